"""Encoders to start with, each of which maps the samples of one modality to features [N, s].

Those of ``basic`` have features that are not negative. ``M3AE``, ``CAVMAEAudio`` and ``CLIP`` are the paper's pretrained ones.
"""

from mla_fast.encoders.basic import MLP, BasicBlock, MeanEmbedding, ResNet18, SequenceCNN, SmallCNN, encoder_for
from mla_fast.encoders.cavmae import CAVMAEAudio
from mla_fast.encoders.clip import CLIP
from mla_fast.encoders.m3ae import M3AE
from mla_fast.encoders.pretrained import load_cavmae, load_m3ae

__all__ = [
    "CAVMAEAudio",
    "CLIP",
    "M3AE",
    "MLP",
    "BasicBlock",
    "MeanEmbedding",
    "ResNet18",
    "SequenceCNN",
    "SmallCNN",
    "encoder_for",
    "load_cavmae",
    "load_m3ae",
]

"""The audio encoder of CAV-MAE: Gong et al., Contrastive audio-visual masked autoencoder, ICLR 2023."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mla_fast.encoders.transformer import Block, initialize, positions_2d
from mla_fast.inputs import describe

PATCH = 16
BINS = 128


class CAVMAEAudio(nn.Module):
    """Map log-mel filter banks [N, frames, 128], or [N, 1, frames, 128], to features [N, width].

    Patches of 16 × 16, frequency first, go through the blocks of the audio branch and the joint one with audio's LayerNorms; the
    features are the mean over all patches after the last LayerNorm. ``datasets.audio.cavmae_fbank`` makes the inputs.

    size: (width, depth, heads), by default those of the released weights, whose depth is 11 blocks of audio and a joint one.

    Raises ValueError for other arguments and inputs.
    """

    def __init__(self, frames: int = 1024, size: tuple[int, int, int] = (768, 12, 12)):
        super().__init__()
        width, depth, heads = size
        if frames < PATCH or frames % PATCH:
            raise ValueError(f"frames: expected a multiple of {PATCH}, got {frames}")
        if width % 4:
            raise ValueError(f"size: expected a width divisible by 4, got {width}")
        self.frames, self.out_features = frames, width
        self.patch_embed = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.pos_embed = nn.Parameter(positions_2d(BINS // PATCH, frames // PATCH, width)[None])
        self.modality = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, 1e-5, "none") for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-5)
        self.apply(initialize)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(width, -1))

    def forward(self, x: Tensor) -> Tensor:
        spectra = x.squeeze(1) if x.dim() == 4 and x.shape[1] == 1 else x
        if spectra.shape[1:] != (self.frames, BINS) or not x.is_floating_point():
            raise ValueError(f"x: expected filter banks, floats [N, {self.frames}, {BINS}], got {describe(x)}")
        h = self.patch_embed(spectra.mT[:, None]).flatten(2).mT  # [N, 8 · frames / 16, width]
        h = h + self.pos_embed + self.modality
        for block in self.blocks:
            h = block(h)
        features: Tensor = self.norm(h).mean(1)
        return features

"""What the accuracy bench compares: every method trained on the same encoders, initial values, batches and budget."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import mla_fast as mla
from bench.accuracy.interaction import CONTROLS, INTERACTIONS
from bench.accuracy.settings import Setting
from mla_fast import data, reference
from mla_fast.baselines import METHODS as ALL_BASELINES
from mla_fast.baselines import MLA_SETTINGS, JointModel, fit_joint, joint_accuracy
from mla_fast.compare.batches import Batches
from mla_fast.data import MultimodalDataset
from mla_fast.encoders import encoder_for
from mla_fast.trainer_checks import step_decay

FEATURES, BATCH, MOMENTUM = 64, 64, 0.9
# The methods of the paper's tables; ``bench.accuracy.balanced`` has all of ``mla_fast.baselines``.
BASELINES = {name: ALL_BASELINES[name] for name in ("Sum", "Concat", "Late fusion", "FiLM", "BiGated", "OGM-GE", "QMF")}
METHODS = (*BASELINES, *CONTROLS, *MLA_SETTINGS, *INTERACTIONS, "MLA official")


def train(method: str, dataset: MultimodalDataset, task: Setting, seed: int) -> JointModel | mla.Trainer:
    """A model trained by one of ``METHODS``, or ValueError."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if len(dataset.modalities) < 2:
        raise ValueError(f"dataset: expected at least two modalities, got {', '.join(dataset.modalities)}")
    if method not in BASELINES and method not in CONTROLS:
        trainer = mla_trainer(method, dataset, task, seed)
        trainer.fit(Batches(dataset, seed, batch_size=BATCH), task.epochs)
        return trainer
    model = {**BASELINES, **CONTROLS}[method](_encoders(dataset, seed), FEATURES, dataset.classes)
    optimizer = new_sgd(model, task)
    batches = Batches(dataset, seed, indexed=True, batch_size=BATCH)
    fit_joint(model, optimizer, batches, task.epochs, scheduler=new_scheduler(optimizer, task))
    return model


def mla_trainer(method: str, dataset: MultimodalDataset, task: Setting, seed: int, **options: Any) -> mla.Trainer:
    """Ready to ``fit`` on ``Batches(dataset, seed)``; options: for the ``MLAOptimizer``, over those of the method."""
    encoders, head = _encoders(dataset, seed), nn.Linear(FEATURES, dataset.classes)
    beside = None
    if method in INTERACTIONS:
        beside = mla.Interaction(FEATURES, dataset.classes, dataset.modalities, gradient=INTERACTIONS[method])
    model = mla.MultimodalModel(encoders, head, interaction=beside)
    options = {**_mla_settings(method, dataset), **options}
    optimizer = mla.MLAOptimizer(new_sgd(model, task), model.head, **options)
    return mla.Trainer(model, optimizer, scheduler=new_scheduler(optimizer, task), progress=False)


def _encoders(dataset: MultimodalDataset, seed: int) -> dict[str, nn.Module]:
    """Drawn first of all, and so the same for every method."""
    torch.manual_seed(seed)
    return {modality: encoder_for(x.shape[1:], FEATURES) for modality, x in dataset.inputs.items()}


def _mla_settings(method: str, dataset: MultimodalDataset) -> dict[str, Any]:
    if method != "MLA official":
        return MLA_SETTINGS["MLA window" if method in INTERACTIONS else method]
    # The released code's α falls within each epoch, so that it depends on the number of batches.
    M, batches = len(dataset.modalities), math.ceil(len(dataset) / BATCH)
    return {"projection": "official", "alpha": lambda step: reference.official_alpha(step // M % batches, batches)}


def new_sgd(model: nn.Module, task: Setting) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=task.lr, momentum=MOMENTUM)


def new_scheduler(optimizer: torch.optim.Optimizer, task: Setting) -> torch.optim.lr_scheduler.MultiStepLR:
    return step_decay(optimizer, task.epochs)


def accuracy(trained: JointModel | mla.Trainer, dataset: MultimodalDataset) -> dict[str, float]:
    """Each modality alone, ``"fused"``, and for MLA the ``"average"`` of the logits; without a modality that no sample has."""
    batches = data.loader(dataset, 1000)
    if isinstance(trained, mla.Trainer):
        found = trained.evaluate(batches)["accuracy"]
    else:
        found = joint_accuracy(trained, batches)
        found["fused"] = found.pop("joint")
    return {name: value for name, value in found.items() if name != "without_interaction" and not math.isnan(value)}

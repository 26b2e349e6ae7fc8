"""Training of one method, epoch by epoch: the same encoders, initial values, batches and passes for all."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mla_fast.baselines import JointModel, Setup, train_epoch
from mla_fast.compare.batches import Batches
from mla_fast.compare.methods import METHODS
from mla_fast.data import MultimodalDataset, loader
from mla_fast.encoders import encoder_for
from mla_fast.interaction import Interaction
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.trainer import Trainer


@dataclass(frozen=True)
class Budget:
    """SGD with momentum for `epochs` passes over each modality; the rate falls to a tenth after 70 % of the epochs."""

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.03
    momentum: float = 0.9
    features: int = 64


class Learner(Protocol):
    """epochs: how often to call ``train_epoch``; passes_before: over each modality, before the first of them."""

    epochs: int
    passes_before: float

    @property
    def model(self) -> nn.Module: ...

    def train_epoch(self, epoch: int) -> None: ...

    def logits(self, inputs: Mapping[str, Tensor], present: Tensor | None) -> Tensor:
        """Return logits [N, C] of the prediction, from one or more modalities, in evaluation mode."""
        ...


class JointLearner:
    """Train a ``JointModel``; what it learns beforehand is learned when this is made."""

    def __init__(
        self, model: JointModel, train: MultimodalDataset, held_out: MultimodalDataset, budget: Budget, seed: int, decay: float
    ):
        self.model, self.budget, self.decay, self.data, self.seed = model, budget, decay, train, seed
        # In orders of their own, so that the training sees the batches that it sees with every other method.
        setup = Setup(
            Batches(train, seed + 10**6, batch_size=budget.batch_size), loader(held_out, 1024), self._fit, budget.epochs
        )
        self.epochs = model.prepare(setup)
        self.passes_before = model.passes_before
        self.optimizer = _sgd(model, budget, decay)
        self.scheduler = _scheduler(self.optimizer, self.epochs)
        self.batches = Batches(train, seed, indexed=True, batch_size=budget.batch_size)

    def _fit(self, model: JointModel, epochs: int) -> None:
        optimizer = _sgd(model, self.budget, self.decay)
        scheduler = _scheduler(optimizer, epochs)
        batches = Batches(self.data, self.seed, indexed=True, batch_size=self.budget.batch_size)
        for epoch in range(epochs):
            train_epoch(model, optimizer, batches, epoch)
            scheduler.step()

    def train_epoch(self, epoch: int) -> None:
        train_epoch(self.model, self.optimizer, self.batches, epoch)
        self.scheduler.step()

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Tensor], present: Tensor | None) -> Tensor:
        self.model.eval()
        logits: Tensor = self.model(inputs, present)
        return logits


class MLALearner:
    """Train by alternating unimodal adaptation; predict by entropy-weighted fusion."""

    passes_before = 0.0

    def __init__(
        self,
        model: MultimodalModel,
        settings: Mapping[str, Any],
        train: MultimodalDataset,
        budget: Budget,
        seed: int,
        decay: float,
    ):
        self.model, self.epochs = model, budget.epochs
        optimizer = MLAOptimizer(_sgd(model, budget, decay), model.head, **settings)
        self.trainer = Trainer(model, optimizer, scheduler=_scheduler(optimizer, budget.epochs), progress=False)
        self.batches = Batches(train, seed, batch_size=budget.batch_size)

    def train_epoch(self, epoch: int) -> None:
        self.trainer.fit(self.batches, epoch + 1)

    def logits(self, inputs: Mapping[str, Tensor], present: Tensor | None) -> Tensor:
        return self.model.predict(inputs, present).logits


def make_learner(
    name: str,
    options: Mapping[str, Any],
    train: MultimodalDataset,
    held_out: MultimodalDataset,
    budget: Budget,
    seed: int,
    device: str = "cpu",
) -> Learner:
    """Return a method ready to be trained; options: of a trial, ``lr_factor`` and ``weight_decay`` among them."""
    own = dict(options)
    budget = dataclasses.replace(budget, lr=budget.lr * own.pop("lr_factor", 1.0))
    decay, method = own.pop("weight_decay", 0.0), METHODS[name]
    torch.manual_seed(seed)  # the encoders are drawn first of all, and so are the same for every method
    encoders = {modality: encoder_for(x.shape[1:], budget.features) for modality, x in train.inputs.items()}
    if method.model is not None:
        make: Callable[..., JointModel] = method.model
        joint = make(encoders, budget.features, train.classes, **own).to(device)
        return JointLearner(joint, train, held_out, budget, seed, decay)
    head, settings = nn.Linear(budget.features, train.classes), {**method.settings, **own}
    gradient = settings.pop("interaction", None)
    beside = None if gradient is None else Interaction(budget.features, train.classes, train.modalities, gradient=gradient)
    model = MultimodalModel(encoders, head, interaction=beside).to(device)
    return MLALearner(model, settings, train, budget, seed, decay)


def snapshot(learner: Learner) -> dict[str, Any]:
    """Return a copy of the model's state."""
    return copy.deepcopy(learner.model.state_dict())


def _sgd(model: nn.Module, budget: Budget, decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=budget.lr, momentum=budget.momentum, weight_decay=decay)


def _scheduler(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.MultiStepLR:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, round(0.7 * epochs))])

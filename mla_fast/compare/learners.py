"""Training of one method, epoch by epoch.

All methods but those for missing modalities have the same encoders, initial values, batches and passes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mla_fast.baselines import JointModel, Setup, train_epoch
from mla_fast.baselines.missing import FittedModel, MissingModel
from mla_fast.compare.batches import Batches
from mla_fast.compare.methods import find
from mla_fast.data import MultimodalDataset, loader
from mla_fast.encoders import MLP, encoder_for
from mla_fast.inputs import to_device
from mla_fast.interaction import Interaction
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.trainer import Trainer
from mla_fast.trainer_checks import step_decay


@dataclass(frozen=True)
class Budget:
    """SGD with momentum for `epochs` passes over each modality; the rate falls to a tenth after 70 % of the epochs.

    hidden: the hidden widths of encoders that are all MLPs of features [N, d]; None: encoders by the shape of the input.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.03
    momentum: float = 0.9
    features: int = 64
    hidden: tuple[int, ...] | None = None


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
    """Train a ``JointModel``; what it learns beforehand is learned when this is made.

    A ``MissingModel`` is trained by its own Adam in place of the budget's SGD; full: the training inputs with nothing masked, for
    those that need them.
    """

    def __init__(
        self,
        model: JointModel,
        train: MultimodalDataset,
        held_out: MultimodalDataset,
        budget: Budget,
        seed: int,
        decay: float,
        full: dict[str, Tensor] | None = None,
    ):
        self.model, self.budget, self.decay, self.data, self.seed = model, budget, decay, train, seed
        self.full = full if isinstance(model, MissingModel) and model.needs_full else None
        # In orders of their own, so that the training sees the batches that it sees with every other method.
        setup = Setup(self._batches(seed + 10**6, indexed=False), loader(held_out, 1024), self._fit, budget.epochs)
        self.epochs = model.prepare(setup)
        self.passes_before = model.passes_before
        self.optimizer, self.scheduler = self._optimizer(model, self.epochs)
        self.batches = self._batches(seed)

    def _batches(self, seed: int, indexed: bool = True) -> Batches:
        return Batches(self.data, seed, indexed=indexed, batch_size=self.budget.batch_size, full=self.full)

    def _optimizer(self, model: JointModel, epochs: int) -> tuple[torch.optim.Optimizer, Any]:
        if isinstance(model, MissingModel):
            return model.optimizer(epochs, self.budget.lr / Budget.lr, self.decay)
        optimizer = _sgd(model, self.budget, self.decay)
        return optimizer, step_decay(optimizer, epochs)

    def _fit(self, model: JointModel, epochs: int) -> None:
        optimizer, scheduler = self._optimizer(model, epochs)
        batches = self._batches(self.seed)
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


class FittedLearner:
    """Train a ``FittedModel`` on the whole training set."""

    passes_before = 0.0

    def __init__(self, model: FittedModel, train: MultimodalDataset, budget: Budget, decay: float):
        self.model = model
        inputs, target, *present = to_device(train[:], next(model.parameters()).device)
        factor = budget.lr / Budget.lr
        self.epochs = model.begin(inputs, target, *present, epochs=budget.epochs, lr_factor=factor, weight_decay=decay)
        self.passes = model.passes

    def train_epoch(self, epoch: int) -> None:
        self.model.train_epoch(epoch)

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Tensor], present: Tensor | None) -> Tensor:
        logits: Tensor = self.model.eval()(inputs, present)
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
        self.trainer = Trainer(model, optimizer, scheduler=step_decay(optimizer, budget.epochs), progress=False)
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
    full: dict[str, Tensor] | None = None,
    encoder: Callable[[str, Sequence[int], int], nn.Module] | None = None,
) -> Learner:
    """Return a method ready to be trained; options: of a trial, ``lr_factor`` and ``weight_decay`` among them.

    encoder: (modality, shape of a sample, width of features) → its encoder, by default that of its shape. full: the training
    inputs with nothing masked, for methods that declare that they need them.
    """
    own = dict(options)
    budget = dataclasses.replace(budget, lr=budget.lr * own.pop("lr_factor", 1.0))
    decay, method = own.pop("weight_decay", 0.0), find(name)
    torch.manual_seed(seed)  # the encoders are drawn first of all, and so are the same for every method
    if method.model is not None and issubclass(method.model, (MissingModel, FittedModel)):
        return _missing_learner(method.model, own, train, held_out, budget, seed, decay, device, full)
    encoders = {modality: _encoder(modality, x.shape[1:], budget, encoder) for modality, x in train.inputs.items()}
    if method.model is not None:
        make: Callable[..., JointModel] = method.model
        joint = make(encoders, budget.features, train.classes, **own).to(device)
        return JointLearner(joint, train, held_out, budget, seed, decay)
    head, settings = nn.Linear(budget.features, train.classes), {**method.settings, **own}
    gradient = settings.pop("interaction", None)
    beside = None if gradient is None else Interaction(budget.features, train.classes, train.modalities, gradient=gradient)
    model = MultimodalModel(encoders, head, interaction=beside).to(device)
    return MLALearner(model, settings, train, budget, seed, decay)


def _encoder(
    modality: str, shape: Sequence[int], budget: Budget, make: Callable[[str, Sequence[int], int], nn.Module] | None
) -> nn.Module:
    if budget.hidden is not None:
        return MLP(shape[0], budget.features, budget.hidden)
    return encoder_for(shape, budget.features) if make is None else make(modality, shape, budget.features)


def _missing_learner(
    model: type[MissingModel] | type[FittedModel],
    options: Mapping[str, Any],
    train: MultimodalDataset,
    held_out: MultimodalDataset,
    budget: Budget,
    seed: int,
    decay: float,
    device: str,
    full: dict[str, Tensor] | None,
) -> Learner:
    widths = {modality: x.shape[1] for modality, x in train.inputs.items()}
    made = model(widths, train.classes, **options).to(device)
    if isinstance(made, FittedModel):
        return FittedLearner(made, train, budget, decay)
    return JointLearner(made, train, held_out, budget, seed, decay, full)


def snapshot(learner: Learner) -> dict[str, Any]:
    """Return a copy of the model's state."""
    return copy.deepcopy(learner.model.state_dict())


def _sgd(model: nn.Module, budget: Budget, decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=budget.lr, momentum=budget.momentum, weight_decay=decay)

"""The model that every method of this package is, and the five hooks by which the methods differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.inputs import to_device
from mla_fast.modality_dict import ModalityDict


class Setup(NamedTuple):
    """What a method may use before and beside its training.

    train, held_out: re-iterable batches ``(inputs, target, …)``, in an order that the training itself does not depend on.
    fit: (model, epochs) → trains a model under the budget of all methods, with an optimizer and a schedule of its own.
    epochs: passes over each modality that the training may take.
    """

    train: Iterable[Sequence[Any]]
    held_out: Iterable[Sequence[Any]]
    fit: Callable[[JointModel, int], Any]
    epochs: int


class JointModel(nn.Module):
    """Train encoders jointly; subclasses define in ``fuse`` how logits are computed from all features.

    encoders: {modality: module that returns features [N, s]}.
    features: s, the same for every modality.

    A modality that is left out of the inputs, or is absent according to `present`, has features of zero and does not train its
    encoder. Each modality can therefore be evaluated alone, and the data may lack modalities.

    A method overrides up to five hooks, called in this order: ``prepare`` once, and in each epoch ``begin_epoch``, for each batch
    ``loss`` and ``gradients``, and ``end_epoch``.

    grid: the values of the constructor's options that a search tries, the default first.
    scales_gradients: whether the method multiplies gradients, which an optimizer that normalises them undoes.
    passes_before: passes over each modality that ``prepare`` took.
    defined_for: the number of modalities, None for any.

    Raises ValueError without encoders, for unknown modalities and for features of another shape.
    """

    grid: ClassVar[Mapping[str, Sequence[Any]]] = {}
    scales_gradients: ClassVar[bool] = False
    passes_before = 0.0
    defined_for: ClassVar[int | None] = None

    def __init__(self, encoders: Mapping[str, nn.Module], features: int):
        super().__init__()
        self.encoders = ModalityDict(encoders)
        self.features = features

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, in the order of the columns of ``present``."""
        return tuple(self.encoders)

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Return logits [N, C] from one or more of the modalities; present is bool [N, M] over ``self.modalities``."""
        return self.fuse(*self.embed(inputs, present))

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        """Return logits [N, C] from features h [M, N, s]; available, bool [M, N], says which are present, the others are zero."""
        raise NotImplementedError

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Return the loss; index [N] are the samples' places in the training set, for methods that remember samples."""
        return F.cross_entropy(self(inputs, present), target)

    def prepare(self, setup: Setup) -> int:
        """Learn what is needed beforehand; return the number of epochs that make ``setup.epochs`` passes over each modality."""
        return setup.epochs

    def begin_epoch(self, epoch: int) -> None:
        """Prepare an epoch, counted from 0."""

    def end_epoch(self, epoch: int) -> None:
        """Finish an epoch, counted from 0."""

    def gradients(self, loss: Tensor) -> None:
        """Compute the gradients of all parameters, of which some may be None."""
        loss.backward()

    def embed(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (features [M, N, s], available bool [M, N]) for ``fuse``; absent rows of the inputs may hold anything."""
        unknown = [modality for modality in inputs if modality not in self.encoders]
        if unknown or not inputs:
            raise ValueError(f"inputs: expected modalities among {', '.join(self.modalities)}, got {', '.join(inputs) or 'none'}")
        check_present(present, len(next(iter(inputs.values()))), len(self.modalities))
        rows = {} if present is None else dict(zip(self.modalities, present.T, strict=True))
        features = {modality: self._encode(modality, x, rows.get(modality)) for modality, x in inputs.items()}
        zeros = torch.zeros_like(next(iter(features.values())))
        available = torch.stack([zeros.new_full((len(zeros),), m in inputs, dtype=torch.bool) for m in self.modalities])
        available = available if present is None else available & present.T
        return torch.stack([features.get(modality, zeros) for modality in self.modalities]), available

    def _encode(self, modality: str, x: Tensor, available: Tensor | None) -> Tensor:
        """Return features [N, s]; with available, bool [N], encode these rows alone and return zeros for the others."""
        h: Tensor = self.encoders[modality](x if available is None else x[available])
        if h.dim() != 2 or h.shape[1] != self.features:
            raise ValueError(f"features: expected [N, {self.features}] from the encoder of {modality!r}, got {list(h.shape)}")
        return h if available is None else h.new_zeros(len(x), self.features).index_put((available,), h)


def check_present(present: Tensor | None, N: int, M: int) -> None:
    """Raise ValueError for a mask that is not bool [N, M]."""
    if present is not None and (present.dtype != torch.bool or present.shape != (N, M)):
        raise ValueError(f"present: expected bool [{N}, {M}], got {present.dtype} {list(present.shape)}")


def on_device(model: nn.Module, loader: Iterable[Sequence[Any]]) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor | None]]:
    """Yield (inputs, target, present or None) of each batch where the model is."""
    device = next(model.parameters()).device
    for batch in loader:
        inputs, target, *more = to_device(batch, device)
        yield inputs, target, more[0] if more else None


def unimodal_losses(logits: Tensor, available: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of each modality [M], the mean over the samples that have it, 0 without any.

    logits: [M, N, C]; available: bool [M, N]; target: [N].
    """
    losses = F.cross_entropy(logits.transpose(1, 2), target.expand(len(logits), -1), reduction="none")
    return _mean(losses, available)


def mean_probability(logits: Tensor, available: Tensor, target: Tensor) -> Tensor:
    """Return s [M], the mean probability of the right class by each modality, of arguments as for ``unimodal_losses``."""
    right = logits.softmax(-1)[:, torch.arange(len(target), device=target.device), target]  # [M, N]
    return _mean(right, available)


def scale_gradients(modules: Iterable[nn.Module], factors: Tensor) -> None:
    """Multiply the gradients of each module's parameters by its factor."""
    for module, factor in zip(modules, factors, strict=True):
        for p in module.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)


def _mean(values: Tensor, available: Tensor) -> Tensor:
    return (values * available).sum(1) / available.sum(1).clamp_min(1)

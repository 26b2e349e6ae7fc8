"""Joint training, to compare with: all modalities in every step, fused before or in the head; and MLA's settings to compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# What is compared wherever methods are: the name and what MLAOptimizer is told.
MLA_SETTINGS: dict[str, dict[str, Any]] = {
    "MLA rls": {"projection": "rls"},
    "MLA window": {"projection": "window", "target": "update"},
    "MLA none": {"projection": "none"},
}


class JointModel(nn.Module):
    """Encoders trained together: subclasses say what becomes of their features.

    encoders: modality → module giving features [N, s], with s = `features` for each.

    A modality that is left out of the inputs, or absent by `present`, counts as features of zero and teaches its encoder nothing.
    So the others can be looked at alone, and data with missing modalities be trained on.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int):
        super().__init__()
        if not encoders:
            raise ValueError("encoders: expected at least one modality, got none")
        self.encoders = nn.ModuleDict(encoders)
        self.features = features

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.encoders)

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Logits [N, C] from one or more of the modalities; present: bool [N, M] over ``self.modalities``."""
        return self.fuse(*self.embed(inputs, present))

    def fuse(self, h: Tensor, here: Tensor) -> Tensor:
        """Logits [N, C] from the features h [M, N, s]; here bool [M, N]: which of them there are, the others being zero."""
        raise NotImplementedError

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """What is minimised; index [N]: which samples of the training set these are, for methods that remember them."""
        return F.cross_entropy(self(inputs, present), target)

    def adjust_gradients(self) -> None:
        """Called between the backward pass and the optimizer's step."""

    def embed(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(features [M, N, s], here bool [M, N]); what absent entries of the inputs hold does not matter."""
        unknown = [modality for modality in inputs if modality not in self.encoders]
        if unknown or not inputs:
            raise ValueError(f"inputs: expected modalities among {', '.join(self.modalities)}, got {', '.join(inputs) or 'none'}")
        rows = {} if present is None else dict(zip(self.modalities, present.T, strict=True))
        features = {modality: self._encode(modality, x, rows.get(modality)) for modality, x in inputs.items()}
        zeros = torch.zeros_like(next(iter(features.values())))
        here = torch.stack([zeros.new_full((len(zeros),), m in inputs, dtype=torch.bool) for m in self.modalities])
        here = here if present is None else here & present.T
        return torch.stack([features.get(modality, zeros) for modality in self.modalities]), here

    def _encode(self, modality: str, x: Tensor, here: Tensor | None) -> Tensor:
        """Features [N, s]; with here [N] of these rows alone, and zeros for the others."""
        h = self.encoders[modality](x if here is None else x[here])
        if h.dim() != 2 or h.shape[1] != self.features:
            raise ValueError(f"features: expected [N, {self.features}] from the encoder of {modality!r}, got {list(h.shape)}")
        return h if here is None else h.new_zeros(len(x), self.features).index_put((here,), h)


class Sum(JointModel):
    """One linear head on the sum of the modalities' features: z = W Σ_m h_m + b.

    A modality alone goes through the same head. The head is linear, so that these logits are its share in the joint ones.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.head = nn.Linear(features, classes)

    def fuse(self, h: Tensor, here: Tensor) -> Tensor:
        return self.head(h.sum(0))


class Concat(JointModel):
    """One linear head on the modalities' features side by side: z = Σ_m W_m h_m + b.

    A modality alone goes through its columns W_m of the head, the sub-head.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.head = nn.Linear(features * len(encoders), classes)

    def fuse(self, h: Tensor, here: Tensor) -> Tensor:
        return self.head(h.transpose(0, 1).flatten(1))


def fit_joint(
    model: JointModel,
    optimizer: torch.optim.Optimizer,
    loader: Iterable,
    epochs: int,
    *,
    scheduler: Any = None,
    progress: bool = False,
) -> list[float]:
    """Trains on ``model.loss``; returns its mean over each epoch. The scheduler steps once an epoch.

    loader: of batches ``(inputs, target)``, with ``present`` and ``index`` after them if ``model.loss`` is to have these.
    """
    device = next(model.parameters()).device
    model.train()
    history = []
    for _ in tqdm(range(epochs), desc="joint", leave=False, disable=None if progress else True):
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            loss = model.loss(*_to(batch, device))
            loss.backward()
            model.adjust_gradients()
            optimizer.step()
            losses.append(loss.detach())
        if not losses:
            raise ValueError("loader: expected at least one batch, got none")
        history.append(torch.stack(losses).mean().item())
        if scheduler is not None:
            scheduler.step()
    return history


@torch.no_grad()
def joint_accuracy(model: JointModel, loader: Iterable) -> dict[str, float]:
    """Share of right predictions: of each modality alone, on the samples that have it, and ``"joint"``. In evaluation mode."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    correct, samples = dict.fromkeys((*model.modalities, "joint"), 0), dict.fromkeys((*model.modalities, "joint"), 0)
    for batch in loader:
        inputs, target, present, *_ = (*_to(batch, device), None)
        parts = {"joint": (inputs, target, present)}
        for m, modality in enumerate(model.modalities):
            rows = slice(None) if present is None else present[:, m]
            parts[modality] = ({modality: inputs[modality][rows]}, target[rows], None)
        for name, (x, y, mask) in parts.items():
            correct[name] += (model(x, mask).argmax(1) == y).sum()
            samples[name] += len(y)
    model.train(training)
    return {name: float(right) / samples[name] if samples[name] else float("nan") for name, right in correct.items()}


def _to(batch: Any, device: torch.device) -> Any:
    """A batch on the device, whatever dictionaries and tuples hold its tensors."""
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_to(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch

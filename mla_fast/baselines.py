"""Joint training to compare MLA with: every step trains all modalities, fused before or in the head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mla_fast.inputs import to_device
from mla_fast.modality_dict import ModalityDict

# The settings of MLAOptimizer that every comparison of methods includes, by the name of the method.
MLA_SETTINGS: dict[str, dict[str, Any]] = {
    "MLA rls": {"projection": "rls"},
    "MLA window": {"projection": "window", "target": "update"},
    "MLA none": {"projection": "none"},
}


class JointModel(nn.Module):
    """Train encoders jointly; subclasses define in ``fuse`` how logits are computed from all features.

    encoders: {modality: module that returns features [N, s]}.
    features: s, the same for every modality.

    A modality that is left out of the inputs, or is absent according to `present`, has features of zero and does not train its
    encoder. Each modality can therefore be evaluated alone, and the data may lack modalities.

    Raises ValueError without encoders, for unknown modalities and for features of another shape.
    """

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

    def adjust_gradients(self) -> None:
        """Change the gradients; called between the backward pass and the optimizer's step."""

    def embed(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (features [M, N, s], available bool [M, N]) for ``fuse``; absent rows of the inputs may hold anything."""
        unknown = [modality for modality in inputs if modality not in self.encoders]
        if unknown or not inputs:
            raise ValueError(f"inputs: expected modalities among {', '.join(self.modalities)}, got {', '.join(inputs) or 'none'}")
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


class Sum(JointModel):
    """Apply one linear head to the sum of the modalities' features: z = W Σ_m h_m + b.

    A modality alone uses the same head. As the head is linear, these logits are the modality's share of the joint logits.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.head = nn.Linear(features, classes)

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        logits: Tensor = self.head(h.sum(0))
        return logits


class Concat(JointModel):
    """Apply one linear head to the concatenated features of the modalities: z = Σ_m W_m h_m + b.

    A modality alone uses its columns W_m of the head.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.head = nn.Linear(features * len(encoders), classes)

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        logits: Tensor = self.head(h.transpose(0, 1).flatten(1))
        return logits


def fit_joint(
    model: JointModel,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Sequence[Any]],
    epochs: int,
    *,
    scheduler: Any = None,
    progress: bool = False,
) -> list[float]:
    """Minimise ``model.loss`` and return its mean over each epoch.

    loader: batches ``(inputs, target)``, ``(inputs, target, present)`` or ``(inputs, target, present, index)``, the arguments of
        ``model.loss``.
    scheduler: steps once an epoch.
    progress: show a progress bar, if the output is a terminal.

    Raises ValueError for an epoch without batches.
    """
    device = next(model.parameters()).device
    model.train()
    history = []
    for _ in tqdm(range(epochs), desc="joint", leave=False, disable=None if progress else True):
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            loss = model.loss(*to_device(batch, device))
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
def joint_accuracy(model: JointModel, loader: Iterable[Sequence[Any]]) -> dict[str, float]:
    """Return the accuracy of each modality alone, on the samples that have it, and of all as ``"joint"``, in evaluation mode.

    A modality that no sample has gets NaN.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    correct, samples = dict.fromkeys((*model.modalities, "joint"), 0), dict.fromkeys((*model.modalities, "joint"), 0)
    for batch in loader:
        inputs, target, *more = to_device(batch, device)
        present = more[0] if more else None
        parts: dict[str, tuple[dict[str, Tensor], Tensor, Tensor | None]] = {"joint": (inputs, target, present)}
        for m, modality in enumerate(model.modalities):
            rows = slice(None) if present is None else present[:, m]
            parts[modality] = ({modality: inputs[modality][rows]}, target[rows], None)
        for name, (x, y, mask) in parts.items():
            correct[name] += (model(x, mask).argmax(1) == y).sum()
            samples[name] += len(y)
    model.train(training)
    return {name: float(right) / samples[name] if samples[name] else float("nan") for name, right in correct.items()}

"""Joint training, to compare with: all modalities in every step, fused before or in the head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

FUSIONS = ("sum", "concat")


class JointModel(nn.Module):
    """Late fusion trained jointly: one linear head on the sum of the modalities' features, or on their concatenation.

    encoders: modality → module giving features [N, s], with s = `features` for each.

    A modality that is left out of the inputs counts as features of zero, so that the others can be looked at alone. As the
    head is linear, the logits are then the share that the others have in the joint ones (plus the bias).
    """

    def __init__(self, encoders: Mapping[str, nn.Module], classes: int, features: int, fusion: str = "sum"):
        super().__init__()
        if not encoders:
            raise ValueError("encoders: expected at least one modality, got none")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion: expected one of {', '.join(FUSIONS)}, got {fusion!r}")
        self.encoders = nn.ModuleDict(encoders)
        self.features, self.fusion = features, fusion
        self.head = nn.Linear(features * (len(encoders) if fusion == "concat" else 1), classes)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.encoders)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits [N, C] from one or more of the modalities."""
        unknown = [modality for modality in inputs if modality not in self.encoders]
        if unknown or not inputs:
            raise ValueError(f"inputs: expected modalities among {', '.join(self.modalities)}, got {', '.join(inputs) or 'none'}")
        features = {modality: self.encoders[modality](x) for modality, x in inputs.items()}
        for modality, h in features.items():
            if h.dim() != 2 or h.shape[1] != self.features:
                raise ValueError(f"features: expected [N, {self.features}] from the encoder of {modality!r}, got {list(h.shape)}")
        if self.fusion == "sum":
            return self.head(sum(features.values()))
        zeros = torch.zeros_like(next(iter(features.values())))
        return self.head(torch.cat([features.get(modality, zeros) for modality in self.modalities], 1))


def fit_joint(
    model: JointModel,
    optimizer: torch.optim.Optimizer,
    loader: Iterable,
    epochs: int,
    *,
    scheduler: Any = None,
    progress: bool = False,
) -> list[float]:
    """Trains on the cross-entropy of the joint logits; returns the mean loss of each epoch. The scheduler steps once an epoch."""
    device = next(model.parameters()).device
    model.train()
    history = []
    for _ in tqdm(range(epochs), desc="joint", leave=False, disable=None if progress else True):
        losses = []
        for inputs, target in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(_to(inputs, device)), target.to(device))
            loss.backward()
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
    """Share of right predictions: of each modality alone (the others zero), and ``"joint"``. In evaluation mode."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    correct, samples = dict.fromkeys((*model.modalities, "joint"), 0), 0
    for inputs, target in loader:
        inputs, target = _to(inputs, device), target.to(device)
        seen = {modality: {modality: inputs[modality]} for modality in model.modalities} | {"joint": inputs}
        for name, part in seen.items():
            correct[name] += (model(part).argmax(1) == target).sum()
        samples += len(target)
    model.train(training)
    return {name: float(right) / samples if samples else float("nan") for name, right in correct.items()}


def _to(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {modality: x.to(device) for modality, x in inputs.items()}

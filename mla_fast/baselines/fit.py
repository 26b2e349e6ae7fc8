"""Training and accuracy of joint models."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mla_fast.baselines.joint import JointModel, on_device
from mla_fast.inputs import to_device
from mla_fast.parts import begin_training, evaluating

NORMALISING = tuple(getattr(torch.optim, name) for name in ("Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad"))


def train_epoch(model: JointModel, optimizer: torch.optim.Optimizer, loader: Iterable[Sequence[Any]], epoch: int) -> float:
    """Train on the batches of `loader`, call the hooks of an epoch, and return the mean loss; ``fit_joint`` has the details."""
    device = next(model.parameters()).device
    begin_training(model)
    model.begin_epoch(epoch)
    losses = []
    for batch in loader:
        optimizer.zero_grad()
        loss = model.loss(*to_device(batch, device))
        model.gradients(loss)
        optimizer.step()
        losses.append(loss.detach())
    if not losses:
        raise ValueError("loader: expected at least one batch, got none")
    model.end_epoch(epoch)
    return torch.stack(losses).mean().item()


def warn_of_normalising(model: JointModel, optimizer: torch.optim.Optimizer) -> None:
    """Warn where a method scales gradients and the optimizer divides them by their own size."""
    if model.scales_gradients and isinstance(optimizer, NORMALISING):
        name, kind = type(model).__name__, type(optimizer).__name__
        message = f"optimizer: {name} scales gradients, which {kind} nearly cancels; use SGD, with momentum or without"
        warnings.warn(message, stacklevel=3)


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

    A method that learns something beforehand needs ``model.prepare`` first, which also says how many epochs to train.
    Warns if the method scales gradients and the optimizer is of Adam's kind. Raises ValueError for an epoch without batches.
    """
    warn_of_normalising(model, optimizer)
    history = []
    for epoch in tqdm(range(epochs), desc="joint", leave=False, disable=None if progress else True):
        history.append(train_epoch(model, optimizer, loader, epoch))
        if scheduler is not None:
            scheduler.step()
    return history


@torch.no_grad()
def joint_accuracy(model: JointModel, loader: Iterable[Sequence[Any]]) -> dict[str, float]:
    """Return the accuracy of each modality alone, on the samples that have it, and of all as ``"joint"``, in evaluation mode.

    A modality that no sample has gets NaN.
    """
    correct, samples = dict.fromkeys((*model.modalities, "joint"), 0), dict.fromkeys((*model.modalities, "joint"), 0)
    with evaluating(model):
        for inputs, target, present in on_device(model, loader):
            parts: dict[str, tuple[dict[str, Tensor], Tensor, Tensor | None]] = {"joint": (inputs, target, present)}
            for m, modality in enumerate(model.modalities):
                if modality in inputs:
                    rows = slice(None) if present is None else present[:, m]
                    parts[modality] = ({modality: inputs[modality][rows]}, target[rows], None)
            for name, (x, y, mask) in parts.items():
                correct[name] += (model(x, mask).argmax(1) == y).sum()
                samples[name] += len(y)
    return {name: float(right) / samples[name] if samples[name] else float("nan") for name, right in correct.items()}

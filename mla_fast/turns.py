"""One modality's step after another, each with a backward pass of its own (eq. 1): for what cannot be taken together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mla_fast import head_loss
from mla_fast.batch import Rows
from mla_fast.inputs import Inputs
from mla_fast.loss import Loss, mean_loss, record_seen
from mla_fast.model import LoneRowError, MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.pull import pull_of
from mla_fast.step import autocast, can_step_together, features_of, leave_out, plain_layer
from mla_fast.trained import look_at_encoder
from mla_fast.wrapped import parameters_of


def steps_in_turn(
    model: MultimodalModel,
    optimizer: MLAOptimizer,
    batches: Sequence[Mapping[str, Rows]],
    totals: Mapping[str, float],
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_norm: float | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Take one step of each modality after another (eq. 1), each over its rows of all `batches`; returns the mean losses."""
    if backward is None:
        backward = torch.autograd.backward if scaler is None else (lambda loss: torch.autograd.backward(scaler.scale(loss)))
    losses: dict[str, Tensor] = {}
    optimizer.watch.alternates()
    optimizer.zero_grad()
    together = _Together(model, optimizer, batches, totals, amp, loss) if model.interaction is not None else None
    for modality, total in totals.items():
        optimizer.zero_grad()
        if together is not None:
            found: Tensor | None = together.backward(modality, total, backward)
        else:
            parts = [rows[modality] for rows in batches if modality in rows]
            found = _backward(model, optimizer, modality, parts, total, amp, backward, loss)
        if found is not None:
            losses[modality] = found
            look_at_encoder(model, optimizer, modality)
            _step(optimizer, modality, scaler, clip_norm)
            for rows in batches:
                if modality in rows:
                    record_seen(model, modality, rows[modality].target, None, loss)
    if together is not None:
        together.step_interaction(clip_norm)
    return losses


def _backward(
    model: MultimodalModel,
    optimizer: MLAOptimizer,
    modality: str,
    parts: list[Rows],
    total: float,
    amp: torch.dtype | None,
    backward: Callable[[Tensor], Any],
    loss: Loss | None,
) -> Tensor | None:
    """Accumulate the gradients of a modality's rows; returns their mean loss, or None where there are none to train on."""
    if optimizer.process_group is None:
        parts = [part for part in parts if len(part.target)]
    sum_of_losses: Tensor | None = None
    left_out = 0
    for i, (x, y, _) in enumerate(parts):
        try:
            with _unsynchronized(model, modality) if i < len(parts) - 1 else contextlib.nullcontext():
                with autocast(optimizer, amp):
                    found = _loss(model, optimizer, modality, x, y, total, loss)
                backward(found)
        except LoneRowError as error:
            leave_out(optimizer, error)
            left_out += 1
            continue
        sum_of_losses = found.detach() if sum_of_losses is None else sum_of_losses + found.detach()
    if sum_of_losses is not None and left_out:  # the mean is over the others
        share = total / (total - left_out)
        for p in _with_gradient(optimizer):
            assert p.grad is not None
            p.grad.mul_(share)
        sum_of_losses = sum_of_losses * share
    return sum_of_losses


def _loss(
    model: MultimodalModel,
    optimizer: MLAOptimizer,
    modality: str,
    inputs: Inputs,
    target: Tensor,
    total: float,
    loss: Loss | None,
) -> Tensor:
    """Return these rows' share of the mean loss (eq. 2), of many logits without their being in memory whole."""
    layer = plain_layer(model, optimizer, loss)
    if layer is None or layer.sharded or not head_loss.is_large(layer, total) or not can_step_together(model):
        return mean_loss(model({modality: inputs})[modality], target, total, loss=loss)
    return head_loss.loss(layer, model.features(modality, inputs), target, total)


def _step(optimizer: MLAOptimizer, modality: str, scaler: torch.amp.GradScaler | None, clip_norm: float | None) -> None:
    if clip_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        _clip(optimizer, clip_norm)
    if scaler is None:
        optimizer.step(modality=modality)
    else:
        scaler.step(optimizer, modality=modality)
        scaler.update()


def _clip(optimizer: MLAOptimizer, norm: float) -> None:
    torch.nn.utils.clip_grad_norm_(_with_gradient(optimizer), norm)


def _with_gradient(optimizer: MLAOptimizer) -> list[Tensor]:
    return [p for p in parameters_of(optimizer) if p.grad is not None]


class _Together:
    """Features of all modalities of some batches, kept until each one's turn has come, and how an interaction pulls at them."""

    def __init__(
        self,
        model: MultimodalModel,
        optimizer: MLAOptimizer,
        batches: Sequence[Mapping[str, Rows]],
        totals: Mapping[str, float],
        amp: torch.dtype | None,
        loss: Loss | None,
    ):
        self.model, self.optimizer, self.batches, self.amp, self.loss = model, optimizer, batches, amp, loss
        alone = optimizer.process_group is None  # or others wait for a rank that has no rows
        taken = [{m: rows[m] for m in totals if m in rows and (len(rows[m].target) or not alone)} for rows in batches]
        with autocast(optimizer, amp):
            self.features = [features_of(model, optimizer, rows) for rows in taken]
            self.pull = pull_of(model, optimizer, self.features, batches, loss)
        self.left_out = {m: sum(m in rows and m not in h for rows, h in zip(taken, self.features, strict=True)) for m in totals}

    def backward(self, modality: str, total: float, backward: Callable[[Tensor], Any]) -> Tensor | None:
        """Differentiate L_m + Σ ⟨h, ∂L_r/∂h⟩ over all batches, in one pass; returns L_m, or None without rows."""
        losses, pulls = [], []
        for i, (features, rows) in enumerate(zip(self.features, self.batches, strict=True)):
            if modality in features:
                h, asked = features[modality], None if self.pull is None else self.pull.at(i, modality)
                try:
                    with autocast(self.optimizer, self.amp):
                        logits = self.model.logits(modality, h)
                        over = total - self.left_out[modality]
                        losses.append(mean_loss(logits, rows[modality].target, over, loss=self.loss))
                except LoneRowError as error:
                    leave_out(self.optimizer, error)
                    continue
                if asked is not None:
                    pulls.append((h.to(asked.dtype) * asked).sum())
        if not losses:
            return None
        loss = torch.stack(losses).sum()
        backward(loss + sum(pulls))
        return loss.detach()

    def step_interaction(self, clip_norm: float | None) -> None:
        """Take the interaction's own step, whose gradient was never scaled."""
        if self.pull is not None:
            self.optimizer.zero_grad()
            self.pull.restore()
            if clip_norm is not None:
                _clip(self.optimizer, clip_norm)
            self.optimizer.step()


@contextlib.contextmanager
def _unsynchronized(model: MultimodalModel, modality: str) -> Iterator[None]:
    """Gradients stay on this rank, to be averaged together with those of a later batch."""
    with contextlib.ExitStack() as stack:
        for part in (model.encoders[modality], model.head):
            if isinstance(part, DistributedDataParallel):
                stack.enter_context(part.no_sync())
        yield

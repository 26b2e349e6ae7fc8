"""One batch of alternating unimodal adaptation (eq. 1): every modality takes one step, on the samples that have it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mla_fast.distributed import added_up, rank_and_size
from mla_fast.head import HeadLayer
from mla_fast.inputs import Inputs, counts, moved, outline
from mla_fast.model import MultimodalModel
from mla_fast.ops.dispatch import dispatch
from mla_fast.optimizer import MLAOptimizer


class Rows(NamedTuple):
    """What one modality has in a batch: inputs [n, …] and target int64 [n], and where not all rows count alike, weights [n] whose
    sum is 1."""

    inputs: Inputs
    target: Tensor
    weights: Tensor | None = None


def alternating_step(
    model: MultimodalModel, optimizer: MLAOptimizer, batch: tuple, *, amp: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Trains on one batch: every modality takes one step, as if one after another, but all encoders in one backward pass.

        features of all modalities;  for each modality in turn: logits, loss, the head's step;  one backward pass through all
        encoders from ∂L_m/∂features_m;  one step of all encoders (and of the head, the last modality's)

    This is step by step in another order, not an approximation: the step of one modality moves its own encoder and the head, so
    no features change under the others. It needs encoders that share no parameter (ValueError), a wrapped optimizer that steps
    every parameter by itself (torch's own do; one that counts its steps as a whole counts M, on CUDA M + 1), and room for what
    all encoders want for their backward pass at once, as joint training does. Hooks of ``optimizer.step`` run once, at the end.

    model, optimizer: a ``MultimodalModel`` and the ``MLAOptimizer`` with its head. batch: ``(inputs, target)`` or ``(inputs,
    target, present)`` as for ``Trainer``, on the model's device. amp: dtype for autocast, bfloat16; float16 overflows without a
    ``GradScaler``, which wants ``Trainer``'s step by step.

    Returns the mean loss {modality: 0-d tensor} of those that had a row; over ranks, the mean of the ranks' is the mean of all.
    A modality whose features or head gradient are not finite takes no step. On CUDA, where nobody waits to see it, its head takes
    none, nor, with a fused wrapped optimizer, does any encoder. Labels that lie on a GPU are not looked at beforehand: one that
    names no class makes the loss NaN.
    """
    check_belong(model, optimizer)
    if not can_step_together(model):
        raise ValueError(
            "model: expected encoders and a head that share no parameter, and MultimodalModel's own forward; "
            "Trainer takes them one after another, which is right"
        )
    inputs, target, present = unpack_batch(model, batch)
    if target.device != optimizer.device:
        raise ValueError(f"target: expected on {optimizer.device} like the head, got {target.device}")
    rows = rows_by_modality(model, inputs, target, present)
    totals = row_totals(model, optimizer, [rows])
    return steps_together(model, optimizer, rows, totals, amp)


def steps_together(
    model: MultimodalModel,
    optimizer: MLAOptimizer,
    rows: dict[str, Rows],
    totals: dict[str, float],
    amp: torch.dtype | None,
) -> dict[str, Tensor]:
    """``alternating_step`` on rows and totals that are there already."""
    optimizer.zero_grad()
    with autocast(optimizer, amp):
        features = model.all_features({modality: rows[modality].inputs for modality in totals})
    automatic = amp is not None or torch.is_autocast_enabled(optimizer.device.type)
    plain = None if automatic else _plain_layer(model.head, optimizer)
    held = list(model.head.parameters())
    losses, outputs, gradients, bad_steps = {}, [], [], []
    with torch.no_grad():
        for modality, total in totals.items():
            h, target, step, weights = features[modality], rows[modality].target, None, rows[modality].weights
            if plain is not None and h.dtype == plain.dtype and weights is None:
                losses[modality], gradient, step = plain.backward(h.detach(), target, total)
            else:
                with _weighted(optimizer, weights):
                    casting = autocast(optimizer, amp)
                    losses[modality], gradient = _head_backward(model.head, h.detach(), target, total, weights, casting)
            measured = optimizer.measure(modality, step)
            bad = measured.empty or measured.bad
            if bad is not True and h.requires_grad:
                outputs.append(h)
                gradients.append(gradient)
            bad_steps.append(bad)
            if len(losses) < len(totals) or bad is not False:  # the last one's head moves in the encoders' step
                optimizer.take_step(modality)
                for p in held:
                    p.grad = None
            else:
                optimizer.project_measured()
    try:
        if outputs:
            torch.autograd.backward(outputs, gradients)
        if losses:
            _encoder_step(optimizer, [bad for bad in bad_steps if isinstance(bad, Tensor)])
    except BaseException:
        optimizer.zero_grad()  # what was measured of this batch is not for another step to take
        raise
    return losses


def _plain_layer(head: nn.Module, optimizer: MLAOptimizer) -> HeadLayer | None:
    """The head's layer where it is an ``nn.Linear`` that nobody watches but the optimizer, so that autograd can be spared."""
    layer = optimizer.layers[0]
    own = type(head) is nn.Linear and "forward" not in head.__dict__ and layer.module is head
    if not own or layer.dtype != head.weight.dtype or layer.sharded or optimizer.process_group is not None:
        return None
    if not head.weight.is_contiguous():  # its gradient must lie in memory as it does, or a fused step goes wrong
        return None
    hooks = len(head._forward_hooks) + len(head._forward_pre_hooks) > 2 or head._backward_hooks or head._backward_pre_hooks
    return None if hooks or _watched(head.weight) or (head.bias is not None and _watched(head.bias)) else layer


def _watched(p: Tensor) -> bool:
    """Frozen, or with hooks of its gradient."""
    return bool(not p.requires_grad or p._backward_hooks or p._post_accumulate_grad_hooks)


def steps_in_turn(
    model: MultimodalModel,
    optimizer: MLAOptimizer,
    batches: list[dict[str, Rows]],
    totals: dict[str, float],
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_norm: float | None = None,
    backward: Callable[[Tensor], Any] | None = None,
) -> dict[str, Tensor]:
    """One step of each modality after another (eq. 1), each over that modality's rows of all `batches`; the mean losses."""
    losses = {}
    for modality, total in totals.items():
        optimizer.zero_grad()
        parts = [rows[modality] for rows in batches if modality in rows]
        if optimizer.process_group is None:
            parts = [part for part in parts if len(part.target)]
        for i, (x, y, _) in enumerate(parts):
            with _unsynchronized(model, modality) if i < len(parts) - 1 else contextlib.nullcontext():
                with autocast(optimizer, amp):
                    loss = mean_loss(model({modality: x})[modality], y, total)
                if backward is not None:
                    backward(loss)
                else:
                    (loss if scaler is None else scaler.scale(loss)).backward()
            losses[modality] = losses.get(modality, 0) + loss.detach()
        if clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            held = (p for group in optimizer.param_groups for p in group["params"])
            torch.nn.utils.clip_grad_norm_([p for p in held if p.grad is not None], clip_norm)
        if scaler is None:
            optimizer.step(modality=modality)
        else:
            scaler.step(optimizer, modality=modality)
            scaler.update()
    return losses


@contextlib.contextmanager
def _unsynchronized(model: MultimodalModel, modality: str) -> Iterator[None]:
    """Gradients stay on this rank, to be averaged together with those of a later batch."""
    with contextlib.ExitStack() as stack:
        for part in (model.encoders[modality], model.head):
            if isinstance(part, DistributedDataParallel):
                stack.enter_context(part.no_sync())
        yield


@torch.enable_grad()
def _head_backward(
    head: nn.Module,
    features: Tensor,
    target: Tensor,
    total: float,
    weights: Tensor | None,
    casting: contextlib.AbstractContextManager,
) -> tuple[Tensor, Tensor]:
    """(loss, ∂L/∂features), the head's gradients left in ``.grad``; the forward pass within `casting`."""
    features.requires_grad_()
    with casting:
        loss = mean_loss(head(features.clone()), target, total, weights)  # a head may change its inputs in place
    loss.backward()
    return loss.detach(), features.grad


@contextlib.contextmanager
def _weighted(optimizer: MLAOptimizer, weights: Tensor | None) -> Iterator[None]:
    """In x̄, rows count by these weights."""
    for layer in optimizer.layers:
        layer.features.weights = weights
    try:
        yield
    finally:
        for layer in optimizer.layers:
            layer.features.weights = None


def _encoder_step(optimizer: MLAOptimizer, bad: list[Tensor]) -> None:
    """Steps what has a gradient, the encoders; a fused wrapped optimizer only where none of `bad` is set."""
    if not bad or not optimizer._step_supports_amp_scaling:
        optimizer.step()
        return
    optimizer.found_inf = torch.stack(bad).amax()
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def check_belong(model: MultimodalModel, optimizer: MLAOptimizer) -> None:
    """Raises TypeError or ValueError unless the optimizer is an MLAOptimizer with the model's head."""
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"model: expected a MultimodalModel (in distributed training mla.distribute's), got {_kind(model)}")
    if not isinstance(optimizer, MLAOptimizer):
        raise TypeError(f"optimizer: expected an MLAOptimizer, got {type(optimizer).__name__}")
    if not any(layer.module is module for module in model.head.modules() for layer in optimizer.layers):
        raise ValueError("optimizer: expected an MLAOptimizer whose head is in the model, got one for another head")


def can_step_together(model: MultimodalModel) -> bool:
    """No parameter is shared, and nobody has replaced what the model does with its encoders and its head."""
    own = type(model).forward is MultimodalModel.forward and "forward" not in model.__dict__
    return own and not model.shared_parameters


def autocast(optimizer: MLAOptimizer, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast on the head's device, or what the caller has."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(optimizer.device.type, dtype=dtype)


def row_totals(model: MultimodalModel, optimizer: MLAOptimizer, batches: list[dict[str, Rows]]) -> dict[str, float]:
    """How many rows each modality's mean loss is over, without the modalities that have none.

    With several ranks the rows of all, divided by the ranks, since DistributedDataParallel takes the gradients' mean; a rank that
    has none takes part all the same. So the ranks must have as many batches with each modality: a rank that has ended gives none.
    The host waits for the counts, once a batch: what the ranks do next depends on them.
    """
    rows_of = dict.fromkeys(model.modalities, 0)
    for rows in batches:
        for modality, part in rows.items():
            rows_of[modality] += len(part.target)
    group = optimizer.process_group
    if group is None:
        return {modality: count for modality, count in rows_of.items() if count}
    having = [sum(m in rows for rows in batches) for m in rows_of]
    each = zip(rows_of.values(), having, (n * n for n in having), strict=True)
    numbers = torch.tensor([(*numbers, not batches) for numbers in each], dtype=torch.float64)
    totals, having, squares, (ended, *_) = added_up(numbers, group, optimizer.device).T.tolist()
    _, size = rank_and_size(group)
    if ended not in (0, size):
        raise ValueError(f"loader: expected as many batches on every rank, but {ended:.0f} of {size} have come to their end")
    for modality, number, square in zip(rows_of, having, squares, strict=True):
        if number * number != size * square:  # they are equal where all ranks have as many
            raise ValueError(
                f"inputs: expected as many batches with {modality!r} on every rank (with no row present where a rank lacks it), "
                f"got {number:.0f} on {size} ranks"
            )
    return {modality: total / size for modality, total in zip(rows_of, totals, strict=True) if total}


def mean_loss(logits: Tensor, target: Tensor, total: float, weights: Tensor | None = None) -> Tensor:
    """These rows' share of the mean cross-entropy over `total` rows (eq. 2); with weights [n], their weighted sum."""
    if weights is not None:
        each = F.cross_entropy(logits, target, reduction="none")
        return (each * weights.to(each.dtype)).sum()
    if len(target) == total:
        return F.cross_entropy(logits, target)
    return F.cross_entropy(logits, target, reduction="sum") / total


def rows_by_modality(
    model: MultimodalModel, inputs: dict[str, Inputs], target: Tensor, present: Tensor | None
) -> dict[str, Rows]:
    """Each modality's rows, in the model's order."""
    inputs = {modality: inputs[modality] for modality in model.modalities if modality in inputs}
    targets = [target] * len(inputs)
    if present is not None:
        plan = dispatch(model.columns(present, inputs), tuple(inputs))
        inputs, targets = plan.pack(inputs), plan.pack(targets)
    return {modality: Rows(x, y) for (modality, x), y in zip(inputs.items(), targets, strict=True)}


def unpack_batch(
    model: MultimodalModel, batch: Any, device: torch.device | None = None
) -> tuple[dict[str, Inputs], Tensor, Tensor | None]:
    """(inputs, target, present), on `device` if it is given, or an error that says what is wrong with the batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3) or not isinstance(batch[0], Mapping):
        raise TypeError(f"batch: expected (inputs: dict, target) or (inputs, target, present), got {outline(batch)}")
    inputs, target, present = batch if len(batch) == 3 else (*batch, None)
    if not inputs or not set(inputs).issubset(model.modalities):
        raise ValueError(f"inputs: expected modalities among {', '.join(model.modalities)}, got {', '.join(inputs)}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.dim() != 1:
        raise TypeError(f"target: expected int64 [N], got {outline(target)}")
    for modality, N in counts(inputs).items():
        if N != len(target):
            raise ValueError(f"inputs[{modality!r}]: expected {len(target)} samples to match target, got {N}")
    if target.device.type == "cpu" and len(target) and (classes := model.classes) is not None:
        low, high = map(int, target.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"target: expected labels in 0 … {classes - 1}, got {low if low < 0 else high}")
    if present is not None:
        model.columns(present, inputs)
    if device is None:
        return dict(inputs), target, present
    present = None if present is None else moved(present, device)
    return {modality: moved(x, device) for modality, x in inputs.items()}, moved(target, device), present


def _kind(model: Any) -> str:
    return (
        f"DistributedDataParallel({_kind(model.module)})" if isinstance(model, DistributedDataParallel) else type(model).__name__
    )

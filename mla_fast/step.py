"""One batch of alternating unimodal adaptation (eq. 1): every modality takes one step, on the samples that have it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mla_fast import head_loss, split_head
from mla_fast.batch import Rows, row_totals, rows_by_modality, unpack_batch
from mla_fast.caller import warn
from mla_fast.head import HeadLayer
from mla_fast.loss import Loss, check_loss, mean_loss, record_seen
from mla_fast.model import LoneRowError, MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.parts import is_sharded, parameters_in
from mla_fast.pull import Pull, pull_of
from mla_fast.trained import check_grad_mode, look_at_encoder
from mla_fast.wrapped import parameters_of


def alternating_step(
    model: MultimodalModel,
    optimizer: MLAOptimizer,
    batch: tuple[Any, ...],
    *,
    amp: torch.dtype | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Train on one batch: every modality takes one step, as if one after another, but all encoders in one backward pass.

        features of all modalities;  for each modality in turn: logits, loss, the head's step;  one backward pass through all
        encoders from ∂L_m/∂features_m;  one step of all encoders

    This is step by step in another order, not an approximation: the step of one modality moves its own encoder and the head, so
    no features change under the others. It needs encoders that share no parameter (ValueError), a wrapped optimizer that steps
    every parameter by itself (torch's own do; one that counts its steps as a whole counts M + 1), and room for what all encoders
    want for their backward pass at once, as joint training does. Parameters beside encoders and head, as a temperature in an
    overridden ``logits`` or in `loss`, move with the head's steps; a layer that several encoders share is refused. It calls
    ``optimizer.zero_grad()`` first, so gradients from before do not count. Hooks of ``optimizer.step`` run once, at the end, when
    the head has moved: ``Trainer`` takes turns where there are any before the step.

    model, optimizer: a ``MultimodalModel`` and the ``MLAOptimizer`` with its head. batch: ``(inputs, target)`` or ``(inputs,
    target, present)`` as for ``Trainer``, on the model's device. amp: dtype for autocast, bfloat16; float16 overflows without a
    ``GradScaler``, which wants ``Trainer``'s step by step. loss: as for ``Trainer``, on the model's device.

    Returns the mean loss {modality: 0-d tensor} of those that had a row; over ranks, the mean of the ranks' is the mean of all.
    A modality with a single row that a BatchNorm in its encoder cannot train on takes no step (``diagnostics()`` counts them),
    nor does one whose features or head gradient are not finite. On CUDA, where nobody waits to see it, its head takes none, nor,
    with a fused wrapped optimizer, does any encoder. Running statistics (BatchNorm's) that would no longer be finite stay as they
    were, on any device. Labels that lie on a GPU are not looked at beforehand: one that names no class fails there, as in
    ``F.cross_entropy``. Warns of encoders whose parameters no step moves.

    Raises RuntimeError under ``no_grad``, TypeError or ValueError that names the argument.
    """
    check_grad_mode()
    check_arguments(model, optimizer, amp, loss)
    if not can_step_together(model):
        raise ValueError(
            "model: expected encoders and a head that share no parameter, and MultimodalModel's own forward without hooks; "
            "Trainer takes them one after another, which is right"
        )
    inputs, target, present = unpack_batch(model, batch, loss=loss)
    if target.device != optimizer.device:
        raise ValueError(f"target: expected on {optimizer.device} like the head, got {target.device}")
    rows = rows_by_modality(model, inputs, target, present)
    totals = row_totals(model.modalities, optimizer, [rows])
    return steps_together(model, optimizer, rows, totals, amp, loss)


def steps_together(
    model: MultimodalModel,
    optimizer: MLAOptimizer,
    rows: Mapping[str, Rows],
    totals: Mapping[str, float],
    amp: torch.dtype | None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Take one step of each modality with one backward pass through all encoders; returns the mean losses."""
    optimizer.zero_grad()
    plain, most = _closed_form(model, optimizer, {m: len(rows[m].target) for m in totals}, loss)
    with autocast(optimizer, amp):
        features = features_of(model, optimizer, {m: rows[m] for m in totals})
        pull = pull_of(model, optimizer, [features], [rows], loss)
    if pull is not None:  # which has called the head
        split_head.put_back(model.head)
    beside, losses, outputs, gradients, bad = _beside_encoders(model, optimizer), dict[str, Tensor](), [], [], []
    for modality in features:
        h = features[modality].detach().requires_grad_()
        try:
            how = rows[modality], totals[modality], amp, loss, most.get(modality)
            losses[modality] = _head_backward(model, optimizer, plain, modality, h, *how)
        except LoneRowError as error:
            leave_out(optimizer, error)
            continue
        with torch.no_grad():
            bad.append(optimizer.take_step(modality))
        record_seen(model, modality, rows[modality].target, rows[modality].weights, loss)
        if bad[-1] is not True:
            look_at_encoder(model, optimizer, modality, features[modality].requires_grad)
            outputs.append(features[modality])
            gradients.append(h.grad if pull is None else pull.added(0, modality, h.grad))
        for p in beside:
            p.grad = None
    try:
        _backward(outputs, gradients, beside)
        _step_encoders(optimizer, pull, bad)
    except BaseException:
        optimizer.zero_grad()  # what there is of this batch is not for another step to take
        raise
    return losses


def _closed_form(
    model: MultimodalModel, optimizer: MLAOptimizer, rows: Mapping[str, int], loss: Loss | None
) -> tuple[HeadLayer | None, dict[str, int]]:
    """Return the layer whose calls can be spared, and ``split_head.fullest`` of it; what is known before the encoders begin."""
    split_head.put_back(model.head)
    plain = plain_layer(model, optimizer, loss)
    return plain, split_head.fullest(optimizer.layers[0], plain is not None, rows, optimizer.process_group)


def features_of(model: MultimodalModel, optimizer: MLAOptimizer, rows: dict[str, Rows]) -> dict[str, Tensor]:
    """Return the features of each modality, without that of a lone row that its encoder cannot train on."""
    if all(len(part.target) != 1 for part in rows.values()):
        return model.all_features({modality: part.inputs for modality, part in rows.items()})
    features = {}
    for modality, part in rows.items():
        try:
            features[modality] = model.features(modality, part.inputs)
        except LoneRowError as error:
            leave_out(optimizer, error)
    return features


def leave_out(optimizer: MLAOptimizer, error: LoneRowError) -> None:
    """Count a row that is left out; where other ranks wait for it, nothing can be."""
    if optimizer.process_group is not None:
        raise error
    if not optimizer.skipped["lone"]:
        warn(f"a row is left out (and others after it; diagnostics() counts them): {error}")
    optimizer.skipped["lone"] += 1


def plain_layer(model: MultimodalModel, optimizer: MLAOptimizer, loss: Loss | None) -> HeadLayer | None:
    """Return the head's layer where it is all of the head, nobody watches it and no other loss than cross-entropy is given, so
    that autograd can be spared: with it every modality's step takes the host longer, on a GPU by a tenth of a batch of 64 through
    ResNet-18s."""
    layer = optimizer.layers[0]
    if loss is not None or model.overrides_logits:
        return None
    return layer if layer.module is model.head and head_loss.is_unobserved(layer) else None


def _head_backward(
    model: MultimodalModel,
    optimizer: MLAOptimizer,
    plain: HeadLayer | None,
    modality: str,
    features: Tensor,
    rows: Rows,
    total: float,
    amp: torch.dtype | None,
    loss: Loss | None,
    most: int | None,
) -> Tensor:
    """Leave ∂L/∂features and the head's gradients in ``.grad``; returns the loss. most: as ``split_head.fullest`` says."""
    if plain is not None and _spares_a_call(plain, optimizer, features, rows, amp, most):
        with torch.no_grad(), _weighted(optimizer, rows.weights), autocast(optimizer, amp):
            found, features.grad = head_loss.backward(plain, features.detach(), rows.target, total, rows.weights, most or 0)
        return found
    with torch.enable_grad(), _weighted(optimizer, rows.weights):
        with autocast(optimizer, amp):
            logits = model.logits(modality, features.clone())  # a head may change its inputs
            found = mean_loss(logits, rows.target, total, rows.weights, loss)
        torch.autograd.backward(found)
    return found.detach()


def _spares_a_call(
    layer: HeadLayer, optimizer: MLAOptimizer, features: Tensor, rows: Rows, amp: torch.dtype | None, most: int | None
) -> bool:
    """Whether logits are better not had from a call: they are many, or the head is split, or nothing is cast and every row counts
    alike."""
    if layer.sharded:
        return most is not None
    if head_loss.is_large(layer, len(rows.target)):
        return True
    automatic = amp is not None or torch.is_autocast_enabled(optimizer.device.type)
    return features.dtype == layer.dtype and rows.weights is None and not automatic


def _beside_encoders(model: MultimodalModel, optimizer: MLAOptimizer) -> list[Tensor]:
    """Return the parameters that the head's steps may move: the head's, and what the optimizer has beside the encoders'."""
    of_encoders = set(map(id, parameters_in(model.encoders)))
    others = [p for p in parameters_of(optimizer) if id(p) not in of_encoders and not is_sharded(p)]
    return list(dict.fromkeys([*model.head.parameters(), *others]))


def _backward(outputs: list[Tensor], gradients: list[Tensor | None], beside: list[Tensor]) -> None:
    """Differentiate the features of all encoders at once; ValueError where they have more in common than their head."""
    trained = [i for i, h in enumerate(outputs) if h.requires_grad]
    if trained:
        torch.autograd.backward([outputs[i] for i in trained], [gradients[i] for i in trained])
    if len(trained) > 1 and (common := sum(p.grad is not None for p in beside)):
        raise ValueError(
            f"model: expected features that depend on their own encoder alone, got {common} parameters of the optimizer beside "
            "the encoders that have gradients of several modalities; Trainer(…, in_turn=True) takes them one after another"
        )


def _step_encoders(optimizer: MLAOptimizer, pull: Pull | None, bad: list[bool | Tensor]) -> None:
    """Step what has a gradient, the encoders; a fused wrapped optimizer only where no flag on a device is set. bad: of the head's
    steps, none where no modality had one."""
    if pull is not None:
        pull.restore()
    if not bad:
        return
    flags = [flag for flag in bad if isinstance(flag, Tensor)]
    if flags:
        optimizer.found_inf = torch.stack(flags).amax()
    try:
        optimizer.step()
    finally:
        if flags:
            del optimizer.found_inf


@contextlib.contextmanager
def _weighted(optimizer: MLAOptimizer, weights: Tensor | None) -> Iterator[None]:
    """Count rows by these weights in x̄."""
    for layer in optimizer.layers:
        layer.features.weights = weights
    try:
        yield
    finally:
        for layer in optimizer.layers:
            layer.features.weights = None


def autocast(optimizer: MLAOptimizer, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Return autocast on the head's device, or what the caller has."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(optimizer.device.type, dtype=dtype)


def check_arguments(model: MultimodalModel, optimizer: MLAOptimizer, amp: Any, loss: Any) -> None:
    """Raise TypeError or ValueError unless these can train together."""
    check_belong(model, optimizer)
    check_loss(loss, model)
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp: expected torch.bfloat16, torch.float16 or None, got {amp!r}")


def check_belong(model: MultimodalModel, optimizer: MLAOptimizer) -> None:
    """Raise TypeError or ValueError unless the optimizer is an MLAOptimizer with the model's head."""
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"model: expected a MultimodalModel (in distributed training mla.distribute's), got {_kind(model)}")
    if not isinstance(optimizer, MLAOptimizer):
        raise TypeError(f"optimizer: expected an MLAOptimizer, got {type(optimizer).__name__}")
    if not any(layer.module is module for module in model.head.modules() for layer in optimizer.layers):
        raise ValueError("optimizer: expected an MLAOptimizer whose head is in the model, got one for another head")
    if model.interaction is not None:
        if not set(parameters_of(optimizer)).issuperset(model.interaction.parameters()):
            raise ValueError("optimizer: expected the interaction's parameters among the optimizer's, got it without them")


def can_step_together(model: MultimodalModel) -> bool:
    """No parameter is shared, and nobody has replaced what the model does with its encoders and its head, or hooks into it."""
    own = type(model).forward is MultimodalModel.forward and "forward" not in model.__dict__
    return own and not head_loss.hooks_of(model) and not model.shared_parameters


def why_in_turn(model: MultimodalModel, optimizer: MLAOptimizer) -> str | None:
    """Return why modalities have to take their steps one after another, or None."""
    if not can_step_together(model):
        return "parts of the model share parameters, or it has a forward or hooks of its own"
    if model.own_parameters:
        return "the model has parameters of its own, beside encoders and head"
    if optimizer._optimizer_step_pre_hooks:
        return "the optimizer has hooks before its step, which are to see each modality's gradients"
    return None


def _kind(model: Any) -> str:
    return (
        f"DistributedDataParallel({_kind(model.module)})" if isinstance(model, DistributedDataParallel) else type(model).__name__
    )

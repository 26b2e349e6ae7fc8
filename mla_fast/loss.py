"""The loss of a modality's rows: eq. 2's cross-entropy, or a function of (logits, target) that is given in its place."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.inputs import describe
from mla_fast.model import MultimodalModel

Loss = Callable[[Tensor, Tensor], Tensor]
# Their outputs are no logits of classes that exclude each other, so there is no entropy to weigh modalities by.
NO_CLASSES = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss),
    *(nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, nn.MultiLabelMarginLoss, nn.SoftMarginLoss),
)
# What of these compares each output with a number, as functions.
ELEMENTWISE = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss),
    *(F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss, F.soft_margin_loss),
)


def check_loss(loss: Any, model: MultimodalModel) -> None:
    """Raise TypeError or ValueError unless `loss` is None or a function of (logits, target) that goes with the model's fusion."""
    if loss is None:
        return
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(f"loss: expected a function of (logits, target), such as nn.CrossEntropyLoss(), got {loss!r}")
    if (reduction := getattr(loss, "reduction", "mean")) != "mean":
        raise ValueError(f'loss: expected reduction="mean", over the rows that it is given, got {reduction!r}')
    if isinstance(loss, NO_CLASSES) and model.fusion == "entropy":
        raise ValueError(
            f'loss: {name_of(loss)} expects MultimodalModel(…, fusion="mean"), since its outputs are no logits of classes that '
            'exclude each other, got fusion="entropy"'
        )


def check_target(model: MultimodalModel, target: Any, loss: Loss | None) -> None:
    """Raise TypeError or ValueError unless a batch's target suits the loss; values are looked at on the CPU alone."""
    if loss is None:
        if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.dim() != 1:
            cure = "labels as target.long(), probabilities [N, C] and others with loss=nn.CrossEntropyLoss() or another loss"
            raise TypeError(f"target: expected int64 [N], got {describe(target)}; {cure}")
        if target.device.type == "cpu" and len(target) and (classes := model.classes) is not None:
            low, high = map(int, target.aminmax())
            if low < 0 or high >= classes:
                cure = "; loss=nn.CrossEntropyLoss(ignore_index=…) leaves rows out" if low < 0 else ""
                raise ValueError(f"target: expected labels in 0 … {classes - 1}, got {low if low < 0 else high}{cure}")
        return
    if not isinstance(target, Tensor) or not target.dim():
        raise TypeError(f"target: expected a tensor [N, …], got {describe(target)}")
    if target.dtype == torch.bool and target.dim() > 1:  # ``predict`` could not tell it from `present`
        raise TypeError(f"target: expected floating of 0 and 1, as by target.float(), got {describe(target)}")
    if model.fusion == "entropy" and not (target.dtype == torch.int64 and target.dim() == 1):
        _check_probabilities(target, model.classes)


def _check_probabilities(target: Tensor, classes: int | None) -> None:
    fits = target.is_floating_point() and target.dim() == 2 and classes in (None, target.shape[1])
    if fits and target.device.type == "cpu":
        fits = bool((target >= 0).all()) and bool(((target.double().sum(1) - 1).abs() < 1e-2).all())
    if not fits:
        expected = f"int64 [N], or probabilities [N, {classes or 'C'}] whose rows sum to 1"
        cure = 'other outputs than classes need MultimodalModel(…, fusion="mean")'
        raise ValueError(f"target: expected {expected}, got {describe(target)}; {cure}")


def mean_loss(logits: Tensor, target: Tensor, total: float, weights: Tensor | None = None, loss: Loss | None = None) -> Tensor:
    """Return these rows' share of the mean loss over `total` rows (eq. 2); with weights [n], their weighted sum.

    A loss that is given takes no weights: the mean over these rows counts as many times as there are rows.
    """
    if loss is not None:
        return given_loss(loss, logits, target) * (len(target) / total)
    if weights is not None:
        each = cross_entropy(logits, target, "none")
        return (each * weights.to(each.dtype)).sum()
    if len(target) == total:
        return cross_entropy(logits, target)
    return cross_entropy(logits, target, "sum") / total


def cross_entropy(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Return eq. 2; ValueError names labels that are none, on the CPU, where the head's classes were not known before."""
    try:
        return F.cross_entropy(logits, target, reduction=reduction)
    except IndexError as error:
        raise ValueError(f"target: expected labels in 0 … {logits.shape[1] - 1}, got others: {error}") from error


def given_loss(loss: Loss, logits: Tensor, target: Tensor) -> Tensor:
    """Return a loss that is given of logits [n, C] and target [n, …], 0-d; 0 of no rows.

    A floating target, and any target of a loss that compares each output with a number, is converted to the logits' dtype, at
    least float32. A target [n] becomes [n, 1] beside one output, unless the loss has an ``ignore_index``.

    Raises ValueError that names `target` where the loss does not take it, and `loss` where it returns something else.
    """
    if not len(target):
        return logits.sum() * 0
    elementwise = _is_elementwise(loss)
    if target.is_floating_point() or elementwise:
        target = target.to(torch.promote_types(logits.dtype, torch.float32))
    if target.dim() == 1 and logits.shape[1] == 1 and ignored_label(loss) is None:
        target = target[:, None]
    try:
        if elementwise and target.shape != logits.shape:
            raise ValueError("the target size has to be that of the logits")
        found: Any = _called(loss, logits, target)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, UserWarning) as error:
        if logits.is_cuda and torch.cuda.is_current_stream_capturing():
            raise  # it is what cannot be captured
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"target: expected one that {name_of(loss)} takes beside logits {describe(logits)}, got {describe(target)}: {reason}"
        ) from error
    if not isinstance(found, Tensor) or found.dim() or not found.is_floating_point():
        raise ValueError(f"loss: expected a floating 0-d tensor from {name_of(loss)}, the mean over rows, got {describe(found)}")
    if target.shape == logits.shape and logits.shape[1] == 1 and not elementwise:
        _check_squeeze(loss, logits.detach(), target)
    return found


def _called(loss: Loss, logits: Tensor, target: Tensor) -> Tensor:
    if target.shape == logits.shape:
        return loss(logits, target)
    with warnings.catch_warnings():  # torch broadcasts [n] over [n, C] and warns: nobody means that
        warnings.filterwarnings("error", message="Using a target size")
        return loss(logits, target)


_LOOKED_AT = weakref.WeakSet[Any]()


def _check_squeeze(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """Raise ValueError for a function that takes the 1 of logits [n, 1] away and not that of target [n, 1], so that one is
    broadcast over the other and nothing but the targets' mean is learned: a loss's first batch whose first rows differ tells."""
    function = getattr(loss, "__func__", loss)
    z, y = logits[:2], target[:2]
    capturing = logits.is_cuda and torch.cuda.is_current_stream_capturing()
    if not isinstance(function, Hashable) or function in _LOOKED_AT or capturing or has_state(loss):
        return
    if len(z.unique()) < 2 or len(y.unique()) < 2:
        return
    by_column, by_row, differ = True, True, True
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError, ValueError, TypeError, IndexError):
        warnings.simplefilter("ignore")
        first, second = loss(z[:1], y[:1]), loss(z[1:], y[1:])
        by_column, by_row = (bool(torch.isclose(loss(z, of), (first + second) / 2, rtol=1e-4)) for of in (y, y[:, 0]))
        differ = bool(first != second)
    if not differ:  # as of a correlation, which a row has none of
        return
    if by_row and not by_column:
        raise ValueError(
            f"loss: expected {name_of(loss)} to be a mean over rows of logits [N, 1] and target [N, 1], which a target [N] "
            "becomes beside one output, got one for a target [N] alone: it squeezes the logits and broadcasts them over it"
        )
    with contextlib.suppress(TypeError):  # of what no weak reference can be had
        _LOOKED_AT.add(function)


def _is_elementwise(loss: Loss) -> bool:
    of_numbers = isinstance(loss, NO_CLASSES) and not isinstance(loss, nn.MultiLabelMarginLoss)
    return of_numbers or getattr(loss, "func", loss) in ELEMENTWISE


def ignored_label(loss: Loss | None) -> int | None:
    """Return the label that a loss of classes ignores: its ``ignore_index``, also of torch's function and a partial of it."""
    default = -100 if getattr(loss, "func", loss) in (F.cross_entropy, F.nll_loss) else None
    found = getattr(loss, "ignore_index", getattr(loss, "keywords", {}).get("ignore_index", default))
    return found if isinstance(found, int) else None


def counted_rows(target: Tensor, loss: Loss | None) -> Tensor | None:
    """Return bool [N] of the rows that the loss does not ignore, or None where it ignores none; waits for the target's device."""
    label = ignored_label(loss)
    if label is None or target.dtype != torch.int64 or target.dim() != 1:
        return None
    counted = target != label
    return None if bool(counted.all()) else counted


def labels_of(fusion: str, classes: int, target: Tensor, loss: Loss | None) -> Tensor | None:
    """Return the class [n] of each row, the most probable one of probabilities; None where the target names none.

    What a loss that is given may ignore, a label that is no class, becomes −1.
    """
    if loss is None:
        return target
    if target.dtype == torch.int64 and target.dim() == 1 and classes > 1:
        return torch.where((target >= 0) & (target < classes), target, -1)
    return target.argmax(1) if fusion == "entropy" else None


def record_seen(model: MultimodalModel, modality: str, target: Tensor, weights: Tensor | None, loss: Loss | None) -> None:
    """Record on which classes a modality was trained: with probabilities those that have any."""
    classes = model.classes
    labels = None if classes is None else labels_of(model.fusion, classes, target, loss)
    if labels is None or classes is None:
        return
    if loss is None:
        model.seen.record(modality, target, classes, weights)
    elif target.is_floating_point():
        model.seen.record(modality, torch.arange(classes, device=target.device), classes, (target > 0).any(0))
    else:
        model.seen.record(modality, labels, classes, labels >= 0)


def has_state(loss: Loss | None) -> bool:
    """Whether a loss has something that training changes; the weights of torch's own losses are settings."""
    own = isinstance(loss, nn.Module) and not type(loss).__module__.startswith("torch.nn.")
    return own and bool(loss.state_dict())  # type: ignore[union-attr]


def name_of(loss: Loss | None) -> str:
    """Return what a loss is called in messages and checkpoints: the name of a function, or of a module's class."""
    if loss is None:
        return "cross_entropy"
    if isinstance(loss, functools.partial):
        loss = loss.func
    loss = getattr(loss, "_orig_mod", loss)  # of torch.compile
    return str(getattr(loss, "__name__", type(loss).__name__))

"""Checks of what the methods for missing modalities are given; every error names the argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_fast.inputs import describe

WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_widths(widths: Any) -> None:
    """Raise TypeError or ValueError unless there are two modalities or more, of one number or more."""
    if not isinstance(widths, Mapping):
        raise TypeError(f"widths: expected a dict {{modality: the numbers of a sample}}, got {describe(widths)}")
    if others := [name for name in widths if not isinstance(name, str) or not name]:
        raise ValueError(f"widths: expected names of modalities that are strings and not empty, got {others[0]!r}")
    for modality, d in widths.items():
        if not _is_whole(d):
            raise TypeError(f"widths[{modality!r}]: expected a whole number of at least 1, got {d!r}")
    if len(widths) < 2 or min(widths.values()) < 1:
        raise ValueError(f"widths: expected at least two modalities and the numbers of each, got {dict(widths)}")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise TypeError for what is no whole number, ValueError for less than `least`."""
    if not _is_whole(value) or value < least:
        kind = ValueError if _is_whole(value) else TypeError
        raise kind(f"{name}: expected a whole number of at least {least}, got {value!r}")


def check_number(name: str, value: Any, most: float = math.inf) -> None:
    """Raise TypeError for what is no number, ValueError unless it is finite and in 0 … `most`."""
    a_number = isinstance(value, Real) and not isinstance(value, bool)
    if not a_number or not math.isfinite(value) or not 0 <= value <= most:
        expected = "a finite number of at least 0" if most == math.inf else f"a number from 0 to {most:g}"
        raise (ValueError if a_number else TypeError)(f"{name}: expected {expected}, got {value!r}")


def check_training(epochs: Any, lr_factor: Any, weight_decay: Any) -> None:
    """Raise TypeError or ValueError unless there is an epoch or more, and a factor and a decay that Adam takes."""
    check_whole("epochs", epochs)
    check_number("lr_factor", lr_factor)
    check_number("weight_decay", weight_decay)


def check_inputs(inputs: Any, widths: Mapping[str, int]) -> None:
    """Raise TypeError or ValueError unless `inputs` are tensors of one or more of the modalities."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: expected a dict {{modality: tensor}}, got {describe(inputs)}")
    if not inputs or any(modality not in widths for modality in inputs):
        got = ", ".join(map(str, inputs)) or "none"
        raise ValueError(f"inputs: expected modalities among {', '.join(widths)}, got {got}")
    for modality, x in inputs.items():
        if not isinstance(x, Tensor) or not x.dim():
            raise TypeError(f"inputs[{modality!r}]: expected a tensor [N, …], got {describe(x)}")


def check_dtype(modality: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless the inputs are in the model's dtype, or in one that autocast brings into it."""
    if x.dtype == dtype:
        return
    if torch.float64 in (x.dtype, dtype) or not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"inputs[{modality!r}]: expected {dtype} like the model, got {describe(x)}")


def check_full(method: str, widths: Mapping[str, int], inputs: Mapping[str, Tensor], full: Any) -> None:
    """Raise TypeError or ValueError unless `full` has finite values of all modalities, in the inputs' shape and dtype.

    inputs: as ``visible`` takes them. Dimensions after the first may be flattened, as in the inputs.
    """
    if not isinstance(full, Mapping):
        raise TypeError(f"full: expected a dict {{modality: tensor}}, got {describe(full)}")
    if any(modality not in widths for modality in full):
        raise ValueError(f"full: expected the modalities {', '.join(widths)}, got {', '.join(map(str, full))}")
    first = next(iter(inputs.values()))
    for modality, d in widths.items():
        if modality in full:
            x, like = full[modality], inputs.get(modality, first)
            fits = isinstance(x, Tensor) and x.dim() > 1 and x.dtype == like.dtype and x.flatten(1).shape == (len(first), d)
            if not fits:
                shape = list(like.shape) if modality in inputs else [len(first), d]
                of = f"inputs[{modality!r}]" if modality in inputs else "the inputs"
                raise ValueError(f"full[{modality!r}]: expected {like.dtype} {shape} like {of}, got {describe(x)}")
        if modality not in full or not bool(full[modality].isfinite().all()):
            expected = f"expected finite values of all modalities, from which {method} learns"
            raise ValueError(f"full: {expected}, got others of {modality!r}")


def check_labels(target: Any, N: int, classes: int) -> None:
    """Raise ValueError unless a training set's target is whole numbers [N] of two or more of the classes; looks at its values."""
    whole = isinstance(target, Tensor) and target.dtype in WHOLE_NUMBERS and target.shape == (N,)
    found = target.unique().tolist() if whole else []
    if len(found) < 2 or found[0] < 0 or found[-1] >= classes:
        got = f"classes {found}" if whole else describe(target)
        raise ValueError(f"target: expected whole numbers [{N}] of two or more of {classes} classes from 0, got {got}")


def cross_entropy(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of logits [N, C] and target, int64 [N].

    Raises ValueError for another target; on the CPU also for values that are no classes, elsewhere nothing waits for them.
    """
    N, C = logits.shape
    expected = f"target: expected whole numbers, int64 [{N}], of {C} classes from 0"
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != (N,):
        raise ValueError(f"{expected}, got {describe(target)}")
    if target.device.type == "cpu" and N:
        low, high = map(int, target.aminmax())
        if low < 0 or high >= C:
            raise ValueError(f"{expected}, got {low if low < 0 else high}")
    return F.cross_entropy(logits, target, reduction=reduction)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)

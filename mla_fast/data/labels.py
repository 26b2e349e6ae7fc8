"""Names and labels in arrays of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mla_fast.data.column import Array
from mla_fast.data.dataset import checked_target, listed


def as_strings(array: Array, name: str) -> Array:
    """Return an array of strings as it is, and one of bytes decoded; raise ValueError, naming it `name`, if that is not UTF-8."""
    try:
        return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected bytes in UTF-8, got {error.object!r}") from None


def as_classes(array: Array, name: str, class_names: Sequence[str] | None = None) -> tuple[Tensor, list[str] | None]:
    """Return labels as classes int64 [N] from 0, and the names of the classes where they are not just these numbers.

    array: [N] or [N, 1] of integers, floats that are whole, booleans, strings or bytes. Integers whose least is 0 are classes as
        they are. Strings, booleans, integers from 1 or more, and exactly −1 and 1, get the classes 0, 1, … in sorted order.
    class_names: those of a training set, to which labels are matched by name.

    Raises ValueError, naming the array `name`, for anything else, for labels that differ in every row, and for labels that are
    not among `class_names`.
    """
    values = _values(array, name)
    if class_names is not None:
        return _matched(values, list(class_names), name), list(class_names)
    found, target = np.unique(values, return_inverse=True)
    if values.dtype.kind in "iu" and not (found[0] >= 1 or found.tolist() == [-1, 1]):
        if found[-1] > np.iinfo(np.int64).max:
            raise ValueError(f"{name}: expected classes from 0, got {found[-1]}")
        return checked_target(torch.from_numpy(values.astype(np.int64)), name), None
    if 1 < len(found) == len(values):
        raise ValueError(f"{name}: expected classes that samples have in common, got another label in each of {len(found)} rows")
    return torch.from_numpy(target), found.astype(str).tolist()


def _values(array: Array, name: str) -> Array:
    """Return integers or strings [N]."""
    column = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if column.ndim != 1 or not len(column):
        raise ValueError(f"{name}: expected [N] or [N, 1] with at least one sample, got {list(array.shape)}")
    kind = column.dtype.kind
    if kind in "US":
        column = as_strings(column, name)
        if not column.astype(bool).all():
            raise ValueError(f"{name}: expected a name in every row, row {int(np.argmin(column.astype(bool)))} has none")
    elif kind == "b":
        column = column.astype(str)
    elif kind == "f":
        whole = (np.floor(column) == column) & (np.abs(column) < 2**53)
        if not whole.all():
            row = int(np.argmin(whole))
            raise ValueError(f"{name}: expected classes, as whole numbers, row {row} has {column[row]}")
        column = column.astype(np.int64)
    elif kind not in "iu":
        raise ValueError(f"{name}: expected integers, whole numbers, booleans or names, got dtype {array.dtype}")
    return column


def _matched(values: Array, class_names: list[str], name: str) -> Tensor:
    found, rows = np.unique(values.astype(str), return_inverse=True)
    if unknown := [label for label in found.tolist() if label not in class_names]:
        raise ValueError(f"{name}: expected the classes {listed(class_names)}, got {listed(unknown)}")
    return torch.tensor([class_names.index(label) for label in found.tolist()])[rows]

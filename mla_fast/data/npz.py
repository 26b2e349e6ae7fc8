"""Multimodal data sets from NumPy ``.npz`` files."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mla_fast.data.dataset import Array, MultimodalDataset, checked_target


def load_npz(path: str | Path, modalities: Sequence[str], label: str = "label") -> MultimodalDataset:
    """Load a data set from the arrays `modalities` [N, ...] and `label` [N] of a NumPy ``.npz`` file.

    uint8 modalities (images, spectrograms) are divided by 255; other numbers are converted to float32 unchanged. An array
    ``present``, bool [N, M], becomes the mask of present modalities. Its columns are named by the array of strings ``modalities``
    if the file has one, and are otherwise those of the argument `modalities` in order. Other arrays [N, ...] become fields.
    Pickled objects are never loaded.

    Raises FileNotFoundError; and ValueError, naming the path and the array, for a file that is not an ``.npz`` or is damaged, a
    missing array, arrays of different N, a modality that is not numeric or not finite, and labels that are not integers from 0.
    """
    _check_names(path, modalities, label)
    arrays = _read_npz(path)
    wanted = [*modalities, label]
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise ValueError(f"{path}: no array {', '.join(map(repr, missing))}; there are: {', '.join(arrays) or 'none'}")
    N = arrays[label].shape[0] if arrays[label].ndim else 0
    if any(arrays[key].shape[:1] != (N,) for key in wanted):
        shapes = ", ".join(f"{key} {list(arrays[key].shape)}" for key in wanted)
        raise ValueError(f"{path}: expected arrays of one length N in the first dimension, got {shapes}")
    present = _pop_present(path, arrays, N, modalities) if "present" in arrays and "present" not in wanted else None
    columns = [None] * len(modalities) if present is None else list(present.T)
    inputs = {m: _as_float(path, m, arrays[m], column) for m, column in zip(modalities, columns, strict=True)}
    target = _as_target(path, label, arrays[label])
    fields = {key: a for key, a in arrays.items() if key not in wanted and a.shape[:1] == (N,)}
    return MultimodalDataset(inputs, target, fields, present)


def _check_names(path: str | Path, modalities: Sequence[str], label: str) -> None:
    if isinstance(modalities, str):
        raise TypeError(f"modalities: expected a sequence of names, got the string {modalities!r}")
    if not modalities:
        raise ValueError(f"modalities: expected at least one key of {path}, got none")
    if len(set(modalities)) != len(modalities):
        raise ValueError(f"modalities: expected each name once, got {', '.join(modalities)}")
    if label in modalities:
        raise ValueError(f"label: expected another key than the modalities {', '.join(modalities)}, got {label!r}")


def _read_npz(path: str | Path) -> dict[str, Array]:
    """Read all arrays, which checks every one against its checksum; raise ValueError for damage of any kind."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a .npz file, or cut short (expected a zip archive of NumPy arrays)")
    arrays = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            try:
                arrays[key] = archive[key]
            except (ValueError, EOFError, OSError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
                raise ValueError(f"{path}: cannot read array {key!r}: {error}") from error
            if not isinstance(arrays[key], np.ndarray):  # NumPy returns the bytes of a member that is not an .npy
                raise ValueError(f"{path}: {key!r} is not a NumPy array")
    return arrays


def _pop_present(path: str | Path, arrays: dict[str, Array], N: int, modalities: Sequence[str]) -> Tensor:
    """Remove the mask and the names of its columns, if any, from `arrays`; return bool [N, M] in the order of `modalities`."""
    mask, names = arrays.pop("present"), list(modalities)
    stored = arrays.get("modalities")
    if stored is not None and "modalities" not in names and stored.ndim == 1 and stored.dtype.kind == "U":
        names = arrays.pop("modalities").tolist()
    if mask.dtype != np.bool_ or mask.shape != (N, len(names)):
        raise ValueError(
            f"{path}: expected present to be bool [{N}, {len(names)}] (samples, {', '.join(names)}), "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if unknown := [m for m in modalities if m not in names]:
        raise ValueError(f"{path}: present has columns for {', '.join(names)}, and none for {', '.join(unknown)}")
    return torch.from_numpy(mask[:, [names.index(m) for m in modalities]])


def _as_float(path: str | Path, key: str, array: Array, present: Tensor | None) -> Tensor:
    """Return float32 [N, ...]; rows that are not `present` need not be finite."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {key!r}: expected numbers, got dtype {array.dtype}")
    x = torch.from_numpy(array.astype(np.float32))
    finite = torch.isfinite(x).view(len(x), math.prod(x.shape[1:])).all(1)
    if present is not None:
        finite |= ~present
    if not finite.all():
        raise ValueError(f"{path}: {key!r}: expected finite values, row {int(finite.logical_not().nonzero()[0])} has others")
    return x.div_(255) if array.dtype == np.uint8 else x


def _as_target(path: str | Path, key: str, array: Array) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ValueError(f"{path}: {key!r}: expected integers, got dtype {array.dtype}")
    return checked_target(torch.from_numpy(array.astype(np.int64)), f"{path}: {key!r}")

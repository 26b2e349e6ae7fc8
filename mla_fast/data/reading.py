"""Multimodal data sets from named arrays: those of an ``.npz`` in memory, others where they are."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mla_fast.data.archive import read_arrays
from mla_fast.data.column import Array, Column, Source
from mla_fast.data.dataset import MultimodalDataset, listed
from mla_fast.data.huggingface import is_saved, read_saved
from mla_fast.data.labels import as_classes, as_strings
from mla_fast.data.npy import npy_paths, read_folder
from mla_fast.data.shards import read_shards, shard_paths

# What arrays become that torch cannot compute with, or that are scaled; others keep their dtype.
_DTYPES: dict[str, Any] = {
    "bool": np.float32,
    "uint8": np.float32,
    "float16": np.float32,
    np.dtype(np.longdouble).name: np.float64,
}
_DTYPES |= {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}


def load(
    path: str | Path,
    modalities: Sequence[str],
    label: str = "label",
    *,
    tokens: Collection[str] = (),
    class_names: Sequence[str] | None = None,
) -> MultimodalDataset:
    """Load a data set from the arrays `modalities` [N, ...] and `label` [N] of an ``.npz``, or of what is larger than memory.

    path: an ``.npz``, which is held in memory; a folder of ``.npy`` files, whose names are those of the arrays; a folder that
        ``datasets.Dataset.save_to_disk`` has written; or WebDataset shards, a folder of ``.tar`` files or a pattern
        ``NAME-{0000..0015}.tar``, of samples KEY.audio.npy, KEY.image.jpg, KEY.label.cls. Of all but the first, labels and other
        arrays [N] are held in memory, and rows of the modalities are read when they are asked for: each of ``inputs`` is a
        ``Column``. Shards have a field ``shard``, the name of each sample's, to split by.

    Of any byte and memory order. Floats and integers stay exact, so standardise before you train, which makes float32 of them:
    float16 becomes float32, long double float64, unsigned integers signed ones. Booleans become float32. uint8 (images,
    spectrograms) becomes float32 divided by 255, unless it is among `tokens`, which stay integers.

    label: integers from 0, or what ``as_classes`` makes classes of; the data set keeps their names. class_names: those to match.

    An array ``present``, bool [N, M], becomes the mask of present modalities. Its columns are named by the array ``modalities``,
    strings or bytes [M], if the file has one, and are otherwise those of the argument `modalities` in order. Other arrays
    [N, ...], of folders [N], become fields, bytes among them strings. Arrays of Python objects are never loaded: those that are
    not asked for are left out, as are fields that cannot be read, as of a folder with nulls in them.

    Raises FileNotFoundError; and ValueError, naming the path and the array, for a file that is not an ``.npz`` or is damaged, a
    folder without arrays, a missing array, arrays of different N, a modality that is not of real numbers, not finite or beyond
    int64 (of a folder, when its row is read), and labels, names or a mask of another kind or shape.
    """
    return read_labelled(path, modalities, label, tokens=tokens, class_names=class_names)[0]


def load_npz(
    path: str | Path,
    modalities: Sequence[str],
    label: str = "label",
    *,
    tokens: Collection[str] = (),
    class_names: Sequence[str] | None = None,
) -> MultimodalDataset:
    """Load a data set from an ``.npz``, as ``load`` does; raise ValueError for what is held anywhere else than in memory."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: expected an .npz, which is held in memory, got a folder")
    return load(path, modalities, label, tokens=tokens, class_names=class_names)


def open_arrays(path: str | Path, wanted: Collection[str] = ()) -> tuple[dict[str, Array | Source], list[str]]:
    """Return all arrays, those larger than memory as sources of their rows, and the names of those of Python objects.

    wanted: of shards, those that are asked for. Raises ValueError or FileNotFoundError, naming the file, for one that is damaged
    or missing, and for a folder without any, or of several kinds.
    """
    folder, arrays = Path(path), dict[str, Array | Source]()
    if folder.is_dir():
        _check_kinds(folder)
    if shards := shard_paths(folder):
        return read_shards(shards, wanted), []
    if not folder.is_dir():
        held, objects = read_arrays(path)
        return arrays | held, objects
    if is_saved(folder):
        columns, objects = read_saved(folder)
        return arrays | columns, objects
    files, objects = read_folder(folder)
    if not files and not objects:
        there = listed(sorted(file.name for file in folder.iterdir()), 5) or "nothing"
        expected = ".npy files, .tar shards or what datasets.Dataset.save_to_disk writes"
        raise ValueError(f"{path}: expected {expected}, got {there}")
    return arrays | files, objects


def _check_kinds(folder: Path) -> None:
    """Raise ValueError for a folder of several kinds, of which all but one would be overlooked."""
    saved = [folder / "dataset_info.json"] if is_saved(folder) else []
    found = [files[0].name for files in (npy_paths(folder), shard_paths(folder), saved) if files]
    if len(found) > 1:
        expected = "either .npy files, .tar shards or what datasets.Dataset.save_to_disk writes"
        raise ValueError(f"{folder}: expected {expected}, got {' and '.join(found)}")


def read_labelled(
    path: str | Path,
    modalities: Sequence[str],
    label: str = "label",
    *,
    tokens: Collection[str] = (),
    class_names: Sequence[str] | None = None,
) -> tuple[MultimodalDataset, dict[str, str]]:
    """Return what ``load`` does, and a description of each array that was asked for: dtype and shape in the file."""
    _check_names(path, modalities, label)
    return _dataset(path, *open_arrays(path, {*modalities, label}), modalities, label, tokens, class_names)


def read_unlabelled(
    path: str | Path, modalities: Sequence[str], *, tokens: Collection[str] = ()
) -> tuple[MultimodalDataset, dict[str, str]]:
    """Return samples that need no labels, with those of the `modalities` that the file has; otherwise as ``read_labelled``.

    All targets are 0. An array ``present`` may have a column for each of the `modalities`, whether the file has it or not.
    """
    arrays, objects = open_arrays(path, modalities)
    here = [m for m in modalities if m in {*arrays, *objects}]
    if not here:
        raise ValueError(f"{path}: expected at least one of the arrays {listed(modalities)}, got {listed(list(arrays))}")
    label, first = "target", arrays.get(here[0])
    while label in {*arrays, *objects, *here}:
        label += "_"
    N = first.shape[0] if first is not None and first.ndim else 0
    arrays[label] = np.zeros(N, np.int64)
    if not N and first is not None:
        raise ValueError(f"{path}: expected arrays of one length N ≥ 1, got {here[0]} {list(first.shape)}")
    mask = arrays.get("present")
    if mask is not None and "modalities" not in arrays and mask.shape[1:] == (len(modalities),):
        arrays["present"] = np.asarray(mask)[:, [m in here for m in modalities]]
    dataset, described = _dataset(path, arrays, objects, here, label, tokens, None)
    del described[label]
    return dataset, described


def _dataset(
    path: str | Path,
    arrays: dict[str, Array | Source],
    objects: Sequence[str],
    modalities: Sequence[str],
    label: str,
    tokens: Collection[str],
    class_names: Sequence[str] | None,
) -> tuple[MultimodalDataset, dict[str, str]]:
    wanted = [*modalities, label]
    missing = [key for key in wanted if key not in {*arrays, *objects}]
    if missing:
        raise ValueError(f"{path}: no array {', '.join(map(repr, missing))}; there are: {', '.join(arrays) or 'none'}")
    masked = "present" in {*arrays, *objects} and "present" not in wanted
    names = ["present", *(["modalities"] if "modalities" not in wanted else [])] if masked else []
    if never := [key for key in (*wanted, *names) if key in objects]:
        raise ValueError(f"{path}: {never[0]!r}: expected numbers or names, got Python objects, which are never loaded")
    N = arrays[label].shape[0] if arrays[label].ndim else 0
    if any(arrays[key].shape[:1] != (N,) for key in wanted):
        shapes = ", ".join(f"{key} {list(arrays[key].shape)}" for key in wanted)
        raise ValueError(f"{path}: expected arrays of one length N in the first dimension, got {shapes}")
    described = {key: f"{arrays[key].dtype} {list(arrays[key].shape)}" for key in (*wanted, *names) if key in arrays}
    columns = {key: np.asarray(arrays.pop(key)) for key in names if key in arrays}
    mask = columns.get("present")
    present = None if mask is None else _columns(path, mask, columns.get("modalities"), N, modalities)
    here = [None] * len(modalities) if present is None else list(present.T)
    inputs = {m: _modality(f"{path}: {m!r}", arrays[m], column, m in tokens) for m, column in zip(modalities, here, strict=True)}
    named = getattr(arrays[label], "class_names", None) if class_names is None else class_names
    target, class_names = as_classes(np.asarray(arrays[label]), f"{path}: {label!r}", named)
    others = {key: a for key, a in arrays.items() if key not in wanted and a.shape[:1] == (N,)}
    fields, unread = _fields({key: a for key, a in others.items() if isinstance(a, np.ndarray) or a.ndim == 1})
    return MultimodalDataset(inputs, target, fields, present, class_names, unread), described


def _check_names(path: str | Path, modalities: Sequence[str], label: str) -> None:
    if isinstance(modalities, str):
        raise TypeError(f"modalities: expected a sequence of names, got the string {modalities!r}")
    if not modalities:
        raise ValueError(f"modalities: expected at least one key of {path}, got none")
    if len(set(modalities)) != len(modalities):
        raise ValueError(f"modalities: expected each name once, got {', '.join(modalities)}")
    if label in modalities:
        raise ValueError(f"label: expected another key than the modalities {', '.join(modalities)}, got {label!r}")


def _columns(path: str | Path, mask: Array, stored: Array | None, N: int, modalities: Sequence[str]) -> Tensor:
    """Return the mask as bool [N, M] in the order of `modalities`; stored: the names of its columns in the file, if any."""
    names = list(modalities)
    if stored is not None:
        if stored.ndim != 1 or stored.dtype.kind not in "US":
            got = f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(f"{path}: 'modalities': expected the names of the columns of present, strings [M], got {got}")
        names = as_strings(stored, f"{path}: 'modalities'").tolist()
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: 'modalities': expected each name once, got {', '.join(names)}")
    if mask.dtype != np.bool_ or mask.shape != (N, len(names)):
        raise ValueError(
            f"{path}: expected present to be bool [{N}, {len(names)}] (samples, {', '.join(names)}), "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if unknown := [m for m in modalities if m not in names]:
        raise ValueError(f"{path}: present has columns for {', '.join(names)}, and none for {', '.join(unknown)}")
    return torch.from_numpy(mask[:, [names.index(m) for m in modalities]])


def _modality(name: str, array: Array | Source, present: Tensor | None, as_tokens: bool) -> Tensor | Column:
    """Return numbers [N, ...] that torch computes with; of a source, when they are asked for."""
    if isinstance(array, np.ndarray):
        return _as_tensor(array, present, None, name=name, as_tokens=as_tokens)
    array.read(np.arange(min(1, array.shape[0])))  # raises already here where no row tells the shape
    return Column(array, partial(_as_tensor, name=name, as_tokens=as_tokens), present)


def _as_tensor(array: Array, present: Tensor | None, rows: Tensor | None, *, name: str, as_tokens: bool) -> Tensor:
    """Return numbers [N, ...] that torch computes with; rows that are not `present` may hold anything of the dtype.

    rows: their numbers in the file, where these are not 0, 1, ….
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected numbers, got dtype {array.dtype}")
    here = np.ones(len(array), dtype=bool) if present is None else present.numpy()
    if array.dtype.kind == "u" and array[here].max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected integers below 2^63, got {array[here].max()}")
    native = array.dtype.newbyteorder("=")
    dtype = np.int64 if as_tokens and array.dtype == np.uint8 else _DTYPES.get(native.name, native)
    with np.errstate(over="ignore"):  # of long doubles, which are infinite then
        x = torch.from_numpy(np.ascontiguousarray(array, dtype))
    if x.is_floating_point() and not math.isfinite(x.sum()):  # or all values are finite, which is told much faster
        finite = x.isfinite().reshape(len(x), math.prod(x.shape[1:])).all(1).numpy()
        if (lost := np.flatnonzero(~finite & here)).size:
            number = lost[0] if rows is None else rows[lost[0]]
            cure = (
                "" if rows is not None or not here.all() else "; an array 'present', bool [N, M], says which rows have a modality"
            )
            raise ValueError(f"{name}: expected finite values, row {number} has others{cure}")
    return x.div_(255) if array.dtype == np.uint8 and not as_tokens else x


def _fields(arrays: Mapping[str, Array | Source]) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the fields, and why those that cannot be read cannot."""
    fields, unread = dict[str, Array](), dict[str, str]()
    for name, array in arrays.items():
        try:
            fields[name] = _as_field(name, np.asarray(array))
        except ValueError as error:
            unread[name] = str(error)
    return fields, unread


def _as_field(name: str, array: Array) -> Array:
    """Return a field in this machine's byte order; bytes as strings where they are UTF-8."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return as_strings(array, name)
    except ValueError:
        return array

"""Data sets of Hugging Face's ``datasets`` that ``save_to_disk`` has written, of which rows are read where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_fast.data.column import Array

PLAIN = ("Value", "ClassLabel", "Array2D", "Array3D", "Array4D", "Array5D")
LISTS = ("List", "LargeList", "Sequence")


class SavedColumn:
    """A column [N, …] of numbers or names, of one shape in all rows; a ``ClassLabel`` is of names, all in `class_names`.

    A null among floats is NaN. Raises ValueError, naming path and column, where `read` finds rows of unlike shapes, or none in
    place of any other value, of which NumPy would make one up.
    """

    def __init__(self, dataset: Any, path: Path, name: str):
        self.path, self.name, self.class_names = path, name, getattr(dataset.features[name], "names", None)
        kind = _kind(dataset.features[name])
        exact = {"dtype": np.dtype(kind)} if np.dtype(kind).kind in "biuf" else {}  # or float64 would become float32
        self.rows = dataset.select_columns([name]).with_format("numpy", **exact)
        self._arrow, self._floats = dataset.select_columns([name]).with_format("arrow"), np.dtype(kind).kind == "f"
        chunks = dataset.data.column(name).chunks
        self._nulls = any(map(_has_null, chunks))
        rows = np.flatnonzero(np.concatenate([chunk.is_valid() for chunk in chunks])) if self._nulls else np.zeros(1, np.int64)
        self.shape, self.dtype = self._example(len(dataset), np.dtype(kind), rows[:100])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def _example(self, N: int, dtype: np.dtype[Any], rows: NDArray[np.int64]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype as of the first of `rows` that can be read; what is wrong with others is said when asked for."""
        for row in rows:
            try:
                first = self.read(np.array([row]))
            except ValueError:
                continue
            return (N, *first.shape[1:]), first.dtype
        return (N,), dtype

    def read(self, rows: NDArray[np.int64]) -> Array:
        """Return rows int64 [K] as an array [K, …]."""
        if not len(rows):
            return np.empty((0, *self.shape[1:]), self.dtype)
        if not self._floats:
            self._check_nulls(rows)
        try:
            found: Array = np.asarray(self.rows[rows][self.name])
        except Exception as error:  # of damaged files and of lists that do not fit together pyarrow and NumPy say many things
            self._check_nulls(rows)
            raise ValueError(f"{self.path}: cannot read {self.name!r}: {error}") from error
        if found.dtype.kind == "O":
            self._check_nulls(rows)
        if found.dtype.kind not in "biufUS" or (found.dtype.kind == "f" and self.class_names is not None):
            raise ValueError(f"{self.path}: {self.name!r}: expected values of one shape in all rows, got {found.dtype}")
        if self.class_names is None:
            return found
        if len(found) and found.min() < 0:
            row = rows[int(found.argmin())]
            raise ValueError(f"{self.path}: {self.name!r}: expected a class in every row, row {row} has none ({found.min()})")
        return np.array(self.class_names)[found]

    def _check_nulls(self, rows: NDArray[np.int64]) -> None:
        if not self._nulls:
            return
        chunks = self._arrow[rows][self.name].chunks
        if any(map(_has_null, chunks)):
            lacking = [_has_null(chunk.slice(i, 1)) for chunk in chunks for i in range(len(chunk))]
            row = rows[lacking.index(True)]
            raise ValueError(f"{self.path}: {self.name!r}: expected a value in every row, row {row} has none")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.read(np.arange(self.shape[0])).astype(dtype or self.dtype, copy=False)


def _has_null(values: Any) -> bool:
    """Return whether any value of a pyarrow array is null, or in a list of it."""
    values = getattr(values, "storage", values)  # of an Array2D, its lists
    return values.null_count > 0 or (hasattr(values, "flatten") and _has_null(values.flatten()))


def _kind(feature: Any) -> str:
    """Return the dtype of a feature's values as NumPy names it, "object" of what is none of numbers or names."""
    while type(feature).__name__ in LISTS:
        feature = feature.feature
    kind = {"string": "str", "large_string": "str"}.get(str(getattr(feature, "dtype", "")), getattr(feature, "dtype", ""))
    try:
        return np.dtype(kind).name if type(feature).__name__ in PLAIN else "object"
    except TypeError:
        return "object"


def is_saved(folder: Path) -> bool:
    """Return whether ``datasets`` has written a folder."""
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def read_saved(folder: Path) -> tuple[dict[str, SavedColumn], list[str]]:
    """Return the columns of numbers or names, and the names of the others.

    Raises ImportError without ``datasets``; ValueError, naming the folder, for one of several splits, without rows, or damaged.
    """
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ValueError(f"{folder}: expected one split, as {folder / splits[0]}, got {', '.join(splits)}")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'{folder}: was written by datasets, which is missing: pip install "mla_fast[datasets]"') from error
    try:
        files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        saved: Any = datasets.load_from_disk(str(folder)) if files else ()  # it cannot load what it has saved of no rows
    except Exception as error:  # pyarrow's among them
        raise ValueError(f"{folder}: expected what datasets.Dataset.save_to_disk writes, got {error}") from error
    if not len(saved):
        raise ValueError(f"{folder}: expected at least one row, got none")
    objects = [name for name, feature in saved.features.items() if _kind(feature) == "object"]
    return {name: SavedColumn(saved, folder, name) for name in saved.features if name not in objects}, objects

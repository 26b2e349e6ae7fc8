"""A folder of NumPy ``.npy`` files, of whose arrays rows are read where they are, without the rest."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mla_fast.data.column import Array

LFS = b"version https://git-lfs"


class NpyFile:
    """An array of a ``.npy`` file of which rows are read at their positions.

    Reads instead of a map (``np.load(mmap_mode="r")``): mapped pages count as resident memory, random rows take twice as long,
    and a file that is cut short while it is mapped kills the process.

    Raises ValueError, naming the file, for one that is not of NumPy, cut short, in Fortran order, or of Python objects.
    """

    def __init__(self, path: Path):
        self.path, self._expected = path, np.empty(0, np.int64)
        try:
            with open(path, "rb") as file:
                start = file.read(len(LFS))
                if start == LFS:
                    raise ValueError("expected a NumPy array, got a Git LFS pointer (git lfs pull fetches what it stands for)")
                if not start.startswith(np.lib.format.MAGIC_PREFIX):
                    raise ValueError("expected a NumPy array, got something else")
                file.seek(0)
                self.shape, fortran, self.dtype = _header(file)
                self.offset, size = file.tell(), os.fstat(file.fileno()).st_size
        except Exception as error:  # of a damaged header NumPy says many things
            raise ValueError(f"{path}: {error}") from error
        self.row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        expected = self.offset + self.dtype.itemsize * math.prod(self.shape)
        if not self.dtype.hasobject and size != expected:
            raise ValueError(f"{path}: expected {expected} bytes for {self.dtype} {list(self.shape)}, got {size}: cut short?")
        if fortran and self.ndim > 1:
            raise ValueError(f"{path}: expected C order, as np.save(file, np.ascontiguousarray(a)) writes, got Fortran order")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def read(self, rows: NDArray[np.int64]) -> Array:
        """Return rows int64 [K] as an array [K, …]: those that follow each other at once, in the order of the file."""
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not found.nbytes:
            return found
        to, width, runs = _bytes(found), self.row_bytes, _runs(rows)
        if len(runs) > 1 and not np.array_equal(rows, self._expected):
            self._expect(runs)  # the disk looks for all of them at once
        for row, begin, end in runs:
            self._read_into(to[begin * width : end * width], self.offset + row * width)
        return found

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Have the disk begin to read rows int64 [K] that will be asked for soon."""
        self._expected = rows
        self._expect(_runs(rows))

    def _expect(self, runs: list[list[int]]) -> None:
        if hasattr(os, "posix_fadvise") and self.row_bytes:
            for row, begin, end in runs:
                where = (self.offset + row * self.row_bytes, (end - begin) * self.row_bytes)
                os.posix_fadvise(self._file.fileno(), *where, os.POSIX_FADV_WILLNEED)

    def _read_into(self, to: memoryview, position: int) -> None:
        while len(to):  # a call reads at most 2 GiB
            count = os.preadv(self._file.fileno(), [to], position)
            if not count:
                raise ValueError(f"{self.path}: expected as many bytes as when it was opened, got fewer")
            to, position = to[count:], position + count

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found = np.empty(self.shape, self.dtype)
        if found.nbytes:
            self._read_into(_bytes(found), self.offset)
        return found.astype(dtype or self.dtype, copy=False)

    @functools.cached_property
    def _file(self) -> BinaryIO:
        return open(self.path, "rb", buffering=0)

    def __reduce__(self) -> tuple[type[NpyFile], tuple[Path]]:
        return type(self), (self.path,)  # each process opens it by itself


def _runs(rows: NDArray[np.int64]) -> list[list[int]]:
    """Return (first row, begin, end) of each stretch of `rows` that follow each other, in the order of the file."""
    if not len(rows):
        return []
    begins = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    ends = [*begins[1:], len(rows)]
    order = np.argsort(first := rows[begins])
    found: list[list[int]] = np.stack([first, begins, ends], 1)[order].tolist()
    return found


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"expected version 1 or 2 of the format, got {version[0]}")
    return read(file)


def npy_paths(path: Path) -> list[Path]:
    """Return the ``.npy`` files of a folder, without the hidden ones, as macOS leaves beside each."""
    return [file for file in sorted(path.glob("*.npy")) if not file.name.startswith(".")]


def read_folder(path: Path) -> tuple[dict[str, NpyFile], list[str]]:
    """Return the arrays of a folder by the names of their files, and the names of those of Python objects."""
    files = {file.stem: NpyFile(file) for file in npy_paths(path)}
    objects = [name for name, file in files.items() if file.dtype.hasobject]
    return {name: file for name, file in files.items() if name not in objects}, objects

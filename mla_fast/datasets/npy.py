"""``.npy`` files that others have published, those of Python objects among them, read without running anything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_fast.datasets.pickles import run_plain


def load_npy(path: Path, objects: bool = False) -> NDArray[Any]:
    """Return the array of a ``.npy``, if of objects, then strings, numbers and None; raise ValueError for anything else."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            needed, left = math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell()
            if not dtype.itemsize or (needed > left and not dtype.hasobject):
                raise ValueError(f"{needed} bytes of {dtype} {list(shape)}, got {left}")
            if not dtype.hasobject:
                file.seek(0)
                return np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # damage makes NumPy raise nearly anything
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path}: expected an array in NumPy's format: {reason}") from None
        array = run_plain(path, file.read()) if objects else None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: expected an array of numbers or strings, got Python objects")
    return array


def load_names(path: Path) -> list[Any]:
    """Return the entries of a ``.npy`` of numbers, strings, or Python objects that are such; raise ValueError for any other."""
    return entries(path, load_npy(path, objects=True))


def entries(path: Path, array: NDArray[Any]) -> list[Any]:
    """Return the entries of an array [N] or [N, 1] of a file; raise ValueError that names it for any other."""
    if array.ndim == 0 or array.shape[1:] not in ((), (1,)) or not array.dtype.itemsize:
        raise ValueError(f"{path}: expected names [N] or [N, 1], got {array.dtype} {list(array.shape)}")
    try:
        return array.ravel().tolist()  # type: ignore[no-any-return]
    except Exception as error:  # of characters that are none, a ValueError or a SystemError
        raise ValueError(f"{path}: expected names, got others ({error})") from None

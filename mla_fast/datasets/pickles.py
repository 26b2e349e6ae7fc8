"""Pickles that others have published, read without running anything that is in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand in for ``_codecs.encode``, by which NumPy's arrays have their bytes in old pickles."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"expected bytes in latin1, got {encoding!r}")
    return text.encode("latin1")


class PlainUnpickler(pickle.Unpickler):
    """Unpickle strings, numbers, lists, tuples, dicts, sets and NumPy arrays and scalars; refuse everything else."""

    ALLOWED = {
        ("builtins", "set"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if (module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"expected strings, numbers, lists, dicts, sets and NumPy arrays, got {module}.{name}")


def load_plain(path: Path) -> Any:
    """Return what a pickle holds, strings of Python 2 among it; raise ValueError that names the file for anything else."""
    with path.open("rb") as file:
        return _load(file, path)


def load_names(path: Path) -> list[Any]:
    """Return the entries of a ``.npy`` of numbers, strings, or Python objects of the kinds of ``PlainUnpickler``."""
    with path.open("rb") as file:
        try:
            return np.load(file, allow_pickle=False).tolist()  # type: ignore[no-any-return]
        except ValueError as error:
            if "Object arrays" not in str(error):
                raise ValueError(f"{path}: expected an array ({error})") from None
        file.seek(0)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        read(file)
        return list(np.ravel(np.asarray(_load(file, path), dtype=object)))


def _load(file: BinaryIO, path: Path) -> Any:
    try:
        return PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # damage makes the unpickler raise nearly anything
        raise ValueError(f"{path}: refused or damaged, nothing in it was run: {error}") from None

"""The arrays of an ``.npz`` file, every byte of which is checked."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from mla_fast.data.column import Array


def read_arrays(path: str | Path) -> tuple[dict[str, Array], list[str]]:
    """Return all arrays and the names of those of Python objects; check every one against its checksum.

    Raises ValueError for damage of any kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a .npz file, or cut short (expected a zip archive of NumPy arrays)") from error
    arrays: dict[str, Array] = {}
    objects: list[str] = []
    with archive:
        if min(found := len(archive.infolist()), 2**16 - 1) != (expected := _members(path)):
            raise ValueError(f"{path}: damaged: expected {expected} arrays, as the archive says, got {found}")
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            if key in arrays or key in objects:
                raise ValueError(f"{path}: expected one array of each name, got two of {key!r}")
            try:
                array = _read_member(archive, member)
            except Exception as error:  # NumPy, zipfile and zlib let the exceptions of all their layers through
                raise ValueError(f"{path}: cannot read array {key!r}: {error}") from error
            if array is None:
                objects.append(key)
            else:
                arrays[key] = array
    return arrays, objects


def _members(path: str | Path) -> int:
    """Return how many members a zip archive says it has, up to 2^16 − 1; zipfile overlooks some that damage hides."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16 - 22))  # the record at the end, and the longest comment after it
        record = file.read().rpartition(b"PK\5\6")[2]
    return int.from_bytes(record[6:8], "little")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array | None:
    """Return an array, or None for one of Python objects; read to the end, where zipfile compares the checksum."""
    magic = np.lib.format.MAGIC_PREFIX
    with archive.open(member) as file:
        if file.read(len(magic)) != magic:
            raise ValueError("it is not a NumPy array")
    with archive.open(member) as file:
        try:
            array: Array | None = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            if "Object arrays" not in str(error):
                raise
            array = None
        rest = file.read()
        if rest and array is not None:
            raise ValueError(f"expected {array.nbytes} bytes for {array.dtype} {list(array.shape)}, got {len(rest)} more")
    return array

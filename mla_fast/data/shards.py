"""WebDataset shards: tar files of samples, of whose members those of a batch are read where they are."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mla_fast.data.column import Array, Source
from mla_fast.data.dataset import listed

IMAGES, SCALARS = ("jpg", "jpeg", "png"), ("cls", "txt")
ABSENT = -1


def shard_paths(path: Path) -> list[Path]:
    """Return the shards of a folder of .tar files, a .tar file or a pattern ``NAME-{0000..0015}.tar``; none for all else.

    Hidden files of a folder are none, as macOS leaves beside each.

    Raises FileNotFoundError that names a missing shard, and ImportError without ``webdataset``.
    """
    if path.is_dir():
        return [shard for shard in sorted(path.glob("*.tar")) if not shard.name.startswith(".")]
    if path.suffix != ".tar":
        return []
    shards = [Path(name) for name in _webdataset(path).shardlists.expand_urls(str(path))]
    if missing := [shard for shard in shards if not shard.exists()]:
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(shards)} shards are missing: {listed(missing, 5)}")
    return shards


def _webdataset(path: Path) -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(f'{path}: reading shards takes webdataset: pip install "mla_fast[webdataset]"') from error
    return webdataset


class ShardColumn:
    """The members of one name, one of each sample: an array [N, …] of whose rows none is read before it is asked for.

    where: int64 [N, 3], the shard, the position in it and the length of each sample's member; a length of −1 where it has none,
        which is read as zeros.

    Raises ValueError, naming the shard and the member, for one that cannot be read, or is unlike the first in dtype or shape.
    """

    def __init__(self, shards: Sequence[Path], name: str, extension: str, where: NDArray[np.int64]):
        self.shards, self.name, self.extension, self.where = list(shards), name, extension, where
        decoders = _webdataset(self.shards[0]).autodecode
        self._decode = decoders.Decoder([decoders.ImageHandler("rgb8")], only=(extension,))
        try:
            self._first = self._member(int(np.argmax(where[:, 2] != ABSENT)))
        except ValueError:
            if extension.rpartition(".")[2] not in SCALARS:
                raise
            self._first = np.zeros((), np.int64)  # of a field that nobody asks for; who does is told when it is read
        self.shape, self.dtype = (len(where), *self._first.shape), self._first.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def read(self, rows: NDArray[np.int64]) -> Array:
        """Return rows int64 [K] as an array [K, …]."""
        found: list[Array] = [self._first] * len(rows)
        for i in np.lexsort((self.where[rows, 1], self.where[rows, 0])):  # in the order of the files
            found[i] = self._checked(int(rows[i])) if self.where[rows[i], 2] != ABSENT else np.zeros_like(self._first)
        return np.stack(found) if found else np.empty((0, *self.shape[1:]), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if (lacking := np.flatnonzero(self.where[:, 2] == ABSENT)).size:
            raise ValueError(f"{self._place(int(lacking[0]))}: expected it in every sample, this one has none")
        found = self.read(np.arange(len(self.where)))
        return found if dtype is None else found.astype(dtype)

    def _checked(self, row: int) -> Array:
        member, first = self._member(row), self._first
        alike = member.dtype == first.dtype or member.dtype.kind == first.dtype.kind == "U"
        if member.shape != first.shape or not alike:
            expected = f"{first.dtype} {list(first.shape)}, as in the first sample"
            raise ValueError(f"{self._place(row)}: expected {expected}, got {member.dtype} {list(member.shape)}")
        return member

    def _member(self, row: int) -> Array:
        shard, position, length = self.where[row].tolist()
        try:
            with open(self.shards[shard], "rb", buffering=0) as file:
                content = os.pread(file.fileno(), length, position)
            found = self._decode({"__key__": str(row), self.extension: content})[self.extension]
            return np.asarray(found.rstrip("\r\n") if isinstance(found, str) else found)  # an editor ends a text with one
        except Exception as error:  # the decoders let those of all their libraries through
            raise ValueError(f"{self._place(row)}: cannot be read: {error.__cause__ or error}") from error

    def _place(self, row: int) -> str:
        shard = int(self.where[row, 0])
        number = row - int(np.argmax(self.where[:, 0] == shard))
        return f"{self.shards[shard]}: {self.extension!r} of sample {number}"


class _Index:
    """Where the members of each name are, of sample after sample."""

    def __init__(self, wanted: Collection[str]) -> None:
        self.wanted = wanted
        self.shard_of: list[int] = []  # each sample
        self.members: dict[str, dict[int, tuple[int, int]]] = {}  # position and length of those of each name, by sample
        self.extensions: dict[str, str] = {}

    def add(self, number: int, shard: Path) -> None:
        """Go through the headers of a shard; raise ValueError for one that is damaged, or has a member of a sample twice."""
        split, last, seen = _webdataset(shard).tariterators.base_plus_ext, None, set[str]()
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    key, extension = split(member.name)
                    if not member.isfile() or key is None:
                        continue
                    if key != last:
                        self.shard_of.append(number)
                        last, seen = key, set[str]()
                    if extension.lower() in seen:
                        raise ValueError(f"{shard}: expected a key of each sample's own, got two {key!r} with {extension!r}")
                    seen.add(extension.lower())
                    self._add_member(extension.lower(), (member.offset_data, member.size), shard)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(
                f"{shard}: expected an uncompressed tar file, got something else or a part of one: {error}"
            ) from error

    def _add_member(self, extension: str, where: tuple[int, int], shard: Path) -> None:
        name, kind = extension.rpartition(".")[0] or extension, extension.rpartition(".")[2]
        known = self.extensions.setdefault(name, extension)
        if name in self.wanted and (known != extension or kind not in ("npy", *IMAGES, *SCALARS)):
            expected = known if known != extension else f"one of .npy, .{', .'.join(IMAGES)}, .{', .'.join(SCALARS)}"
            raise ValueError(f"{shard}: {name!r}: expected {expected}, got {extension}")
        self.members.setdefault(name, {})[len(self.shard_of) - 1] = where

    def where(self, name: str) -> NDArray[np.int64]:
        """Return the places that ``ShardColumn`` takes."""
        found = np.zeros((len(self.shard_of), 3), np.int64)
        found[:, 0], found[:, 2] = self.shard_of, ABSENT
        found[list(self.members[name]), 1:] = list(self.members[name].values())
        return found


def read_shards(shards: Sequence[Path], wanted: Collection[str] = ()) -> dict[str, Array | Source]:
    """Return the members of all samples by name: ``audio`` for KEY.audio.npy, ``jpg`` for KEY.jpg; only headers are read.

    Those `wanted`; and to split by, classes and texts that have a name and that all samples have, as KEY.speaker.txt, and
    ``shard``, the name of each sample's. Where samples lack some of those wanted, ``present`` says which have them, and
    ``modalities`` what its columns are.

    Raises ValueError, naming the shard, for one that is damaged, or where no sample has what is wanted and in others some has.
    """
    index = _Index(wanted)
    for number, shard in enumerate(tqdm(shards, desc="shards", leave=False, disable=None)):
        index.add(number, shard)
    places, here = {}, {}
    for name, extension in index.extensions.items():
        where = index.where(name)
        has, named = where[:, 2] != ABSENT, "." in extension and extension.rpartition(".")[2] in SCALARS
        if name in wanted or (named and has.all()):
            places[name] = where
        if name in wanted:
            here[name] = has
            if lacking := sorted({*range(len(shards))} - {*where[has, 0].tolist()}):
                raise ValueError(f"{shards[lacking[0]]}: expected {name!r} in its samples, as in other shards, got none")
    arrays: dict[str, Array | Source] = {
        name: ShardColumn(shards, name, index.extensions[name], where) for name, where in places.items()
    }
    if not all(has.all() for has in here.values()) and not {"present", "modalities"} & arrays.keys():
        arrays |= {"present": np.stack(list(here.values()), 1), "modalities": np.array(list(here))}
    return {"shard": np.array([shard.name for shard in shards])[index.shard_of], **arrays}

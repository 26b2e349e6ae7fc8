"""A data set that decodes its samples when they are asked for."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mla_fast.data.dataset import listed
from mla_fast.datasets.cache import Cache
from mla_fast.datasets.files import DecodeError, problem_with
from mla_fast.datasets.readers import CompactReader, Reader

Sample = tuple[dict[str, Tensor], Tensor, Tensor]
WITH_VALIDATION = ("train", "validation", "test")


@dataclass(frozen=True)
class Entry:
    """A sample: its name, its class, what each modality is read from (None where it has none), and its speaker or session."""

    id: str
    label: int
    sources: Mapping[str, Any]
    group: str = ""


@dataclass
class Found:
    """What a data set found on disk: its entries, and {reason: names} of what it left out."""

    entries: list[Entry] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(name)


class LazyDataset(Dataset[Sample]):
    """Return ``({modality: tensor}, label int64 [], present bool [M])`` of each sample, decoded in the worker that asks for it.

    A modality that has no file, or one that is empty, a Git LFS pointer, silent or damaged, is absent from its sample: `present`
    is False there, the tensor is zeros, and a warning names a file that turns out to be damaged. ``describe`` counts what is
    known. Samples with no modality at all are left out.

    modalities: the names, in the order of the columns of `present`. class_names: of the classes 0, 1, ….
    entries: the samples; left_out: {reason: names} of samples that are not among them; absent: {"modality: reason": names}.
    augment: whether to crop, flip and jitter images at random, from torch's generator; by default in the part "train" alone.
    cache: a folder that ``mla_fast.datasets.prepare`` has written, from which decoded samples are read.

    parts: those that the data set has.

    Raises ValueError if no sample is left, and for a cache that was made in another way.
    """

    parts: Sequence[str] = ("train", "test")

    def __init__(
        self,
        found: Found,
        readers: Mapping[str, Reader],
        class_names: Sequence[str],
        *,
        augment: bool = False,
        cache: str | Path | None = None,
        name: str = "",
    ):
        self.readers, self.class_names, self.augment, self.name = dict(readers), list(class_names), augment, name
        self.left_out, self.absent = {k: list(v) for k, v in found.left_out.items()}, dict[str, list[str]]()
        self.entries = [entry for entry in map(self._checked, found.entries) if entry is not None]
        if not self.entries:
            raise ValueError(f"root: expected samples, got none ({self._counts() or 'nothing was found'})")
        self.cache = None if cache is None else Cache(Path(cache), self.readers)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.readers)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def target(self) -> Tensor:
        """The classes of all samples, int64 [N]."""
        return torch.tensor([entry.label for entry in self.entries])

    @property
    def groups(self) -> list[str]:
        """The speaker or session of each sample."""
        return [entry.group for entry in self.entries]

    def identity(self) -> str:
        """Return what tells these samples from others: names, classes, and the sizes of files or the values of features."""
        found = hashlib.sha256()
        for entry in self.entries:
            found.update(repr((entry.id, entry.label, [_told(entry.sources[m]) for m in self.modalities])).encode())
        return found.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def sample(self, index: int, *, compact: bool = False) -> Sample:
        """Return a sample; compact: with the small halves of those modalities that have them, see ``CompactReader``."""
        inputs, present = {}, []
        for modality, reader in self.readers.items():
            try:
                decoded = self.decode(index, modality)
            except DecodeError as error:
                decoded = None
                warnings.warn(f"{self.name}: {modality} of {self.entries[index].id} is left out: {error}", stacklevel=3)
            if compact and isinstance(reader, CompactReader):
                inputs[modality] = reader.compact(decoded, self.augment)
            else:
                inputs[modality] = reader.empty() if decoded is None else reader.finish(decoded, self.augment)
            present.append(decoded is not None)
        return inputs, torch.tensor(self.entries[index].label), torch.tensor(present)

    def with_entries(self, entries: Sequence[Entry]) -> LazyDataset:
        """Return the same data set with other entries."""
        other = copy.copy(self)
        other.entries = list(entries)
        return other

    def decode(self, index: int, modality: str) -> Tensor | None:
        """Return a modality of a sample as its reader decodes it, None where it is absent; raise DecodeError if it is damaged."""
        entry = self.entries[index]
        source = entry.sources[modality]
        if source is None:
            return None
        kept = None if self.cache is None else self.cache.read(modality, entry.id)
        return self.readers[modality].decode(source) if kept is None else kept

    def describe(self) -> str:
        """Return a line that counts what is there and what is not."""
        counts = self._counts()
        return f"{self.name}: {len(self)} samples, {self.classes} classes" + (f"; {counts}" if counts else "")

    def _counts(self) -> str:
        named = {**{f"left out, {reason}": names for reason, names in self.left_out.items()}, **self.absent}
        return "; ".join(f"{reason}: {len(names)} ({listed(names, 3)})" for reason, names in named.items())

    def _checked(self, entry: Entry) -> Entry | None:
        """Return the entry without sources that cannot be read, counted; None without any."""
        sources, reasons = {}, []
        for modality in self.readers:
            source = entry.sources.get(modality)
            path = source[0] if isinstance(source, tuple) else source
            if isinstance(path, Tensor):
                reason = None
            else:
                reason = ("no text" if not path.strip() else None) if isinstance(path, str) else problem_with(path)
            sources[modality] = source if reason is None else None
            if reason is not None:
                reasons.append((f"{modality}: {reason}", entry.id))
        if len(reasons) == len(self.readers):
            self.left_out.setdefault("; ".join(reason for reason, _ in reasons), []).append(entry.id)
            return None
        for reason, name in reasons:
            self.absent.setdefault(reason, []).append(name)
        return Entry(entry.id, entry.label, sources, entry.group)


def check_part(part: str, parts: Sequence[str], why: str = "") -> None:
    if part not in (*parts, "all"):
        raise ValueError(f"part: expected one of {', '.join(parts)}, all{why}, got {part!r}")


def chosen(
    readers: Mapping[str, Reader], modalities: Sequence[str] | None, own: Mapping[str, Reader] | None
) -> dict[str, Reader]:
    """Return the readers of the modalities asked for, in that order, some of them the user's own."""
    readers = {**readers, **(own or {})}
    for name in modalities or ():
        if name not in readers:
            raise ValueError(f"modalities: expected among {', '.join(readers)}, got {name!r}")
    return {name: readers[name] for name in modalities or readers}


def find_root(root: str | Path) -> Path:
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"root: expected a folder, got {path}, which is none")
    return path


def _told(source: Any) -> Any:
    if isinstance(source, Path):
        return source.name, source.stat().st_size if source.is_file() else None
    if isinstance(source, Tensor):
        return hashlib.sha256(source.contiguous().numpy().tobytes()).hexdigest()
    return [_told(each) for each in source] if isinstance(source, (list, tuple)) else source

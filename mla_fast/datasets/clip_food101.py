"""Features of UPMC Food-101 by CLIP, on which the paper's Table 4 trains a head alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mla_fast.datasets.files import DecodeError, index, load_array
from mla_fast.datasets.lazy import Entry, Found, LazyDataset, check_part, chosen, find_root
from mla_fast.datasets.readers import Reader

MODALITIES = ("image", "text")


@dataclass(frozen=True)
class Features:
    """Read features float32 [width] from ``.npy`` of [width] or [1, width], or take them as they are."""

    width: int

    def decode(self, source: Path | Tensor) -> Tensor:
        found = source if isinstance(source, Tensor) else torch.from_numpy(load_array(source)).flatten()
        if found.shape != (self.width,):
            raise DecodeError(source, f"expected features [{self.width}], got {list(found.shape)}")
        return found

    def finish(self, decoded: Tensor, augment: bool) -> Tensor:
        return decoded

    def empty(self) -> Tensor:
        return torch.zeros(self.width)


class ClipFood101(LazyDataset):
    """Read features that CLIP has made of Food-101's images and titles, as you exported them.

    Either ``{train,test}.npz`` in the root, each with ``image`` and ``text`` [N, s] and ``label`` [N], numbers or names; or a
    file for each sample, ``{image,text}/{train,test}/CLASS_N.npy`` of [s] or [1, s], also in folders CLASS: the form in which
    MLA's code reads them. s is that of CLIP's projection, 512 for ViT-B/32, the same for both. They are taken as they are:
    whether MLA's were normalised to a length of 1 is not known.

    See ``LazyDataset`` for the rest.
    """

    def __init__(
        self,
        root: str | Path,
        part: str = "train",
        *,
        modalities: Sequence[str] | None = None,
        readers: Mapping[str, Reader] | None = None,
        augment: bool | None = None,
        cache: str | Path | None = None,
    ):
        check_part(part, self.parts)
        folder, found = find_root(root), Found()
        read = _read_npz if (folder / "train.npz").exists() else _read_files
        rows = {which: read(folder, which) for which in self.parts}
        classes = sorted({label for each in rows.values() for _, label, _ in each})
        for which in self.parts if part == "all" else (part,):
            found.entries += [Entry(name, classes.index(label), sources) for name, label, sources in rows[which]]
        width = _width(found.entries)
        own = chosen({modality: Features(width) for modality in MODALITIES}, modalities, readers)
        super().__init__(found, own, list(map(str, classes)), augment=bool(augment), cache=cache, name=f"CLIP Food-101 {part}")


Row = tuple[str, str | int, dict[str, Path | Tensor | None]]  # name, class, sources


def _read_npz(folder: Path, part: str) -> list[Row]:
    path = folder / f"{part}.npz"
    if not path.exists():
        raise FileNotFoundError(f"root: expected {path.name} beside the other part in {folder}, got none")
    with np.load(path, allow_pickle=False) as file:
        absent = [name for name in (*MODALITIES, "label") if name not in file.files]
        if absent:
            raise ValueError(f"{path}: expected arrays image, text and label, got {', '.join(file.files) or 'none'}")
        arrays = {m: torch.from_numpy(np.asarray(file[m], dtype=np.float32)) for m in MODALITIES}
        labels = file["label"].tolist()
    for modality, x in arrays.items():
        if x.dim() != 2 or len(x) != len(labels):
            raise ValueError(f"{path}: {modality}: expected [{len(labels)}, s], as many as labels, got {list(x.shape)}")
    return [(f"{part}_{i}", label, {m: x[i] for m, x in arrays.items()}) for i, label in enumerate(labels)]


def _read_files(folder: Path, part: str) -> list[Row]:
    files = {m: index(folder, [f"{m}/{part}/*.npy", f"{m}/{part}/*/*.npy"]) for m in MODALITIES}
    if not any(files.values()):
        raise FileNotFoundError(f"root: expected {part}.npz or {{image,text}}/{part}/CLASS_N.npy in {folder}, got neither")
    names = sorted(set().union(*files.values()))
    return [(name, name.rsplit("_", 1)[0], {m: files[m].get(name) for m in MODALITIES}) for name in names]


def _width(entries: Sequence[Entry]) -> int:
    """Return the length of the first features that can be read."""
    for entry in entries:
        for source in entry.sources.values():
            if isinstance(source, Tensor):
                return len(source)
            try:
                return int(load_array(source).size) if source is not None else 0
            except DecodeError:
                continue
    raise ValueError("root: expected features, got none that can be read")

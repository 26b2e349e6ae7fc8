"""MVSA-Single: Niu et al., 2016; tweets with an image, each labelled by what its text and its image express."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mla_fast.datasets.files import read_lines
from mla_fast.datasets.food101 import find_jsonl, read_jsonl
from mla_fast.datasets.images import Images
from mla_fast.datasets.lazy import WITH_VALIDATION, Entry, Found, LazyDataset, check_part, chosen, find_root
from mla_fast.datasets.readers import Reader
from mla_fast.datasets.text import Tokenizer, Tokens

CLASSES = ("negative", "neutral", "positive")
LABELS = ("agreeing", "merged")


class MVSA(LazyDataset):
    """Read MVSA-Single: ``data/ID.jpg``, ``data/ID.txt`` and ``labelResultAll.txt``.

    labels: "agreeing" keeps the pairs whose two labels agree, 2,592 of 4,869, as QMF and MLA do, and splits them 3 : 1 : 1.
        "merged" is the usual alternative: where one label is neutral the other counts, what contradicts is left out; 4,511
        pairs, split 8 : 1 : 1. No split was published with the data: `seed` draws one.
        Where QMF's ``{train,dev,test}.jsonl`` (id, label, text, img) are in the root they are the parts, whatever `labels`.
    tokenizer, readers: as in ``Food101``. Texts may be in UTF-8, GB 18030 or Latin-1.

    See ``LazyDataset`` for the rest.
    """

    parts = WITH_VALIDATION

    def __init__(
        self,
        root: str | Path,
        part: str = "train",
        *,
        labels: str = "agreeing",
        seed: int = 0,
        tokenizer: str | Tokenizer = "bert-base-uncased",
        modalities: Sequence[str] | None = None,
        readers: Mapping[str, Reader] | None = None,
        augment: bool | None = None,
        cache: str | Path | None = None,
    ):
        check_part(part, self.parts)
        if labels not in LABELS:
            raise ValueError(f"labels: expected one of {', '.join(LABELS)}, got {labels!r}")
        folder, found = find_root(root), Found()
        listed = find_jsonl(folder)
        found.entries = _read_lists(listed, folder, part) if listed else _read_folder(folder, found, labels, part, seed)
        images = Images(256, squash=False, resample="bicubic", jitter=0.4)
        own = chosen({"text": Tokens(tokenizer), "image": images}, modalities, readers)
        augment = part == "train" if augment is None else augment
        super().__init__(found, own, CLASSES, augment=augment, cache=cache, name=f"MVSA {part}")


def _read_lists(listed: Mapping[str, Path], folder: Path, part: str) -> list[Entry]:
    """Return the entries of QMF's lists."""
    if part not in (*listed, "all"):
        raise FileNotFoundError(f"part: expected {part} among the lists in {folder}, got {', '.join(map(str, listed))}")
    entries = []
    for path in listed.values() if part == "all" else (listed[part],):
        for name, label, text, image in read_jsonl(path, folder):
            if label not in CLASSES:
                raise ValueError(f"{path}: {name}: expected a label of {', '.join(CLASSES)}, got {label!r}")
            entries.append(Entry(name, CLASSES.index(label), {"text": text, "image": image}))
    return entries


def _read_folder(folder: Path, found: Found, labels: str, part: str, seed: int) -> list[Entry]:
    """Return the entries of a part of the published folder."""
    path = folder / "labelResultAll.txt"
    if not path.exists():
        raise FileNotFoundError(f"root: expected labelResultAll.txt or train.jsonl in {folder}, got neither")
    for name, text, image in _read_labels(path):
        label = text if text == image else None
        if label is None and labels == "merged" and "neutral" in (text, image):
            label = text if image == "neutral" else image
        if label is None:
            found.leave_out(name, "labels of text and image that differ" if labels == "agreeing" else "labels that contradict")
            continue
        sources = {"text": folder / "data" / f"{name}.txt", "image": folder / "data" / f"{name}.jpg"}
        found.entries.append(Entry(name, CLASSES.index(label), sources))
    return _part_of(found.entries, part, 0.2 if labels == "agreeing" else 0.1, seed)


def _read_labels(path: Path) -> list[tuple[str, str, str]]:
    """Return [(id, label of the text, label of the image)] of lines ``1<tab>neutral,positive``, after a header."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        fields = [field.lower() for field in re.split(r"[\t,\s]+", line)]
        if len(fields) == 3 and fields[1] in CLASSES and fields[2] in CLASSES:
            rows.append((fields[0], fields[1], fields[2]))
        elif number > 1:
            raise ValueError(f"{path}, line {number}: expected ID<tab>label,label of {', '.join(CLASSES)}, got {line!r}")
    return rows


def _part_of(entries: list[Entry], part: str, share: float, seed: int) -> list[Entry]:
    """Return a random part: `share` for test, as much for validation."""
    if part == "all":
        return entries
    order, each = (
        torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed)).tolist(),
        round(share * len(entries)),
    )
    parts = {"test": order[:each], "validation": order[each : 2 * each], "train": order[2 * each :]}
    return [entries[i] for i in sorted(parts[part])]

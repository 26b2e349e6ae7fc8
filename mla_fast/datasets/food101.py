"""UPMC Food-101: Wang et al., 2015; photos of 101 dishes with the titles of the pages they were found on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mla_fast.datasets.files import index, read_lines, read_text
from mla_fast.datasets.images import Images
from mla_fast.datasets.lazy import Entry, Found, LazyDataset, check_part, chosen, find_root
from mla_fast.datasets.readers import Reader
from mla_fast.datasets.text import Tokenizer, Tokens

ROW = re.compile(r"([^,]+_\d+)\.(?:jpg|txt),(.*),\s*([^,]*?)\s*", re.DOTALL)
START = re.compile(r"^[^,\"\s]+_\d+\.(?:jpg|txt),")


class Food101(LazyDataset):
    """Read UPMC Food-101 as Kaggle has it, by MMBT's lists, or in the folders of MLA's code.

    Kaggle's: ``images/{train,test}/CLASS/CLASS_N.jpg`` and ``texts/{train,test}_titles.csv`` (file, title, class, no header).
    MMBT's and QMF's: ``{train,dev,test}.jsonl`` in the root (id, label, text, img), whose dev is the part "validation".
    MLA's: ``visual/{train,test}_imgs/STEM.jpg`` and ``text_token/{train,test}_token/STEM_token.npy`` [1, 256].

    The CSV has quotes that are never closed, which make common parsers lose rows, and rows that name ``.txt`` in place of
    ``.jpg``: it is read by the names that rows begin with. The class is what the file's name has before its number.

    tokenizer: as ``datasets.text.Tokens`` takes it. readers: of your own in place of ``Tokens(tokenizer)`` and
        ``Images(256, squash=False, resample="bicubic", jitter=0.4)``.

    See ``LazyDataset`` for the rest.
    """

    def __init__(
        self,
        root: str | Path,
        part: str = "train",
        *,
        tokenizer: str | Tokenizer = "bert-base-uncased",
        modalities: Sequence[str] | None = None,
        readers: Mapping[str, Reader] | None = None,
        augment: bool | None = None,
        cache: str | Path | None = None,
    ):
        folder, found = find_root(root), Found()
        listed = find_jsonl(folder)
        self.parts = tuple(listed or ("train", "test"))
        check_part(part, self.parts)
        rows, problems = {}, Found()
        for p in listed or ("train", "test"):
            report = found if part in (p, "all") else problems
            rows[p] = read_jsonl(listed[p], folder) if listed else _read_folders(folder, p, report)
        classes = sorted({label for part_rows in rows.values() for _, label, *_ in part_rows})
        for p in rows if part == "all" else (part,):
            for name, label, text, image in rows[p]:
                found.entries.append(Entry(name, classes.index(label), {"text": text, "image": image}))
        images = Images(256, squash=False, resample="bicubic", jitter=0.4)
        own = chosen({"text": Tokens(tokenizer), "image": images}, modalities, readers)
        augment = part == "train" if augment is None else augment
        super().__init__(found, own, classes, augment=augment, cache=cache, name=f"Food-101 {part}")


Row = tuple[str, str, str | Path | None, Path | None]  # name, class, text, image


def _read_folders(folder: Path, part: str, found: Found) -> list[Row]:
    tokens = index(folder, [f"text_token/{part}_token/*_token.npy"])
    if tokens:
        images = index(folder, [f"visual/{part}_imgs/*.jpg"])
        names = sorted({name.removesuffix("_token") for name in tokens} | images.keys())
        return [(name, name.rsplit("_", 1)[0], tokens.get(f"{name}_token"), images.get(name)) for name in names]
    path, images = folder / "texts" / f"{part}_titles.csv", index(folder, [f"images/{part}/*/*.jpg"])
    if not path.exists():
        raise FileNotFoundError(f"root: expected texts/{part}_titles.csv, {part}.jsonl or text_token/{part}_token in {folder}")
    parsed, unreadable = read_titles(path)
    for row in unreadable:
        found.leave_out(row, "row without file, title and class")
    titles = {name: title for name, title, label in parsed if label == name.rsplit("_", 1)[0]}
    wrong = {name for name, *_ in parsed} - titles.keys()
    for name in sorted(wrong):
        found.leave_out(name, "class in the list is not the file's")
    names = sorted((titles.keys() | images.keys()) - wrong)
    return [(name, name.rsplit("_", 1)[0], titles.get(name), images.get(name)) for name in names]


def read_titles(path: Path) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Return [(name without suffix, title, class)] and the rows without these three.

    A quote that is not closed takes no other row with it.
    """
    rows: list[str] = []
    for line in read_text(path).splitlines():
        if START.match(line) or not rows:
            rows.append(line)
        else:
            rows[-1] += f" {line}"  # a title of several lines
    parsed, unreadable = [], []
    for row in rows:
        match = ROW.fullmatch(row)
        if match is not None:
            title = match[2]
            title = title[1:].removesuffix('"').replace('""', '"') if title.startswith('"') else title
            parsed.append((match[1], title, match[3].strip('"')))
        else:
            unreadable.append(row[:40])
    return parsed, unreadable


def find_jsonl(folder: Path) -> dict[str, Path]:
    """Return {part: list} of the lists of MMBT's or QMF's form in a folder."""
    names = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}
    return {part: folder / name for part, name in names.items() if (folder / name).exists()}


def read_jsonl(path: Path, folder: Path) -> list[Row]:
    """Return the rows (id, label, text, img) of a list of MMBT's or QMF's; raise ValueError that names a line of other things."""
    rows: list[Row] = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            image = None if row.get("img") is None else folder / row["img"]
            rows.append((str(row["id"]).replace("/", "_"), row["label"], row.get("text") or None, image))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected id, label, text and img in JSON, got {line[:60]!r}") from error
    return rows

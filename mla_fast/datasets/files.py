"""Files as people have them: pointers in place of files, frames in no order, texts in any encoding."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_fast.datasets.npy import load_npy
from mla_fast.datasets.pickles import load_plain

LFS = b"version https://git-lfs"
IMAGES = (".jpg", ".jpeg", ".png")


class DecodeError(ValueError):
    """Raised where a file cannot be decoded; its message is "path: reason"."""

    def __init__(self, path: object, reason: str):
        super().__init__(path, reason)  # both, so that it can be sent between processes
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def problem_with(path: Path | None) -> str | None:
    """Return why nothing can be read from a file or a folder of frames, as far as it can be seen without decoding, or None."""
    if path is None or not path.exists():
        return "not on disk"
    if path.is_dir():
        return None if frames_in(path) else "folder without frames"
    size = path.stat().st_size
    if size == 0:
        return "empty file"
    if size < 1024:
        with path.open("rb") as file:
            if file.read(len(LFS)) == LFS:
                return "Git LFS pointer, run git lfs pull"
    return None


def index(root: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Return {name without suffix: path} of what matches; the first pattern wins. macOS' ``._`` files are left out."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if not path.name.startswith("._"):
                found.setdefault(path.stem, path)
    return found


def frames_in(folder: Path) -> list[Path]:
    """Return the images of a folder, in the order of the last number in their names."""
    images = (p for p in folder.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith("._"))
    return sorted(images, key=lambda p: (int((re.findall(r"\d+", p.stem) or ["0"])[-1]), p.name))


def read_text(path: Path) -> str:
    """Return a text in UTF-8, with or without a byte-order mark, else in GB 18030, else in Latin-1, which takes any bytes."""
    data = path.read_bytes()
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text that are not blank, stripped."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def load_array(path: Path) -> NDArray[Any]:
    """Return the array of a ``.npy``, or of a ``.pkl`` that holds nothing else, as float32; raise DecodeError otherwise."""
    try:
        array = load_plain(path, "a NumPy array") if path.suffix == ".pkl" else load_npy(path)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise ValueError(f"expected a NumPy array of numbers, got {getattr(array, 'dtype', type(array).__name__)}")
        return np.asarray(array, dtype=np.float32)
    except (OSError, ValueError, MemoryError) as error:
        raise DecodeError(path, f"not an array ({str(error).removeprefix(f'{path}: ')})") from None

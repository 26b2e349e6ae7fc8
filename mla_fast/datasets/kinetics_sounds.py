"""Kinetics-Sounds: Arandjelović and Zisserman, 2017; the classes of Kinetics-400 that are heard as well as seen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mla_fast.datasets.audio import Fbank
from mla_fast.datasets.files import frames_in, index, read_lines
from mla_fast.datasets.images import Images
from mla_fast.datasets.lazy import Entry, Found, LazyDataset, check_part, chosen, find_root
from mla_fast.datasets.readers import Reader

AUDIO = ("audio_spec/*.npy", "audio_spec/*.pkl", "audio/*_fbank/*.npy", "audio/*.wav", "audio/*/*.wav")
FRAMES = ("visual/*_imgs/Image-01-FPS/*", "visual/*", "video/*.mp4", "video/*/*.mp4")
LISTS = {"train": ("my_train.txt", "my_train_ks.txt"), "test": ("my_test.txt", "my_test_ks.txt")}


class KineticsSounds(LazyDataset):
    """Read Kinetics-Sounds in the folders of OGM-GE's or MLA's code.

    Audio is ``audio_spec/NAME.npy`` or ``.pkl``, ``audio/*_fbank/NAME.npy`` or ``audio/NAME.wav``; images are three frames of
    ``visual/NAME/``, of ``visual/*_imgs/Image-01-FPS/NAME/`` or of ``video/NAME.mp4``. Lists in the root are OGM-GE's
    ``my_{train,test}.txt`` (``NAME,10,label``) or ``my_{train,test}_ks.txt`` (``NAME.mp4 class``); names may end in a time, as
    ``_000058_000068``. OGM-GE has 14,799 and 2,597 of 31 classes, whose names were not published; since videos vanish, nobody has
    them all. Clips of fewer than three extracted frames are left out.

    readers: of your own in place of ``datasets.audio.Fbank()``, for filter banks [1024, 128], and
        ``datasets.images.Images(frames=3)``; ``datasets.audio.Spectrogram()`` is for OGM-GE's [257, 188].

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
        rows = {which: _read_list(folder, names) for which, names in LISTS.items()}
        labels = {label for listed in rows.values() for _, label in listed}
        numbers = all(label.isdigit() for label in labels)
        classes = [str(i) for i in range(max(map(int, labels)) + 1)] if numbers else sorted(labels)
        audio, frames = index(folder, AUDIO), index(folder, FRAMES)
        for name, label in rows["train"] + rows["test"] if part == "all" else rows[part]:
            path = frames.get(name)
            if path is not None and path.is_dir() and 0 < len(frames_in(path)) < 3:
                found.leave_out(name, "fewer than three frames")
                continue
            found.entries.append(Entry(name, classes.index(label), {"audio": audio.get(name), "image": path}))
        own = chosen({"audio": Fbank(), "image": Images(frames=3)}, modalities, readers)
        augment = part == "train" if augment is None else augment
        super().__init__(found, own, classes, augment=augment, cache=cache, name=f"Kinetics-Sounds {part}")


def _read_list(folder: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return [(name, label)] of the first list that is there."""
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise FileNotFoundError(f"root: expected {' or '.join(names)} in {folder}, got neither")
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        match = re.fullmatch(r"(\S+),\d+,(\d+)", line) or re.fullmatch(r"(\S+?)(?:\.mp4)?\s+(\S.*)", line)
        if match is None:
            raise ValueError(f"{path}, line {number}: expected NAME,10,label or NAME.mp4 class, got {line!r}")
        rows.append((match[1], match[2]))
    return rows

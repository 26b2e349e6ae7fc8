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

CLASSES = frozenset(
    "blowing nose,blowing out candles,bowling,chopping wood,dribbling basketball,laughing,mowing lawn,playing accordion,"
    "playing bagpipes,playing bass guitar,playing clarinet,playing drums,playing guitar,playing harmonica,playing keyboard,"
    "playing organ,playing piano,playing saxophone,playing trombone,playing trumpet,playing violin,playing xylophone,"
    "ripping paper,shoveling snow,shuffling cards,singing,stomping grapes,tap dancing,tapping guitar,tapping pen,tickling".split(
        ","
    )
)
AUDIO = ("audio_spec/*.npy", "audio_spec/*.pkl", "audio/*_fbank/*.npy", "audio/*.wav", "audio/*/*.wav")
FRAMES = ("visual/*_imgs/Image-01-FPS/*", "visual/*", "video/*.mp4", "video/*/*.mp4")
CLASS_FOLDERS = {"train": ("train", "video/train"), "test": ("val", "validate", "test", "video/val", "video/test")}
LISTS = {"train": ("my_train.txt", "my_train_ks.txt"), "test": ("my_test.txt", "my_test_ks.txt")}


class KineticsSounds(LazyDataset):
    """Read Kinetics-Sounds in the folders of OGM-GE's or MLA's code.

    Audio is ``audio_spec/NAME.npy`` or ``.pkl``, ``audio/*_fbank/NAME.npy`` or ``audio/NAME.wav``; images are three frames of
    ``visual/NAME/``, of ``visual/*_imgs/Image-01-FPS/NAME/`` or of ``video/NAME.mp4``. Lists in the root are OGM-GE's
    ``my_{train,test}.txt`` (``NAME,10,label``) or ``my_{train,test}_ks.txt`` (``NAME.mp4 class``); names may end in a time, as
    ``_000058_000068``. OGM-GE has 14,799 and 2,597 of 31 classes, whose names were not published; since videos vanish, nobody has
    them all. Clips of fewer than three extracted frames are left out.

    Without lists, the folders of Kinetics-400: ``train/CLASS/NAME.mp4`` and ``val/CLASS/NAME.mp4``, also under ``video/``, of
    which the 31 classes of ``CLASSES`` are taken. Folders may have underscores for spaces, any capitals, and more in parentheses.

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
        rows = {which: _read_list(folder, names) for which, names in LISTS.items()} if _has_lists(folder) else {}
        videos: dict[str, Path] = {}
        for which in () if rows else LISTS:
            rows[which] = _read_class_folders(folder, which, videos, found)
        labels = {label for listed in rows.values() for _, label in listed}
        numbers = all(label.isdigit() for label in labels)
        classes = [str(i) for i in range(max(map(int, labels)) + 1)] if numbers else sorted(labels)
        audio, frames = index(folder, AUDIO), videos | index(folder, FRAMES)
        for name, label in rows["train"] + rows["test"] if part == "all" else rows[part]:
            path = frames.get(name)
            if path is not None and path.is_dir() and 0 < len(frames_in(path)) < 3:
                found.leave_out(name, "fewer than three frames")
                continue
            found.entries.append(Entry(name, classes.index(label), {"audio": audio.get(name), "image": path}))
        own = chosen({"audio": Fbank(), "image": Images(frames=3)}, modalities, readers)
        augment = part == "train" if augment is None else augment
        super().__init__(found, own, classes, augment=augment, cache=cache, name=f"Kinetics-Sounds {part}")


def _has_lists(folder: Path) -> bool:
    """Return whether there are lists, or no class folders to do without them."""
    listed = any((folder / name).exists() for names in LISTS.values() for name in names)
    return listed or not any((folder / name).is_dir() for names in CLASS_FOLDERS.values() for name in names)


def class_of(folder: str) -> str:
    """Return a class folder's name in lower case with single spaces, without what is in parentheses."""
    return " ".join(re.sub(r"\(.*?\)", " ", folder).replace("_", " ").lower().split())


def _read_class_folders(folder: Path, part: str, videos: dict[str, Path], found: Found) -> list[tuple[str, str]]:
    """Return [(name, class)] of a part, add {name: video} to `videos`, and count the classes that are left out."""
    root = next((folder / name for name in CLASS_FOLDERS[part] if (folder / name).is_dir()), None)
    if root is None:
        raise FileNotFoundError(f"root: expected {' or '.join(CLASS_FOLDERS[part])} in {folder}, got none of them")
    rows = []
    for path in sorted(p for p in root.iterdir() if p.is_dir()):
        here = index(path, ["*.mp4"])
        if class_of(path.name) not in CLASSES:
            found.leave_out(path.name, "not a class of Kinetics-Sounds")
            continue
        videos.update(here)
        rows += [(name, class_of(path.name)) for name in here]
    return rows


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

"""CREMA-D: Cao et al., 2014. 7,442 clips of 91 actors who say 12 sentences in six emotions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mla_fast.datasets.audio import Fbank
from mla_fast.datasets.files import index, read_lines
from mla_fast.datasets.images import Images
from mla_fast.datasets.lazy import WITH_VALIDATION, Entry, Found, LazyDataset, check_part, chosen, find_root
from mla_fast.datasets.readers import Reader

EMOTIONS = {"ANG": "Anger", "DIS": "Disgust", "FEA": "Fear", "HAP": "Happy", "NEU": "Neutral", "SAD": "Sad"}
NAME = re.compile(r"(\d{4})_[A-Z]{3}_(ANG|DIS|FEA|HAP|NEU|SAD)_(LO|MD|HI|XX|X)")  # old copies have 1040_ITH_SAD_X
AUDIO = ("AudioWAV/*.wav", "audio/*_fbank/*.npy")
FRAMES = ("Image-01-FPS/*", "visual/*_imgs/Image-01-FPS/*", "VideoFlash/*.flv", "VideoFlash/*.mp4")
LISTED = " with the published lists; split='speaker' has a validation part"
LISTS = {"train": ("train.csv", "my_train_cre.txt"), "test": ("test.csv", "my_test_cre.txt")}


class CremaD(LazyDataset):
    """Read CREMA-D as its Git LFS repository has it, or in the folders of MLA's code.

    Audio is ``AudioWAV/ID.wav`` or ``audio/*_fbank/ID.npy`` [1024, 128]; images are three frames of ``Image-01-FPS/ID/``, of
    ``visual/*_imgs/Image-01-FPS/ID/`` or of ``VideoFlash/ID.flv``. The class is the emotion in the name, in the order of MLA's.

    split: "lists" by ``train.csv`` and ``test.csv`` of OGM-GE or ``my_{train,test}_cre.txt`` of MLA, in the root: 6,698 and 744
        clips, which differ between the two and share all actors. "speaker" tests on the actors whose number ends in 0 and
        validates on those that end in 1. By default lists where there are any.
    readers: of your own in place of ``datasets.audio.Fbank()`` and ``datasets.images.Images(frames=3)``.

    See ``LazyDataset`` for the rest.
    """

    def __init__(
        self,
        root: str | Path,
        part: str = "train",
        *,
        split: str | None = None,
        modalities: Sequence[str] | None = None,
        readers: Mapping[str, Reader] | None = None,
        augment: bool | None = None,
        cache: str | Path | None = None,
    ):
        folder, found = find_root(root), Found()
        self.lists = {p: next((folder / n for n in names if (folder / n).exists()), None) for p, names in LISTS.items()}
        self.split = split or ("lists" if all(self.lists.values()) else "speaker")
        if self.split not in ("lists", "speaker"):
            raise ValueError(f"split: expected lists or speaker, got {split!r}")
        self.parts = WITH_VALIDATION if self.split == "speaker" else ("train", "test")
        check_part(part, self.parts, "" if self.split == "speaker" else LISTED)
        audio, frames = index(folder, AUDIO), index(folder, FRAMES)
        for name in sorted(self._names(folder, part, audio.keys() | frames.keys())):
            match = NAME.fullmatch(name)
            if match is None:
                found.leave_out(name, "not a name of a clip")
                continue
            sources = {"audio": audio.get(name), "image": frames.get(name)}
            found.entries.append(Entry(name, list(EMOTIONS).index(match[2]), sources, match[1]))
        own = chosen({"audio": Fbank(), "image": Images(frames=3)}, modalities, readers)
        augment = part == "train" if augment is None else augment
        super().__init__(found, own, list(EMOTIONS.values()), augment=augment, cache=cache, name=f"CREMA-D {part}")

    def _names(self, folder: Path, part: str, there: set[str]) -> list[str]:
        if self.split == "speaker":
            return [name for name in there if part in ("all", {"0": "test", "1": "validation"}.get(name[3:4], "train"))]
        names = []
        for which in ("train", "test") if part == "all" else (part,):
            path = self.lists[which]
            if path is None:
                raise FileNotFoundError(f"split: expected {' or '.join(LISTS[which])} in {folder}, got neither")
            names += [re.split(r"[,\s]", line)[0].rsplit(".", 1)[0] for line in read_lines(path)]
        other = {"1040_ITH_SAD_X": "1040_ITH_SAD_XX", "1040_ITH_SAD_XX": "1040_ITH_SAD_X"}
        return [other.get(name, name) if name not in there else name for name in names]

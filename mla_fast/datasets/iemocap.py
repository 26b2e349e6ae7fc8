"""IEMOCAP: Busso et al., 2008; ten actors in five sessions of dialogues, by utterance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mla_fast.datasets.audio import CAVMAE, Fbank
from mla_fast.datasets.files import index, read_lines
from mla_fast.datasets.images import Images
from mla_fast.datasets.lazy import WITH_VALIDATION, Entry, Found, LazyDataset, check_part, chosen, find_root
from mla_fast.datasets.readers import Reader
from mla_fast.datasets.text import Tokenizer, Tokens

CLASSES = ("Angry", "Happy", "Neutral", "Sad")
EMOTIONS = {"ang": "Angry", "hap": "Happy", "exc": "Happy", "neu": "Neutral", "sad": "Sad"}
LABEL = re.compile(r"\[(\d+\.\d+) - (\d+\.\d+)\]\t(Ses\d\d\w+)\t(\w+)\t\[.*\]")
SPOKEN = re.compile(r"(Ses\d\d\w+) \[[\d.]+-[\d.]+\]: ?(.*)")
FACES = ("faces/*", "visual/*_imgs/Image-01-FPS/*")


class IEMOCAP(LazyDataset):
    """Read IEMOCAP as released: ``SessionK/{sentences/wav, dialog/avi/DivX, dialog/transcriptions, dialog/EmoEvaluation}``.

    The classes are the usual four, excitement counting as happy: 5,531 utterances. Audio is the utterance's WAV; text its line of
    the transcription; the image is the middle one of ``faces/UTTERANCE/``, which you extract, or else the middle frame, of those
    one a second, of the dialogue's video within the utterance (both actors), for which ``mla_fast[video]`` is needed.

    split: "session" tests on `session`, validates on the one before it and trains on the other three. "lists" takes MLA's
        ``my_{train,test}_iemo.txt`` in the root (3,318 and 1,107 utterances at random, speakers on both sides).
        By default the session.
    tokenizer: as in ``Food101``. readers: of your own in place of ``Fbank(1024, audio.CAVMAE)``, ``Images(256)`` and
        ``Tokens(tokenizer)``; MLA's code has ``Fbank(1024)``, without the standardisation that CAV-MAE was trained with.

    See ``LazyDataset`` for the rest.
    """

    def __init__(
        self,
        root: str | Path,
        part: str = "train",
        *,
        split: str = "session",
        session: int = 5,
        tokenizer: str | Tokenizer = "bert-base-uncased",
        modalities: Sequence[str] | None = None,
        readers: Mapping[str, Reader] | None = None,
        augment: bool | None = None,
        cache: str | Path | None = None,
    ):
        if split not in ("session", "lists"):
            raise ValueError(f"split: expected session or lists, got {split!r}")
        if session not in range(1, 6):
            raise ValueError(f"session: expected 1 … 5, got {session}")
        self.parts = WITH_VALIDATION if split == "session" else ("train", "test")
        check_part(part, self.parts, "" if split == "session" else " with MLA's lists")
        folder, found = find_root(root), Found()
        entries = _read_sessions(folder, found)
        if split == "session":
            held_out = {str(session): "test", str((session - 2) % 5 + 1): "validation"}
            found.entries = [e for e in entries.values() if part in ("all", held_out.get(e.group, "train"))]
        else:
            for name in _listed(folder, part):
                if name in entries:
                    found.entries.append(entries[name])
                else:
                    found.leave_out(name, "in the list, but not among the labels")
        defaults: dict[str, Reader] = {"audio": Fbank(standardize=CAVMAE), "image": Images(256), "text": Tokens(tokenizer)}
        own = chosen(defaults, modalities, readers)
        augment = part == "train" if augment is None else augment
        super().__init__(found, own, CLASSES, augment=augment, cache=cache, name=f"IEMOCAP {part}")


def _read_sessions(folder: Path, found: Found) -> dict[str, Entry]:
    """Return {utterance: entry} of the four classes, and count the others."""
    labels = index(folder, ["Session*/dialog/EmoEvaluation/*.txt"])
    if not labels:
        raise FileNotFoundError(f"root: expected SessionK/dialog/EmoEvaluation/*.txt in {folder}, got none")
    wavs = index(folder, ["Session*/sentences/wav/*/*.wav"])
    faces = index(folder, FACES)
    videos = index(folder, ["Session*/dialog/avi/DivX/*.avi"])
    texts = _spoken(index(folder, ["Session*/dialog/transcriptions/*.txt"]))
    entries = {}
    for dialog, path in labels.items():
        for match in filter(None, map(LABEL.fullmatch, read_lines(path))):
            start, end, name, emotion = float(match[1]), float(match[2]), match[3], match[4]
            if emotion not in EMOTIONS:
                found.leave_out(name, f"emotion {emotion}")
                continue
            video = videos.get(dialog)
            image = faces.get(name) or (None if video is None else (video, start, end))
            sources = {"audio": wavs.get(name), "image": image, "text": texts.get(name)}
            entries[name] = Entry(name, CLASSES.index(EMOTIONS[emotion]), sources, str(int(name[3:5])))
    return entries


def _spoken(transcriptions: Mapping[str, Path]) -> dict[str, str]:
    """Return {utterance: text}; lines without a time are not utterances."""
    lines = (line for path in transcriptions.values() for line in read_lines(path))
    return {match[1]: match[2] for match in map(SPOKEN.fullmatch, lines) if match is not None}


def _listed(folder: Path, part: str) -> list[str]:
    names = []
    for which in ("train", "test") if part == "all" else (part,):
        path = folder / f"my_{which}_iemo.txt"
        if not path.exists():
            raise FileNotFoundError(f"split: expected {path.name} in {folder}, got none")
        names += [line.split("[split|sign]")[0].strip().rsplit(".", 1)[0] for line in read_lines(path)]
    return names

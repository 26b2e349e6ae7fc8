"""IEMOCAP as features of utterances: GCNet's release and MMIN's folds, made into arrays for an ``.npz``."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_fast.datasets.files import DecodeError, load_array
from mla_fast.datasets.pickles import load_names, load_plain

FOLDERS = {"audio": "wav2vec", "text": "deberta", "image": "manet"}
CLASSES = {4: ("happy", "sad", "neutral", "angry"), 6: ("happy", "sad", "neutral", "angry", "excited", "frustrated")}
MMIN_FOLDERS, PARTS = {"audio": "A", "text": "L", "image": "V"}, {"trn": "train", "val": "validation", "tst": "test"}
CPM_NAMES = {"audio": "audio", "text": "text", "image": "video"}
UTTERANCE = re.compile(r"Ses0([1-5])\w*_([FM])\d+")
Arrays = dict[str, NDArray[Any]]


def read_gcnet(root: Path, classes: int = 4, session: int = 5) -> tuple[Arrays, list[str]]:
    """Return arrays by name and what is to be said about them, of GCNet's release of IEMOCAP.

    root: has ``features/{wav2vec…, deberta…, manet…}/UTTERANCE.npy``, or a folder UTTERANCE of .npy that are averaged, and the
        label pickle ``…{classes}way….pkl``, also in a folder: a list of which the first two are {dialog: utterances} and
        {dialog: labels}. It is read by an unpickler that knows containers and NumPy alone.
    classes: 4 or 6. session: 1 … 5, whose utterances have the part "test", the others "train".

    The arrays are ``audio``, ``text``, ``image`` [N, d] in float32; ``present`` bool [N, 3] with its ``modalities``, where
    anything is absent; ``label``, and as strings ``utterance``, ``dialog``, ``session``, ``speaker`` (the actor) and ``part``. A
    modality without a file, or with an empty folder or a damaged file, is absent. Left out and counted are utterances without
    any, and labels that name no class.

    Raises ValueError or FileNotFoundError that name what was expected.
    """
    if classes not in CLASSES:
        raise ValueError(f"classes: expected 4 or 6, got {classes}")
    if session not in range(1, 6):
        raise ValueError(f"session: expected 1 … 5, got {session}")
    folders = {modality: _feature_folder(root, start) for modality, start in FOLDERS.items()}
    rows, said = [], Counter[str]()
    for dialog, name, label in _labels(root, classes):
        match = UTTERANCE.fullmatch(name)
        if match is None or label not in range(classes):
            said[f"label {label!r} is no class" if match is not None else "name is no utterance of IEMOCAP"] += 1
            continue
        found = {modality: _feature(folder, name, said) for modality, folder in folders.items()}
        if all(x is None for x in found.values()):
            said["without any features, left out"] += 1
            continue
        actor = name[3:6] if match[2] == name[5] else name[3:5] + match[2]
        fields = {"utterance": name, "dialog": dialog, "session": match[1], "speaker": actor}
        rows.append((found, CLASSES[classes][label], fields | {"part": "test" if match[1] == str(session) else "train"}))
    return _arrays(root, rows), [f"{count} × {what}" for what, count in sorted(said.items())]


def read_mmin(root: Path, fold: int = 1) -> tuple[Arrays, list[str]]:
    """Return the same of a fold in MMIN's layout: ``{A,V,L}/FOLD/{trn,val,tst}.npy``, ``target/FOLD/{…}_{label,int2name}.npy``.

    Labels may be one-hot [N, C] or [N]; features [N, T, d] are averaged over T. ``part`` is train, validation or test.
    """
    if (root / "A" / "comparE.h5").exists():
        h5 = "A/comparE.h5, V/denseface.h5 and L/bert_large.h5 are MMIN's sequences by frame"
        raise ValueError(f"root: expected folds of arrays, A/{fold}/trn.npy and so on, which MMIN's scripts make; {h5}")
    rows = []
    for short, part in PARTS.items():
        paths = {modality: root / folder / str(fold) / f"{short}.npy" for modality, folder in MMIN_FOLDERS.items()}
        labels = root / "target" / str(fold) / f"{short}_label.npy"
        for path in (*paths.values(), labels):
            if not path.exists():
                raise FileNotFoundError(f"root: expected {path.relative_to(root)} in {root}, got none")
        found = {modality: load_array(path) for modality, path in paths.items()}
        target = load_array(labels)
        target = target.argmax(1) if target.ndim == 2 else target
        names = labels.with_name(f"{short}_int2name.npy")
        numbered: list[Any] = [f"{part} {i}" for i in range(len(target))]
        utterances = [_text(name) for name in (load_names(names) if names.exists() else numbered)]
        if {*map(len, found.values()), len(utterances)} != {len(target)}:
            lengths = ", ".join(f"{modality} {len(x)}" for modality, x in found.items())
            raise ValueError(f"{labels}: expected as many labels as utterances, got {len(target)} and {lengths}")
        for i, name in enumerate(utterances):
            each: dict[str, NDArray[Any] | None] = {modality: _averaged(x[i]) for modality, x in found.items()}
            session = match[1] if (match := UTTERANCE.match(name)) else ""
            rows.append((each, int(target[i]), {"utterance": name, "session": session, "part": part}))
    return _arrays(root, rows), []


def read_cpm(root: Path, fold: int = 1) -> tuple[Arrays, list[str]]:
    """Return the same of a fold in CPM-Net's layout: ``FOLD/{trn,val,tst}.npz`` with audio, video, text, label and name."""
    rows = []
    for short, part in PARTS.items():
        path = root / str(fold) / f"{short}.npz"
        if not path.exists():
            raise FileNotFoundError(f"root: expected {path.relative_to(root)} in {root}, got none")
        with np.load(path, allow_pickle=False) as file:
            absent = [name for name in (*CPM_NAMES.values(), "label") if name not in file.files]
            if absent:
                raise ValueError(f"{path}: expected arrays audio, video, text and label, got {', '.join(file.files) or 'none'}")
            try:
                found = {modality: np.asarray(file[name], dtype=np.float32) for modality, name in CPM_NAMES.items()}
                target = file["label"]
                names = file["name"].tolist() if "name" in file.files else [f"{part} {i}" for i in range(len(target))]
            except ValueError as error:
                raise ValueError(f"{path}: expected arrays of numbers and strings, saved without pickle ({error})") from None
        target = target.argmax(1) if target.ndim == 2 else target
        if {*map(len, found.values()), len(names)} != {len(target)}:
            raise ValueError(f"{path}: expected as many rows of each array as labels, {len(target)}")
        for i, name in enumerate(map(_text, names)):
            each: dict[str, NDArray[Any] | None] = {modality: _averaged(x[i]) for modality, x in found.items()}
            session = match[1] if (match := UTTERANCE.match(name)) else ""
            rows.append((each, int(target[i]), {"utterance": name, "session": session, "part": part}))
    return _arrays(root, rows), []


def _text(name: Any) -> str:
    name = name[0] if isinstance(name, (list, tuple, np.ndarray)) and len(name) else name
    return name.decode() if isinstance(name, bytes) else str(name)


def _feature_folder(root: Path, start: str) -> Path:
    found = sorted(path for path in (root / "features").glob(f"{start}*") if path.is_dir())
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"root: expected one folder {root / 'features'}/{start}*, got {got}")
    return found[0]


def _labels(root: Path, classes: int) -> list[tuple[str, str, Any]]:
    """Return (dialog, utterance, label) of the label pickle."""
    found = sorted(root.rglob(f"*{classes}way*.pkl"))
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"root: expected one label pickle *{classes}way*.pkl in {root}, got {got}")
    content = load_plain(found[0])
    if not (isinstance(content, (list, tuple)) and len(content) > 1 and all(isinstance(part, dict) for part in content[:2])):
        expected = "expected a list of {dialog: utterances}, {dialog: labels}, …"
        raise ValueError(f"{found[0]}: {expected}, got {type(content).__name__}")
    labels: list[tuple[str, str, Any]] = []
    for dialog, names in content[0].items():
        values = content[1].get(dialog, ())
        if len(names) != len(values):
            raise ValueError(f"{found[0]}: {dialog}: expected a label for each of {len(names)} utterances, got {len(values)}")
        labels += [(_text(dialog), _text(name), value) for name, value in zip(names, values, strict=True)]
    return labels


def _feature(folder: Path, name: str, said: Counter[str]) -> NDArray[Any] | None:
    """Return [d], the mean of all frames; None, counted in `said`, where there is nothing to read."""
    path = folder / name
    paths = sorted(path.glob("[!.]*.npy")) if path.is_dir() else [folder / f"{name}.npy"]
    try:
        frames = [_averaged(load_array(frame)) for frame in paths if frame.exists()]
    except DecodeError as error:
        said[f"{folder.name}: damaged ({error.path})"] += 1
        return None
    if not frames:
        said[f"{folder.name}: {'empty folder' if path.is_dir() else 'not on disk'}"] += 1
        return None
    mean: NDArray[Any] = np.stack(frames).mean(0, dtype=np.float32)
    return mean


def _averaged(x: NDArray[Any]) -> NDArray[Any]:
    return x.reshape(-1, x.shape[-1]).mean(0, dtype=np.float32) if x.ndim > 1 else x


def _arrays(root: Path, rows: list[tuple[dict[str, NDArray[Any] | None], Any, dict[str, str]]]) -> Arrays:
    if not rows:
        raise ValueError(f"root: expected utterances with features and a label in {root}, got none")
    arrays: Arrays = {}
    for modality in FOLDERS:
        found = [row[0][modality] for row in rows]
        shapes = {x.shape for x in found if x is not None}
        if len(shapes) != 1:
            raise ValueError(f"{modality}: expected features of one width, got {', '.join(map(str, sorted(shapes))) or 'none'}")
        arrays[modality] = np.stack([np.zeros(next(iter(shapes)), np.float32) if x is None else x for x in found])
    arrays["present"] = np.array([[row[0][modality] is not None for modality in FOLDERS] for row in rows])
    arrays["modalities"], arrays["label"] = np.array(list(FOLDERS)), np.array([row[1] for row in rows])
    if arrays["present"].all():
        del arrays["present"], arrays["modalities"]
    return arrays | {name: np.array([row[2][name] for row in rows]) for name in rows[0][2]}

"""IEMOCAP as features of utterances: GCNet's release and MMIN's folds, made into arrays for an ``.npz``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_fast.data.archive import read_arrays
from mla_fast.datasets.files import DecodeError, load_array
from mla_fast.datasets.npy import entries, load_names, load_npy
from mla_fast.datasets.pickles import load_plain, shown

FOLDERS = {"audio": "wav2vec", "text": "deberta", "image": "manet"}
CLASSES = {4: ("happy", "sad", "neutral", "angry"), 6: ("happy", "sad", "neutral", "angry", "excited", "frustrated")}
MMIN_FOLDERS, PARTS = {"audio": "A", "text": "L", "image": "V"}, {"trn": "train", "val": "validation", "tst": "test"}
CPM_NAMES = {"audio": "audio", "text": "text", "image": "video"}
UTTERANCE = re.compile(r"Ses0([1-5])\w{0,60}_([FM])\d{1,9}")
Arrays = dict[str, NDArray[Any]]
Row = tuple[dict[str, NDArray[Any] | None], Any, dict[str, str]]  # features, the label, and what else is known
Fold = tuple[Path, Arrays, NDArray[Any], list[Any] | None]  # the labels' file, features, labels, names


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is counted
def read_gcnet(root: Path, classes: int = 4, session: int = 5) -> tuple[Arrays, list[str]]:
    """Return arrays by name and what is to be said about them, of GCNet's release of IEMOCAP.

    root: has ``features/{wav2vec…, deberta…, manet…}/UTTERANCE.npy``, or a folder UTTERANCE of .npy that are averaged, and the
        label pickle ``…{classes}way….pkl``, also in a folder: a list of which the first two are {dialog: utterances} and
        {dialog: labels}. It is read without running anything in it, and may hold containers and NumPy's arrays alone.
    classes: 4 or 6. session: 1 … 5, whose utterances have the part "test", the others "train".

    The arrays are ``audio``, ``text``, ``image`` [N, d] in float32; ``present`` bool [N, 3] with its ``modalities``, where
    anything is absent; ``label``, and as strings ``utterance``, ``dialog``, ``session``, ``speaker`` (the actor) and ``part``. A
    modality is absent without a file or frames, or with a file that is damaged or not finite. Left out and counted are utterances
    without any, and labels that name no class.

    Raises ValueError or FileNotFoundError that name what was expected.
    """
    _check_classes(classes)
    if session not in range(1, 6):
        raise ValueError(f"session: expected 1 … 5, got {session}")
    folders = {modality: _feature_folder(root, start) for modality, start in FOLDERS.items()}
    rows, said = list[Row](), Counter[str]()
    for dialog, name, label in _labels(root, classes):
        match = UTTERANCE.fullmatch(name)
        if match is None or label not in range(classes):
            said[f"label {shown(label)} is no class" if match is not None else "name is no utterance of IEMOCAP"] += 1
            continue
        found = {modality: _feature(folder, name, said) for modality, folder in folders.items()}
        actor = name[3:6] if match[2] == name[5] else name[3:5] + match[2]
        fields = {"utterance": name, "dialog": dialog, "session": match[1], "speaker": actor}
        rows.append((found, CLASSES[classes][label], fields | {"part": "test" if match[1] == str(session) else "train"}))
    return _arrays(root, rows, said)


def read_mmin(root: Path, fold: int = 1, classes: int = 4) -> tuple[Arrays, list[str]]:
    """Return the same of a fold in MMIN's layout: ``{A,V,L}/FOLD/{trn,val,tst}.npy``, ``target/FOLD/{…}_{label,int2name}.npy``.

    Labels are whole numbers [N] or [N, 1], or one-hot [N, classes]; features [N, T, d] are averaged over T, and absent where they
    are not finite. ``part`` is train, validation or test.
    """
    if (root / "A" / "comparE.h5").exists():
        h5 = "A/comparE.h5, V/denseface.h5 and L/bert_large.h5 are MMIN's sequences by frame"
        raise ValueError(f"root: expected folds of arrays, A/{fold}/trn.npy and so on, which MMIN's scripts make; {h5}")

    def read(short: str) -> Fold:
        paths = {modality: root / folder / str(fold) / f"{short}.npy" for modality, folder in MMIN_FOLDERS.items()}
        labels = root / "target" / str(fold) / f"{short}_label.npy"
        names = labels.with_name(f"{short}_int2name.npy")
        _check_there(root, *paths.values(), labels)
        found = {modality: load_array(path) for modality, path in paths.items()}
        return labels, found, load_npy(labels), load_names(names) if names.exists() else None

    return _folds(root, classes, read)


def read_cpm(root: Path, fold: int = 1, classes: int = 4) -> tuple[Arrays, list[str]]:
    """Return the same of a fold in CPM-Net's layout: ``FOLD/{trn,val,tst}.npz`` with audio, video, text, label and name."""

    def read(short: str) -> Fold:
        path = root / str(fold) / f"{short}.npz"
        _check_there(root, path)
        arrays, objects = read_arrays(path)
        if wrong := [name for name in (*CPM_NAMES.values(), "label", "name") if name in objects]:
            raise ValueError(f"{path}: expected arrays of numbers and strings, saved without pickle, got objects in {wrong[0]}")
        if not {*CPM_NAMES.values(), "label"} <= {*arrays}:
            raise ValueError(f"{path}: expected arrays audio, video, text and label, got {', '.join(arrays) or 'none'}")
        names = entries(path, arrays["name"]) if "name" in arrays else None
        return path, {modality: arrays[name] for modality, name in CPM_NAMES.items()}, arrays["label"], names

    return _folds(root, classes, read)


@np.errstate(over="ignore", invalid="ignore")
def _folds(root: Path, classes: int, read: Callable[[str], Fold]) -> tuple[Arrays, list[str]]:
    """Return the arrays of all parts, each of which `read` has by its short name."""
    _check_classes(classes)
    rows, said = list[Row](), Counter[str]()
    for short, part in PARTS.items():
        path, found, target, names = read(short)
        labels = _class_numbers(path, target, classes)
        if names is not None and len(names) != len(labels):
            raise ValueError(f"{path}: expected as many names as labels, {len(labels)}, got {len(names)}")
        for modality, x in found.items():
            if x.dtype.kind not in "biuf" or x.ndim not in (2, 3) or len(x) != len(labels) or 0 in x.shape[1:]:
                expected = f"expected numbers [N, d] or [N, T, d] of {modality} for N = {len(labels)} labels"
                raise ValueError(f"{path}: {expected}, got {x.dtype} {list(x.shape)}")
        for i, label in enumerate(labels):
            name = f"{part} {i}" if names is None else _text(names[i], f"{path}: row {i}")
            session = match[1] if (match := UTTERANCE.match(name)) else ""
            each: dict[str, NDArray[Any] | None] = {}
            for modality, x in found.items():
                try:
                    each[modality] = _averaged(x[i], modality)
                except DecodeError as error:
                    each[modality] = None
                    said[str(error)] += 1
            rows.append((each, label, {"utterance": name, "session": session, "part": part}))
    return _arrays(root, rows, said)


def _check_classes(classes: int) -> None:
    if classes not in CLASSES:
        raise ValueError(f"classes: expected 4 or 6, got {classes}")


def _check_there(root: Path, *paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"root: expected {path.relative_to(root)} in {root}, got none")


def _class_numbers(path: Path, target: NDArray[Any], classes: int) -> list[int]:
    """Return labels 0 … classes − 1, of whole numbers [N] or [N, 1] or of one-hot rows [N, classes]."""
    rows = target[:, None] if target.ndim == 1 else target
    one_hot = rows.ndim == 2 and rows.shape[1] == classes
    if rows.dtype.kind not in ("biuf" if one_hot else "iuf") or rows.ndim != 2 or rows.shape[1] not in (1, classes):
        expected = f"expected labels of whole numbers [N] or [N, 1], or one-hot [N, {classes}]"
        raise ValueError(f"{path}: {expected}, got {target.dtype} {list(target.shape)}")
    good = ((rows == 0) | (rows == 1)).all(1) & (rows.sum(1) == 1) if one_hot else np.isin(rows[:, 0], range(classes))
    if not good.all():
        expected = f"a single 1 among {classes}" if one_hot else f"a whole number of 0 … {classes - 1}"
        row = int(good.argmin())
        raise ValueError(f"{path}: row {row}: expected {expected} as label, got {str(rows[row].tolist())[1:-1]}")
    numbers: list[int] = (rows.argmax(1) if one_hot else rows[:, 0].astype(int)).tolist()
    return numbers


def _text(name: Any, where: str) -> str:
    text = str(name, "utf-8", "backslashreplace") if isinstance(name, bytes) else name
    if not isinstance(text, str) or len(text) > 255:
        raise ValueError(f"{where}: expected a name, got {shown(name)}")
    return str(text)


def _feature_folder(root: Path, start: str) -> Path:
    found = sorted(path for path in (root / "features").glob(f"{start}*") if path.is_dir())
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"root: expected one folder {root / 'features'}/{start}*, got {got}")
    return found[0]


def _labels(root: Path, classes: int) -> list[tuple[str, str, int]]:
    """Return (dialog, utterance, label) of the label pickle."""
    found = sorted(path for path in root.rglob(f"*{classes}way*.pkl") if not path.name.startswith("._"))
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"root: expected one label pickle *{classes}way*.pkl in {root}, got {got}")
    path, content = found[0], load_plain(found[0])
    if not (isinstance(content, list | tuple) and len(content) > 1 and all(isinstance(part, dict) for part in content[:2])):
        expected = "expected a list of {dialog: utterances}, {dialog: labels}, …"
        raise ValueError(f"{path}: {expected}, got {shown(content)}")
    labels: list[tuple[str, str, int]] = []
    for key, names in content[0].items():
        dialog = _text(key, f"{path}: dialog")
        names = _entries(names, f"{path}: {dialog}: expected a list of utterances")
        values = _entries(content[1].get(key, ()), f"{path}: {dialog}: expected a list of labels")
        if len(names) != len(values):
            raise ValueError(f"{path}: {dialog}: expected a label for each of {len(names)} utterances, got {len(values)}")
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool):
                raise ValueError(f"{path}: {dialog}: label {i}: expected a whole number, got {shown(value)}")
            labels.append((dialog, _text(name, f"{path}: {dialog}: utterance {i}"), int(value)))
    return labels


def _entries(entries: Any, expected: str) -> Sequence[Any]:
    entries = entries.tolist() if isinstance(entries, np.ndarray) and entries.ndim == 1 else entries
    if not isinstance(entries, list | tuple):
        raise ValueError(f"{expected}, got {shown(entries)}")
    return entries


def _feature(folder: Path, name: str, said: Counter[str]) -> NDArray[Any] | None:
    """Return [d], the mean of all frames; None, counted in `said`, where there is nothing to read."""
    path = folder / name
    paths = sorted(path.glob("[!.]*.npy")) if path.is_dir() else [folder / f"{name}.npy"]
    try:
        loaded = [(str(frame), load_array(frame)) for frame in paths if frame.exists()]
        frames = [(frame, _averaged(x, frame)) for frame, x in loaded if x.size]
        _check_widths(folder.name, frames)
        if frames:
            return _averaged(np.stack([x for _, x in frames]), path)
        said[f"{folder.name}: {'no frames' if loaded else 'empty folder' if path.is_dir() else 'not on disk'}"] += 1
    except DecodeError as error:
        said[f"{folder.name}: damaged ({error})"] += 1
    return None


def _averaged(x: NDArray[Any], source: object) -> NDArray[Any]:
    """Return [d], the mean in float32 of [d] or [..., d]; raise DecodeError where it is not finite."""
    mean: NDArray[Any] = x.reshape(-1, x.shape[-1] if x.ndim else 1).mean(0, dtype=np.float32)
    if not np.isfinite(mean).all():
        raise DecodeError(source, "not finite")
    return mean


def _check_widths(modality: str, found: Sequence[tuple[str, NDArray[Any]]]) -> None:
    for name, x in found:
        if x.shape != found[0][1].shape:
            expected = f"expected features of one width, {found[0][1].size} as of {found[0][0]}"
            raise ValueError(f"{modality}: {name}: {expected}, got {x.size}")


def _arrays(root: Path, rows: list[Row], said: Counter[str]) -> tuple[Arrays, list[str]]:
    """Return the arrays of the rows that have any features, and what is said."""
    kept = [row for row in rows if any(x is not None for x in row[0].values())]
    if not kept:
        raise ValueError(f"root: expected utterances with features and a label in {root}, got none")
    if len(kept) < len(rows):
        said["without any features, left out"] += len(rows) - len(kept)
    arrays: Arrays = {}
    for modality in FOLDERS:
        found = [(row[2]["utterance"], x) for row in kept if (x := row[0][modality]) is not None]
        if not found:
            raise ValueError(f"{modality}: expected features of any utterance, got none")
        _check_widths(modality, found)
        zeros = np.zeros_like(found[0][1])
        arrays[modality] = np.stack([zeros if (x := row[0][modality]) is None else x for row in kept])
    arrays["present"] = np.array([[row[0][modality] is not None for modality in FOLDERS] for row in kept])
    arrays["modalities"], arrays["label"] = np.array(list(FOLDERS)), np.array([row[1] for row in kept])
    if arrays["present"].all():
        del arrays["present"], arrays["modalities"]
    arrays |= {name: np.array([row[2][name] for row in kept]) for name in kept[0][2]}
    return arrays, [f"{count} × {what}" for what, count in sorted(said.items())]

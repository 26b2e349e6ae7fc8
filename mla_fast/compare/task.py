"""What methods are compared on: data in three parts, to train, to choose epochs and hyperparameters, and to test."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mla_fast import data
from mla_fast.data import MultimodalDataset
from mla_fast.encoders import encoder_for

HELD_OUT = 0.25  # of the samples or groups for testing, and of what remains for validation
Two = tuple[MultimodalDataset, MultimodalDataset]
Three = tuple[MultimodalDataset, MultimodalDataset, MultimodalDataset]


@dataclass(frozen=True)
class Task:
    """Data that is split anew for every seed.

    name: in reports; identity: what tells these data from others; prepare: seed → (the rest, test); group: a field of the data
    whose values are each in a single part; per: how to standardise, as for ``data.standardize``; layouts, vocabulary: of the
    modalities, as ``data.find_layouts`` and ``data.vocabulary`` return them, None for the layouts that shapes leave no doubt of.
    """

    name: str
    identity: str
    prepare: Callable[[int], Two]
    group: str | None = None
    per: str = "feature"
    layouts: Mapping[str, str] | None = None
    vocabulary: Mapping[str, int] | None = None

    def parts(self, seed: int) -> Three:
        """Return (train, validation, test), standardised by train.

        Raises ValueError where a part would be empty, or a class is missing from train.
        """
        train, validation, test = self.split(seed)
        (train, validation, test), _ = data.standardize(train, validation, test, per=self.per, layouts=self.layouts)
        return train, validation, test

    def encoder(self, modality: str, shape: Sequence[int], features: int) -> nn.Module:
        """Return a new encoder for samples of this shape."""
        layout, size = (self.layouts or {}).get(modality), (self.vocabulary or {}).get(modality)
        return encoder_for(shape, features, layout, size)

    def full(self, seed: int) -> dict[str, torch.Tensor] | None:
        """Return the inputs of the training part with nothing masked, where something is."""
        return None

    def split(self, seed: int) -> Three:
        """Return (train, validation, test) as they are; raises as ``parts``."""
        rest, test = self.prepare(seed)
        group = self.group if self.group in rest.fields else None
        train, validation = hold_out(rest, group, seed, "validation")
        absent = set(torch.cat([validation.target, test.target]).tolist()) - set(train.target.tolist())
        if absent:
            some = ", ".join(map(str, sorted(absent)[:5]))
            raise ValueError(f"label: seed {seed}: expected every class in the training part, got none of class {some}")
        return train, validation, test


def hold_out(dataset: MultimodalDataset, group: str | None, seed: int, part: str) -> Two:
    """Return (the rest, a quarter that is held out): whole groups if there is a group, else of each class its share."""
    if group is None:
        try:
            return data.random_split(dataset, HELD_OUT, seed)
        except ValueError:
            raise ValueError(f"data: expected enough samples for a {part} part, got {len(dataset)}") from None
    from sklearn.model_selection import GroupShuffleSplit

    column = group_column(dataset, group)
    if column.max() == 0:
        raise ValueError(f"group: expected at least two values of {group!r} to make a {part} part of, got one")
    splitter = GroupShuffleSplit(1, test_size=HELD_OUT, random_state=seed)
    rest, held_out = next(splitter.split(column, groups=column))
    return dataset.subset(torch.from_numpy(rest)), dataset.subset(torch.from_numpy(held_out))


def group_column(dataset: MultimodalDataset, group: str) -> np.typing.NDArray[np.int64]:
    """Return the group of each sample as numbers from 0."""
    if group not in dataset.fields:
        raise ValueError(f"group: expected one of {', '.join(dataset.fields) or 'no fields at all'}, got {group!r}")
    column = dataset.fields[group]
    if column.ndim != 1 or column.dtype.kind not in "biuU":
        raise ValueError(f"group: expected a field [N] of integers or strings, {group!r} is {column.dtype} {list(column.shape)}")
    return np.unique(column, return_inverse=True)[1].astype(np.int64)


def load_task(
    source: str,
    modalities: Sequence[str] = (),
    label: str = "label",
    group: str | None = None,
    layouts: Mapping[str, str] | None = None,
    folds: bool = False,
) -> Task:
    """Return the task of ``"digits"``, ``"competition"`` or an .npz with arrays of these names.

    layouts: {modality: layout} of those that dtype and shape leave in doubt, as for ``data.find_layouts``. folds: seed k is
    tested on one value of the group, the k-th in sorted order; without it a seed is tested on a quarter of them, drawn.

    Raises FileNotFoundError, or ValueError that names the argument: fewer than two modalities, a group of two values or one.
    """
    if source in BUILT_IN:
        for name, value in (("group", group), ("layout", layouts), ("folds", folds)):
            if value:
                raise ValueError(f"{name}: expected none for {source}, got {value!r}")
        return Task(source, source, partial(_built_in, source, tuple(modalities)))
    if not Path(source).exists():
        raise FileNotFoundError(f"data: expected {', '.join(BUILT_IN)} or an .npz, and there is no file {source}")
    if len(modalities) < 2:
        raise ValueError(f"modalities: expected at least two names of arrays in {source}, got {', '.join(modalities) or 'none'}")
    file = (source, tuple(modalities), label, tuple(sorted((layouts or {}).items())))
    whole, found, without = _load(*file)
    if without:
        print(f"{without} rows of {source} have none of these modalities and are left out")
    if "part" in whole.fields and group is None:
        print("note: the array 'part' is not looked at: each seed draws its own parts; train --test-where part=test goes by it")
    if folds and group is None:
        raise ValueError("folds: expected --group beside it, the array whose values are left out one at a time, got none")
    if group is not None and (values := int(group_column(whole, group).max()) + 1) < 3:
        raise ValueError(f"group: expected at least three values of {group!r}, to train, to choose and to test on, got {values}")
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]
    prepare = partial(_from_file, file, group, folds)
    return Task(Path(source).stem, digest, prepare, group, layouts=found, vocabulary=data.vocabulary(whole, found))


@lru_cache(1)
def _load(
    path: str, modalities: tuple[str, ...], label: str, layouts: tuple[tuple[str, str], ...]
) -> tuple[MultimodalDataset, dict[str, str], int]:
    """Return the samples that have any of these modalities, the layouts, and how many others there are."""
    whole = data.load_npz(path, modalities, label)
    found, N = data.find_layouts(whole, dict(layouts)), len(whole)
    if whole.present is not None:
        whole = whole.subset(whole.present.any(1))
    return data.arrange(whole, found), found, N - len(whole)


def _from_file(file: tuple[Any, ...], group: str | None, folds: bool, seed: int) -> Two:
    whole = _load(*file)[0]
    return leave_out(whole, group, seed) if folds and group is not None else hold_out(whole, group, seed, "test")


def leave_out(dataset: MultimodalDataset, group: str, k: int) -> Two:
    """Return (the rest, the samples of the k-th value of the group, in sorted order)."""
    column = torch.from_numpy(group_column(dataset, group))
    if k > column.max():
        raise ValueError(f"seeds: expected 0 … {int(column.max())}, one for each value of {group!r} with --folds, got {k}")
    return dataset.subset((column != k).nonzero()[:, 0]), dataset.subset((column == k).nonzero()[:, 0])


def _built_in(name: str, modalities: tuple[str, ...], seed: int) -> Two:
    train, test = (_only(part, modalities) for part in BUILT_IN[name](seed))
    return train, test


def _only(dataset: MultimodalDataset, modalities: tuple[str, ...]) -> MultimodalDataset:
    if not modalities:
        return dataset
    if len(modalities) < 2 or (unknown := [name for name in modalities if name not in dataset.inputs]):
        got = ", ".join(unknown if len(modalities) > 1 else modalities)
        raise ValueError(f"modalities: expected at least two of {', '.join(dataset.modalities)}, got {got}")
    return MultimodalDataset({name: dataset.inputs[name] for name in modalities}, dataset.target, dataset.fields)


def competition(seed: int) -> Two:
    """Draw data of Huang et al.: every training sample shows its class in both modalities, many a test sample in one only."""
    directions = data.sparse_coding_directions(3 * seed)
    train = data.sparse_coding(300, 0.0, 3 * seed + 1, directions=directions)
    return train, data.sparse_coding(4000, 0.3, 3 * seed + 2, directions=directions)


BUILT_IN: dict[str, Callable[[int], Two]] = {"digits": data.digits, "competition": competition}

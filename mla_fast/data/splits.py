"""Splits into training and test samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mla_fast.data.dataset import MultimodalDataset, listed
from mla_fast.data.labels import as_strings


def split_where(dataset: MultimodalDataset, where: str) -> tuple[MultimodalDataset, MultimodalDataset]:
    """Split into (train, test) by a field: ``"speaker=2,4"`` tests on the samples whose field `speaker` is 2 or 4.

    The field is [N], of integers, booleans, strings or bytes in UTF-8. Raises ValueError for a malformed expression, an unknown
    field or one of another kind, a value that no sample has, and if nothing is left to train on.
    """
    held_out = rows_where(dataset, where)
    if held_out.all():
        raise ValueError(f"where: {where!r} selects all {len(dataset)} samples for testing, none is left to train on")
    return dataset.subset(~held_out), dataset.subset(held_out)


def rows_where(dataset: MultimodalDataset, where: str) -> Tensor:
    """Return the mask, bool [N], of the samples that ``split_where`` tests on; it may be true for all of them."""
    name, equals, wanted = where.partition("=")
    name, values = name.strip(), [value.strip() for value in wanted.split(",")]
    if not (name and equals and all(values)):
        raise ValueError(f'where: expected "field=value" or "field=value,value", got {where!r}')
    if name in dataset.unread:
        raise ValueError(f"where: {dataset.unread[name]}")
    if name not in dataset.fields:
        fields = f"{', '.join(dataset.fields) or 'none'} (arrays of Python objects are none)"
        raise ValueError(f"where: no field {name!r}; there are: {fields}")
    column = as_strings(dataset.fields[name], f"where: {name!r}")
    if column.ndim != 1 or column.dtype.kind not in "biuU":
        raise ValueError(f"where: expected a field [N] of integers or strings, {name!r} is {column.dtype} {list(column.shape)}")
    found, rows = np.unique(column, return_inverse=True)
    found = found.astype(str)
    for value in values:
        if value not in found:
            raise ValueError(f"where: no sample has {name}={value}; {name} is one of: {listed(found.tolist())}")
    return torch.from_numpy(np.isin(found, values)[rows])


def random_split(dataset: MultimodalDataset, test_fraction: float, seed: int) -> tuple[MultimodalDataset, MultimodalDataset]:
    """Split into (train, test) at random, each class in its proportion; round `test_fraction` of the samples to a whole number.

    Raises ValueError if either side would be empty.
    """
    N = len(dataset)
    held_out = round(N * test_fraction) if 0 < test_fraction < 1 else 0
    if not 0 < held_out < N:
        raise ValueError(f"test_fraction: expected to leave samples on both sides of {N}, got {test_fraction!r}")
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    order = order[dataset.target[order].argsort(stable=True)]
    # Evenly spaced places in a list sorted by class give every class its share, to within one sample.
    places = ((torch.arange(held_out, dtype=torch.float64) + 0.5) * (N / held_out)).long()
    mask = torch.zeros(N, dtype=torch.bool)
    mask[order[places]] = True
    return dataset.subset(~mask), dataset.subset(mask)

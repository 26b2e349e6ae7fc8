"""Standardisation of each modality by means and standard deviations of the training samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mla_fast.data.dataset import MultimodalDataset
from mla_fast.data.layout import is_integer

PER = ("feature", "array", "none")
Statistics = dict[str, tuple[Any, ...] | None]


def statistics(dataset: MultimodalDataset, per: str = "feature", layouts: Mapping[str, str] | None = None) -> Statistics:
    """Return {modality: (mean, standard deviation)} over the samples that have it, as numbers or as lists that broadcast.

    per: ``"feature"``, those of each column of [N, F] (and of [N, T, F], if `layouts` says it is a sequence) and of each
        channel of [N, C, H, W], [N, H, W] being one channel; ``"array"``, one of each modality; ``"none"``, (0, 1).
    layouts: {modality: layout}, as ``find_layouts`` returns; without, 2 and 4 axes are features and images. Tokens get None.

    Integers have a third entry, the base that the mean is relative to: they are subtracted exactly, whatever their size.
    A column with one value has this as its mean and a deviation of 1, and a modality without samples (0, 1).

    Raises ValueError where float64 does not hold the mean or the deviation.
    """
    if per not in PER:
        raise ValueError(f"per: expected one of {', '.join(PER)}, got {per!r}")
    result: Statistics = {}
    for modality in dataset.modalities:
        x, layout = dataset.rows(modality), (layouts or {}).get(modality)
        if layout == "tokens":
            result[modality] = None
        elif per == "none" or not x.numel():
            result[modality] = (0.0, 1.0)
        else:
            result[modality] = _moments(modality, x, _reduced(x, layout) if per == "feature" else None)
    return result


def feature_axis(x: Tensor, layout: str | None = None) -> int | None:
    """Return the axis of the features or channels, each of which is standardised by itself; None if all are one."""
    axes = {2: 1, 3: 2 if layout == "sequence" else None, 4: 1}
    return axes.get(x.dim())


def _reduced(x: Tensor, layout: str | None) -> list[int] | None:
    axis = feature_axis(x, layout)
    return None if axis is None else [i for i in range(x.dim()) if i != axis]


def _moments(modality: str, x: Tensor, reduced: list[int] | None) -> tuple[Any, ...]:
    low = x.amin(reduced or (), keepdim=True)
    constant = low == x.amax(reduced or (), keepdim=True)
    base = low.long() if is_integer(x) else None
    shifted = _minus(x, base)
    mean = shifted.mean(reduced, keepdim=True).where(~constant, _minus(low, base))
    std = shifted.std(reduced, correction=0, keepdim=True).where(~constant, 1)
    if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
        raise ValueError(
            f"inputs[{modality!r}]: expected values whose mean and deviation float64 holds, got up to {x.abs().max()}"
        )
    parts = (mean, std) if base is None else (mean, std, base)
    return tuple(part.item() if reduced is None else part[0].tolist() for part in parts)


def _minus(x: Tensor, base: Tensor | None) -> Tensor:
    """Return x − base in float64, of integers with one rounding: float64 holds the differences of both halves of their bits."""
    if base is None:
        return x.double()
    if not is_integer(x):
        return x.double() - base
    x, half = x.long(), 2**32
    return ((x >> 32) - (base >> 32)).double() * half + ((x & (half - 1)) - (base & (half - 1))).double()


def constant_features(dataset: MultimodalDataset, layouts: Mapping[str, str]) -> dict[str, list[int]]:
    """Return the features, or channels, of each modality that have one value in all samples; modalities without any left out."""
    found: dict[str, list[int]] = {}
    for modality in dataset.modalities:
        x, layout = dataset.rows(modality), layouts[modality]
        reduced = _reduced(x, layout)
        if layout != "tokens" and reduced is not None and x.numel():
            columns = (x.amin(reduced) == x.amax(reduced)).nonzero()[:, 0].tolist()
            found |= {modality: columns} if columns else {}
    return found


def apply_statistics(dataset: MultimodalDataset, statistics: Mapping[str, Sequence[Any] | None]) -> MultimodalDataset:
    """Return a new data set with each modality minus its mean, divided by its deviation, in float64, and then as float32.

    statistics: as ``statistics`` returns, or as JSON has kept it. What has None, such as tokens, stays as it is.

    Raises ValueError if a modality has no statistics, if they do not fit its shape, or if float32 does not hold the result.
    """
    if any(modality not in statistics for modality in dataset.modalities):
        raise ValueError(f"statistics: expected those of {', '.join(dataset.modalities)}, got {', '.join(statistics) or 'none'}")
    columns = [None] * len(dataset.modalities) if dataset.present is None else list(dataset.present.T)
    each = zip(dataset.inputs.items(), columns, strict=True)
    return dataset.with_inputs({m: _standardized(m, x, here, statistics[m]) for (m, x), here in each})


def _standardized(modality: str, x: Tensor, here: Tensor | None, statistics: Sequence[Any] | None) -> Tensor:
    if statistics is None:
        return x
    mean, std = (torch.tensor(part, dtype=torch.float64) for part in statistics[:2])
    base = torch.tensor(statistics[2]) if len(statistics) > 2 else None
    if mean.dim() and (mean.dim() != x.dim() - 1 or any(k not in (1, n) for k, n in zip(mean.shape, x.shape[1:], strict=True))):
        raise ValueError(f"statistics[{modality!r}]: expected those of {list(x.shape[1:])}, got {list(mean.shape)}")
    z = ((_minus(x, base) - mean) / std).float()
    lost = (z.isinf() & x.isfinite()).reshape(len(x), x[0].numel()).any(1)
    lost = lost if here is None else lost & here
    if lost.any():
        row = int(lost.nonzero()[0])
        raise ValueError(f"inputs[{modality!r}]: expected values that float32 holds when standardised, row {row} has others")
    return z


def standardize(
    train: MultimodalDataset, *others: MultimodalDataset, per: str = "feature", layouts: Mapping[str, str] | None = None
) -> tuple[list[MultimodalDataset], Statistics]:
    """Standardise `train` and the `others` by the ``statistics`` of `train`; return ([train, *others], statistics)."""
    of_train = statistics(train, per, layouts)
    return [apply_statistics(dataset, of_train) for dataset in (train, *others)], of_train

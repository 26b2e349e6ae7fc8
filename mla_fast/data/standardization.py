"""Standardisation of each modality by means and standard deviations of the training samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mla_fast.data.column import Column
from mla_fast.data.dataset import MultimodalDataset
from mla_fast.data.layout import is_integer

PER = ("feature", "array", "none")
Statistics = dict[str, tuple[Any, ...] | None]


class Survey(NamedTuple):
    """What one reading of the training samples finds: their ``statistics`` and ``constant_features``."""

    statistics: Statistics
    constant: dict[str, list[int]]


def statistics(dataset: MultimodalDataset, per: str = "feature", layouts: Mapping[str, str] | None = None) -> Statistics:
    """Return {modality: (mean, standard deviation)} over the samples that have it, as numbers or as lists that broadcast.

    per: ``"feature"``, those of each column of [N, F] (and of [N, T, F], if `layouts` says it is a sequence) and of each
        channel of [N, C, H, W], [N, H, W] being one channel; ``"array"``, one of each modality; ``"none"``, (0, 1).
    layouts: {modality: layout}, as ``find_layouts`` returns; without, 2 and 4 axes are features and images. Tokens get None.

    Integers have a third entry, the base that the mean is relative to: they are subtracted exactly, whatever their size.
    A column with one value has this as its mean and a deviation of 1, and a modality without samples (0, 1). What is read when it
    is asked for is gone through once, part by part, in float64, with a progress bar on a terminal.

    Raises ValueError where float64 does not hold the mean or the deviation.
    """
    return survey(dataset, per, layouts).statistics


def survey(dataset: MultimodalDataset, per: str = "feature", layouts: Mapping[str, str] | None = None) -> Survey:
    """Return ``statistics`` and, with per "feature", the features that have one value, of one reading."""
    if per not in PER:
        raise ValueError(f"per: expected one of {', '.join(PER)}, got {per!r}")
    found: Survey = Survey({}, {})
    for modality in dataset.modalities:
        layout, x = (layouts or {}).get(modality), dataset.inputs[modality]
        if layout == "tokens" or per == "none":
            found.statistics[modality] = None if layout == "tokens" else (0.0, 1.0)
            continue
        reduced = _reduced(x, layout) if per == "feature" else None
        moments = _moments_of(dataset, modality, reduced)
        found.statistics[modality] = (0.0, 1.0) if moments is None else moments.statistics(modality, reduced)
        if reduced is not None and moments is not None and (columns := moments.constant().flatten().nonzero()[:, 0].tolist()):
            found.constant[modality] = columns
    return found


def _moments_of(dataset: MultimodalDataset, modality: str, reduced: list[int] | None) -> Moments | None:
    """Return the moments of all samples that have a modality, None without any."""
    moments, total = None, len(dataset) if dataset.present is None else int(dataset.has(modality).sum())  # type: ignore
    hidden = None if isinstance(dataset.inputs[modality], Column) else True  # None: where the output is not a terminal
    with tqdm(desc=f"statistics of {modality}", total=total, unit=" samples", leave=False, disable=hidden) as bar:
        for x in dataset.chunks(modality):
            if x.numel():
                part = Moments.of(x, reduced)
                moments = part if moments is None else moments.merge(part)
            bar.update(len(x))
    return moments


def feature_axis(x: Tensor, layout: str | None = None) -> int | None:
    """Return the axis of the features or channels, each of which is standardised by itself; None if all are one."""
    axes = {2: 1, 3: 2 if layout == "sequence" else None, 4: 1}
    return axes.get(x.dim())


def _reduced(x: Tensor, layout: str | None) -> list[int] | None:
    axis = feature_axis(x, layout)
    return None if axis is None else [i for i in range(x.dim()) if i != axis]


@dataclass(frozen=True)
class Moments:
    """Hold number, least, largest, mean and variance of values, in float64; of integers relative to `base`, their least."""

    count: int
    low: Tensor
    high: Tensor
    mean: Tensor
    variance: Tensor
    base: Tensor | None

    @classmethod
    def of(cls, x: Tensor, reduced: list[int] | None) -> Moments:
        low, high = x.amin(reduced or (), keepdim=True), x.amax(reduced or (), keepdim=True)
        base = low.long() if is_integer(x.dtype) else None
        shifted = _minus(x, base)
        mean, variance = shifted.mean(reduced, keepdim=True), shifted.var(reduced, correction=0, keepdim=True)
        return cls(x.numel() // low.numel(), low, high, mean, variance, base)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both (Chan, Golub and LeVeque, 1979)."""
        low, high = self.low.minimum(other.low), self.high.maximum(other.high)
        base = None if self.base is None else low.long()
        means = [of.mean if base is None else of.mean + _minus(of.base, base) for of in (self, other)]  # type: ignore
        N, between = self.count + other.count, means[1] - means[0]
        share = other.count / N
        mean = means[0] + between * share
        variance = self.variance * (1 - share) + other.variance * share + between.square() * (share * (1 - share))
        return Moments(N, low, high, mean, variance, base)

    def constant(self) -> Tensor:
        return self.low == self.high

    def statistics(self, modality: str, reduced: list[int] | None) -> tuple[Any, ...]:
        """Return (mean, standard deviation), of integers with the base, as numbers or as lists where some axis is left."""
        mean = self.mean.where(~self.constant(), _minus(self.low, self.base))
        std = self.variance.sqrt().where(~self.constant(), 1)
        if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
            largest = max(float(self.high.max()), -float(self.low.min()))
            raise ValueError(f"inputs[{modality!r}]: expected values whose mean and deviation float64 holds, got up to {largest}")
        parts = (mean, std) if self.base is None else (mean, std, self.base)
        return tuple(part.item() if reduced is None else part[0].tolist() for part in parts)


def _minus(x: Tensor, base: Tensor | None) -> Tensor:
    """Return x − base in float64, of integers with one rounding: float64 holds the differences of both halves of their bits."""
    if base is None:
        return x.double()
    if not is_integer(x.dtype):
        return x.double() - base
    x, half = x.long(), 2**32
    return ((x >> 32) - (base >> 32)).double() * half + ((x & (half - 1)) - (base & (half - 1))).double()


def constant_features(dataset: MultimodalDataset, layouts: Mapping[str, str]) -> dict[str, list[int]]:
    """Return the features, or channels, of each modality that have one value in all samples; modalities without any left out."""
    return survey(dataset, "feature", layouts).constant


def apply_statistics(dataset: MultimodalDataset, statistics: Mapping[str, Sequence[Any] | None]) -> MultimodalDataset:
    """Return a new data set with each modality minus its mean, divided by its deviation, in float64, and then as float32.

    What is read when it is asked for is standardised then.

    statistics: as ``statistics`` returns, or as JSON has kept it. What has None, such as tokens, stays as it is.

    Raises ValueError if a modality has no statistics, if they do not fit its shape, or if float32 does not hold the result.
    """
    if any(modality not in statistics for modality in dataset.modalities):
        raise ValueError(f"statistics: expected those of {', '.join(dataset.modalities)}, got {', '.join(statistics) or 'none'}")
    return dataset.then({m: partial(_standardized, modality=m, statistics=_tensors(statistics[m])) for m in dataset.modalities})


def _tensors(statistics: Sequence[Any] | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return mean and deviation in float64, and the base of integers."""
    if statistics is None:
        return None
    mean, std = (torch.tensor(part, dtype=torch.float64) for part in statistics[:2])
    return mean, std, torch.tensor(statistics[2]) if len(statistics) > 2 else None


def _standardized(
    x: Tensor, here: Tensor | None, modality: str, statistics: tuple[Tensor, Tensor, Tensor | None] | None
) -> Tensor:
    if statistics is None:
        return x
    mean, std, base = statistics
    if mean.dim() and (mean.dim() != x.dim() - 1 or any(k not in (1, n) for k, n in zip(mean.shape, x.shape[1:], strict=True))):
        raise ValueError(f"statistics[{modality!r}]: expected those of {list(x.shape[1:])}, got {list(mean.shape)}")
    z = (_minus(x, base) - mean).div_(std).float()
    if math.isfinite(z.sum()):  # as nearly always, and told much faster than of each value
        return z
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

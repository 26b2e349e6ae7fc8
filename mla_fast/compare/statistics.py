"""What the runs say: the trial of each seed chosen on validation, means with intervals, paired differences, sign counts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_fast.compare.records import Record
from mla_fast.compare.run import rank

RESAMPLES = 9999


class Estimate(NamedTuple):
    """A mean over seeds and its 95 % bootstrap interval, None where a single seed gives none."""

    mean: float
    interval: tuple[float, float] | None


class Difference(NamedTuple):
    """A paired difference over the seeds of both, and in how many of these it is above, equal to and below zero."""

    estimate: Estimate
    above: int
    equal: int
    below: int


def choose(found: Sequence[Record]) -> list[Record]:
    """Return the run of each method and seed with the best validation scores; the first trial where several are the best."""
    best: dict[tuple[str, int], Record] = {}
    for record in sorted(found, key=lambda record: record["trial"]):
        case = record["method"], record["seed"]
        if case not in best or rank(record["validation"]) > rank(best[case]["validation"]):
            best[case] = record
    order = {method: i for i, method in enumerate(dict.fromkeys(record["method"] for record in found))}
    return sorted(best.values(), key=lambda record: (order[record["method"]], record["seed"]))


def by_method(chosen: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the runs of each method, in the order in which the methods come."""
    groups: dict[str, list[Record]] = {}
    for record in chosen:
        groups.setdefault(record["method"], []).append(record)
    return groups


def values(runs: Sequence[Record], *path: str) -> dict[int, float]:
    """Return {seed: a value of its record}, as ``values(runs, "test", "accuracy")``; seeds without it are left out."""
    found: dict[int, float] = {}
    for record in runs:
        value: Any = record
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            found[record["seed"]] = float(value)
    return found


def estimate(sample: Sequence[float]) -> Estimate:
    """Return the mean of a sample and its percentile bootstrap interval."""
    from scipy.stats import bootstrap

    mean = statistics.fmean(sample)
    if len(sample) < 2:
        return Estimate(mean, None)
    if len(set(sample)) == 1:
        return Estimate(mean, (mean, mean))
    rng = np.random.default_rng(0)
    interval = bootstrap((sample,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng).confidence_interval
    return Estimate(mean, (float(interval.low), float(interval.high)))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Return ours − theirs, seed by seed; None if they have no seed in common."""
    sample = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not sample:
        return None
    signs = [(d > 1e-12) - (d < -1e-12) for d in sample]
    return Difference(estimate(sample), signs.count(1), signs.count(0), signs.count(-1))


def leader(groups: Mapping[str, Sequence[Record]]) -> str:
    """Return the method that is best on validation, by the mean over its seeds: a choice that the test part does not see."""
    return max(groups, key=lambda method: statistics.fmean(values(groups[method], "validation", "accuracy").values()))

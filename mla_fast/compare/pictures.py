"""The report's pictures, as SVG to put into a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mla_fast.compare.records import Record
from mla_fast.compare.statistics import Estimate, estimate, values
from mla_fast.page import confusion as draw_confusion
from mla_fast.page import new_figure, svg

Groups = Mapping[str, Sequence[Record]]
BLUE, GREY = "#1f6fb4", "#7a7a7a"


def ranking(groups: Groups, best: str) -> str:
    """Draw each method's test accuracy: a point for each seed, the mean and its interval; best is the one to be marked."""
    figure, axes = new_figure(7, 0.5 + 0.28 * len(groups))
    for place, (name, runs) in enumerate(groups.items()):
        sample = [100 * value for value in values(runs, "test", "accuracy").values()]
        axes.plot(sample, [place] * len(sample), "o", color=GREY, alpha=0.4, ms=4)
        _with_interval(axes, estimate(sample), place, BLUE if name == best else "black")
    axes.set(yticks=range(len(groups)), yticklabels=groups, xlabel="test accuracy, %")
    axes.invert_yaxis()
    return svg(figure)


def bars(groups: Groups, measure: str, label: str) -> str:
    """Draw a measure that each modality has, ``"alone"`` or ``"use"``, as bars of mean percentages."""
    modalities = list(next(iter(groups.values()))[0]["test"][measure])
    figure, axes = new_figure(7, 0.6 + 0.34 * len(groups))
    height = 0.8 / len(modalities)
    for i, modality in enumerate(modalities):
        means = [_mean(values(runs, "test", measure, modality)) for runs in groups.values()]
        places = [place + (i - (len(modalities) - 1) / 2) * height for place in range(len(groups))]
        axes.barh(places, means, height, label=modality)
    axes.set(yticks=range(len(groups)), yticklabels=groups, xlabel=label)
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return svg(figure)


def cost(groups: Groups, best: str) -> str:
    """Draw accuracy over the seconds of a run, those beforehand included."""
    figure, axes = new_figure(7, 4)
    for name, runs in groups.items():
        seconds = statistics.fmean(values(runs, "cost", "seconds").values())
        reached = _mean(values(runs, "test", "accuracy"))
        color = BLUE if name == best else "black"
        axes.plot(seconds, reached, "o", color=color, ms=5)
        axes.annotate(name, (seconds, reached), xytext=(4, 3), textcoords="offset points", fontsize=7, color=color)
    axes.set(xlabel="seconds a run", ylabel="test accuracy, %", xscale="log")
    axes.margins(x=0.2)
    return svg(figure)


def confusion(runs: Sequence[Record]) -> str:
    """Draw the confusion matrix of a method, summed over its seeds."""
    table = [
        [sum(cell) for cell in zip(*rows, strict=True)] for rows in zip(*(run["test"]["confusion"] for run in runs), strict=True)
    ]
    return draw_confusion(table)


def missing(groups: Groups) -> str:
    """Draw accuracy over the rate at which modalities are missing."""
    figure, axes = new_figure(7, 4)
    for name, runs in groups.items():
        rates = list(runs[0]["test"]["missing"])
        axes.plot(
            [float(rate) for rate in rates], [_mean(values(runs, "test", "missing", r)) for r in rates], "o-", ms=3, label=name
        )
    axes.set(xlabel="rate of missing modalities in the test part", ylabel="test accuracy, %")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return svg(figure)


def by_rate(values: Mapping[str, Mapping[float, Mapping[int, float]]]) -> str:
    """Draw accuracy over the rate of missing modalities; values: {method: {rate: {seed: accuracy}}}."""
    figure, axes = new_figure(7, 4.5)
    for i, (name, rows) in enumerate(values.items()):
        axes.plot(list(rows), [_mean(seeds) for seeds in rows.values()], "os^D"[i // 10 % 4] + "-", ms=4, label=name)
    axes.set(xlabel="rate of missing modalities, in training and test", ylabel="test accuracy, %")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return svg(figure)


def _mean(found: Mapping[int, float]) -> float:
    return 100 * statistics.fmean(found.values()) if found else float("nan")


def _with_interval(axes: Any, found: Estimate, place: float, color: str) -> None:
    axes.plot(found.mean, place, "|", color=color, ms=12, mew=2)
    if found.interval is not None:
        axes.plot(found.interval, (place, place), "-", color=color, lw=1.5)

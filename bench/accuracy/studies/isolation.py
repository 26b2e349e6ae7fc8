"""Figure 2 of the paper: one modality is taken away from part of the training samples; does the other's accuracy move?

    python -m bench.accuracy.studies.isolation --data avdigits.npz --config B

Nothing is missing in the test data. With MLA a modality's encoder learns from its own steps alone, and meets the other in the
shared head only.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import pictures
from bench.accuracy import tables
from bench.accuracy.jobs import Study, main
from bench.accuracy.methods import accuracy, train
from bench.accuracy.settings import Setting
from bench.records import Record
from mla_fast.data import MultimodalDataset
from mla_fast.tables import markdown_table

METHODS = ("Concat", "QMF", "MLA rls", "MLA window")
RATES = (0.1, 0.3, 0.5, 0.7, 0.9)


class Job(NamedTuple):
    task: Setting
    method: str
    seed: int
    masked: str | None
    rate: float


def jobs(task: Setting, seeds: Sequence[int]) -> list[Job]:
    modalities = task.parts(seeds[0])[0].modalities
    masks = [(None, 0.0), *itertools.product(modalities, RATES)]
    return [Job(task, method, seed, *mask) for method, seed, mask in itertools.product(METHODS, seeds, masks)]


def run(job: Job) -> Record:
    train_set, test_set = job.task.parts(job.seed)
    return {"accuracy": accuracy(train(job.method, masked(train_set, job), job.task, job.seed), test_set)}


def masked(dataset: MultimodalDataset, job: Job) -> MultimodalDataset:
    """The rate's share of the samples, rounded, without the modality; more go as the rate grows, and none come back."""
    present = torch.ones(len(dataset), len(dataset.modalities), dtype=torch.bool)
    if job.masked is not None:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(job.seed))
        present[order[: round(job.rate * len(dataset))], dataset.modalities.index(job.masked)] = False
    return MultimodalDataset(dataset.inputs, dataset.target, dataset.fields, present)


def moves(found: Sequence[Record]) -> dict[tuple[str, str, str], dict[float, float]]:
    """(method, masked, other) → {rate: points by which the other's accuracy has moved from rate 0, mean over the seeds}."""
    alone = {(r["method"], r["seed"], r["masked"], r["rate"]): r["accuracy"] for r in found}
    grouped: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for (method, seed, mask, rate), values in alone.items():
        if mask is None or (method, seed, None, 0.0) not in alone:
            continue
        before = alone[method, seed, None, 0.0]
        for other in [name for name in values if name not in (mask, "average", "fused")]:
            per_rate = grouped.setdefault((method, mask, other), {})
            per_rate.setdefault(rate, []).append(100 * (values[other] - before[other]))
    return {case: {rate: statistics.mean(by_rate[rate]) for rate in sorted(by_rate)} for case, by_rate in grouped.items()}


def table(found: Sequence[Record]) -> str:
    curves = moves(found)
    rates = sorted({rate for curve in curves.values() for rate in curve})
    rows = [
        [f"{method}: {other}, while {mask} is masked", *(f"{curve[rate]:+.1f}" if rate in curve else "-" for rate in rates)]
        for (method, mask, other), curve in curves.items()
    ]
    return markdown_table([tables.heading(found), *(f"{rate:.0%}" for rate in rates)], rows)


def draw(found: Sequence[Record], path: Path) -> bool:
    curves = moves(found)
    cases = sorted({case[1:] for case in curves})
    figure = pictures.new_figure(pictures.PAGE, 3.8)
    if figure is None:
        return False
    methods = list(dict.fromkeys(case[0] for case in curves))
    for axes, (mask, other) in zip(figure.subplots(1, len(cases), squeeze=False, sharey=True)[0], cases, strict=True):
        for method in methods:
            curve = curves[method, mask, other]
            axes.plot([0, *curve], [0, *curve.values()], marker="o", ms=4, **pictures.style(method))
        axes.set(title=f"{other} alone", xlabel=f"share of {mask} masked in training", ylabel="points it gains")
        axes.label_outer()
        axes.axhspan(-2, 2, color="tab:grey", alpha=0.15)
    pictures.legend(figure, {method: pictures.style(method) for method in methods}, len(methods))
    return pictures.save(figure, path)


STUDY = Study("isolation", jobs, run, table, draw, "0-5")

if __name__ == "__main__":
    main(STUDY)

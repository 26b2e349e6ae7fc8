"""Learning one modality and then another: by how much does the first one's loss rise, through the shared head alone?

    python -m bench.accuracy.studies.forgetting

The first modality's encoder does not move while the second is learned, so that whatever is lost is lost in the head. The data's
first modality and then its second; plain SGD at the rate 0.1, without momentum.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench import pictures
from bench.accuracy import tables
from bench.accuracy.jobs import Study, main
from bench.accuracy.methods import Batches, mla_trainer
from bench.accuracy.settings import Setting
from bench.records import Record
from mla_fast import Trainer
from mla_fast.data import MultimodalDataset
from mla_fast.tables import markdown_table

CASES = tuple(itertools.product(("MLA none", "MLA window", "MLA rls"), ("free", "project")))
ALPHA = 0.1


class Job(NamedTuple):
    task: Setting
    method: str
    bias: str
    first: str
    second: str
    seed: int


def jobs(task: Setting, seeds: Sequence[int]) -> list[Job]:
    first, second, *_ = task.parts(seeds[0])[0].modalities
    return [Job(task, *case, first, second, seed) for case, seed in itertools.product(CASES, seeds)]


def run(job: Job) -> Record:
    train_set, test_set = job.task.parts(job.seed)
    trainer = mla_trainer(job.method, train_set, replace(job.task, lr=0.1), job.seed, bias=job.bias, alpha=ALPHA)
    trainer.scheduler = None
    for group in trainer.optimizer.param_groups:
        group["momentum"] = 0.0
    batches = Batches(train_set, job.seed)
    trainer.fit(OneModality(batches, job.first), job.task.epochs)
    before = loss(trainer, job.first, test_set)
    trainer.fit(OneModality(batches, job.second), 2 * job.task.epochs)
    losses = {"before": before, "after": loss(trainer, job.first, test_set), "other": loss(trainer, job.second, test_set)}
    return {"losses": losses}


class OneModality:
    """The batches with a single modality in them."""

    def __init__(self, batches: Batches, modality: str):
        self.batches, self.modality = batches, modality

    def __iter__(self) -> Iterator[tuple]:
        for inputs, target, _ in self.batches:
            yield {self.modality: inputs[self.modality]}, target


def loss(trainer: Trainer, modality: str, dataset: MultimodalDataset) -> float:
    with torch.no_grad():
        return F.cross_entropy(trainer.model({modality: dataset.inputs[modality]})[modality], dataset.target).item()


def table(found: Sequence[Record]) -> str:
    rows, whole = [], None
    for runs in tables.groups(found, ["method", "bias"]):
        columns = [list(map(rise, runs)), *([run["losses"][name] for run in runs] for name in ("before", "other"))]
        whole = statistics.mean(columns[0]) if whole is None else whole  # without projection, which comes first
        share = f"{100 * statistics.mean(columns[0]) / whole:.1f}"
        rows.append([label(runs[0]), *(tables.spread(values, 1, 3) for values in columns), share])
    header = ["rise of the first's loss", "before", "loss of the second", "rise, % of that without projection"]
    return markdown_table([tables.heading(found), *header], rows)


def label(record: Record) -> str:
    return f"{record['method']}, bias {record['bias']}"


def rise(record: Record) -> float:
    return record["losses"]["after"] - record["losses"]["before"]


def draw(found: Sequence[Record], path: Path) -> bool:
    figure = pictures.new_figure(pictures.PAGE, 3.5)
    if figure is None:
        return False
    axes = figure.subplots()
    axes.set_xscale("symlog", linthresh=1e-3)  # before there are points, or the limits are a straight scale's
    axes.axvline(0, color="black", lw=0.8)
    names = []
    for place, runs in enumerate(tables.groups(found, ["method", "bias"])):
        axes.plot([rise(run) for run in runs], [place] * len(runs), "o", color=pictures.FAMILIES["MLA"], alpha=0.5)
        names.append(label(runs[0]))
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="rise of the first modality's loss; one point a run")
    axes.grid(axis="y", alpha=0.3)
    axes.margins(x=0.08)
    return pictures.save(figure, path)


STUDY = Study("forgetting", jobs, run, table, draw, "0-4")

if __name__ == "__main__":
    main(STUDY)

"""How much of the head's gradient is left as training goes on, ‖GP‖/‖G‖, and the size of P, ‖P‖_F.

    python -m bench.accuracy.studies.collapse --data avdigits.npz --config B

Eq. 5 is cumulative: P can only shrink, over the whole span of the features, the faster the smaller α is. The window's P is made
of the other modalities' latest means at each step.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench import pictures
from bench.accuracy import tables
from bench.accuracy.jobs import Study, main
from bench.accuracy.methods import Batches, accuracy, mla_trainer
from bench.accuracy.settings import Setting
from bench.records import Record
from mla_fast.tables import markdown_table

CASES = (("MLA rls", 0.1), ("MLA rls", 1.0), ("MLA rls", 100.0), ("MLA window", 1.0), ("MLA official", None))


class Job(NamedTuple):
    task: Setting
    method: str
    alpha: float | None
    seed: int


def jobs(task: Setting, seeds: Sequence[int]) -> list[Job]:
    return [Job(task, *case, seed) for case, seed in itertools.product(CASES, seeds)]


def run(job: Job) -> Record:
    """Both curves, at the last step of each epoch."""
    train_set, test_set = job.task.parts(job.seed)
    alpha = {} if job.alpha is None else {"alpha": job.alpha}
    trainer = mla_trainer(job.method, train_set, job.task, job.seed, **alpha)
    batches = Batches(train_set, job.seed)
    curves: dict[str, list[float]] = {"steps": [], "gradient_kept": [], "P_norm": []}
    for epoch in range(1, job.task.epochs + 1):
        trainer.fit(batches, epoch)
        (layer,) = trainer.optimizer.diagnostics()["layers"].values()
        for name, curve in curves.items():
            curve.append(layer[name])
    return {**curves, "accuracy": accuracy(trainer, test_set)["fused"]}


def label(record: Record) -> str:
    return record["method"] if record["alpha"] is None else f"{record['method']}, α = {record['alpha']:g}"


def table(found: Sequence[Record]) -> str:
    rows = []
    for runs in tables.groups(found, ["method", "alpha"]):
        last = [statistics.mean(run[name][-1] for run in runs) for name in ("gradient_kept", "P_norm")]
        rows.append([label(runs[0]), *(f"{value:.3g}" for value in last), tables.spread([run["accuracy"] for run in runs])])
    steps = found[0]["steps"][-1]
    return markdown_table([tables.heading(found), f"‖GP‖/‖G‖ after {steps} steps", "‖P‖_F", "fused accuracy, %"], rows)


def draw(found: Sequence[Record], path: Path) -> bool:
    figure = pictures.new_figure(pictures.PAGE, 3.8)
    if figure is None:
        return False
    names = {"gradient_kept": "‖GP‖/‖G‖", "P_norm": "‖P‖_F"}
    for axes, (name, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for runs in tables.groups(found, ["method", "alpha"]):
            means = [statistics.mean(values) for values in zip(*(run[name] for run in runs), strict=True)]
            axes.plot(runs[0]["steps"], means, "o-", ms=3, label=label(runs[0]))
        axes.set(title=title, xlabel="steps", xscale="log", yscale="log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return pictures.save(figure, path)


STUDY = Study("collapse", jobs, run, table, draw)

if __name__ == "__main__":
    main(STUDY)

"""Which (class, modality) pairs are found, by how often a modality is insufficient (μ) and by the initial scale of the units.

    python -m bench.accuracy.studies.competition

The two-layer network of ``mla_fast.competition``, after Huang et al. (ICML 2022), trained jointly, each modality on its own, and
by MLA. Tested with μ = 0.3 throughout.
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
from bench.accuracy.settings import DEFAULT, Setting
from bench.records import Record
from mla_fast.compare.task import BUILT_IN
from mla_fast.competition import ROUNDS, train_joint, train_mla, train_unimodal
from mla_fast.tables import markdown_table

METHODS = {"joint, sum": train_joint, "unimodal": train_unimodal, "MLA rls": train_mla}
MUS = (0.0, 0.1, 0.2, 0.3)
SCALES = (0.02, 0.05, 0.15)


class Job(NamedTuple):
    task: Setting
    method: str
    mu: float
    scale: float
    seed: int


def jobs(_: Setting, seeds: Sequence[int]) -> list[Job]:
    """On data of its own, whatever the task; an epoch is a round, one step on all samples."""
    task = Setting("competition", DEFAULT, BUILT_IN["competition"], epochs=ROUNDS)
    return [Job(task, *job) for job in itertools.product(METHODS, MUS, SCALES, seeds)]


def run(job: Job) -> Record:
    learned = METHODS[job.method](job.seed, rounds=job.task.epochs, mu=job.mu, scale=job.scale)
    return {"learned": learned._asdict()}


def table(found: Sequence[Record]) -> str:
    rows = [
        [f"{runs[0]['method']}, initial scale {runs[0]['scale']}", *(tables.spread(values) for values in _by_mu(runs).values())]
        for runs in tables.groups(found, ["method", "scale"])
    ]
    return markdown_table(["pairs found, %", *(f"μ = {mu}" for mu in _by_mu(found))], rows)


def _by_mu(runs: Sequence[Record]) -> dict[float, list[float]]:
    return {group[0]["mu"]: [run["learned"]["found"] for run in group] for group in tables.groups(runs, ["mu"])}


def draw(found: Sequence[Record], path: Path) -> bool:
    methods = tables.groups(found, ["method"])
    figure = pictures.new_figure(pictures.PAGE, 2.8)
    if figure is None:
        return False
    panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for axes, runs in zip(panels, methods, strict=True):
        by_scale = {group[0]["scale"]: _by_mu(group) for group in tables.groups(runs, ["scale"])}
        cells = [[statistics.mean(values) for values in by_mu.values()] for by_mu in by_scale.values()]
        picture = axes.imshow(cells, vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
        mus = list(_by_mu(runs))
        axes.set(title=runs[0]["method"], xlabel="μ", xticks=range(len(mus)), xticklabels=mus)
        axes.set(ylabel="initial scale", yticks=range(len(by_scale)), yticklabels=by_scale)
        axes.label_outer()
    figure.colorbar(picture, ax=panels, label="share of pairs found")
    return pictures.save(figure, path)


STUDY = Study("competition", jobs, run, table, draw)

if __name__ == "__main__":
    main(STUDY)

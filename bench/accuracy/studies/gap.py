"""Figure 3 of the paper: how far apart the modalities' features lie.

    python -m bench.accuracy.studies.gap --data avdigits.npz --config B

The modality gap of Liang et al. (NeurIPS 2022): features h / ‖h‖ of the test samples, the distance between the modalities' means.
The picture shows these on their two principal axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench import pictures
from bench.accuracy import tables
from bench.accuracy.jobs import Study, main
from bench.accuracy.methods import accuracy, train
from bench.accuracy.settings import Setting
from bench.records import Record
from mla_fast.compare.study import directions, mean_distance
from mla_fast.tables import markdown_table

METHODS = ("Sum", "Concat", "Late fusion", "MLA none", "MLA rls", "MLA window")
COLORS = "#1f6fb4", "#c8621b", "#3a8a4d", "#7d838c"  # of the modalities
SHOWN = 200  # samples of each modality in the picture, at most


class Job(NamedTuple):
    task: Setting
    method: str
    seed: int


def jobs(task: Setting, seeds: Sequence[int]) -> list[Job]:
    return [Job(task, *job) for job in itertools.product(METHODS, seeds)]


@torch.no_grad()
def run(job: Job) -> Record:
    train_set, test_set = job.task.parts(job.seed)
    with torch.enable_grad():
        trained = train(job.method, train_set, job.task, job.seed)
    encoders = getattr(trained, "model", trained).encoders.eval()
    features = {modality: encoders[modality](x) for modality, x in test_set.inputs.items()}
    result = {"accuracy": accuracy(trained, test_set)["fused"], "gap": gap(list(features.values()))}
    if job.seed:
        return result
    points = projected([h[:: math.ceil(len(h) / SHOWN)] for h in features.values()])
    return result | {"points": {m: p.round(decimals=3).tolist() for m, p in zip(features, points, strict=True)}}


def gap(features: Sequence[Tensor]) -> float:
    """Mean over pairs of modalities of the distance between the means of their normalised features [N, s]; at most 2."""
    return mean_distance([directions(h).mean(0) for h in features])


def projected(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The normalised features of each modality on the two principal axes of all of them: [N, 2] each."""
    rows = torch.cat([directions(h) for h in features])
    rows = rows - rows.mean(0)
    axes = torch.linalg.svd(rows, full_matrices=False).Vh[:2]
    return (rows @ axes.T).split([len(h) for h in features])


def table(found: Sequence[Record]) -> str:
    rows = []
    for runs in tables.groups(found, ["method"]):
        gaps, fused = [run["gap"] for run in runs], [run["accuracy"] for run in runs]
        rows.append([runs[0]["method"], tables.spread(gaps, 1, 2), tables.spread(fused)])
    return markdown_table([tables.heading(found), "modality gap", "fused accuracy, %"], rows)


def draw(found: Sequence[Record], path: Path) -> bool:
    shown = [record for record in found if "points" in record]
    columns = min(3, max(len(shown), 1))
    rows = -(-len(shown) // columns)
    figure = pictures.new_figure(pictures.PAGE, 2.9 * rows + 0.3)
    if figure is None:
        return False
    for axes, record in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        for color, points in zip(COLORS, record["points"].values(), strict=False):
            axes.plot(*zip(*points, strict=True), ".", ms=4, alpha=0.6, color=color)
        axes.set(title=f"{record['method']}, gap {record['gap']:.2f}", xticks=[], yticks=[])
    for axes in figure.axes[len(shown) :]:
        axes.remove()
    entries = {m: {"color": c, "marker": "o", "ls": ""} for m, c in zip(shown[0]["points"], COLORS, strict=False)}
    pictures.legend(figure, entries, len(entries))
    return pictures.save(figure, path)


STUDY = Study("gap", jobs, run, table, draw)

if __name__ == "__main__":
    main(STUDY)

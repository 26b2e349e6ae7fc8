"""A modality is added when the data of the old ones is gone: what do the old ones lose, and how good is the new one?

    python -m bench.accuracy.studies.adding --data avdigits.npz --config B

The old modalities are trained with MLA, then the new one alone, for as many epochs each; nothing but its encoder and the shared
head moves. *half*: the new one has the first half of the classes only. Several additions follow one another;
*image/0* is the first half of the image.

Rivals, on top of no projection: *replay* also trains the head on 1 % of the old data after every batch, *frozen head* trains the
new encoder alone, *distillation* adds T² KL(old head's answers to the new features ‖ answers), T = 2, as learning without
forgetting does.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import mla_fast as mla
from bench import pictures
from bench.accuracy import tables
from bench.accuracy.jobs import Study, main
from bench.accuracy.methods import FEATURES, Batches, accuracy, new_scheduler, new_sgd
from bench.accuracy.settings import Setting
from bench.records import Record
from mla_fast.data import MultimodalDataset
from mla_fast.encoders import encoder_for
from mla_fast.tables import markdown_table

OURS = "rls, update, bias"
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {"projection": "none"},
    "window": {"projection": "window", "target": "update"},
    "rls": {"projection": "rls"},
    OURS: {"projection": "rls", "target": "update", "bias": "project"},
}
RIVALS = ("replay 1 %", "frozen head", "distillation")
METHODS = (*SETTINGS, *RIVALS)
T, IN_A_ROW = 2.0, 3  # the temperature; how many seeds have several additions


class Job(NamedTuple):
    task: Setting
    old: str
    new: str
    classes: str
    method: str
    seed: int


def jobs(task: Setting, seeds: Sequence[int]) -> list[Job]:
    """Each modality last, with all and half of the classes, seed by seed, to share what comes before; then one after another."""
    names = task.parts(seeds[0])[0].modalities
    orders = [(*(m for m in names if m != last), last) for last in names]
    single = [("+".join(order[:-1]), order[-1], classes) for order in orders for classes in ("all", "half")]
    rows = [(order[0], "+".join(order[1:]), "all") for order in orders] if len(names) > 2 else []
    if task.config == "B":
        rows = [(f"{names[1]}/0", f"{names[1]}/1+{names[0]}/0+{names[0]}/1", "all")]
    todo = [*itertools.product(seeds, single), *itertools.product(seeds[:IN_A_ROW], rows)]
    return [Job(task, *case, method, seed) for (seed, case), method in itertools.product(todo, METHODS)]


def select(dataset: MultimodalDataset, names: Sequence[str]) -> MultimodalDataset:
    """The data with these modalities alone; "image/1" is the second half of an image's rows."""
    inputs = {}
    for name in names:
        x = dataset.inputs[name.split("/")[0]]
        inputs[name] = x.chunk(2, 1)[int(name[-1])] if "/" in name else x
    return MultimodalDataset(inputs, dataset.target)


def run(job: Job) -> Record:
    train_set, test_set = job.task.parts(job.seed)
    old, new = job.old.split("+"), job.new.split("+")
    half = train_set.classes // 2 if job.classes == "half" else train_set.classes
    trainer = trainer_of(train_set, job, old)
    trainer.resume(first_phase(job.task, job.seed, job.old, job.method if job.method in SETTINGS else "none"))
    phases = [accuracy(trainer, select(test_set, old))]
    alone = []
    for i, name in enumerate(new, 1):
        add(trainer, train_set, train_set.subset(train_set.target < half), job, name, (*old, *new[: i - 1]))
        phases.append(accuracy(trainer, select(test_set, [*old, *new[:i]])))
        alone.append(accuracy(trainer, select(test_set.subset(test_set.target < half), [name]))[name])
    trainer.model.seen.counts = False
    plain = accuracy(trainer, select(test_set, [*old, *new]))["fused"]
    return {"phases": phases, "new_alone": alone, "plain": plain}


@functools.lru_cache(maxsize=16)
def first_phase(task: Setting, seed: int, old: str, method: str) -> Path:
    """The file of a run on the old modalities; what methods have in common is trained once."""
    train_set, _ = task.parts(seed)
    trainer = trainer_of(train_set, Job(task, old, "", "all", method, seed), old.split("+"))
    trainer.fit(Batches(select(train_set, old.split("+")), seed), task.epochs)
    path = folder() / f"{task.data}-{seed}-{old.replace('/', '_')}-{method}.pt"
    trainer.save(path)
    return path


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="adding-"))


def trainer_of(train_set: MultimodalDataset, job: Job, names: Sequence[str]) -> mla.Trainer:
    torch.manual_seed(job.seed)
    model = mla.MultimodalModel({m: encoder(train_set, m) for m in names}, nn.Linear(FEATURES, train_set.classes))
    optimizer = mla.MLAOptimizer(new_sgd(model, job.task), model.head, **SETTINGS.get(job.method, SETTINGS["none"]))
    return mla.Trainer(model, optimizer, scheduler=new_scheduler(optimizer, job.task), progress=False)


def encoder(train_set: MultimodalDataset, name: str) -> nn.Module:
    return encoder_for(select(train_set, [name]).inputs[name].shape[1:], FEATURES)


def add(
    trainer: mla.Trainer, whole: MultimodalDataset, train_set: MultimodalDataset, job: Job, name: str, old: Sequence[str]
) -> None:
    """Add a modality and train it by the job's method."""
    torch.manual_seed(job.seed)
    before = copy.deepcopy(trainer.model.head)
    trainer.add_modality(name, encoder(whole, name), scheduler=lambda optimizer: new_scheduler(optimizer, job.task))
    batches = Batches(select(train_set, [name]), job.seed)
    if job.method == "frozen head":
        trainer.model.head.requires_grad_(False)
    if job.method == "distillation":
        distil(trainer, batches, before, name, job.task.epochs)
        return
    loader = Replay(batches, select(whole, old), job.seed) if job.method == "replay 1 %" else batches
    trainer.fit(loader, trainer.epoch + job.task.epochs)


class Replay:
    """The batches, each followed by one of the 1 % of the old samples that were kept."""

    def __init__(self, batches: Batches, old: MultimodalDataset, seed: int):
        kept = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))[: max(1, len(old) // 100)]
        self.batches, self.kept = batches, old.subset(kept)

    def __iter__(self) -> Iterator[tuple]:
        for batch in self.batches:
            yield batch
            yield self.kept.inputs, self.kept.target


def distil(trainer: mla.Trainer, batches: Batches, before: nn.Module, name: str, epochs: int) -> None:
    model, optimizer = trainer.model.train(), trainer.optimizer
    for _ in range(epochs):
        for inputs, target, _ in batches:
            optimizer.zero_grad()
            features = model.features(name, inputs[name])
            logits = model.head(features)
            with torch.no_grad():
                asked = (before(features) / T).log_softmax(1)
            kept = F.kl_div((logits / T).log_softmax(1), asked, reduction="batchmean", log_target=True)
            (F.cross_entropy(logits, target) + T**2 * kept).backward()
            optimizer.step(modality=name)
            model.saw(name, target)
        trainer.scheduler.step()
        trainer.epoch += 1


def modalities(record: Record) -> list[str]:
    return [*record["old"].split("+"), *record["new"].split("+")]


def falls(record: Record, after: int = -1) -> float:
    """How many points the modalities have lost, in the mean, from when each was trained last to addition number `after`."""
    phases, old, new = record["phases"], record["old"].split("+"), record["new"].split("+")
    last = len(phases) - 1 if after < 0 else after
    since = {**dict.fromkeys(old, 0), **{name: i for i, name in enumerate(new, 1) if i < last}}
    return statistics.mean(100 * (phases[i][name] - phases[last][name]) for name, i in since.items())


def case(record: Record) -> str:
    return f"{tables.title(record)}: {record['old']}, then {record['new']}"


def columns(runs: Sequence[Record]) -> list[str]:
    """What is told of a method in one case: the fall of the old ones and the worst seed's, the new one alone, all fused."""
    lost = [falls(run) for run in runs]
    fused = [run["phases"][-1]["fused"] for run in runs]
    return [
        f"{statistics.mean(lost):+.1f} ({max(lost):+.1f})",
        tables.spread([run["new_alone"][-1] for run in runs]),
        tables.spread(fused),
    ]


def table(found: Sequence[Record]) -> str:
    return "\n\n".join(filter(None, [summary(found), _all_table(found), _half_table(found), _row_table(found)]))


def summary(found: Sequence[Record]) -> str:
    """The means over all runs in which one modality is added."""
    single = [record for record in found if "+" not in record["new"]]
    count = sum(record["classes"] == "all" and record["method"] == METHODS[0] for record in single)
    rows = []
    for runs in tables.groups(single, ["method"]):
        cells = []
        for classes in ("all", "half"):
            of = [run for run in runs if run["classes"] == classes]
            lost = [falls(run) for run in of]
            cells += [f"{statistics.mean(lost):+.1f} ({max(lost):+.1f})"] if lost else ["-"]
            cells += [tables.spread([run["new_alone"][-1] for run in of]).split(" ±")[0]]
            cells += [tables.spread([run["phases"][-1]["fused"] for run in of]).split(" ±")[0]]
        rows.append([runs[0]["method"], *cells])
    names = ["old lose (worst run)", "new alone", "fused"]
    return markdown_table([f"mean of {count} runs", *names, *(f"half: {name}" for name in names)], rows)


def _all_table(found: Sequence[Record]) -> str:
    parts = []
    for group in tables.groups([r for r in found if r["classes"] == "all" and "+" not in r["new"]], ["data", "old", "new"]):
        rows = [[runs[0]["method"], *columns(runs)] for runs in tables.groups(group, ["method"])]
        parts.append(markdown_table([case(group[0]), "old lose (worst seed)", "new alone", "fused"], rows))
    return "\n\n".join(parts)


def _half_table(found: Sequence[Record]) -> str:
    parts = []
    for group in tables.groups([r for r in found if r["classes"] == "half"], ["data", "old", "new"]):
        rows = []
        for runs in tables.groups(group, ["method"]):
            gain = [100 * (run["phases"][-1]["fused"] - run["phases"][0]["fused"]) for run in runs]
            ways = [[run["phases"][-1]["average"] for run in runs], [run["plain"] for run in runs]]
            rows.append([runs[0]["method"], *columns(runs), f"{statistics.mean(gain):+.1f} ({min(gain):+.1f})"])
            rows[-1] += [tables.spread(way).split(" ±")[0] for way in ways]
        header = ["old lose (worst seed)", "new alone", "fused", "fused − old fused (worst)", "plain mean", "plain entropy"]
        parts.append(markdown_table([f"{case(group[0])} of half of the classes", *header], rows))
    return "\n\n".join(parts)


def _row_table(found: Sequence[Record]) -> str:
    parts = []
    for group in tables.groups([r for r in found if "+" in r["new"]], ["data", "new"]):
        rows, count = [], group[0]["new"].count("+") + 1
        for runs in tables.groups(group, ["method"]):
            lost = [statistics.mean(falls(run, i) for run in runs) for i in range(1, count + 1)]
            rows.append([runs[0]["method"], *(f"{x:+.1f}" for x in lost), columns(runs)[-1]])
        names = [f"lost after addition {i}" for i in range(1, count + 1)]
        parts.append(markdown_table([case(group[0]).replace("+", ", then "), *names, "fused"], rows))
    return "\n\n".join(parts)


def draw(found: Sequence[Record], path: Path) -> bool:
    single = [record for record in found if "+" not in record["new"]]
    figure = pictures.new_figure(pictures.PAGE, 3.8)
    if figure is None:
        return False
    named = [runs[0]["method"] for runs in tables.groups(single, ["method"])]
    for axes, classes in zip(figure.subplots(1, 2, sharey=True), ("all", "half"), strict=True):
        for place, runs in enumerate(tables.groups([r for r in single if r["classes"] == classes], ["method"])):
            lost = [falls(run) for run in runs]
            axes.plot(lost, [place] * len(lost), "o", color="tab:blue", alpha=0.4)
            axes.plot(statistics.mean(lost), place, "|", color="black", ms=14)
        axes.set(title=f"the new one has {classes} of the classes", xlabel="points lost by the old ones")
        axes.set(yticks=range(len(named)), yticklabels=named)
    return pictures.save(figure, path)


STUDY = Study("adding", jobs, run, table, draw, "0-5")

if __name__ == "__main__":
    main(STUDY)

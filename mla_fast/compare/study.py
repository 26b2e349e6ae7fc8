"""A run of a study: one method on a data set that is decoded lazily, with the paper's encoders, in the paper's settings or as the
released code has them."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mla_fast.baselines import METHODS, MLA_SETTINGS, JointModel, joint_accuracy, train_epoch
from mla_fast.baselines.joint import on_device
from mla_fast.compare.records import Record
from mla_fast.datasets import LazyDataset, Loader
from mla_fast.evaluate import Tally
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.parts import evaluating
from mla_fast.reference import official_fusion
from mla_fast.trainer import Trainer

SETTINGS = ("paper", "released")
FIXED = {2: (0.55, 0.45), 3: (0.35, 0.25, 0.40)}  # weights of the released code without --dynamic, in its order


class Job(NamedTuple):
    """masked: the modality that a share of the training samples lacks, None where none does."""

    method: str
    setting: str
    seed: int
    masked: str | None = None
    share: float = 0.0


class Parts(Protocol):
    """What the command line makes of its options: the parts of the data, and the encoders with the width of their features."""

    def __call__(self, setting: str) -> tuple[dict[str, LazyDataset], Callable[[], tuple[dict[str, nn.Module], int]]]: ...


class Learner(Protocol):
    @property
    def model(self) -> nn.Module: ...

    def train_epoch(self, epoch: int) -> None: ...

    def accuracy(self, loader: Iterable[Any]) -> dict[str, float]: ...


class Joint:
    """A method that is trained jointly."""

    def __init__(self, model: JointModel, loader: Loader, settings: Mapping[str, Any]):
        self.model, self.loader = model, loader
        self.optimizer, self.scheduler = _optimizer(model, settings)

    def train_epoch(self, epoch: int) -> None:
        train_epoch(self.model, self.optimizer, self.loader, epoch)
        self.scheduler.step()

    def accuracy(self, loader: Iterable[Any]) -> dict[str, float]:
        found = joint_accuracy(self.model, (batch[:3] for batch in loader))
        return {"multi" if name == "joint" else name: value for name, value in found.items()}


class Alternating:
    """MLA, its fusion "dynamic" by entropies and "fixed" by the mean; or both as the released code has them."""

    def __init__(self, model: MultimodalModel, loader: Loader, settings: Mapping[str, Any], how: Mapping[str, Any], setting: str):
        self.model, self.loader, self.setting = model, loader, setting
        sgd, _ = _optimizer(model, settings)
        optimizer = MLAOptimizer(sgd, model.head, **how)
        self.trainer = Trainer(model, optimizer, scheduler=_scheduler(optimizer, settings), progress=False)

    def train_epoch(self, epoch: int) -> None:
        self.trainer.fit(self.loader, epoch + 1)

    def accuracy(self, loader: Iterable[Any]) -> dict[str, float]:
        if self.setting == "released":
            return released_accuracy(self.model, loader)
        found = self.trainer.evaluate(batch[:3] for batch in loader)["accuracy"]
        names = {"fused": "dynamic", "average": "fixed"}
        return {names.get(name, name): value for name, value in found.items()}


@torch.no_grad()
def released_accuracy(model: MultimodalModel, loader: Iterable[Any]) -> dict[str, float]:
    """Return the accuracy of each modality and of both ways to fuse, as the released code evaluates.

    "dynamic" has one weight for each modality and batch, so that a prediction depends on its neighbours; "fixed" the weights of
    ``FIXED``. What is absent is encoded as zeros.
    """
    tallies: dict[str, Tally] = {}
    for inputs, target, present in on_device(model, (batch[:3] for batch in loader)):
        with evaluating(model):
            logits = torch.stack(list(model(inputs).values()))  # [M, N, C]
        weights = logits.new_tensor(FIXED.get(len(logits), [1 / len(logits)] * len(logits)))
        answers = dict(zip(inputs, logits, strict=True))
        fused = {"dynamic": official_fusion(logits)[0], "fixed": torch.einsum("m,mnc->nc", weights, logits)}
        for name, z in (answers | fused).items():
            here = None if present is None or name in fused else present[:, model.modalities.index(name)]
            tallies.setdefault(name, Tally(z.shape[1], z.device)).add(z, target, here)
    return {name: tally.accuracy() for name, tally in tallies.items()}


def run(job: Job, parts: Parts, settings: Mapping[str, Any], device: torch.device, *, gap: bool = False) -> Record:
    """Train a method and test it.

    settings: ``epochs``, ``batch_size``, ``lr``, ``momentum``, ``weight_decay``, ``decay_at`` and ``workers``.

    In the paper's settings the epoch is chosen on the validation part, where the data set has one, and is the last otherwise. As
    released, it is the best **on the test part**, which the record says.
    """
    data, make_encoders = parts(job.setting)
    started = time.perf_counter()
    torch.manual_seed(job.seed)
    training = data["train"] if job.masked is None else lacking(data["train"], job.masked, job.share, job.seed)
    how = {"workers": settings["workers"], "device": device}
    loaders = {p: Loader(d, settings["batch_size"], **how) for p, d in data.items() if p != "train"}
    learner = _learner(job, training, make_encoders, settings, device)
    chosen_on = "test" if job.setting == "released" else "validation" if "validation" in loaders else "last epoch"
    epoch, test = train_and_test(learner, settings["epochs"], loaders, chosen_on)
    of_gap = {"gap": modality_gap(learner.model, loaders["test"])} if gap else {}
    return {
        **job._asdict(),
        "chosen_on": chosen_on,
        "epoch": epoch,
        "test": test,
        **of_gap,
        "samples": {part: len(each) for part, each in data.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def train_and_test(learner: Learner, epochs: int, loaders: Mapping[str, Loader], chosen_on: str) -> tuple[int, dict[str, float]]:
    """Train for all epochs; return the chosen one, from 1, and its accuracies on the test part."""
    best: tuple[float, int, dict[str, float]] | None = None
    for epoch in range(epochs):
        learner.train_epoch(epoch)
        if chosen_on == "last epoch" and epoch + 1 < epochs:
            continue
        found = learner.accuracy(loaders[chosen_on if chosen_on in loaders else "test"])
        score = found["multi"] if "multi" in found else found["dynamic"]
        if best is None or score > best[0]:
            test = learner.accuracy(loaders["test"]) if chosen_on == "validation" else found
            best = score, epoch + 1, test
    if best is None:
        raise ValueError("epochs: expected at least one, got none")
    return best[1:]


def _learner(
    job: Job, training: LazyDataset, make_encoders: Callable[[], Any], settings: Mapping[str, Any], device: torch.device
) -> Learner:
    encoders, features = make_encoders()
    how = {"shuffle": True, "workers": settings["workers"], "device": device}
    if job.method in MLA_SETTINGS:
        head = new_head(features, training.classes)
        projection = {"projection": "none"} if job.setting == "released" else MLA_SETTINGS[job.method]
        model = MultimodalModel(encoders, head).to(device)
        return Alternating(model, Loader(training, settings["batch_size"], **how), settings, projection, job.setting)
    make: Callable[..., JointModel] = METHODS[job.method]
    joint = make(encoders, features, training.classes).to(device)
    return Joint(joint, Loader(training, settings["batch_size"], indexed=True, **how), settings)


def new_head(features: int, classes: int) -> nn.Linear:
    """Return a head with the initial values of the released code."""
    head = nn.Linear(features, classes)
    nn.init.xavier_normal_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def lacking(dataset: LazyDataset, modality: str, share: float, seed: int) -> LazyDataset:
    """Return a data set of which a share of the samples, drawn by a seed, lacks a modality; none loses its only one."""
    chosen = torch.rand(len(dataset), generator=torch.Generator().manual_seed(seed)) < share
    entries = []
    for entry, without in zip(dataset.entries, chosen.tolist(), strict=True):
        others = any(source is not None for name, source in entry.sources.items() if name != modality)
        sources = {**entry.sources, modality: None} if without and others else entry.sources
        entries.append(dataclasses.replace(entry, sources=sources))
    return dataset.with_entries(entries)


@torch.no_grad()
def modality_gap(model: nn.Module, loader: Iterable[Any]) -> float:
    """Return the mean distance between the modalities' mean directions h / ‖h‖, over pairs of modalities: 0 … 2.

    The modality gap of Liang et al., NeurIPS 2022.
    """
    encoders: Any = model.encoders
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with evaluating(model):
        for inputs, _, present in on_device(model, (batch[:3] for batch in loader)):
            for m, (modality, x) in enumerate(inputs.items()):
                h = encoders[modality](x if present is None else x[present[:, m]])
                sums[modality] = sums.get(modality, torch.zeros(())) + directions(h).sum(0).cpu()
                counts[modality] = counts.get(modality, 0) + len(h)
    return mean_distance([total / counts[modality] for modality, total in sums.items() if counts[modality]])


def directions(h: Tensor) -> Tensor:
    """Return h / ‖h‖ of features [N, s]."""
    found: Tensor = h / h.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return found


def mean_distance(points: Sequence[Tensor]) -> float:
    """Return the mean distance over pairs of points [s]."""
    return float(torch.stack([(a - b).norm() for a, b in itertools.combinations(points, 2)]).mean())


def _optimizer(model: nn.Module, settings: Mapping[str, Any]) -> tuple[torch.optim.SGD, Any]:
    how = {name: settings[name] for name in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), **how)
    return optimizer, _scheduler(optimizer, settings)


def _scheduler(optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> torch.optim.lr_scheduler.MultiStepLR:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [settings["decay_at"]])


def defined_for(method: str) -> int | None:
    """Return the number of modalities that a method is defined for, None for any."""
    return METHODS[method].defined_for if method in METHODS else None


def jobs(
    methods: Iterable[str], settings: Iterable[str], seeds: Iterable[int], masks: Iterable[tuple[str | None, float]]
) -> list[Job]:
    """Return all runs, seed by seed; as released the projection never fires, so that both forms of MLA are one."""
    found: Iterator[Job] = (
        Job("MLA none" if setting == "released" and method == "MLA rls" else method, setting, seed, *mask)
        for seed in seeds
        for mask in masks
        for setting in settings
        for method in methods
    )
    return list(dict.fromkeys(found))

"""One run: a method with one choice of hyperparameters and one seed, its best epoch chosen on the validation part."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mla_fast.compare.learners import Budget, Learner, make_learner, snapshot
from mla_fast.compare.measures import brief, measure, predict, scores
from mla_fast.compare.methods import trials
from mla_fast.compare.records import Record
from mla_fast.compare.task import Task
from mla_fast.data import MultimodalDataset

NAMES = ("method", "seed", "trial", "rate")  # what tells a run from others in a folder


class Job(NamedTuple):
    """trial: of how many the method gets, from 0; rates: of missing modalities, for the test part; settings: their digest.

    rate: at which all parts lack modalities, None where none does.
    """

    task: Task
    method: str
    seed: int
    trial: int
    budget: Budget
    rates: tuple[float, ...]
    device: str
    settings: str
    rate: float | None = None


def run(job: Job) -> Record:
    """Train, choose the epoch by the accuracy on the validation part (then by the likelihood), and measure on the test part.

    On the CPU it uses one thread: encoders this small only wait for each other on more.
    """
    torch.set_num_threads(1)
    options = trials(job.method, job.trial + 1)[-1]
    train, validation, test = job.task.parts(job.seed)
    warm_up(job.device)
    memory = Memory(job.device)
    started = time.perf_counter()
    full, encoder = job.task.full(job.seed), job.task.encoder
    learner = make_learner(job.method, options, train, validation, job.budget, job.seed, job.device, full, encoder)
    before = time.perf_counter() - started
    epoch, chosen = train_to_best_epoch(learner, validation)
    seconds, peak = time.perf_counter() - started, memory.peak()
    cost = {
        "seconds": seconds,
        "seconds_before": before,
        "passes": getattr(learner, "passes", job.budget.epochs),
        "passes_before": learner.passes_before,
    }
    return {
        **{name: getattr(job, name) for name in NAMES},
        "options": options,
        "settings": job.settings,
        "epoch": epoch,
        "validation": chosen,
        "test": measure(learner, test, job.rates, job.seed) if job.rate is None else brief(learner, test),
        "samples": {"train": len(train), "validation": len(validation), "test": len(test)},
        **({} if job.rate is None else {"share": _missing_share(train, validation, test)}),
        "cost": {name: round(value, 3) for name, value in cost.items()} | {"peak_mb": peak},
        "torch": torch.__version__,
    }


def _missing_share(*parts: MultimodalDataset) -> float:
    """Return how much of all samples' modalities is missing."""
    present = [torch.ones(len(part), len(part.inputs)) if part.present is None else part.present for part in parts]
    return round(1 - torch.cat([here.double() for here in present]).mean().item(), 4)


@lru_cache
def warm_up(device: str) -> None:
    """Load what libraries load when first used, which would make the first run of a process slower and larger."""
    layer = torch.nn.Linear(2, 2).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 2, device=device)).sum().backward()
    optimizer.step()
    scores(torch.eye(2), torch.arange(2))


def train_to_best_epoch(learner: Learner, validation: MultimodalDataset) -> tuple[int, dict[str, float]]:
    """Train for all epochs, leave the model as it was after the best one; return which, from 1, and its validation scores."""
    best: tuple[int, dict[str, float]] | None = None
    state: dict[str, Any] = {}
    for epoch in range(learner.epochs):
        learner.train_epoch(epoch)
        found = scores(predict(learner, validation), validation.target)
        if best is None or rank(found) > rank(best[1]):
            best, state = (epoch + 1, found), snapshot(learner)
    if best is None:
        raise ValueError("epochs: expected at least one, got none")
    learner.model.load_state_dict(state)
    return best


def rank(validation: dict[str, float]) -> tuple[float, float]:
    """Return what is larger for a better choice."""
    return validation["accuracy"], -validation["nll"]


class Memory:
    """The most memory in use since this was made, above what was in use then; on a CPU under Linux alone."""

    def __init__(self, device: str):
        self.cuda = torch.device(device) if device.startswith("cuda") else None
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self.start = torch.cuda.memory_allocated(self.cuda) / 2**20
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        except OSError:
            pass
        self.start = _status("VmRSS")

    def peak(self) -> float | None:
        """Return MiB, None where they are not known."""
        if self.cuda is not None:
            return round(torch.cuda.max_memory_allocated(self.cuda) / 2**20 - self.start, 1)
        return round(_status("VmHWM") - self.start, 1) if self.start else None


def _status(name: str) -> float:
    """Return a line of /proc/self/status in MiB, 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)

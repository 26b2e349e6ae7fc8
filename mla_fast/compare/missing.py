"""Table 2 of the paper: every method trained, chosen and tested on data of which the same share is missing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mla_fast import data, ranks
from mla_fast.compare import missing_report
from mla_fast.compare.learners import Budget
from mla_fast.compare.methods import MISSING, TABLE_2, find, select, trials
from mla_fast.compare.records import Record
from mla_fast.compare.run import Job
from mla_fast.compare.runner import add, begin, run_all, settings_of
from mla_fast.compare.task import Task, Three
from mla_fast.data import MultimodalDataset

WIDTH = 128  # of the encoders' three layers


@dataclass(frozen=True)
class MaskedTask(Task):
    """A task at feature level, [N, d] for each modality, with modalities of all three parts taken away at one rate.

    What is masked holds NaN, so that no method sees it but by ``full``. Statistics to standardise with are of what is visible.
    Where data lack modalities already the mask is on top of that, and no sample loses its last one.
    """

    rate: float = 0.0
    protocol: str = "cpm"

    def parts(self, seed: int) -> Three:
        rest, validation, test = self._standardized(seed)
        return _hide(rest), _hide(validation), _hide(test)

    def full(self, seed: int) -> dict[str, Tensor] | None:
        """Return the inputs of the training part with nothing masked; None where these data lack modalities themselves."""
        if not self.split(seed)[0].complete:
            return None
        return self._standardized(seed)[0].inputs

    def masks(self, parts: Sequence[MultimodalDataset], seed: int) -> list[Tensor]:
        """Return present, bool [N, M], of each of the three parts."""
        return [self._mask(part, 3 * seed + i) for i, part in enumerate(parts)]

    def _standardized(self, seed: int) -> Sequence[MultimodalDataset]:
        parts = self.split(seed)
        masked = [_flat(part, present) for part, present in zip(parts, self.masks(parts, seed), strict=True)]
        return data.standardize(*masked, per=self.per)[0]

    def _mask(self, part: MultimodalDataset, seed: int) -> Tensor:
        present = data.with_missing(part, self.rate, seed, self.protocol).present
        assert present is not None
        return present


def _flat(part: MultimodalDataset, present: Tensor) -> MultimodalDataset:
    inputs = {modality: x.flatten(1) for modality, x in part.inputs.items()}
    return MultimodalDataset(inputs, part.target, part.fields, present, part.class_names)


def _hide(part: MultimodalDataset) -> MultimodalDataset:
    assert part.present is not None
    columns = zip(part.inputs.items(), part.present.T, strict=True)
    return part.with_inputs({m: x.masked_fill(~here[:, None], torch.nan) for (m, x), here in columns})


def masked(task: Task, rate: float, protocol: str) -> MaskedTask:
    """Return a task with modalities taken away at `rate`."""
    return MaskedTask(task.name, task.identity, task.prepare, task.group, task.per, rate=rate, protocol=protocol)


def choose_methods(names: Sequence[str], task: Task, seeds: Sequence[int]) -> tuple[list[str], list[str]]:
    """Return the methods to run, by default the rows of Table 2, and those that are left out: they need true values, and some
    seed's training part lacks modalities.

    Raises ValueError for an unknown name, and where one that was named needs what the data lack.
    """
    training = [task.split(seed)[0] for seed in seeds]
    wanted = TABLE_2 if list(names) == ["all"] else list(names)
    wanted, _ = select(wanted, len(training[0].modalities), MISSING)
    lacking = not all(part.complete for part in training)
    need = [name for name in wanted if lacking and getattr(find(name).model, "needs_full", False)]
    if need and list(names) != ["all"]:
        raise ValueError(f"methods: {need[0]} learns from true values of what is masked, expected data that lack no modalities")
    return [name for name in wanted if name not in need], need


def compare_missing(task: Task, arguments: argparse.Namespace, budget: Budget, **names: Any) -> str:
    """Run all rates, seeds, methods and trials into ``arguments.output`` and return what the report says."""
    methods, left_out = choose_methods(arguments.methods, task, arguments.seeds)
    for name in methods:
        trials(name, arguments.trials)
    if tokens := [name for name, layout in (task.layouts or {}).items() if layout == "tokens"]:
        raise ValueError(f"protocol: expected arrays of numbers, which a vector of zeros stands for, got tokens of {tokens[0]!r}")
    budget = replace(budget, features=WIDTH, hidden=(WIDTH, WIDTH))
    # What is wrong with the data, for any seed, is said before anything is written.
    same = {seed: _rates_of_same_masks(task, arguments, seed) for seed in arguments.seeds}
    # Rates are not among the settings: more of them may be asked for later.
    settings = settings_of(task, budget, [], arguments.device, protocol=arguments.protocol, **names)
    digest = ranks.from_first(lambda: begin(arguments, settings))
    device = ranks.device_name(arguments.device)
    jobs = [
        Job(masked(task, rate, arguments.protocol), name, seed, trial, budget, (), device, digest, rate)
        for seed in arguments.seeds
        for rate in same[seed]
        for name in methods
        for trial in range(arguments.trials)
    ]
    found: list[Record] = run_all(jobs, arguments.output, arguments.jobs)
    if not ranks.is_first():
        return ""
    others = [{**run, "rate": rate, "run_at": run["rate"]} for run in found for rate in same[run["seed"]][run["rate"]]]
    found += add(others, arguments.output, digest)
    settings |= {"missing": arguments.missing, "trials": arguments.trials}
    return missing_report.write(found, settings, arguments.output, left_out)


def _rates_of_same_masks(task: Task, arguments: argparse.Namespace, seed: int) -> dict[float, list[float]]:
    """Return the rates at which something else is masked, each with the others of the same masks, which need no runs.

    Where ``cpm`` leaves every sample one modality, as it does with two modalities from 0.5 on, a higher rate changes nothing.
    """
    parts, found = task.split(seed), dict[bytes, list[float]]()
    for rate in arguments.missing:
        present = torch.cat(masked(task, rate, arguments.protocol).masks(parts, seed))
        found.setdefault(present.numpy().tobytes(), []).append(rate)
    return {first: others for first, *others in found.values()}

"""All runs of a comparison, in processes side by side, into a folder that remembers what is done."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from mla_fast import ranks
from mla_fast.cli_config import write_options
from mla_fast.compare import records
from mla_fast.compare.learners import Budget
from mla_fast.compare.records import Record
from mla_fast.compare.run import NAMES, Job, run
from mla_fast.compare.spread import spread
from mla_fast.compare.task import Task


def settings_of(task: Task, budget: Budget, rates: Sequence[float], device: str, **names: Any) -> dict[str, Any]:
    """Return what the results in a folder have in common; names: others, as the modalities and the label."""
    common = {"data": task.name, "identity": task.identity, "group": task.group, **names}
    of_budget = {name: value for name, value in dataclasses.asdict(budget).items() if value is not None}
    return {**common, **of_budget, "missing": list(rates), "device": device}


def claim(folder: Path, settings: dict[str, Any]) -> str:
    """Write the settings to a folder, or check that they are those of the results that it has; return their digest.

    Raises ValueError that names the first setting that differs.
    """
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(saved.keys() | settings.keys(), key=lambda name: (name != "data", name != "protocol", name)):
            if saved.get(name) != settings.get(name):
                here = f"results of {name} {saved.get(name)!r}"
                raise ValueError(f"output: {folder} has {here}, expected {settings.get(name)!r}; choose another folder")
    else:
        records.replace(path, json.dumps(settings, indent=2) + "\n")
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def begin(arguments: argparse.Namespace, settings: dict[str, Any]) -> str:
    """Claim the output folder, leave the options there of a command that was typed, and return the digest of the settings."""
    if arguments.output.is_file():
        raise ValueError(f"output: expected a folder, got the file {arguments.output}")
    digest = claim(arguments.output, settings)
    if "command" in arguments:
        write_options(arguments, arguments.output / "run.toml")
    return digest


def finished(folder: Path, digest: str) -> dict[tuple[Any, ...], Record]:
    """Return the runs that the folder has by (method, seed, trial); raise ValueError for one of other settings."""
    path = folder / "runs.jsonl"
    found = records.read(path)
    for number, record in enumerate(found, 1):
        if record.get("settings") != digest:
            raise ValueError(f"output: {path}: line {number} is a run with other settings; choose another folder")
    return {records.key(record, NAMES): record for record in found}


def add(found: Sequence[Record], folder: Path, digest: str) -> list[Record]:
    """Add runs that need no running to ``runs.jsonl``, those that it does not have, and return them as they are there."""
    done = finished(folder, digest)
    for record in found:
        if (name := records.key(record, NAMES)) not in done:
            records.append(folder / "runs.jsonl", record)
            done[name] = record
    return [done[records.key(record, NAMES)] for record in found]


def _say(text: str) -> None:
    print(text, flush=True)


def run_all(jobs: Sequence[Job], folder: Path, processes: int, say: Callable[[str], None] = _say) -> list[Record]:
    """Run what the folder does not have, add each run to ``runs.jsonl`` as soon as it is done, and return all in order.

    A run that fails stops the others; what is done is kept. Of several ranks each takes the next run that nobody has taken, in
    `processes` of its own, and the first writes them all; the others return none.
    """
    done = ranks.from_first(lambda: finished(folder, jobs[0].settings))
    wanted = [tuple(getattr(job, name) for name in NAMES) for job in jobs]
    left = [job for job, name in zip(jobs, wanted, strict=True) if name not in done]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are done already")
    started = time.perf_counter()
    results = spread(left, functools.partial(_results, processes=processes)) if ranks.several() else _results(left, processes)
    for count, record in enumerate(results, 1):
        records.append(folder / "runs.jsonl", record)
        done[records.key(record, NAMES)] = record
        remaining = (time.perf_counter() - started) / count * (len(left) - count)
        what = f"{record['method']}, seed {record['seed']}, trial {record['trial'] + 1}"
        what += f", {100 * record['rate']:.0f} % missing" if record.get("rate") is not None else ""
        reached = f"validation {100 * record['validation']['accuracy']:.1f} %, {record['cost']['seconds']:.1f} s"
        say(f"[{count}/{len(left)}] {what}: {reached}; {_duration(remaining)} left")
    return [done[name] for name in wanted] if ranks.is_first() else []


def _results(jobs: Iterable[Job], processes: int) -> Iterator[Record]:
    """Yield the results of jobs, each of which is taken when a process is free for it."""
    if processes == 1 and not ranks.several():  # a run has no part in what the ranks agree on
        yield from map(run, jobs)
        return
    context = torch.multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)
    coming = iter(jobs)
    running = {pool.submit(run, job) for job in itertools.islice(coming, processes)}
    try:
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(run, job) for job in itertools.islice(coming, len(done))}
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when the one that started it is killed, which otherwise would leave it waiting for work."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

"""Times that can be compared: every provider in turn, round after round, so that a busy machine is busy for all of them."""

from __future__ import annotations

import functools
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """Microseconds: the median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def interleave(
    providers: dict[str, Callable[[], Any]], *, seconds: float = 1.0, rounds: tuple[int, int] = (25, 2000)
) -> dict[str, Timing]:
    """Medians over rounds in which each provider runs once, in a random order: none always follows the one that leaves the
    caches worst."""
    names = list(providers)
    for name in names:
        for _ in range(3):
            providers[name]()
    once = sum(_time(providers[name]) for name in names)
    count = int(min(max(seconds * 1e6 / once, rounds[0]), rounds[1]))
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(count):
        for name in order.sample(names, len(names)):
            samples[name].append(_time(providers[name]))
    return {name: _summary(times) for name, times in samples.items()}


def _time(function: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - start) / 1e3


def _summary(times: list[float]) -> Timing:
    fifths = statistics.quantiles(times, n=5)
    return Timing(statistics.median(times), fifths[0], fifths[-1])


def machine() -> dict[str, Any]:
    """Where a number comes from."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


@functools.cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@functools.cache
def _commit() -> str:
    """Asked for once, before the results that are written make the tree dirty."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Appends records, each with the machine it was measured on."""
    where = machine()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps({**record, "machine": where}) + "\n" for record in records)

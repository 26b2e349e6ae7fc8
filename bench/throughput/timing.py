"""Times that can be compared: every provider in turn, round after round, so that a busy machine is busy for all of them."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

CPU = torch.device("cpu")
SLOW_US = 1e5  # a second call that takes this long needs no third to be warm, and is a sample by itself


class Timing(NamedTuple):
    """Microseconds: the median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


class HostClock:
    """For functions that are done when they return. A sample is one call, or as many as take `sample_us`."""

    def __init__(self, sample_us: float = 0.0):
        self.sample_us = sample_us

    def time(self, function: Callable[[], Any], calls: int) -> float:
        """Microseconds a call."""
        start = time.perf_counter_ns()
        for _ in range(calls):
            function()
        return (time.perf_counter_ns() - start) / 1e3 / calls


class DeviceClock:
    """For functions that launch work on the current CUDA device: between two events on its stream, the launching included
    where the device waits for it."""

    # The first launch reaches an idle device some µs late; among this many it does not show.
    sample_us = 1000.0

    def __init__(self):
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, function: Callable[[], Any], calls: int) -> float:
        self.start.record()
        for _ in range(calls):
            function()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) * 1e3 / calls


def interleave(
    providers: dict[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (25, 2000),
    periods: Mapping[str, int] | None = None,
    device: torch.device = CPU,
) -> dict[str, Timing]:
    """Medians over the rounds of ``sample``.

    A provider whose cost comes round every `periods[name]` calls counts with the means of as many samples, so that what it
    puts off until the last of them is in every one.
    """
    periods = periods or {}
    least = max((5 * period for period in periods.values() if period > 1), default=0)
    samples = sample(providers, seconds=seconds, rounds=(max(rounds[0], least), max(rounds[1], least)), device=device)
    return {name: summary(times, periods.get(name, 1)) for name, times in samples.items()}


def sample(
    providers: dict[str, Callable[[], Any]],
    *,
    seconds: float,
    rounds: tuple[int, int],
    device: torch.device = CPU,
    host_us: float = 0.0,
) -> dict[str, list[float]]:
    """Microseconds a call, in rounds in which each provider gives one sample, in a random order: none always follows the one that
    leaves the caches worst. As many rounds as the seconds have time for, within bounds; on the host's clock a sample is one call,
    or as many as take `host_us`."""
    clock = DeviceClock() if device.type == "cuda" else HostClock(host_us)
    names = list(providers)
    calls = {name: _calls(clock, providers[name]) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)

    def take_turns():
        for name in order.sample(names, len(names)):
            samples[name].append(clock.time(providers[name], calls[name]))

    take_turns()
    once = sum(samples[name][0] * calls[name] for name in names)
    for _ in range(int(min(max(seconds * 1e6 / once, rounds[0]), rounds[1])) - 1):
        take_turns()
    return samples


def _calls(clock: HostClock | DeviceClock, function: Callable[[], Any]) -> int:
    """How many calls make a sample, after some to warm up. A single one takes longer than one of many, hence a second look."""
    function()
    if clock.time(function, 1) > SLOW_US:
        return 1
    function()
    calls = 1
    for _ in range(2):
        calls = max(1, math.ceil(clock.sample_us / max(clock.time(function, calls), 1e-3)))
    return calls


def summary(times: list[float], period: int = 1) -> Timing:
    """Of the samples' means over whole periods."""
    means = [statistics.mean(times[i : i + period]) for i in range(0, len(times) - period + 1, period)]
    fifths = statistics.quantiles(means, n=5, method="inclusive")
    return Timing(statistics.median(means), fifths[0], fifths[-1])


def copy_bandwidth(device: torch.device = CPU) -> float:
    """GB/s, read and written, of a copy far larger than any cache."""
    source = torch.rand(2**28 if device.type == "cuda" else 2**26, device=device)  # pages of zeros might all be one
    target = torch.empty_like(source)
    copied = interleave({"copy": lambda: target.copy_(source)}, seconds=0.3, rounds=(10, 100), device=device)["copy"]
    return 2 * source.nbytes / copied.median / 1e3


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """Where a number comes from."""
    where = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }
    if device.type == "cuda":
        where |= {"gpu": torch.cuda.get_device_name(device), "driver": _driver(), "cuda": torch.version.cuda, "triton": _triton()}
    return where


@functools.cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@functools.cache
def _commit() -> str:
    """Asked for once, before the results that are written make the tree dirty. A copy of the tree is told by its maker."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")
    return os.environ.get("MLA_FAST_COMMIT") or _output(*command)


@functools.cache
def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "unknown"
    return triton.__version__


def _output(*command: str) -> str:
    """The first line that the command prints."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def write_jsonl(path: Path, records: list[dict[str, Any]], device: torch.device = CPU) -> None:
    """Appends records, each with the machine it was measured on."""
    where = machine(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps({**record, "machine": where}) + "\n" for record in records)

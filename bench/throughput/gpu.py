"""Tables and readings of what ``make gpu-check`` measured on a GPU, from its records alone."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from bench import records
from bench.records import Record
from bench.throughput.speed import interval, number
from mla_fast.tables import markdown_table

OPERATORS = (
    *(f"rls s={s} C={C}" for s in (512, 1024, 4096) for C in (6, 101)),
    *(f"window s={s} C=101 M=3" for s in (512, 1024, 4096)),
    "fusion [3, 64, 101]",
    "fusion [3, 65536, 1000]",
    *(f"infer [3, 16384, 512] C=101{masked}" for masked in ("", " masked")),
    *(f"dispatch N={N}{means}" for N in (64, 20480) for means in ("", " means")),
    *(f"predict N={N}" for N in (128, 512)),
)
WAYS = ("plain loop", "joint concat", "ours rls", "ours window", "ours streams rls", "ours graph rls", "ours graph window")
WAYS += ("ours interaction window", "ours graph interaction window", "graph plain loop", "graph joint concat", "released")


class GPU:
    """The records of a GPU's files by commit, in the order in which these were measured."""

    def __init__(self, results: Path, name: str):
        self.kernels, self.operators, self.steps = (
            records.read(results / f"{name}-{part}.jsonl") for part in ("kernels", "ops", "step")
        )
        if not (self.kernels and self.operators and self.steps):
            raise ValueError(f"{results}: expected results of make gpu-check for {name}, got none")
        self.machine = self.kernels[0]["machine"]
        self.large_heads = records.read(results / f"{name}-large_head.jsonl")

    @staticmethod
    def commits(found: list[Record]) -> list[str]:
        return list(dict.fromkeys(r["machine"]["commit"] for r in found))

    def latest(self, found: list[Record]) -> list[Record]:
        last = self.commits(found)[-1]
        return [r for r in found if r["machine"]["commit"] == last]


class Times:
    """Microseconds of the latest operators, by case."""

    def __init__(self, gpu: GPU):
        self.records = {(r["case"], r["provider"]): r for r in gpu.latest(gpu.operators)}

    def best(self, case: str, *prefixes: str) -> float | None:
        """The shortest of the providers whose names begin so."""
        found = [r["median_us"] for (c, name), r in self.records.items() if c == case and name.startswith(prefixes)]
        return min(found, default=None)

    def ours(self, case: str) -> float | None:
        return self.records.get((case, "ours"), {}).get("median_us")

    def graph(self, case: str) -> float | None:
        return self.best(case, "ours graph", "ours padded graph")

    def share(self, case: str) -> float | None:
        """Of the bandwidth of a copy, what ours in a graph reaches with the bytes of its form."""
        r = self.records.get((case, "ours graph"), {})
        return r["gb_per_s"] / r["copy_gb_per_s"] if r.get("gb_per_s") else None


def measured_on(gpu: GPU) -> str:
    m, kernels, steps = gpu.machine, gpu.commits(gpu.kernels), gpu.commits(gpu.steps)
    return (
        f"On one {m['gpu']} (driver {m['driver']}, CUDA {m['cuda']}, torch {m['torch']}, Triton {m['triton']}); a copy moves "
        f"{gpu.kernels[-1]['copy_gb_per_s'] / 1e3:.1f} TB/s. Kernels at commits {' and '.join(kernels)}, operators beside their "
        f"rivals at {gpu.commits(gpu.operators)[-1]}, steps at {steps[-1]}."
    )


def kernels(gpu: GPU) -> str:
    """Each launch of an operator at the first commit and at the last, µs by the profiler."""
    times: dict[tuple[str, str], dict[str, Record]] = {}
    for r in gpu.kernels:
        times.setdefault((r["case"], _family(r["kernel"])), {})[r["machine"]["commit"]] = r
    first, last = gpu.commits(gpu.kernels)[0], gpu.commits(gpu.kernels)[-1]
    rows = []
    for (case, kernel), by_commit in times.items():
        if "cold" in case or not kernel:
            continue
        before, after = by_commit.get(first), by_commit.get(last)
        rows.append([case.removesuffix(" hot"), kernel, _spread(before), _spread(after)])
    return markdown_table(["µs by the profiler, mean of a call", "launch", f"at {first}", f"at {last}"], rows)


def large_heads(gpu: GPU) -> str:
    """The cross-entropy of heads of many classes with all gradients: time and memory beside plain torch's."""
    rows, found = [], {(r["case"], r["provider"]): r for r in gpu.large_heads}
    for case in dict.fromkeys(r["case"] for r in gpu.large_heads):
        ours, plain, compiled = (found[case, name] for name in ("ours", "plain", "plain, compiled"))
        times = [number(r["median_us"] / 1e3, 2) for r in (ours, plain, compiled)]
        peaks = [f"{r['peak_mb']:.0f}" for r in (ours, plain, compiled)]
        beyond = (ours["peak_mb"] - ours["gradients_mb"]) / (plain["peak_mb"] - plain["gradients_mb"])
        rows.append([case, *times, f"{ours['median_us'] / plain['median_us']:.2f}", *peaks, f"{beyond:.2f}"])
    header = ["head", "ours, ms", "plain", "compiled", "ours / plain", "ours, MiB", "plain", "compiled"]
    return markdown_table([*header, "ours / plain beyond the gradients"], rows)


def _family(kernel: str) -> str:
    """Which of ours it is; empty for others."""
    names = ("read", "finish", "fold", "window", "fusion_backward", "fusion")
    return next((n.replace("_", " ") for n in names if n in kernel and kernel.endswith("_kernel")), "")


def _spread(record: Record | None) -> str:
    return "-" if record is None else f"{record['mean_a_call_us']:.1f} ({record['p20_us']:.1f}–{record['p80_us']:.1f})"


def operators(gpu: GPU) -> str:
    """Ours and its rivals as they are, in a CUDA graph, and the released arithmetic."""
    found = Times(gpu)
    rows = []
    for case in (case for case in OPERATORS if found.ours(case)):
        times = [found.ours(case), found.best(case, "eager"), found.best(case, "compile"), found.graph(case)]
        times += [found.best(case, "graph eager"), found.best(case, "released")]
        rows.append([case, *(number(us, 1) for us in times), _percent(found.share(case))])
    header = ["µs", "ours", "best eager", "best torch.compile", "ours in a graph", "best eager in a graph", "released"]
    return markdown_table([*header, "ours in a graph, of a copy's bandwidth"], rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _against(*rival: str) -> Callable[[Times, str], float | None]:
    """How many times as fast ours is, in a graph, as the best of the providers whose names begin so."""

    def ratio(times: Times, case: str) -> float | None:
        best, ours = times.best(case, *rival), times.graph(case)
        return None if best is None or ours is None else best / ours

    return ratio


# What was asked for before anything had been measured; ours in a CUDA graph.
TARGETS: tuple[tuple[str, str, Callable[[Times, str], float | None], str, float], ...] = (
    ("RLS, s ≤ 1024, against the released arithmetic", r"rls s=(512|1024) ", _against("released"), "≥ {:.1f}×", 8),
    ("RLS, s ≤ 1024, against eager", r"rls s=(512|1024) ", _against("eager"), "≥ {:.1f}×", 3),
    ("RLS, s ≤ 1024, against eager in a graph", r"rls s=(512|1024) ", _against("graph eager"), "≥ {:.1f}×", 3),
    ("RLS, s ≤ 1024, against torch.compile", r"rls s=(512|1024) ", _against("compile"), "≥ {:.1f}×", 1.5),
    ("RLS, s ≥ 4096, of a copy's bandwidth", r"rls s=(4096|8192) ", Times.share, "≥ {:.0%}", 0.85),
    ("window", "window ", Times.graph, "≤ {:.1f} µs", 10),
    ("fusion of small logits, against eager", r"fusion \[3, 64, 101\]$", _against("eager"), "≥ {:.1f}×", 10),
    ("fusion of small logits, against eager in a graph", r"fusion \[3, 64, 101\]$", _against("graph eager"), "≥ {:.1f}×", 10),
    ("fusion of small logits, against torch.compile", r"fusion \[3, 64, 101\]$", _against("compile"), "≥ {:.1f}×", 1.5),
    ("fusion of large logits, of a copy's bandwidth", r"fusion \[3, 65536, 1000\]$", Times.share, "≥ {:.0%}", 0.85),
    ("dispatch, against the mask loop, which no graph can hold", "dispatch ", _against("eager"), "≥ {:.1f}×", 3),
)


def targets(gpu: GPU) -> str:
    """What came of the targets: the least and the most over the cases that were measured."""
    times, rows = Times(gpu), []
    measured = list(dict.fromkeys(case for case, _ in times.records))
    for what, cases, value, text, bound in TARGETS:
        values = [v for case in measured if re.match(cases, case) and (v := value(times, case)) is not None]
        if values:
            met = min(values) >= bound if text.startswith("≥") else max(values) <= bound
            least, most = (text[2:].format(number) for number in (min(values), max(values)))
            span = least if least == most else f"{least} to {most}"
            rows.append([what, text.format(bound), span, "met" if met else "missed"])
    return markdown_table(["target", "asked for", "measured, least to most", ""], rows)


def largest(gpu: GPU) -> str:
    """The largest RLS step that ran."""
    found = [r for r in gpu.operators if r["op"] == "largest"]
    last = {r["provider"]: r for r in found}
    rows = [[name, str(r["s"]), _percent(r["share"]), number(r["median_us"] / 1e3, 1)] for name, r in last.items()]
    return markdown_table(["RLS step, C = 101", "largest s", "P's share of the memory", "ms a step"], rows)


COUNTERS = ("DRAM Throughput", "L1/TEX Cache Throughput", "Compute (SM) Throughput", "Achieved Occupancy")


def counters(path: Path) -> str:
    """What ``ncu`` counted, each launch with its grid once: percent of the GPU's peak."""
    launches: dict[tuple[str, str], dict[str, str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            launches.setdefault((row["Kernel Name"], row["Grid Size"]), {})[row["Metric Name"]] = row["Metric Value"]
    rows = [
        [kernel.removesuffix("_kernel"), grid, *(found[name] for name in COUNTERS)] for (kernel, grid), found in launches.items()
    ]
    return markdown_table(["% of peak", "programs", *COUNTERS], rows)


def steps(gpu: GPU) -> str:
    """Milliseconds of a whole batch, by way to train."""
    found = {(r["case"], r["provider"]): r for r in gpu.latest(gpu.steps) if "provider" in r}
    cases = list(dict.fromkeys(case for case, _ in found))
    rows = [[way, *(_milliseconds(found.get((case, way))) for case in cases)] for way in WAYS]
    return markdown_table(["ms a batch (20–80 %)", *cases], [row for row in rows if set(row[1:]) != {"-"}])


def _milliseconds(record: Record | None) -> str:
    if record is None:
        return "-"
    return f"{record['median_us'] / 1e3:.2f} ({record['p20_us'] / 1e3:.2f}–{record['p80_us'] / 1e3:.2f})"


def ratios(gpu: GPU) -> str:
    """What one way takes for another's 1, with its 95 % interval and what was asked for."""
    found = {(r["case"], r["comparison"]): r for r in gpu.latest(gpu.steps) if "comparison" in r}
    cases = list(dict.fromkeys(case for case, _ in found))
    wanted = [what for what in dict.fromkeys(what for _, what in found) if "joint" in what or "graph" in what or "plain" in what]
    rows = [[what, *(interval(found.get((case, what))) for case in cases)] for what in wanted if "added" not in what]
    return markdown_table(["time / time", *cases], rows)

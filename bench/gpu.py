"""Tables and readings of what ``make gpu-check`` measured on a GPU, from its records alone."""

from __future__ import annotations

from pathlib import Path

from bench import records
from bench.records import Record
from bench.speed import interval, number
from mla_fast.demo import markdown_table

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
WAYS += ("graph plain loop", "graph joint concat", "released")


class GPU:
    """The records of a GPU's files by commit, in the order in which these were measured."""

    def __init__(self, results: Path, name: str):
        self.kernels, self.operators, self.steps = (
            records.read(results / f"{name}-{part}.jsonl") for part in ("kernels", "ops", "step")
        )
        if not (self.kernels and self.operators and self.steps):
            raise ValueError(f"{results}: expected results of make gpu-check for {name}, got none")
        self.machine = self.kernels[0]["machine"]

    @staticmethod
    def commits(found: list[Record]) -> list[str]:
        return list(dict.fromkeys(r["machine"]["commit"] for r in found))

    def latest(self, found: list[Record]) -> list[Record]:
        return [r for r in found if r["machine"]["commit"] == self.commits(found)[-1]]


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


def _family(kernel: str) -> str:
    """Which of ours it is; empty for others."""
    names = ("read", "finish", "fold", "window", "fusion_backward", "fusion", "cross_entropy")
    return next((n.replace("_", " ") for n in names if n in kernel and kernel.endswith("_kernel")), "")


def _spread(record: Record | None) -> str:
    return "-" if record is None else f"{record['mean_a_call_us']:.1f} ({record['p20_us']:.1f}–{record['p80_us']:.1f})"


def operators(gpu: GPU) -> str:
    """Ours and the best eager form, as they are and in a CUDA graph, and the released arithmetic."""
    found: dict[tuple[str, str], float] = {(r["case"], r["provider"]): r["median_us"] for r in gpu.latest(gpu.operators)}

    def best(case: str, prefix: str) -> float | None:
        return min((us for (c, name), us in found.items() if c == case and name.startswith(prefix)), default=None)

    rows = []
    for case in (case for case in OPERATORS if (case, "ours") in found):
        ours, graph = found[case, "ours"], found.get((case, "ours graph"), found.get((case, "ours padded graph")))
        eager, captured = best(case, "eager"), best(case, "graph eager")
        released = found.get((case, "released"))
        numbers = [ours, eager, _ratio(eager, ours), graph, captured, _ratio(captured, graph), released, _ratio(released, ours)]
        rows.append([case, *(number(n, 1) for n in numbers)])
    header = ["operator", "ours, µs", "best eager, µs", "times as fast", "ours in a graph, µs", "best eager in a graph, µs"]
    return markdown_table([*header, "times as fast", "released, µs", "times as fast (no graph)"], rows)


def _ratio(rival: float | None, ours: float | None) -> float | None:
    return None if rival is None or ours is None else rival / ours


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

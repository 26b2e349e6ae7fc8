"""Tables and readings of what ``bench.throughput`` measured on the CPU, from its records alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import records
from bench.compare import THRESHOLD, judge
from bench.records import Record
from mla_fast.demo import markdown_table

OURS = "ours"


class Throughput:
    """Times by (threads, case, provider), and comparisons of ways to train by (threads, case, what is compared).

    Raises ValueError for a file without times.
    """

    def __init__(self, path: Path):
        found = list(records.timings(path).values())
        if not found:
            raise ValueError(f"{path}: expected results of bench.throughput, got none")
        self.times = {_key(r, "provider"): r for r in found if r["op"] != "step"}
        self.step_times = {_key(r, "provider"): r for r in found if r["op"] == "step"}
        self.comparisons = {_key(r, "comparison"): r for r in records.read(path) if "comparison" in r}
        self.threads = sorted({threads for threads, _, _ in self.times})
        self.machine = found[0]["machine"]

    def cases(self, op: str | None = None) -> list[str]:
        """By operator, in the order in which these were first measured."""
        found = {r["case"]: r["op"] for r in self.times.values() if op in (None, r["op"])}
        order = list(dict.fromkeys(found.values()))
        return sorted(found, key=lambda case: order.index(found[case]))

    def best(self, threads: int, case: str, prefix: str) -> Record | None:
        """The record with the shortest median of those whose provider's name begins so."""
        rivals = [r for (t, c, name), r in self.times.items() if (t, c) == (threads, case) and name.startswith(prefix)]
        return min(rivals, key=lambda r: r["median_us"], default=None)

    def times_as_fast(self, threads: int, case: str, prefix: str = "eager") -> float | None:
        rival, ours = self.best(threads, case, prefix), self.times.get((threads, case, OURS))
        return None if rival is None or ours is None else rival["median_us"] / ours["median_us"]


def _key(record: Record, name: str) -> tuple[int, str, str]:
    return record["machine"]["threads"], record["case"], record[name]


def measured_on(found: Throughput) -> str:
    m = found.machine
    return f"{m['cpu']}, torch {m['torch']}, Python {m['python']}, commit {m['commit']}"


def operators(found: Throughput) -> str:
    """Operators and inference: our time and the best eager form's, and how many times as fast ours is."""
    first = found.threads[0]
    rivals = [(threads, "eager", f"× best eager, {_threads(threads)}") for threads in found.threads]
    rivals += [(first, "released", "× released arithmetic"), (first, "compile", "× torch.compile")]
    rivals = [r for r in rivals if any(found.times_as_fast(r[0], case, r[1]) for case in found.cases())]
    rows = []
    for case in found.cases():
        times = [found.times.get((first, case, OURS)), found.best(first, case, "eager")]
        ratios = [found.times_as_fast(threads, case, prefix) for threads, prefix, _ in rivals]
        rows.append([case, *(number(r and r["median_us"], 1) for r in times), *(number(ratio, 2) for ratio in ratios)])
    header = [f"operator, {_threads(first)} unless told", "ours, µs", "best eager, µs", *(name for *_, name in rivals)]
    return markdown_table(header, rows)


def read_operators(found: Throughput) -> str:
    """How often ours is faster, ties and is slower, by more than the noise, and where it is slower."""
    said = [f"On {measured_on(found)}."]
    for threads in found.threads:
        verdicts = {}
        for case in found.cases():
            ours, rival = found.times.get((threads, case, OURS)), found.best(threads, case, "eager")
            if ours and rival:
                verdicts[case] = judge(rival, ours, THRESHOLD)[1]
        ratios = {case: found.times_as_fast(threads, case) for case in verdicts}
        slower = [f"{case} ({ratios[case]:.2f})" for case, verdict in verdicts.items() if verdict == "slower"]
        count = list(verdicts.values()).count
        said.append(
            f"On {_threads(threads)} ours is faster than the best eager form in {count('faster')} of {len(verdicts)} cases, the "
            f"median of all being {statistics.median(ratios.values()):.2f} times as fast; it ties in {count('')} and is "
            f"slower in {len(slower)}{': ' * bool(slower)}{', '.join(slower)}."
        )
    return " ".join(said)


def read_window(found: Throughput) -> str:
    """The window beside the RLS step that it takes the place of."""
    ratios = [found.times_as_fast(found.threads[0], case, "rls eager") for case in found.cases("window")]
    return f"The window's step takes the place of an RLS step, and is {_range(ratios)} times as fast as the best eager one."


def read_inference(found: Throughput) -> str:
    """The model's ``predict`` beside the same operators called one by one."""
    first, added = found.threads[0], []
    for case in found.cases("infer"):
        called = found.times.get((first, case, "ours dispatched"), found.times[first, case, OURS])
        added.append(found.times[first, case, "ours predict"]["median_us"] - called["median_us"])
    return f"`model.predict` takes {min(added):.0f} to {max(added):.0f} µs more than the operators that it calls."


def step_times(found: Throughput) -> str:
    """Milliseconds of a batch: ways to train by workload and threads."""
    columns = list(dict.fromkeys((case, threads) for threads, case, _ in found.step_times))
    rows = []
    for way in dict.fromkeys(name for *_, name in found.step_times):
        each = [found.step_times.get((threads, case, way)) for case, threads in columns]
        rows.append([way, *(number(r and r["median_us"] / 1e3, 2) for r in each)])
    return markdown_table(["ms a batch", *(f"{case}, {_threads(threads)}" for case, threads in columns)], rows)


def step_ratios(found: Throughput) -> str:
    """What one way takes for the other's 1, with its 95 % interval and what is asked for."""
    columns = list(dict.fromkeys((case, threads) for threads, case, _ in found.comparisons))
    rows = []
    for what in dict.fromkeys(what for *_, what in found.comparisons):
        each = [found.comparisons.get((threads, case, what)) for case, threads in columns]
        rows.append([what, *(interval(r) for r in each)])
    return markdown_table(["time / time", *(f"{case}, {_threads(threads)}" for case, threads in columns)], rows)


def read_steps(found: Throughput) -> str:
    """What was asked for: met, missed, or unclear where the bound lies within the ratio's interval."""
    asked = {key: r for key, r in found.comparisons.items() if r["target"]}
    said = []
    for verdict in ("met", "unclear", "missed"):
        here = [(key, r) for key, r in asked.items() if r["verdict"] == verdict]
        which = [f"{what} on {case}, {_threads(t)} ({r['ratio']:.3f}, {r['target']})" for (t, case, what), r in here]
        said.append(f"{verdict} {len(here)}" + (f" ({'; '.join(which)})" if which and verdict != "met" else ""))
    return f"Of {len(asked)} bounds that were set beforehand: {', '.join(said)}."


def read_overhead(found: Throughput) -> str:
    """What MLAOptimizer adds to a batch of the plain loop, and what alternating_step takes in its place."""
    added, taken = {}, {}
    for (threads, case, what), r in found.comparisons.items():
        way, _, rival = what.partition(" / ")
        projection, where = way.split()[-1], f"{case}, {_threads(threads)}"
        if rival == "plain loop, by what is added":
            added.setdefault(where, []).append(f"{100 * (r['ratio'] - 1):+.1f} % ({projection})")
        elif rival == "plain loop" and way == f"ours {projection}":
            taken.setdefault(where, []).append(f"{r['ratio']:.2f} ({projection})")
    more, share = ("; ".join(f"{' and '.join(shares)} on {where}" for where, shares in said.items()) for said in (added, taken))
    return f"MLAOptimizer adds to a batch of the plain loop {more}. `alternating_step` takes, of the plain loop's time, {share}."


def interval(record: Record | None) -> str:
    if record is None:
        return "-"
    asked = f", {record['target']}: {record['verdict']}" if record["target"] else ""
    return f"{record['ratio']:.2f} ({record['low']:.2f}–{record['high']:.2f}){asked}"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _range(values: Sequence[float]) -> str:
    """ "1.3", or "1.3–2.0"."""
    return "–".join(dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values))))

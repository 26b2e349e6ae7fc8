"""Tables of what ``bench.throughput`` measured, from its records alone: each contender at its own best number of threads."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from bench import records
from bench.records import Record
from bench.throughput.compare import THRESHOLD, judge
from mla_fast.tables import markdown_table

OURS = "ours"
# What else stands beside the eager forms: (ours, theirs, what a row says).
BESIDE = (("ours", "rls eager", ", for an RLS step"), ("ours predict", "eager", ", model.predict"))


class Throughput:
    """Times by (case, provider) and then threads, and comparisons of ways to train by (case, what is compared) and then threads.

    Raises ValueError for a file without times.
    """

    def __init__(self, path: Path):
        found = list(records.timings(path).values())
        if not found:
            raise ValueError(f"{path}: expected results of bench.throughput, got none")
        self.times = _by_threads([r for r in found if r["op"] != "step"], "provider")
        self.steps = _by_threads([r for r in found if r["op"] == "step"], "provider")
        self.comparisons = _by_threads([r for r in records.read(path) if "comparison" in r], "comparison")
        self.machine = found[0]["machine"]

    def cases(self) -> list[str]:
        """By operator, in the order in which these were first measured."""
        found = {r["case"]: r["op"] for by_threads in self.times.values() for r in by_threads.values()}
        order = list(dict.fromkeys(found.values()))
        return sorted(found, key=lambda case: order.index(found[case]))

    def best(self, case: str, prefix: str) -> Record | None:
        """The shortest median of the providers whose names begin so, on any number of threads."""
        return fastest(r for (c, name), by in self.times.items() if c == case and name.startswith(prefix) for r in by.values())

    def ours(self, case: str, name: str = OURS) -> Record | None:
        return fastest(self.times.get((case, name), {}).values())

    def step(self, case: str, way: str) -> Record | None:
        return fastest(self.steps.get((case, way), {}).values())


def _by_threads(found: list[Record], name: str) -> dict[tuple[str, str], dict[int, Record]]:
    grouped: dict[tuple[str, str], dict[int, Record]] = {}
    for r in found:
        grouped.setdefault((r["case"], r[name]), {})[r["machine"]["threads"]] = r
    return grouped


def fastest(found: Iterable[Record]) -> Record | None:
    return min(found, key=lambda r: r["median_us"], default=None)


def best_threads(found: list[Record]) -> list[Record]:
    """Each provider of each case on as many threads as suit it best."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for r in found:
        grouped.setdefault((r["case"], r["provider"]), []).append(r)
    return [fastest(group) for group in grouped.values()]


def measured_on(found: Throughput) -> str:
    m = found.machine
    return f"{m['cpu']}, torch {m['torch']}, Python {m['python']}, commit {m['commit']}"


def tables(found: Throughput) -> list[str]:
    return [operators(found), step_times(found), step_ratios(found)]


def operators(found: Throughput) -> str:
    """Operators and inference: times with the threads that they take, and how many times as fast ours is."""
    rows = []
    for case in found.cases():
        for ours_name, eager, what in ((OURS, "eager", ""), *BESIDE):
            ours = found.ours(case, ours_name)
            rivals = [found.best(case, eager)]
            if ours is None or what and rivals[0] is None:
                continue
            rivals += [None, None] if what else [found.best(case, "released"), found.best(case, "compile")]
            ratios = [number(rival and rival["median_us"] / ours["median_us"], 2) for rival in rivals]
            rows.append([case + what, timed(ours), timed(rivals[0]), *ratios])
    return markdown_table(
        ["µs (threads)", "ours", "best eager", "× best eager", "× released arithmetic", "× torch.compile"], rows
    )


def read_operators(found: Throughput) -> str:
    """How often ours is faster, ties and is slower, by more than the noise."""
    pairs = {case: (found.best(case, "eager"), found.ours(case)) for case in found.cases()}
    pairs = {case: pair for case, pair in pairs.items() if all(pair)}
    verdicts = {case: judge(*pair, THRESHOLD)[1] for case, pair in pairs.items()}
    median = statistics.median(rival["median_us"] / ours["median_us"] for rival, ours in pairs.values())
    slower = [case for case, verdict in verdicts.items() if verdict == "slower"]
    count = list(verdicts.values()).count
    return (
        f"{measured_on(found)}. Ours is faster than the best eager form in {count('faster')} of {len(pairs)} cases, ties in "
        f"{count('')} and is slower in {len(slower)}{': ' * bool(slower)}{', '.join(slower)}; the median of the ratios of bests "
        f"is {median:.2f}. Faster and slower are medians more than {THRESHOLD:.0%} apart whose ranges, 20 to 80 %, do not meet; "
        "rows without an eager form are not counted."
    )


def step_times(found: Throughput) -> str:
    """Milliseconds of a batch: ways to train by workload."""
    cases, ways = (list(dict.fromkeys(names)) for names in zip(*found.steps, strict=True)) if found.steps else ([], [])
    rows = []
    for way in ways:
        rows.append([way, *(timed(found.step(case, way), 1e3, 2) for case in cases)])
    return markdown_table(["ms a batch (threads)", *cases], rows)


def step_ratios(found: Throughput) -> str:
    """What one way takes for the other's 1, with its 95 % interval and what is asked for."""
    cases = list(dict.fromkeys(case for case, _ in found.comparisons))
    wanted = dict.fromkeys(what for _, what in found.comparisons)
    return markdown_table(["time / time", *cases], [[what, *(_ratio(found, case, what) for case in cases)] for what in wanted])


def _ratio(found: Throughput, case: str, what: str) -> str:
    """As it was measured within the rounds, where both ways are at their best on the same number of threads."""
    over, _, under = what.partition(" / ")
    best = [found.step(case, way) for way in (over, under.partition(",")[0])]
    if None in best:
        return "-"
    threads = {r["machine"]["threads"] for r in best}
    if len(threads) == 1:
        return interval(found.comparisons[case, what].get(threads.pop()))
    return "-" if "," in under else number(best[0]["median_us"] / best[1]["median_us"], 2)


def interval(record: Record | None) -> str:
    if record is None:
        return "-"
    asked = f", {record['target']}: {record['verdict']}" if record["target"] else ""
    return f"{record['ratio']:.2f} ({record['low']:.2f}–{record['high']:.2f}){asked}"


def timed(record: Record | None, unit: float = 1.0, digits: int = 1) -> str:
    return "-" if record is None else f"{record['median_us'] / unit:.{digits}f} ({record['machine']['threads']})"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

"""Has anything become slower? ``python -m bench.throughput.compare before.jsonl after.jsonl [--threshold 0.05]``.

A time has changed where the 20–80 % intervals of the two do not overlap and the medians differ by more than the threshold.
Regressions come first, and are the exit status: 1 if there is one. Times of different machines are refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.records import Record, timings
from mla_fast.tables import markdown_table

THRESHOLD = 0.05  # medians that differ by less are a tie
HARDWARE, SOFTWARE = ("cpu", "gpu"), ("torch", "python", "driver", "cuda", "triton")


class Change(NamedTuple):
    """ratio: the second median over the first; verdict: "slower", "faster", or "" within the noise."""

    key: tuple
    before: Record
    after: Record
    ratio: float
    verdict: str


def compare(before: dict[tuple, Record], after: dict[tuple, Record], threshold: float) -> list[Change]:
    """Of what both have: what has become slower, the worst first, then what has become faster, then the rest."""
    changes = [
        Change(key, before[key], after[key], *judge(before[key], after[key], threshold)) for key in before.keys() & after.keys()
    ]
    return sorted(changes, key=lambda c: (("slower", "faster", "").index(c.verdict), -c.ratio, c.key))


def judge(before: Record, after: Record, threshold: float) -> tuple[float, str]:
    """(ratio, verdict)"""
    ratio = after["median_us"] / before["median_us"]
    if ratio > 1 + threshold and after["p20_us"] > before["p80_us"]:
        return ratio, "slower"
    if ratio < 1 / (1 + threshold) and after["p80_us"] < before["p20_us"]:
        return ratio, "faster"
    return ratio, ""


def differences(changes: Sequence[Change], names: Sequence[str]) -> list[str]:
    """What the machines' records say differently, as "cpu: … → …"."""
    pairs = {(name, c.before["machine"].get(name), c.after["machine"].get(name)) for c in changes for name in names}
    return sorted(f"{name}: {old} → {new}" for name, old, new in pairs if old != new)


def table(changes: Sequence[Change]) -> str:
    rows = []
    for change in changes:
        case, provider, device, threads = change.key
        times = [f"{r['median_us']:.1f} ({r['p20_us']:.1f}–{r['p80_us']:.1f})" for r in (change.before, change.after)]
        rows.append([f"{case}: {provider}", f"{device}, {threads} thread(s)", *times, f"{change.ratio:.2f}", change.verdict])
    return markdown_table(["", "on", "before, µs", "after, µs", "ratio", ""], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what has become slower, and what faster")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="by which medians have to differ (default: %(default)s)"
    )
    parser.add_argument("--other-machine", action="store_true", help="compare although the hardware is not the same")
    arguments = parser.parse_args(argv)
    try:
        before, after = (load(path) for path in (arguments.before, arguments.after))
        changes = compare(before, after, arguments.threshold)
        check(changes, arguments)
    except (ValueError, OSError) as error:
        print(f"bench.throughput.compare: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for difference in differences(changes, (*HARDWARE, *SOFTWARE)):
        print(f"not the same: {difference}")
    print(table(changes))
    slower, faster = (sum(c.verdict == verdict for c in changes) for verdict in ("slower", "faster"))
    alone = len(before) + len(after) - 2 * len(changes)
    print(f"{slower} slower, {faster} faster, {len(changes) - slower - faster} within the noise, {alone} in one file only")
    print(f"median ratio {median(c.ratio for c in changes):.2f}")  # far from 1: it is the machine
    raise SystemExit(int(slower > 0))


def load(path: Path) -> dict[tuple, Record]:
    if not path.exists():
        raise ValueError(f"{path}: expected results of bench.throughput, got no such file")
    return timings(path)


def check(changes: Sequence[Change], arguments: argparse.Namespace) -> None:
    if not changes:
        raise ValueError(f"{arguments.before} and {arguments.after}: expected some case measured in both, got none")
    if (wrong := differences(changes, HARDWARE)) and not arguments.other_machine:
        raise ValueError(f"{arguments.after}: expected the same machine (or --other-machine), got {'; '.join(wrong)}")


if __name__ == "__main__":
    main()

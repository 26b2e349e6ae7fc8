"""Draws what was measured: ``python -m bench.throughput.plot results.jsonl out.png``. One row per case, µs of each way."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.pictures import PAGE, legend, new_figure, save
from bench.records import timings
from bench.throughput.speed import best_threads

KINDS = {
    "ours": {"color": "#1f6fb4", "marker": "o"},
    "eager": {"color": "#c8621b", "marker": "D"},
    "compile": {"color": "#3a8a4d", "marker": "s"},
    "released": {"color": "#7d838c", "marker": "x"},
}
NAMES = {"eager": "best eager", "compile": "torch.compile", "released": "released arithmetic"}


def rows(records: list[dict]) -> dict[str, dict[str, float]]:
    """{case: {kind: µs}} of the cases that have ours, the fastest of each kind, operator by operator."""
    found: dict[str, dict[str, float]] = {}
    for r in records:
        kind = r["provider"] if r["provider"] == "ours" else r["provider"].split()[0]
        if kind in KINDS and (kind == "ours") == (r["provider"] == "ours"):
            times = found.setdefault(r["case"], {})
            times[kind] = min(times.get(kind, float("inf")), r["median_us"])
    order = list(dict.fromkeys(r["op"] for r in records))
    ops = {r["case"]: order.index(r["op"]) for r in records}
    return {case: found[case] for case in sorted(found, key=ops.__getitem__) if "ours" in found[case]}


def draw(records: list[dict], path: Path) -> bool:
    """Writes the picture. Without matplotlib a line says so: False."""
    found = rows(records)
    figure = new_figure(PAGE, 1.2 + 0.26 * len(found))
    if figure is None:
        return False
    axes = figure.subplots()
    for place, times in enumerate(found.values()):
        axes.plot([min(times.values()), max(times.values())], [place] * 2, color="#d5d8dc", lw=1, zorder=1)
        for kind, us in reversed(times.items()):
            axes.plot(us, place, ls="", ms=6, zorder=2 + (kind == "ours"), **KINDS[kind])
    axes.set(yticks=range(len(found)), yticklabels=found, xscale="log", xlabel="µs, on as many threads as suit it best")
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    legend(figure, {NAMES.get(kind, kind): {**how, "ls": ""} for kind, how in KINDS.items()}, len(KINDS))
    return save(figure, path)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m bench.throughput.plot results.jsonl out.png")
    records = best_threads(list(timings(Path(sys.argv[1])).values()))
    if not records:
        raise SystemExit(f"{sys.argv[1]}: expected times of operators, measured with bench.throughput.ops, got none")
    if not draw(records, Path(sys.argv[2])):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

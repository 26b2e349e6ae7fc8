"""Draws what was measured: ``python -m bench.throughput.plot results.jsonl out.png``. One panel per operator, µs over size."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.pictures import new_figure, save
from bench.records import timings
from bench.throughput.speed import best_threads

PANELS = ("rls", "window", "fusion")
COLOURS = {"ours": "tab:red", "eager": "tab:blue", "graph": "tab:cyan", "compile": "tab:green", "released": "tab:grey"}


def curves(records: list[dict], op: str) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """(what is shown, {provider: [(size, µs), …]}) of one panel: the sizes of the C (and M) that has most of them.

    Size is s; for the fusion it is the number of logits, of all cases without a mask.
    """
    chosen = [r for r in records if r["op"] == op and not r["masked"]]
    what = op
    if op != "fusion" and chosen:
        groups: dict[tuple, set[int]] = {}
        for r in chosen:
            groups.setdefault((r["C"], r["M"]), set()).add(r["s"])
        C, M = max(groups, key=lambda group: (len(groups[group]), group == (101, 3), group[0] == 101))
        chosen = [r for r in chosen if (r["C"], r["M"]) == (C, M)]
        what += f", C = {C}" + ("" if M is None else f", M = {M}")
    found: dict[str, list[tuple[int, float]]] = {}
    for r in chosen:
        size = r["s"] or r["M"] * r["N"] * r["C"]
        found.setdefault(r["provider"], []).append((size, r["median_us"]))
    return what, {name: sorted(points) for name, points in found.items()}


def draw(records: list[dict], path: Path) -> bool:
    """Writes the picture. Without matplotlib a line says so: False."""
    figure = new_figure(15, 5)
    if figure is None:
        return False
    for axes, op in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        what, found = curves(records, op)
        for i, (name, points) in enumerate(found.items()):
            kind = name.split()[0]
            style = dict(color=COLOURS.get(kind, "tab:olive"), marker="osv^Dx*P"[i % 8], lw=2 if kind == "ours" else 1)
            axes.plot(*zip(*points, strict=True), label=name, ms=4, **style)
        axes.set(title=what, xlabel="logits" if op == "fusion" else "s", ylabel="µs", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        if found:
            axes.legend(fontsize=7)
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

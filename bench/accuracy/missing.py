"""Table 2 of the paper on avdigits B and digits: methods for missing modalities beside late fusion, QMF and MLA.

    python -m bench.accuracy.missing --data avdigits.npz --seeds 0-2 --missing 0.1:0.7:0.1 --epochs 60 --output runs/missing

The protocol is that of ``mla-fast compare --protocol cpm``. Each task is a folder with runs.jsonl, table.md and report.html;
what is done is not run again. ``bench/results/missing-*.jsonl`` are such runs. ``--show`` prints what there is without running.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.accuracy.balanced import TASKS, committed, of_folder, task
from mla_fast import cli_options as options
from mla_fast.compare import missing_report
from mla_fast.compare.command import check_installed
from mla_fast.compare.learners import Budget
from mla_fast.compare.missing import compare_missing
from mla_fast.compare.records import Record
from mla_fast.data import PROTOCOLS

NAMES = ("digits", "avdigits B")


def tables(found: dict[str, list[Record]]) -> str:
    """The tables of accuracy, of records by task."""
    parts = []
    for name, runs in found.items():
        if runs:
            seeds = len({record["seed"] for record in runs})
            parts.append(missing_report.table(runs, f"{name}, {seeds} seed{'s' * (seeds > 1)}"))
    if not parts:
        raise ValueError("show: expected a folder with results of bench.accuracy.missing, got none")
    return "\n\n".join(parts)


def readings(found: dict[str, list[Record]]) -> str:
    """Who is ahead at each rate, and what falls short, of records by task."""
    return "\n".join(f"- {name}: {said}" for name, runs in found.items() if runs for said in missing_report.reading(runs))


def parts(results: Path) -> dict[str, str]:
    """What the report says of the records in a folder, by the names of its template."""
    found = committed(results, "missing", NAMES)
    return {"table 2": tables(found), "table 2 reading": readings(found)}


def plot(results: Path, path: Path) -> None:
    """Draw accuracy over the rate of missing modalities, one panel for each task, a line for each method."""
    from bench import pictures

    shown = {name: missing_report.by_rate(runs) for name, runs in committed(results, "missing", NAMES).items() if runs}
    figure = pictures.new_figure(pictures.PAGE, 4.6)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    styles = _styles(dict.fromkeys(method for values in shown.values() for method in values))
    for ax, (name, values) in zip(axes, shown.items(), strict=True):
        for method, rows in values.items():
            means = [100 * sum(seeds.values()) / len(seeds) for seeds in rows.values()]
            ax.plot([100 * rate for rate in rows], means, ms=4, **styles[method])
        ax.set(title=name, xlabel="missing, %", ylabel="accuracy, %")
    pictures.legend(figure, styles, 5)
    pictures.save(figure, path)


def _styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return how a line of each method is drawn: MLA and what it is beside in their colours, thick, others thin, none alike."""
    from bench import pictures

    others = iter([(color, marker) for marker in "sv" for color in ("C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9")])
    styles: dict[str, dict[str, Any]] = {}
    for method in methods:
        if method.startswith(("MLA", *pictures.UNIMODAL)):
            styles[method] = {**pictures.style(method), "marker": "^" if method == "QMF" else "o", "lw": 2.5}
        else:
            color, marker = next(others)
            styles[method] = {"color": color, "marker": marker, "lw": 1}
    return styles


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.accuracy.missing")
    parser.add_argument("--data", type=Path, help="avdigits.npz; without it avdigits B is left out")
    parser.add_argument("--methods", type=options.names, default=["all"])
    parser.add_argument("--seeds", type=options.seeds, default=options.seeds("0-2"))
    parser.add_argument("--trials", type=options.positive, default=1)
    parser.add_argument("--epochs", type=options.positive, default=60)
    parser.add_argument("--missing", type=options.rates, default=options.rates("0.1:0.7:0.1"))
    parser.add_argument("--protocol", choices=PROTOCOLS, default="cpm")
    parser.add_argument("--jobs", type=options.positive, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/missing"))
    parser.add_argument("--show", type=Path, help="only print the tables of this folder")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.show:
            everything(arguments)
        found = of_folder(arguments.show or arguments.output, NAMES)
        print(f"{tables(found)}\n\n{readings(found)}")
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"bench.accuracy.missing: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def everything(arguments: argparse.Namespace) -> None:
    check_installed()
    for name in NAMES:
        if TASKS[name][0] is not None and arguments.data is None:
            print(f"{name} is left out: it needs --data avdigits.npz")
            continue
        each, _ = task(name, arguments.data)
        here = argparse.Namespace(**{**vars(arguments), "output": arguments.output / name.replace(" ", "-")})
        compare_missing(each, here, Budget(epochs=arguments.epochs))


if __name__ == "__main__":
    main()

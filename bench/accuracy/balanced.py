"""Every method of balanced learning on avdigits B and C, digits and competition, by the protocol of ``mla-fast compare``.

    python -m bench.accuracy.balanced --data avdigits.npz --seeds 0-5 --trials 4 --jobs 2 --output runs/balanced

Each task is a folder with runs.jsonl, results.csv and report.html; what is done is not run again. The tasks are those of
``bench.accuracy``, whose training part is split once more, by speaker in B, for a part to choose epochs and hyperparameters on.
``bench/results/balanced-*.jsonl`` are such runs. ``--show`` prints the tables of a folder without running anything.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.accuracy.settings import setting
from mla_fast import cli_options as options
from mla_fast.compare.command import check_installed, compare_methods
from mla_fast.compare.findings import findings
from mla_fast.compare.learners import Budget
from mla_fast.compare.methods import select
from mla_fast.compare.records import Record, read
from mla_fast.compare.report import ranking_table, sort
from mla_fast.compare.run import NAMES
from mla_fast.compare.statistics import by_method, choose
from mla_fast.compare.task import Task
from mla_fast.tables import markdown_table

TASKS: dict[str, tuple[str | None, str | None]] = {  # name: the configuration of avdigits, and the group of its parts
    "avdigits B": ("B", "speaker"),
    "avdigits C": ("C", None),
    "digits": (None, None),
    "competition": (None, None),
}


def task(name: str, path: Path) -> tuple[Task, int]:
    """The task of a name and its epochs."""
    config, group = TASKS[name]
    found = setting(name if config is None else str(path), config)
    identity = name if config is None else f"{config} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    return Task(name, identity, found.prepare, group, per="array"), found.epochs


def tables(found: dict[str, list[Record]]) -> str:
    """The rankings of all tasks that have records."""
    parts = []
    for name, runs in found.items():
        if runs:
            (_, *header), rows = ranking_table(sort(by_method(choose(runs))))
            trials, seeds = (len({record[key] for record in runs}) for key in (NAMES[2], NAMES[1]))
            parts.append(markdown_table([f"{name}, {seeds} seeds, {trials} trials", *header], rows))
    if not parts:
        raise ValueError("show: expected a folder with results of bench.accuracy.balanced, got none")
    return "\n\n".join(parts)


def readings(found: dict[str, list[Record]]) -> str:
    """What the numbers of each task say."""
    return "\n".join(f"- {name}: {' '.join(findings(sort(by_method(choose(runs)))))}" for name, runs in found.items() if runs)


def of_folder(folder: Path, names: Iterable[str]) -> dict[str, list[Record]]:
    """The records of tasks of these names where they were run."""
    return {name: read(folder / name.replace(" ", "-") / "runs.jsonl") for name in names}


def committed(results: Path, kind: str, names: Iterable[str]) -> dict[str, list[Record]]:
    """The records of tasks of these names in bench/results."""
    return {name: read(results / f"{kind}-{name.replace(' ', '-')}.jsonl") for name in names}


def parts(results: Path) -> dict[str, str]:
    """What the report says of the records in a folder, by the names of its template."""
    found = committed(results, "balanced", TASKS)
    return {"balanced": tables(found), "balanced reading": readings(found)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.accuracy.balanced")
    parser.add_argument("--data", type=Path, help="avdigits.npz; without it B and C are left out")
    parser.add_argument("--methods", type=options.names, default=["all"])
    parser.add_argument("--seeds", type=options.seeds, default=options.seeds("0-5"))
    parser.add_argument("--trials", type=options.positive, default=4)
    parser.add_argument("--epochs", type=options.positive, help="in place of each task's own")
    parser.add_argument("--missing", type=options.rates, default=[])
    parser.add_argument("--jobs", type=options.positive, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/balanced"))
    parser.add_argument("--show", type=Path, help="only print the tables of this folder")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.show:
            everything(arguments)
        found = of_folder(arguments.show or arguments.output, TASKS)
        print(f"{tables(found)}\n\n{readings(found)}")
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"bench.accuracy.balanced: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def everything(arguments: argparse.Namespace) -> None:
    check_installed()
    for name, (config, _) in TASKS.items():
        if config is not None and arguments.data is None:
            print(f"{name} is left out: it needs --data avdigits.npz")
            continue
        each, epochs = task(name, arguments.data)
        modalities = each.parts(arguments.seeds[0])[0].modalities
        here = argparse.Namespace(**{**vars(arguments), "output": arguments.output / name.replace(" ", "-")})
        methods, _ = select(arguments.methods, len(modalities))
        budget = Budget(epochs=arguments.epochs or epochs)
        compare_methods(each, methods, arguments.seeds, arguments.trials, budget, here, modalities=list(modalities))


if __name__ == "__main__":
    main()

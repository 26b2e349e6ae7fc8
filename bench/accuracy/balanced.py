"""Every method of balanced learning on avdigits B and C, digits and competition, by the protocol of ``mla-fast compare``.

    python -m bench.accuracy.balanced --data avdigits.npz --seeds 0-5 --trials 4 --jobs 2 --output runs/balanced

Each task is a folder with runs.jsonl, results.csv and report.html; what is done is not run again. The tasks are those of
``bench.accuracy``, whose training part is split once more, by speaker in B, for a part to choose epochs and hyperparameters on.
``--show`` prints the tables of a folder without running anything.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.accuracy.settings import setting
from mla_fast.compare import options
from mla_fast.compare.command import check_installed, compare_methods
from mla_fast.compare.learners import Budget
from mla_fast.compare.methods import select
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


def tables(folder: Path) -> str:
    """The rankings of all tasks in a folder."""
    from bench.records import read

    parts = []
    for name in TASKS:
        found = read(folder / name.replace(" ", "-") / "runs.jsonl")
        if found:
            (_, *header), rows = ranking_table(sort(by_method(choose(found))))
            trials, seeds = (len({record[key] for record in found}) for key in (NAMES[2], NAMES[1]))
            parts.append(markdown_table([f"{name}, {seeds} seeds, {trials} trials", *header], rows))
    if not parts:
        raise ValueError(f"show: expected a folder with results of bench.accuracy.balanced, got {folder}")
    return "\n\n".join(parts)


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
        print(tables(arguments.show) if arguments.show else everything(arguments))
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"bench.accuracy.balanced: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def everything(arguments: argparse.Namespace) -> str:
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
    return tables(arguments.output)


if __name__ == "__main__":
    main()

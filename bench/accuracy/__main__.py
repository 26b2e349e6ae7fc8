"""Accuracy of MLA and of the paper's other methods: ``python -m bench.accuracy --data digits --methods all --seeds 0-5``.

The encoders, their initial values, batches and budget are the same for all: every method sees each modality once per batch. Each
run is a line in the results file and is not run again when it is there. ``--everything`` runs all that bench/REPORT.md shows, the
studies included, into a folder; ``--show results.jsonl`` only prints the tables of a file and draws its picture.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import records
from bench.accuracy import jobs, tables
from bench.accuracy.jobs import describe
from bench.accuracy.methods import METHODS, accuracy, train
from bench.accuracy.settings import AVDIGITS, Setting, setting
from bench.accuracy.studies import adding, collapse, competition, forgetting, gap, isolation
from bench.records import Record
from mla_fast.cli_options import rates

EVERYTHING = (
    "--data {data} --config B --seeds 0-5",
    "--data digits --seeds 0-5",
    "--data {data} --config B --seeds 0-5 --missing 0.1:0.7 --methods 'Concat,Late fusion,MLA rls,MLA window'",
    "--data {data} --config C --seeds 0-2",
    "--data competition --seeds 0-2",
    "--data remainders --seeds 0-2",
)
ON_AVDIGITS = (isolation.STUDY, gap.STUDY, collapse.STUDY)
STUDIES = (*ON_AVDIGITS, forgetting.STUDY, competition.STUDY, adding.STUDY)


class Job(NamedTuple):
    """A run: `missing` of the modalities' entries are taken away."""

    task: Setting
    method: str
    seed: int
    missing: float


def run(job: Job) -> Record:
    """One run, on one thread: encoders this small only wait for each other on more."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    train_set, test_set = job.task.parts(job.seed, job.missing)
    found = accuracy(train(job.method, train_set, job.task, job.seed), test_set)
    return {**describe(job), "accuracy": found, "seconds": round(time.perf_counter() - started, 2), "torch": torch.__version__}


def methods(text: str) -> list[str]:
    names = list(METHODS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"expected all, or some of {', '.join(METHODS)}; got {name!r}")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.accuracy", description="accuracy of MLA and of other methods")
    parser.add_argument("--data", help="digits, competition, or an .npz")
    parser.add_argument("--config", help=f"of avdigits.npz: {', '.join(AVDIGITS)}")
    parser.add_argument("--modalities", default="", help="names of the arrays in another .npz, as audio,image")
    parser.add_argument("--label", default="label", help="name of its labels")
    parser.add_argument("--test-where", help="its rows to test on, as speaker=2,4 (default: a quarter at random)")
    parser.add_argument("--methods", type=methods, default=list(METHODS), help='"all" or names, separated by commas')
    parser.add_argument("--seeds", type=jobs.seeds, default=[0, 1, 2], help='as "0-5" or "0,2"')
    parser.add_argument("--missing", type=rates, default=[0.0], help='rates of missing modalities, as "0.1:0.7"')
    parser.add_argument("--epochs", type=int, help="in place of the configuration's")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--output", type=Path, default=Path("accuracy.jsonl"), help="a folder with --everything")
    parser.add_argument("--everything", action="store_true", help="all that the report shows; --data is avdigits.npz")
    parser.add_argument("--show", type=Path, help="print the tables of this file and draw its picture beside it; nothing is run")
    arguments = parser.parse_args(argv)
    try:
        if arguments.show is not None:
            show(arguments.show)
        elif arguments.data is None:
            raise ValueError("--data: expected digits, competition or an .npz, got none")
        elif arguments.everything:
            everything(arguments)
        else:
            compare(arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"bench.accuracy: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def compare(arguments: argparse.Namespace) -> None:
    names = [name for name in arguments.modalities.split(",") if name]
    task = setting(
        arguments.data,
        arguments.config,
        modalities=names,
        label=arguments.label,
        test_where=arguments.test_where,
        epochs=arguments.epochs,
    )
    task.parts(arguments.seeds[0])  # what is wrong with the data is said before anything is run
    todo = [Job(task, *each) for each in itertools.product(arguments.methods, arguments.seeds, arguments.missing)]
    print(tables.accuracy(jobs.run_missing(todo, run, describe, arguments.output, arguments.jobs)))


def everything(arguments: argparse.Namespace) -> None:
    common = ["--jobs", str(arguments.jobs), "--output"]
    for line in EVERYTHING:
        options = [option.format(data=arguments.data) for option in shlex.split(line)]
        main([*options, *common, str(arguments.output / "accuracy.jsonl")])
    on_b = ["--data", arguments.data, "--config", "B"]
    for study in STUDIES:
        on = [on_b, ["--data", "digits"], ["--data", "competition"]] if study is adding.STUDY else [[]]
        for data in [on_b] if study in ON_AVDIGITS else on:
            jobs.main(study, [*data, *common, str(arguments.output / f"{study.name}.jsonl")])
    show(arguments.output / "accuracy.jsonl")


def show(path: Path) -> None:
    found = [record for record in records.read(path) if "accuracy" in record and "missing" in record]
    if not found:
        raise ValueError(f"{path}: expected results of bench.accuracy, got none")
    print(tables.accuracy(found))
    tables.draw_accuracy(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

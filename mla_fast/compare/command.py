"""``mla-fast compare``: train every method on the same data under the same budget, and say which is right for it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mla_fast import cli_options as options
from mla_fast import ranks
from mla_fast.compare import report
from mla_fast.compare.learners import Budget
from mla_fast.compare.methods import select, trials
from mla_fast.compare.missing import compare_missing
from mla_fast.compare.run import Job
from mla_fast.compare.runner import begin, run_all, settings_of
from mla_fast.compare.task import Task, load_task
from mla_fast.data import PROTOCOLS

EXTRA = ("sklearn", "scipy", "torchmetrics", "matplotlib")


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``mla-fast``."""
    p = commands.add_parser("compare", help="train many methods on your data, and say which is right for it")
    p.add_argument("--data", required=True, help="digits, competition, or an .npz with an array for each modality and a label")
    options.add(p, "--modalities", options.names, [], "names of the arrays to use, as audio,image")
    options.add(p, "--label", str, "label", "name of the array of labels")
    options.add(p, "--layout", options.layouts, {}, "how arrays are read, as for train: text=tokens,image=image")
    p.add_argument("--group", help="array whose values each stay in one part, as speaker")
    help = "test seed k on the k-th value of --group alone: leave one group out"
    p.add_argument("--folds", action=argparse.BooleanOptionalAction, default=False, help=help)
    options.add(p, "--methods", options.names, ["all"], "names of methods, separated by commas (default: all)")
    help = 'seeds, each of a split and a run, as "0-4" (the default) or "0,2"'
    options.add(p, "--seeds", options.seeds, [0, 1, 2, 3, 4], help)
    options.add(p, "--trials", options.positive, 4, "choices of hyperparameters to try for every method")
    help = 'rates of missing modalities to test at as well, as "0.1:0.7" (default: none)'
    options.add(p, "--missing", options.rates, [], help)
    help = "take modalities away in training, too, by this protocol, as in Table 2 (default: in the test alone)"
    p.add_argument("--protocol", choices=PROTOCOLS, help=help)
    options.add(p, "--epochs", options.positive, 20, "passes over each modality")
    options.add(p, "--jobs", options.positive, _cores(), "processes of each rank that train side by side")
    options.add_device_option(p, "cpu")
    options.add_config_option(p)
    options.add(p, "--output", Path, Path("runs/compare"), "folder of the results, which keeps what is done already")
    p.set_defaults(command=compare)


def _cores() -> int:
    return max((os.cpu_count() or 1) // ranks.on_this_machine(), 1)


def compare(arguments: argparse.Namespace) -> None:
    """Run what is not done yet, and write runs.jsonl, results.csv and report.html to the output folder."""
    with ranks.together():
        task = _load(arguments)
        said = {"methods": arguments.methods, "seeds": arguments.seeds, "trials": arguments.trials, "missing": arguments.missing}
    ranks.check_alike("compare", {"data": task.identity, **said, "epochs": arguments.epochs, "protocol": arguments.protocol})
    if arguments.protocol is not None:
        if not arguments.missing and all(task.split(seed)[0].complete for seed in arguments.seeds):
            raise ValueError("protocol: expected --missing beside it, as 0.1:0.7:0.1, got none")
        arguments.missing = arguments.missing or [0.0]  # data that lack modalities, as they are
        arrays = {
            "modalities": list(task.split(arguments.seeds[0])[0].modalities),
            "label": arguments.label,
            **_only_if_asked(arguments),
        }
        print(compare_missing(task, arguments, Budget(epochs=arguments.epochs), **arrays))
        print(f"\nwrote {arguments.output / 'report.html'}, table.md, results.csv, runs.jsonl and run.toml")
        return
    # What is wrong with the data, for any seed, is said before anything is run.
    modalities = [task.parts(seed)[0].modalities for seed in arguments.seeds][0]
    names, left_out = select(arguments.methods, len(modalities))
    for name in left_out:
        print(f"{name} is left out: it is not defined for {len(modalities)} modalities")
    data = {"modalities": list(modalities), "label": arguments.label, **_only_if_asked(arguments)}
    budget = Budget(epochs=arguments.epochs)
    print(compare_methods(task, names, arguments.seeds, arguments.trials, budget, arguments, **data))
    print(f"\nwrote {arguments.output / 'report.html'}, results.csv, runs.jsonl and run.toml")


def _only_if_asked(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in ("layout", "folds") if (value := getattr(arguments, name))}


def _load(arguments: argparse.Namespace) -> Task:
    check_installed()
    device = options.device(arguments.device)
    if arguments.device == "auto":
        arguments.device = device.type
    if Path(arguments.data).exists():
        arguments.data = str(Path(arguments.data).resolve())
    return load_task(arguments.data, arguments.modalities, arguments.label, arguments.group, arguments.layout, arguments.folds)


def compare_methods(
    task: Task, names: list[str], seeds: list[int], count: int, budget: Budget, arguments: argparse.Namespace, **data: Any
) -> str:
    """Run all methods, seeds and trials into ``arguments.output`` and return what the report says."""
    for name in names:
        trials(name, count)
    settings = settings_of(task, budget, arguments.missing, arguments.device, **data)
    digest = ranks.from_first(lambda: begin(arguments, settings))
    rates = tuple(arguments.missing)
    jobs = [
        Job(task, name, seed, trial, budget, rates, ranks.device_name(arguments.device), digest)
        for seed in seeds
        for name in names
        for trial in range(count)
    ]
    found = run_all(jobs, arguments.output, arguments.jobs)
    return report.write(found, {**settings, "trials": count}, arguments.output) if ranks.is_first() else ""


def check_installed() -> None:
    """Raise ImportError, with its cure, where the extra is not installed."""
    for name in EXTRA:
        try:
            __import__(name)
        except ImportError as error:
            raise ImportError(f'{name} is missing: pip install "mla_fast[compare]"') from error

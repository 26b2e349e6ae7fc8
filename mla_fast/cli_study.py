"""``mla-fast compare SET ROOT --study table-1``: the paper's tables and figures on its data sets, for who has them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mla_fast import cli_options as options
from mla_fast import cli_paper, datasets
from mla_fast.cli_config import write_options
from mla_fast.compare import records, study, study_report
from mla_fast.compare.published import STUDIES, Study, find_study
from mla_fast.compare.records import Record
from mla_fast.compare.runner import claim

# What the runs of a folder have in common; more seeds, methods and settings may be added to it.
COMMON = "epochs batch_size lr momentum weight_decay decay_at split tokenizer modalities encoder weights size".split()


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of ``mla-fast``."""
    help = "the same as compare SET ROOT --study …: a table or figure of the paper, on its data set"
    p = commands.add_parser("study", help=help, prog="mla-fast compare")
    cli_paper.add_data_options(p)
    cli_paper.add_settings(p)
    p.add_argument("--study", choices=STUDIES, required=True, help="table or figure of the paper")
    help = "paper, released or both (the default); released has no projection, its own patches and fusion, the best epoch on test"
    options.add(p, "--settings", _settings, list(study.SETTINGS), help)
    options.add(p, "--methods", options.names, [], "rows of the study to run, separated by commas (default: all)")
    options.add(p, "--seeds", options.seeds, [0, 1, 2], 'seeds to run every row with, as "0-2" (the default) or "0,2"')
    options.add(p, "--output", Path, Path("runs/study"), "folder of the results, which keeps what is done already")
    p.set_defaults(command=compare, name="compare", full_name="compare SET ROOT --study")


def _settings(text: str) -> list[str]:
    found = options.names(text)
    if not found or not set(found) <= set(study.SETTINGS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(study.SETTINGS)}, got {text!r}")
    return found


def compare(arguments: argparse.Namespace) -> None:
    """Run what is not done yet, each run to runs.jsonl as it is done, and write table.md."""
    what = find_study(arguments.study, arguments.dataset)
    settings = cli_paper.settings_of(arguments)
    device = options.device(arguments.device)
    data, _ = _parts(arguments, settings)(arguments.settings[0])
    for part in data.values():
        print(part.describe())
    modalities = data["train"].modalities
    jobs = study.jobs(
        _methods(what, arguments.methods, len(modalities)), arguments.settings, arguments.seeds, _masks(what, modalities)
    )
    common = {
        "data": arguments.dataset,
        "study": arguments.study,
        "identity": {name: part.identity() for name, part in data.items()},
    }
    digest = claim(arguments.output, common | {name: settings[name] for name in COMMON})
    path = arguments.output / "runs.jsonl"
    done = {records.key(r, study.Job._fields): r for r in records.read(path)}
    write_options(arguments, arguments.output / "run.toml")
    for number, job in enumerate(jobs, 1):
        if (key := tuple(job)) not in done:
            record: Record = study.run(job, _parts(arguments, settings), settings, device, gap=what.gap)
            done[key] = record | {"settings": digest}
            records.append(path, done[key])
        print(f"[{number}/{len(jobs)}] {_said(done[key])}", flush=True)
    print("\n" + study_report.write([done[tuple(job)] for job in jobs], what, arguments.dataset, modalities, arguments.output))
    print(f"\nwrote {arguments.output / 'table.md'}, runs.jsonl and run.toml")


def _methods(what: Study, wanted: Sequence[str], modalities: int) -> list[str]:
    """Return the methods to train for the rows asked for; raise ValueError for one that the study has not."""
    labels = [row.label for row in what.rows]
    for name in wanted:
        if name not in labels:
            raise ValueError(f"--methods: expected rows of the study, {', '.join(labels)}; got {name!r}")
    methods = dict.fromkeys(row.method for row in what.rows if not wanted or row.label in wanted)
    undefined = [name for name in methods if study.defined_for(name) not in (None, modalities)]
    for name in undefined:
        print(f"{name} is left out: it is not defined for {modalities} modalities")
    return [name for name in methods if name not in undefined]


def _masks(what: Study, modalities: Sequence[str]) -> list[tuple[str | None, float]]:
    masks = [(modality, share) for modality in modalities for share in what.masked if share]
    return [(None, 0.0), *masks]


def _parts(arguments: argparse.Namespace, settings: dict[str, Any]) -> study.Parts:
    """Return what makes the data and the encoders of a setting."""

    def parts(setting: str) -> tuple[dict[str, datasets.LazyDataset], Callable[[], tuple[dict[str, nn.Module], int]]]:
        own = settings | {"as_released": setting == "released"}
        data = cli_paper.make_parts(arguments, own)
        return data, lambda: cli_paper.make_encoders(arguments.dataset, own, data["train"])

    return parts


def _said(record: Record) -> str:
    name = f"{record['method']}, {record['setting']}, seed {record['seed']}"
    name += f", {record['masked']} {100 * record['share']:.0f} % masked" if record["masked"] else ""
    fused = record["test"].get("multi", record["test"].get("dynamic", math.nan))
    return f"{name}: test {100 * fused:.1f} % after epoch {record['epoch']}, {record['seconds']:.0f} s"

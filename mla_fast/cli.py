"""The command line: ``mla-fast demo | train | eval | predict | compare | prepare | features | env``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla_fast import cli_add, cli_config, cli_features, cli_paper, cli_study, cli_train, data, environment, ops, ranks
from mla_fast import cli_options as options
from mla_fast.cli_eval import evaluate, predict
from mla_fast.compare.command import add_parser as add_compare
from mla_fast.data.standardization import PER


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or after one line on stderr, 2 for bad input and 130 for Ctrl-C."""
    typed = list(sys.argv[1:] if argv is None else argv)
    arguments = argparse.Namespace(name=next(iter(typed), ""))
    try:
        with ranks.silent_but_first():
            arguments = _parse(typed)
            full_name = getattr(arguments, "full_name", arguments.name)  # of what shares its name with another command
            with ranks.joined(full_name, getattr(arguments, "device", "cpu")):
                arguments.command(arguments)
    except (ValueError, TypeError, OSError, ImportError, ops.BackendError) as error:
        print(f"mla-fast {arguments.name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mla-fast {arguments.name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(typed: list[str]) -> argparse.Namespace:
    """Parse a command line after the options of its --config, which it overrides."""
    path = cli_config.config_path(typed)
    typed = _in_full(typed)
    if path is None:
        return _parser().parse_args(typed)
    try:
        return _parser().parse_args([typed[0], *cli_config.read_options(path), *typed[1:]])
    except SystemExit as stop:
        if stop.code:
            print(f"note: the settings of {path} were read as options, too", file=sys.stderr)
        raise


def _in_full(typed: list[str]) -> list[str]:
    """Return the command line with the parser's name for ``train SET`` and ``compare SET``."""
    if typed[:1] in (["train"], ["compare"]) and cli_paper.is_meant(typed[1:]):
        return [{"train": "paper", "compare": "study"}[typed[0]], *typed[1:]]
    return typed


def demo(arguments: argparse.Namespace) -> None:
    """Run both experiments of ``mla_fast.demo``."""
    from mla_fast.demo import run

    run(arguments.output, quick=arguments.quick, seed=arguments.seed)


def env(arguments: argparse.Namespace) -> None:
    """Print ``environment.report``."""
    lines = environment.report()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")


def train(arguments: argparse.Namespace) -> None:
    """Train on an .npz, or with --add one more modality of the run of --from."""
    if (arguments.add is None) != (arguments.start is None):
        raise ValueError("--add: expected together with --from, the checkpoint of the run to add to")
    if arguments.add is None:
        cli_train.train(arguments)
    else:
        cli_add.add(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mla-fast", description="Multimodal learning by alternating unimodal adaptation.")
    commands = parser.add_subparsers(dest="name", required=True)

    p = commands.add_parser("demo", help="compare joint training and MLA on digits and on synthetic data, in a minute")
    options.add(p, "--output", Path, Path("demo"), "folder of results.json and demo.png")
    options.add(p, "--seed", options.seed, 0, "first of the seeds")
    p.add_argument("--quick", action="store_true", help="take a few seconds, to see that it runs")
    p.set_defaults(command=demo)

    more = f"train SET ROOT is for the paper's data sets, {', '.join(cli_paper.SETS)}: see mla-fast train crema-d --help"
    help = "train on an .npz with one array per modality and a label array"
    p = commands.add_parser("train", help=f"{help}, or on a data set of the paper", epilog=more)
    _add_data_options(p)
    _add_training_options(p)
    options.add_projection_options(p)
    _add_run_options(p)
    p.set_defaults(command=train)
    _add_reading_commands(commands)
    add_compare(commands)
    cli_paper.add_commands(commands)
    cli_study.add_command(commands)
    cli_features.add_command(commands)
    commands.add_parser("env", help="show versions, devices, and which backends are active").set_defaults(command=env)
    return parser


def _add_reading_commands(commands: Any) -> None:
    p = commands.add_parser("eval", help="evaluate a checkpoint written by train")
    p.add_argument("checkpoint", type=Path, help="file that train has written, as runs/mla/checkpoint.pt")
    p.add_argument("--data", type=Path, help="other data with the same arrays (default: the data it was trained on)")
    part = p.add_mutually_exclusive_group()
    part.add_argument("--test-where", help="another part to evaluate on, as speaker=2,4")
    part.add_argument("--all", action="store_true", help="evaluate on every row")
    _add_reading_options(p)
    p.set_defaults(command=evaluate)

    p = commands.add_parser("predict", help="write what a checkpoint written by train predicts for an .npz, as a CSV")
    p.add_argument("checkpoint", type=Path, help="file that train has written, as runs/mla/best.pt")
    p.add_argument("file", type=Path, help="data with the arrays that were trained on, or some of them; no labels are needed")
    help = "CSV with a row for each sample: class, probabilities, weight of each modality"
    options.add(p, "--output", Path, Path("predictions.csv"), help)
    p.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    _add_reading_options(p)
    p.set_defaults(command=predict)


def _add_reading_options(p: argparse.ArgumentParser) -> None:
    options.add_device_option(p)
    options.add_amp_option(p, "none, however it was trained")
    options.add(p, "--threads", options.positive, None, "CPU threads (default: as many as it was trained with)")


def _add_data_options(p: argparse.ArgumentParser) -> None:
    help = "an .npz, or data larger than memory: a folder of .npy, tar shards, or what the package datasets has saved"
    p.add_argument("--data", type=Path, required=True, help=help)
    options.add(p, "--modalities", options.names, [], "names of its arrays [N, …], as audio,image")
    p.add_argument("--add", metavar="NAME", help="array to add to the modalities of another run, whose data may be gone")
    help = "checkpoint of the run to add to; its model and projection are continued"
    p.add_argument("--from", dest="start", type=Path, metavar="CHECKPOINT", help=help)
    layouts = ", ".join(f"{layout} ({shape})" for layout, (shape, _) in data.LAYOUTS.items())
    options.add(p, "--layout", options.layouts, {}, f"how arrays are read, as text=tokens,image=image: {layouts}")
    help = "standardise by a mean and deviation of each feature or channel, of each array, or not at all"
    options.add(p, "--standardize", str, "feature", help, choices=PER)
    options.add(p, "--label", str, "label", "name of the array of labels: whole numbers, booleans or names")
    options.add(p, "--missing", options.below_one, 0.0, "rate at which modalities are removed in training and test")
    help = "how --missing removes them: each by itself (independent, the default), or so that every sample keeps one (cpm)"
    p.add_argument("--protocol", choices=tuple(data.PROTOCOLS), help=help)
    p.add_argument("--test-where", help="test on the rows where an array has these values, as speaker=2,4")
    options.add(p, "--test-fraction", options.fraction, 0.2, "fraction of the rows to test on without --test-where")
    help = "fraction of the other rows, or rows as speaker=3, to validate on; the epoch that does best there is kept as best.pt"
    p.add_argument("--validation", type=options.held_out, metavar="FRACTION", help=help)


def _add_training_options(p: argparse.ArgumentParser) -> None:
    sgd = {"epochs": 20, "seed": 0, "batch_size": 64, "lr": 0.03, "momentum": 0.9, "weight_decay": 0.0}
    options.add_training_options(p, sgd, falls="70 %% of the epochs")
    options.add(p, "--features", options.positive, 64, "width of the features that the encoders return")
    help = "your own encoder, as audio=package.module:Encoder; called without arguments, returns features [N, s]"
    options.add(p, "--encoder", options.pairs, {}, help)
    help = "rank of the interaction head (default: 0, no interaction; try 128)"
    p.add_argument("--interaction", type=options.count, default=0, metavar="RANK", help=help)
    options.add_amp_option(p)
    options.add(p, "--label-smoothing", options.below_one, 0.0, "share of each label that is spread over all classes")
    help = "weigh each class by N / (C n), where n of the N training samples have it (default: all alike)"
    p.add_argument("--class-weights", choices=("balanced",), help=help)
    options.add(p, "--accumulate", options.positive, 1, "batches whose gradients are accumulated for one step")
    help = "stop after this many epochs without an improvement on --validation (default: never)"
    options.add(p, "--patience", options.positive, None, help)
    options.add(p, "--clip-norm", options.above_zero, None, "largest norm of a step's gradient (default: no limit)")


def _add_run_options(p: argparse.ArgumentParser) -> None:
    options.add(p, "--backend", str, "auto", "implementation of the operators; auto is the fastest", choices=ops.BACKENDS)
    options.add_config_option(p)
    options.add_device_option(p)
    help = "CPU threads (default: torch's number, or one where a small model proves faster with it; --resume keeps the run's)"
    options.add(p, "--threads", options.positive, None, help)
    help = "processes that load batches; 0 is fastest for data in memory or in the page cache"
    options.add(p, "--workers", options.count, 0, help)
    options.add(p, "--output", Path, Path("runs/mla"), "folder of the run")
    help = "number of batches after which the checkpoint is written, too (default: after each epoch alone)"
    options.add(p, "--checkpoint-every", options.positive, None, help)
    help = "write every epoch's numbers to --output for TensorBoard"
    p.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help=help)
    options.add_rerun_options(p)

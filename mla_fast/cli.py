"""The command line: ``mla-fast demo | train | eval | predict | compare | prepare | paper | features | env``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla_fast import cli_config, cli_features, cli_paper, cli_study, data, environment, ops, ranks
from mla_fast.cli_encoders import pairs
from mla_fast.cli_eval import evaluate, predict
from mla_fast.cli_train import train
from mla_fast.compare import options
from mla_fast.compare.command import add_parser as add_compare
from mla_fast.data.standardization import PER
from mla_fast.settings import BIASES, PROJECTIONS, TARGETS


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


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse uses the name in the error message for text that kind refuses
    return parse


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return value


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return value


def _seed(text: str) -> int:
    if not -(2**63) <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"expected a number of 64 bits, got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a probability in [0, 1), got {text}")
    return value


def _held_out(text: str) -> str:
    if "=" not in text and not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction in (0, 1) or FIELD=VALUES, got {text}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mla-fast", description="Multimodal learning by alternating unimodal adaptation.")
    commands = parser.add_subparsers(dest="name", required=True)

    p = commands.add_parser("demo", help="compare joint training and MLA on digits and on synthetic data, in a minute")
    p.add_argument("--output", type=Path, default=Path("demo"), help="folder for results.json and demo.png (default: demo)")
    p.add_argument("--seed", type=_seed, default=0)
    p.add_argument("--quick", action="store_true", help="take a few seconds, to see that it runs")
    p.set_defaults(command=demo)

    more = f"train SET ROOT is for the paper's data sets, {', '.join(cli_paper.SETS)}: see mla-fast train crema-d --help"
    help = "train on an .npz with one array per modality and a label array"
    p = commands.add_parser("train", help=f"{help}, or on a data set of the paper", epilog=more)
    _add_data_options(p)
    _add_training_options(p)
    _add_head_options(p)
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
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--data", type=Path, help="other data with the same arrays (default: the one it was trained on)")
    part = p.add_mutually_exclusive_group()
    part.add_argument("--test-where", help="another part to evaluate on, as speaker=2,4")
    part.add_argument("--all", action="store_true", help="evaluate on every row")
    _add_device_options(p)
    p.set_defaults(command=evaluate)

    p = commands.add_parser("predict", help="write what a checkpoint written by train predicts for an .npz, as a CSV")
    p.add_argument("checkpoint", type=Path)
    p.add_argument("file", type=Path, help="data with the arrays that were trained on, or some of them; no labels are needed")
    help = "a row for each sample: class, probabilities, weight of each modality (default: predictions.csv)"
    p.add_argument("--output", type=Path, default=Path("predictions.csv"), help=help)
    p.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    _add_device_options(p)
    p.set_defaults(command=predict)


def _add_device_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto")
    p.add_argument("--amp", choices=("bf16",), help="autocast of the forward passes (default: none, however it was trained)")
    p.add_argument("--threads", type=_positive(int), help="of the CPU (default: as many as it was trained with)")


def _add_data_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--data",
        type=Path,
        required=True,
        help="an .npz, or larger than memory: a folder of .npy, tar shards, what datasets saved",
    )
    p.add_argument("--modalities", type=_names, default=[], help="names of its arrays [N, …], as audio,image")
    p.add_argument("--add", metavar="NAME", help="an array to add to the modalities of another run, whose data may be gone")
    p.add_argument("--from", dest="start", type=Path, metavar="CHECKPOINT", help="of that run: its model and projection go on")
    layouts = ", ".join(f"{layout} ({shape})" for layout, (shape, _) in data.LAYOUTS.items())
    p.add_argument("--layout", type=options.layouts, default={}, help=f"how to read them, as text=tokens,image=image: {layouts}")
    help = "by a mean and deviation of each feature or channel (the default), of each array, or not at all"
    p.add_argument("--standardize", choices=PER, default="feature", help=help)
    p.add_argument("--label", default="label", help="name of the labels: whole numbers, booleans or names (default: label)")
    p.add_argument("--missing", type=_rate, default=0.0, help="remove modalities of samples at this rate, in training and test")
    help = "of --missing: each entry by itself (the default), or one of each sample kept and as many others as make the rate"
    p.add_argument("--protocol", choices=tuple(data.PROTOCOLS), help=help)
    p.add_argument("--test-where", help="hold out the rows where an array has these values, as speaker=2,4")
    p.add_argument("--test-fraction", type=float, default=0.2, help="without --test-where, hold out this part (default: 0.2)")
    help = "of what is left, hold out this fraction, or rows as speaker=3, and keep the epoch that does best on it as best.pt"
    p.add_argument("--validation", type=_held_out, metavar="FRACTION", help=help)


def _add_training_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--epochs", type=_positive(int), default=20)
    p.add_argument("--seed", type=_seed, default=0)
    p.add_argument("--batch-size", type=_positive(int), default=64)
    p.add_argument("--lr", type=_positive(float), default=0.03, help="falls to a tenth after 70 %% of the epochs (default: 0.03)")
    p.add_argument("--momentum", type=_not_negative, default=0.9)
    p.add_argument("--weight-decay", type=_not_negative, default=0.0)
    p.add_argument("--features", type=_positive(int), default=64, help="size of the encoders' features (default: 64)")
    help = "of one's own, as audio=package.module:Encoder, which is called without arguments and returns features [N, s]"
    p.add_argument("--encoder", type=pairs, default={}, help=help)
    p.add_argument(
        "--interaction", type=int, default=0, metavar="RANK", help="of an interaction head (default: 0, none; try 128)"
    )
    p.add_argument("--amp", choices=("bf16",), help="autocast of the forward passes")
    p.add_argument("--label-smoothing", type=_rate, default=0.0, help="share of a label that goes to all classes (default: 0)")
    p.add_argument("--class-weights", choices=("balanced",), help="weigh a class by what is in training: N / (C samples of it)")
    p.add_argument("--accumulate", type=_positive(int), default=1, help="batches accumulated for a step (default: 1)")
    p.add_argument("--patience", type=_positive(int), help="stop after as many epochs that are no better on --validation")
    p.add_argument("--clip-norm", type=_positive(float), help="largest norm of a step's gradient (default: no limit)")


def _add_head_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--projection", choices=PROJECTIONS, default="rls", help="of the head's step (default: rls, the paper's)")
    p.add_argument("--order", choices=ops.ORDERS, default="update_first")
    p.add_argument("--target", choices=TARGETS, default="gradient")
    p.add_argument("--bias", choices=BIASES, default="free")
    p.add_argument("--alpha", type=_positive(float), default=1.0)
    p.add_argument("--backend", choices=ops.BACKENDS, default="auto")


THREADS = "of the CPU (default: one where a model is so small that it is faster, which is measured; a resumed run has its own)"


def _add_run_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", type=Path, help="settings as TOML, such as the run.toml of another run; options override them")
    p.add_argument("--device", default="auto")
    p.add_argument("--threads", type=_positive(int), help=THREADS)
    help = "processes that load batches (default: 0, which is fastest for data in memory or in the page cache)"
    p.add_argument("--workers", type=_count, default=0, help=help)
    p.add_argument("--output", type=Path, default=Path("runs/mla"), help="folder of the run (default: runs/mla)")
    p.add_argument("--checkpoint-every", type=_positive(int), help="also write it after this many batches (default: each epoch)")
    p.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write every epoch's numbers to --output for TensorBoard",
    )
    again = p.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --output, to more --epochs if you like")
    again.add_argument("--overwrite", action="store_true", help="delete the run in --output and begin anew")

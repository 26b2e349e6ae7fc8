"""The command line: ``mla-fast demo | train | eval | compare | env``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mla_fast import data, environment, ops
from mla_fast.callbacks import TensorBoard
from mla_fast.checkpoint import read_checkpoint
from mla_fast.compare.command import add_parser as add_compare
from mla_fast.encoders import encoder_for
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.settings import BIASES, PROJECTIONS, TARGETS
from mla_fast.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or after one line on stderr, 2 for bad input and 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, TypeError, OSError, ImportError, ops.BackendError) as error:
        print(f"mla-fast {arguments.name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mla-fast {arguments.name}: interrupted", file=sys.stderr)
        return 130
    return 0


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
    """Train on an .npz, evaluate on the part held out, and write checkpoint.pt and metrics.json."""
    config = _config(arguments)
    dataset = _load(config)
    torch.manual_seed(arguments.seed)
    config["encoders"] = {name: list(x.shape[1:]) for name, x in dataset.inputs.items()}
    config["classes"] = _classes(dataset, config)
    parts = _split(dataset, config)
    config["statistics"] = {name: list(values) for name, values in data.statistics(parts[0]).items()}
    train_set, test_set = (data.apply_statistics(part, config["statistics"]) for part in parts)
    trainer = _build(config, _device(arguments.device))
    checkpoint = arguments.output / "checkpoint.pt"
    trainer.config = config
    if arguments.tensorboard:
        trainer.callbacks = (TensorBoard(arguments.output),)
    if arguments.resume:
        _resume(trainer, checkpoint, config)
    batches = data.loader(train_set, config["batch_size"], shuffle=True)
    trainer.fit(batches, config["epochs"], checkpoint=checkpoint, checkpoint_every=arguments.checkpoint_every)
    result = trainer.evaluate(data.loader(test_set, 1024))
    head = trainer.optimizer.diagnostics()
    metrics = {"config": config, "history": trainer.history, "test": result, "head": head}
    (arguments.output / "metrics.json").write_text(json.dumps(_without_nan(metrics), indent=2))
    _print_result(result)
    if head["skipped_nonfinite"]:
        print(f"{head['skipped_nonfinite']} steps were skipped because they were not finite: lower --lr?")
    print(f"wrote {checkpoint} and {arguments.output / 'metrics.json'}")


def _classes(dataset: data.MultimodalDataset, config: dict[str, Any]) -> int:
    """Return the number of classes; raise ValueError if there is only one, or if the labels cannot be class numbers."""
    label, found = f"{config['data']}: {config['label']!r}", len(dataset.target.unique())
    if found < 2:
        raise ValueError(f"{label}: expected at least two classes, got {dataset.target[0]} alone")
    if dataset.classes > 10**5 > len(dataset):
        raise ValueError(f"{label}: expected classes numbered from 0, got {found} of them up to {dataset.classes - 1}")
    return dataset.classes


def _resume(trainer: Trainer, checkpoint: Path, config: dict[str, Any]) -> None:
    """Continue an interrupted run; raise FileNotFoundError if there is none, ValueError if its settings differ."""
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: nothing to resume; leave out --resume to start a new run")
    saved = read_checkpoint(checkpoint)["config"] or {}
    for name, value in json.loads(json.dumps(config)).items():
        if saved.get(name) != value:
            raise ValueError(f"--resume: expected the settings of the saved run, whose {name} is {saved.get(name)}, got {value}")
    trainer.resume(checkpoint)
    left = config["epochs"] - trainer.epoch
    print(f"continuing after {trainer.epoch} epochs" if left else f"all {trainer.epoch} epochs are done: nothing left to train")


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a checkpoint on the part held out of its data, or on all or a part of other data."""
    saved = read_checkpoint(arguments.checkpoint)
    config = saved["config"]
    if not isinstance(config, dict) or "encoders" not in config:
        raise ValueError(f"{arguments.checkpoint}: expected a checkpoint written by mla-fast train, which describes its encoders")
    if arguments.data is not None and arguments.data.resolve() == Path(config["data"]):
        arguments.data = None  # the checkpoint's own data, of which only the part held out is new
    whole = arguments.all or (arguments.data is not None and arguments.test_where is None)
    if arguments.data is None and (whole or arguments.test_where not in (None, config["test_where"])):
        print("note: some of these rows were trained on")
    if arguments.data is not None:
        config = {**config, "data": str(arguments.data)}
    dataset = _load(config)
    for name, x in dataset.inputs.items():
        if list(x.shape[1:]) != config["encoders"][name]:
            raise ValueError(f"{config['data']}: {name!r}: expected samples {config['encoders'][name]}, got {list(x.shape[1:])}")
    if arguments.test_where is not None:
        dataset = dataset.subset(data.rows_where(dataset, arguments.test_where))
    elif not whole:
        _, dataset = _split(dataset, config)
    _note_other_units(dataset, config["statistics"])
    test_set = data.apply_statistics(dataset, config["statistics"])
    trainer = _build(config, _device(arguments.device))
    trainer.model.load_state_dict(saved["model"])
    _print_result(trainer.evaluate(data.loader(test_set, 1024)))


def _note_other_units(dataset: data.MultimodalDataset, trained: data.Statistics) -> None:
    """Print a note for each modality whose mean is so far from that in training that its units must differ."""
    for name, (expected, std) in trained.items():
        mean = dataset.rows(name).double().mean().item()  # NaN where there are no rows
        if abs(mean - expected) > 3 * std:
            trained_on = f"in training it was {expected:.3g} ± {std:.3g}"
            print(f"note: {name!r} has a mean of {mean:.3g}, {trained_on}: are the units the same?")


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options as plain values; with the shapes and statistics of the data, they suffice to rebuild the model."""
    names = "label missing test_where test_fraction seed epochs batch_size lr momentum weight_decay features amp".split()
    config = {name: getattr(arguments, name) for name in (*names, "accumulate", "clip_norm")}
    config["data"] = str(arguments.data.resolve())
    config["modalities"] = list(arguments.modalities)
    config["head"] = {name: getattr(arguments, name) for name in ("projection", "order", "target", "bias", "alpha", "backend")}
    return config


def _load(config: dict[str, Any]) -> data.MultimodalDataset:
    dataset = data.load_npz(config["data"], config["modalities"], config["label"])
    rate = config.get("missing", 0.0)
    return data.with_missing(dataset, rate, config["seed"]) if rate else dataset


def _split(dataset: data.MultimodalDataset, config: dict[str, Any]) -> tuple[data.MultimodalDataset, data.MultimodalDataset]:
    if config["test_where"] is not None:
        return data.split_where(dataset, config["test_where"])
    return data.random_split(dataset, config["test_fraction"], config["seed"])


def _build(config: dict[str, Any], device: torch.device) -> Trainer:
    encoders = {}
    for name, shape in config["encoders"].items():
        try:
            encoders[name] = encoder_for(shape, config["features"])
        except ValueError as error:
            raise ValueError(f"{config['data']}: {name!r}: {error}") from None
    model = MultimodalModel(encoders, nn.Linear(config["features"], config["classes"])).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=config["momentum"], weight_decay=config["weight_decay"])
    optimizer = MLAOptimizer(sgd, model.head, **config["head"])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, round(0.7 * config["epochs"]))])
    amp = torch.bfloat16 if config["amp"] == "bf16" else None
    how = {"amp": amp, "accumulate": config["accumulate"], "clip_norm": config["clip_norm"]}
    return Trainer(model, optimizer, scheduler=scheduler, seed=config["seed"], **how)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected auto or an available device, got {name!r} ({reason})") from None


def _print_result(result: dict[str, Any]) -> None:
    print(f"test accuracy on {result['samples']} samples")
    width = max(map(len, result["accuracy"]))
    for name, value in result["accuracy"].items():
        print(f"  {name:{width}}  {100 * value:5.1f} %")


def _without_nan(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse uses the name in the error message for text that kind refuses
    return parse


def _rate(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a probability in [0, 1), got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mla-fast", description="Multimodal learning by alternating unimodal adaptation.")
    commands = parser.add_subparsers(dest="name", required=True)

    p = commands.add_parser("demo", help="compare joint training and MLA on digits and on synthetic data, in a minute")
    p.add_argument("--output", type=Path, default=Path("demo"), help="folder for results.json and demo.png (default: demo)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="take a few seconds, to see that it runs")
    p.set_defaults(command=demo)

    p = commands.add_parser("train", help="train on an .npz with one array per modality and a label array")
    _add_data_options(p)
    _add_training_options(p)
    _add_head_options(p)
    _add_run_options(p)
    p.set_defaults(command=train)

    p = commands.add_parser("eval", help="evaluate a checkpoint written by train")
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--data", type=Path, help="another .npz with the same arrays (default: the one it was trained on)")
    part = p.add_mutually_exclusive_group()
    part.add_argument("--test-where", help="another part to evaluate on, as speaker=2,4")
    part.add_argument("--all", action="store_true", help="evaluate on every row")
    p.add_argument("--device", default="auto")
    p.set_defaults(command=evaluate)

    add_compare(commands)
    commands.add_parser("env", help="show versions, devices, and which backends are active").set_defaults(command=env)
    return parser


def _add_data_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", type=Path, required=True, help="the .npz")
    shapes = "[N, F], [N, H, W] or [N, C, H, W]"
    p.add_argument("--modalities", type=_names, required=True, help=f"names of its arrays {shapes}, as audio,image")
    p.add_argument("--label", default="label", help="name of the integer labels (default: label)")
    p.add_argument("--missing", type=_rate, default=0.0, help="remove modalities of samples at this rate, in training and test")
    p.add_argument("--test-where", help="hold out the rows where an array has these values, as speaker=2,4")
    p.add_argument("--test-fraction", type=float, default=0.2, help="without --test-where, hold out this part (default: 0.2)")


def _add_training_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--epochs", type=_positive(int), default=20)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch-size", type=_positive(int), default=64)
    p.add_argument("--lr", type=_positive(float), default=0.03, help="falls to a tenth after 70 %% of the epochs (default: 0.03)")
    p.add_argument("--momentum", type=float, default=0.9)
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--features", type=_positive(int), default=64, help="size of the encoders' features (default: 64)")
    p.add_argument("--amp", choices=("bf16",), help="autocast of the forward passes")
    p.add_argument("--accumulate", type=_positive(int), default=1, help="batches accumulated for a step (default: 1)")
    p.add_argument("--clip-norm", type=_positive(float), help="largest norm of a step's gradient (default: no limit)")


def _add_head_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--projection", choices=PROJECTIONS, default="rls", help="of the head's step (default: rls, the paper's)")
    p.add_argument("--order", choices=ops.ORDERS, default="update_first")
    p.add_argument("--target", choices=TARGETS, default="gradient")
    p.add_argument("--bias", choices=BIASES, default="free")
    p.add_argument("--alpha", type=_positive(float), default=1.0)
    p.add_argument("--backend", choices=ops.BACKENDS, default="auto")


def _add_run_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto")
    p.add_argument("--output", type=Path, default=Path("runs/mla"), help="folder for checkpoint.pt and metrics.json")
    p.add_argument("--checkpoint-every", type=_positive(int), help="also write it after this many batches (default: each epoch)")
    p.add_argument("--tensorboard", action="store_true", help="write every epoch's numbers to --output for TensorBoard")
    p.add_argument("--resume", action="store_true", help="continue the interrupted run in --output")

"""``mla-fast train`` and ``mla-fast eval``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mla_fast import cli_data, data
from mla_fast.callbacks import TensorBoard
from mla_fast.checkpoint import read_checkpoint
from mla_fast.cli_result import print_result
from mla_fast.encoders import encoder_for
from mla_fast.interaction import Interaction
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.trainer import Trainer


def train(arguments: argparse.Namespace) -> None:
    """Train on an .npz, evaluate on the part held out, and write checkpoint.pt and metrics.json."""
    if (arguments.add is None) != (arguments.start is None):
        raise ValueError("--add: expected together with --from, the checkpoint of the run to add to")
    if arguments.add is not None:
        from mla_fast.cli_add import add  # which builds on this module

        return add(arguments)
    if not arguments.modalities:
        raise ValueError("--modalities: expected names of arrays in the .npz, as audio,image, got none")
    check_output(arguments)
    config = _config(arguments)
    dataset, arrays = cli_data.read_for_training(config)
    cli_data.print_reading(dataset, arrays, config, training=True)
    torch.manual_seed(arguments.seed)
    parts = cli_data.split(dataset, config)
    config["statistics"] = data.statistics(parts[0], config["standardize"], config["layouts"])
    cli_data.print_constant(parts[0], config)
    train_set, test_set = (data.apply_statistics(part, config["statistics"]) for part in parts)
    config = json.loads(json.dumps(config))  # as it is in a checkpoint
    trainer = build(config, device(arguments.device))
    if arguments.resume:
        resume(trainer, arguments.output / "checkpoint.pt", config)
    elif arguments.overwrite:
        remove(arguments.output)
    trainer.config = config
    fit(trainer, train_set, arguments, config["epochs"])
    finish(arguments.output, trainer, evaluated(trainer, test_set), is_complete(test_set))


def fit(trainer: Trainer, train_set: data.MultimodalDataset, arguments: argparse.Namespace, epochs: int) -> None:
    """Train until `epochs` are done in all, and write checkpoint.pt."""
    if arguments.tensorboard:
        trainer.callbacks = (TensorBoard(arguments.output),)
    batches, checkpoint = data.loader(train_set, arguments.batch_size, shuffle=True), arguments.output / "checkpoint.pt"
    trainer.fit(batches, epochs, checkpoint=checkpoint, checkpoint_every=arguments.checkpoint_every)


def finish(output: Path, trainer: Trainer, result: dict[str, Any], complete: bool) -> None:
    """Write metrics.json, and print what is in it; complete: no sample of the test part lacks a modality."""
    head = trainer.optimizer.diagnostics()
    metrics = {"config": trainer.config, "history": trainer.history, "test": result, "head": head}
    (output / "metrics.json").write_text(json.dumps(_without_nan(metrics), indent=2))
    print_result(result, (trainer.config or {}).get("class_names"), complete)
    if head["skipped_nonfinite"]:
        print(f"{head['skipped_nonfinite']} steps were skipped because they were not finite: lower --lr?")
    if head["skipped_lone"]:
        print(f"{head['skipped_lone']} rows were left out, alone in a batch with their modality: larger --batch-size?")
    print(f"wrote {output / 'checkpoint.pt'} and {output / 'metrics.json'}")


def check_output(arguments: argparse.Namespace) -> None:
    """Raise FileExistsError if --output has a run that nobody has said what to do with."""
    there = [name for name in ("checkpoint.pt", "metrics.json") if (arguments.output / name).exists()]
    if there and not (arguments.resume or arguments.overwrite):
        choice = "--resume continues that run, --overwrite begins anew and deletes it"
        raise FileExistsError(f"--output: {arguments.output} has {' and '.join(there)} of another run; {choice}")


def remove(output: Path) -> None:
    """Remove what a run has written."""
    for path in (output / "checkpoint.pt", output / "metrics.json", *output.glob("events.out.tfevents.*")):
        path.unlink(missing_ok=True)


def resume(trainer: Trainer, checkpoint: Path, config: dict[str, Any]) -> None:
    """Continue a run, to more epochs if asked for.

    Raises FileNotFoundError if there is none, and ValueError if its settings differ, or for fewer epochs than are done.
    """
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: nothing to resume; leave out --resume to start a new run")
    saved = read_checkpoint(checkpoint)
    before = described(saved["config"], checkpoint)
    for name, value in config.items():
        if name == "statistics" and before.get(name) != value:
            raise ValueError(f"--resume: expected the data of the saved run, got others in {config['data']}")
        if name != "epochs" and before.get(name) != value:
            raise ValueError(f"--resume: expected the settings of the saved run, whose {name} is {before.get(name)}, got {value}")
    since = config["additions"][-1]["since"] if config.get("additions") else 0
    if saved["epoch"] - since > config["epochs"]:
        raise ValueError(f"--epochs: expected at least the {saved['epoch'] - since} epochs that are done, got {config['epochs']}")
    trainer.resume(checkpoint)
    left = since + config["epochs"] - trainer.epoch
    print(f"continuing after {trainer.epoch} epochs" if left else f"all {trainer.epoch} epochs are done: nothing left to train")
    if left and config["epochs"] != before["epochs"]:
        fell = sorted(trainer.scheduler.milestones)[0]
        print(f"the learning rate goes on as in that run of {before['epochs']} epochs: a tenth from epoch {fell + 1} on")


def described(config: Any, checkpoint: Path) -> dict[str, Any]:
    """Return the whole config of a checkpoint; raise ValueError if the command line did not write it."""
    if not isinstance(config, dict) or "encoders" not in config:
        raise ValueError(f"{checkpoint}: expected a checkpoint written by mla-fast train, which describes its encoders")
    return cli_data.complete(config)


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a checkpoint on the part held out of its data, or on all or a part of other data."""
    saved = read_checkpoint(arguments.checkpoint)
    config = described(saved["config"], arguments.checkpoint)
    if arguments.data is not None and arguments.data.resolve() == Path(config["data"]):
        arguments.data = None  # the checkpoint's own data, of which only the part held out is new
    whole = arguments.all or (arguments.data is not None and arguments.test_where is None)
    if arguments.data is None and (whole or arguments.test_where not in (None, config["test_where"])):
        print("note: some of these rows were trained on")
    if arguments.data is not None:
        config = {**config, "data": str(arguments.data)}
    there = cli_data.available(config)
    dataset, arrays = cli_data.read_for_evaluation(there)
    cli_data.print_reading(dataset, arrays, there)
    if arguments.test_where is not None:
        dataset = dataset.subset(data.rows_where(dataset, arguments.test_where))
    elif not whole:
        _, dataset = cli_data.split(dataset, there)
    test_set = data.apply_statistics(dataset, {name: config["statistics"][name] for name in dataset.modalities})
    cli_data.note_other_units(test_set, config)
    trainer = build(config, device(arguments.device))
    trainer.model.load_state_dict(saved["model"])
    result = evaluated(trainer, test_set)
    print_result(result, config.get("class_names"), is_complete(test_set))
    for name, value in config.get("before", {}).items():
        after = f", {100 * result['accuracy'][name]:.1f} % here" if name in result["accuracy"] else ""
        print(f"{name} had {100 * value:.1f} % before {config['additions'][-1]['modality']} was added{after}")


def evaluated(trainer: Trainer, dataset: data.MultimodalDataset) -> dict[str, Any]:
    """Evaluate in a shuffled order: the use test permutes features within a batch, where sorted samples are alike."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return trainer.evaluate(data.loader(dataset.subset(order), 1024), use_test=True)


def is_complete(dataset: data.MultimodalDataset) -> bool:
    return dataset.present is None or bool(dataset.present.all())


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options as plain values; with what the data add, they suffice to rebuild the model."""
    names = "label missing test_where test_fraction seed epochs batch_size lr momentum weight_decay features amp".split()
    config = {name: getattr(arguments, name) for name in (*names, "accumulate", "clip_norm", "standardize", "interaction")}
    config["data"] = str(arguments.data.resolve())
    config["modalities"] = list(arguments.modalities)
    config["layouts"] = dict(arguments.layout)
    config["head"] = {name: getattr(arguments, name) for name in ("projection", "order", "target", "bias", "alpha", "backend")}
    return config


def build(config: dict[str, Any], device: torch.device) -> Trainer:
    """Return the trainer that a config describes, with the modalities that were added in their order."""
    later = config.get("additions", [])
    added, classes = [of["modality"] for of in later], config["classes"] - sum(of["classes"] for of in later)
    encoders = {name: _encoder(config, name) for name in config["encoders"] if name not in added}
    head, rank = nn.Linear(config["features"], classes), config.get("interaction", 0)
    beside = Interaction(config["features"], classes, list(encoders), rank) if rank else None
    model = MultimodalModel(encoders, head, interaction=beside).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=config["momentum"], weight_decay=config["weight_decay"])
    optimizer = MLAOptimizer(sgd, model.head, **config["head"])
    amp = torch.bfloat16 if config["amp"] == "bf16" else None
    how = {"amp": amp, "accumulate": config["accumulate"], "clip_norm": config["clip_norm"]}
    trainer = Trainer(model, optimizer, scheduler=_scheduler(optimizer, config["epochs"]), seed=config["seed"], **how)
    for addition in later:
        add_to(trainer, config, addition)
    return trainer


def add_to(trainer: Trainer, config: dict[str, Any], addition: dict[str, Any]) -> None:
    """Add the modality of an addition, to train as it says."""
    name, settings = addition["modality"], {of: addition[of] for of in ("lr", "momentum", "weight_decay")}
    for group in trainer.optimizer.param_groups:  # the head's, too
        group.update(settings, initial_lr=settings["lr"])
    encoder, classes = _encoder(config, name), addition["classes"]
    trainer.add_modality(name, encoder, scheduler=lambda o: _scheduler(o, addition["epochs"]), classes=classes, **settings)


def _encoder(config: dict[str, Any], name: str) -> nn.Module:
    return encoder_for(config["encoders"][name], config["features"], config["layouts"][name], config["vocabulary"].get(name))


def _scheduler(optimizer: MLAOptimizer, epochs: int) -> torch.optim.lr_scheduler.MultiStepLR:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, round(0.7 * epochs))])


def device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected auto or an available device, got {name!r} ({reason})") from None


def _without_nan(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

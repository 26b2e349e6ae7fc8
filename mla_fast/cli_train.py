"""``mla-fast train``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mla_fast import cli_data, data, ranks
from mla_fast.callbacks import TensorBoard
from mla_fast.cli_encoders import make_encoders
from mla_fast.cli_options import autocast_dtype, device
from mla_fast.cli_output import KeepBest, begin, check_output, finish, read_resumed
from mla_fast.distributed import distribute
from mla_fast.interaction import Interaction
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.threads import limited, measured, said
from mla_fast.trainer import Trainer
from mla_fast.trainer_checks import step_decay


def train(arguments: argparse.Namespace) -> None:
    """Train on an .npz, evaluate on the part held out, and write checkpoints, metrics.json, run.toml and report.html."""
    if not arguments.modalities:
        raise ValueError("--modalities: expected names of arrays in the .npz, as audio,image, got none")
    ranks.check_batch_size(arguments.batch_size)
    check_output(arguments)
    config = _config(arguments)
    with ranks.together():
        train_set, test_set, *validation_sets = _read(config)
    config = json.loads(json.dumps(config))  # as it is in a checkpoint
    check_alike(config, train_set, test_set, *validation_sets)
    trainer = build(config, device(arguments.device))
    carry_out(trainer, config, arguments, train_set, test_set, validation_sets)


def check_alike(config: dict[str, Any], *parts: data.MultimodalDataset) -> None:
    """Raise RankError, which names what differs, unless all ranks have the same settings and data, wherever they lie."""
    masks = [None if part.present is None else ranks.digest(part.present) for part in parts]
    facts = {"samples": [len(part) for part in parts], "labels": [ranks.digest(part.target) for part in parts], "present": masks}
    ranks.check_alike(config["data"], {**facts, **{name: value for name, value in config.items() if name != "data"}})


def _read(config: dict[str, Any]) -> list[data.MultimodalDataset]:
    """Return the parts to train on, to test on and, if asked for, to validate on; what the data say goes into the config."""
    dataset, arrays = cli_data.read_for_training(config)
    cli_data.print_reading(dataset, arrays, config, training=True)
    torch.manual_seed(config["seed"])
    rest, test_set = cli_data.split(dataset, config)
    train_set, validation_set = cli_data.hold_out(rest, config)
    config["statistics"], constant = data.survey(train_set, config["standardize"], config["layouts"])
    cli_data.print_constant(train_set, constant, config)
    if config["class_weights"] == "balanced":
        config["class_weights"] = balanced(train_set.target, config["classes"])
    parts = (train_set, test_set, *([] if validation_set is None else [validation_set]))
    return [data.apply_statistics(part, config["statistics"]) for part in parts]


def carry_out(
    trainer: Trainer,
    config: dict[str, Any],
    arguments: argparse.Namespace,
    train_set: data.MultimodalDataset,
    test_set: data.MultimodalDataset,
    validation_sets: Sequence[data.MultimodalDataset] = (),
    since: int = 0,
) -> None:
    """Train, resuming a run if asked for, until the epochs of the config are done since `since`, and write the results."""
    checkpoint, best = arguments.output / "checkpoint.pt", KeepBest(trainer, arguments.output) if validation_sets else None
    config["threads"] = arguments.threads
    with ranks.together():
        between = arguments.resume and _resume(trainer, checkpoint, config)
    if best is not None and between:
        best.after_resume()
    if not arguments.resume and arguments.threads is None:
        config["threads"] = _threads(trainer, train_set[: config["batch_size"]])
    arguments.threads = config["threads"]  # of run.toml, too: their number may change the last bits of what comes out
    trainer.config, epochs = config, since + config["epochs"]
    board = [TensorBoard(arguments.output)] if arguments.tensorboard and ranks.is_first() else []
    trainer.callbacks = (*([] if best is None else [best]), *board)
    begin(arguments, trainer, epochs)
    how = {"checkpoint": checkpoint, "checkpoint_every": arguments.checkpoint_every, "patience": arguments.patience}
    validation = ranks.share(data.loader(validation_sets[0], 1024), ranks.EveryOther) if validation_sets else None
    batches = data.loader(train_set, config["batch_size"], shuffle=True, workers=arguments.workers)
    with limited(config["threads"]), ranks.naming_the_unused():
        trainer.fit(ranks.share(batches, ranks.ShareOfBatches), epochs, validation=validation, **how)
        finish(arguments.output, trainer, shuffled(test_set), complete=test_set.complete, best=best)


def _threads(trainer: Trainer, batch: Any) -> int | None:
    """Return how many threads suit a batch like this, and say so; None on a GPU."""
    chosen, seconds = measured(trainer.model, batch, trainer.loss)
    if seconds:
        print(said(seconds, chosen))
    return chosen if trainer.device.type == "cpu" else None


def _resume(trainer: Trainer, checkpoint: Path, config: dict[str, Any]) -> bool:
    """Continue a run, to more epochs if asked for; returns whether it stands between epochs.

    Raises FileNotFoundError if there is none, and ValueError if its settings differ, or for fewer epochs than are done.
    """
    saved = read_resumed(checkpoint)
    before = described(saved["config"], checkpoint)
    for name, value in list(config.items()):
        if name == "statistics" and before.get(name) != value:
            raise ValueError(f"--resume: expected the data of the saved run, got others in {config['data']}")
        if name == "before":  # measured when the run began, on data that may be gone
            config[name] = before[name]
        elif name == "threads":
            config[name] = before[name] if value is None else value
        elif name != "epochs" and _but_epochs(name, before.get(name)) != _but_epochs(name, value):
            raise ValueError(f"--resume: expected the settings of the saved run, whose {name} is {before.get(name)}, got {value}")
    since = config["additions"][-1]["since"] if config.get("additions") else 0
    if saved["epoch"] - since > config["epochs"]:
        raise ValueError(f"--epochs: expected at least the {saved['epoch'] - since} epochs that are done, got {config['epochs']}")
    trainer.resume(checkpoint)
    left = since + config["epochs"] - trainer.epoch
    print(f"continuing after {trainer.epoch} epochs" if left else f"all {trainer.epoch} epochs are done: nothing left to train")
    if left and config["epochs"] != before["epochs"]:
        fell = sorted(trainer.scheduler.milestones)[0]
        print(f"the learning rate goes on as in that run of {before['epochs']} epochs: a tenth from epoch {since + fell + 1} on")
    return not saved["batches"]


def _but_epochs(name: str, value: Any) -> Any:
    """Return a setting without the number of epochs that it has in a modality that was added."""
    return [of | {"epochs": None} for of in value] if name == "additions" and value else value


def described(config: Any, checkpoint: Path) -> dict[str, Any]:
    """Return the whole config of a checkpoint; raise ValueError if the command line did not write it."""
    if not isinstance(config, dict) or "encoders" not in config:
        raise ValueError(f"{checkpoint}: expected a checkpoint written by mla-fast train, which describes its encoders")
    return cli_data.complete(config)


def shuffled(dataset: data.MultimodalDataset) -> Any:
    """Return a loader in a shuffled order: the use test permutes features within a batch, where sorted samples are alike."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return data.loader(dataset.subset(order), 1024)


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options as plain values; with what the data add, they suffice to rebuild the model."""
    names = "encoder label missing test_where test_fraction seed epochs batch_size lr momentum weight_decay features amp".split()
    more = "accumulate clip_norm standardize interaction validation label_smoothing class_weights".split()
    config = {name: getattr(arguments, name) for name in (*names, *more)}
    if arguments.protocol is not None and not arguments.missing:
        raise ValueError(f"--protocol: expected --missing beside it, as 0.3, got {arguments.protocol} alone")
    config["protocol"] = arguments.protocol = arguments.protocol or ("independent" if arguments.missing else None)
    config["data"] = str(arguments.data.resolve())
    config["modalities"] = list(arguments.modalities)
    config["layouts"] = dict(arguments.layout)
    config["head"] = {name: getattr(arguments, name) for name in ("projection", "order", "target", "bias", "alpha", "backend")}
    return config


def build(config: dict[str, Any], device: torch.device, *, alone: bool = False) -> Trainer:
    """Return the trainer that a config describes, of initial parameters, with the modalities that were added in their order.

    alone: to evaluate, where no rank waits for another.
    """
    later = config.get("additions", [])
    added, classes = [of["modality"] for of in later], config["classes"] - sum(of["classes"] for of in later)
    encoders, features = make_encoders(config, [name for name in config["encoders"] if name not in added])
    head, rank = nn.Linear(features, classes), config.get("interaction", 0)
    beside = Interaction(features, classes, list(encoders), rank) if rank else None
    model = MultimodalModel(encoders, head, interaction=beside).to(device)
    model = distribute(model) if ranks.several() and not alone else model
    sgd = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=config["momentum"], weight_decay=config["weight_decay"])
    optimizer = MLAOptimizer(sgd, model.head, process_group=None if alone else "auto", **config["head"])
    how: dict[str, Any] = {"amp": autocast_dtype(config["amp"]), "loss": _loss(config), "progress": ranks.is_first()}
    how |= {name: config[name] for name in ("accumulate", "clip_norm")}
    trainer = Trainer(model, optimizer, scheduler=step_decay(optimizer, config["epochs"]), seed=config["seed"], **how)
    for addition in later:
        add_to(trainer, config, addition)
    return trainer


def add_to(trainer: Trainer, config: dict[str, Any], addition: dict[str, Any]) -> None:
    """Add the modality of an addition, to train as it says."""
    name, settings = addition["modality"], {of: addition[of] for of in ("lr", "momentum", "weight_decay")}
    for group in trainer.optimizer.param_groups:  # the head's, too
        group.update(settings, initial_lr=settings["lr"])
    encoders, classes = make_encoders({**config, "features": trainer.model.head.in_features}, [name])[0], addition["classes"]
    trainer.add_modality(name, encoders[name], scheduler=lambda o: step_decay(o, addition["epochs"]), classes=classes, **settings)


def balanced(target: torch.Tensor, classes: int) -> list[float]:
    """Return the weight of each class by which all count alike: N / (C n_c), of those that there are; 1 for others."""
    counts = target.bincount(minlength=classes)
    weights = len(target) / ((counts > 0).sum() * counts.clamp(min=1).double())
    return [float(each) for each in weights.where(counts > 0, 1.0)]


def _loss(config: dict[str, Any]) -> nn.CrossEntropyLoss | None:
    """Return None for plain cross-entropy, which has a faster way."""
    weights = config.get("class_weights")
    if weights is None and not config.get("label_smoothing"):
        return None
    weight = None if weights is None else torch.tensor(weights)
    return RowsMean(weight, label_smoothing=config.get("label_smoothing") or 0.0)


class RowsMean(nn.CrossEntropyLoss):
    """Cross-entropy whose weighted rows are divided by their number, not by their weights.

    So parts of a batch, in ranks or accumulated, add up to the loss of the whole; weights with a mean of one keep its scale.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(input, target, self.weight, reduction="none", label_smoothing=self.label_smoothing)
        return losses.mean()

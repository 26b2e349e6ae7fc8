"""``mla-fast prepare SET ROOT`` and ``mla-fast train SET ROOT``: the paper's data sets, encoders and settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mla_fast import cli_options, cli_output, datasets
from mla_fast.cli_encoders import check_names, one_width, own_encoder, width_of
from mla_fast.compare.study import new_head
from mla_fast.data.dataset import listed
from mla_fast.datasets.audio import Fbank
from mla_fast.encoders import M3AE, CAVMAEAudio, ResNet18, load_cavmae, load_m3ae
from mla_fast.encoders.m3ae import SIZES
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.settings import Settings
from mla_fast.trainer import Trainer

SETS = {
    "crema-d": datasets.CremaD,
    "kinetics-sounds": datasets.KineticsSounds,
    "food-101": datasets.Food101,
    "mvsa": datasets.MVSA,
    "iemocap": datasets.IEMOCAP,
    "clip-food101": datasets.ClipFood101,
}
WITH_TEXT = ("food-101", "mvsa", "iemocap")
PAPER: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 64,
    "lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "decay_at": 70,
    "seed": 0,
    "workers": 2,
    **dataclasses.asdict(Settings()),
    "split": "",
    "tokenizer": "bert-base-uncased",
    "cache": "",
    "modalities": [],
    "encoder": {},
    "weights": {},
    "size": "base",
    "as_released": False,
    "amp": None,
}


def add_commands(commands: Any) -> None:
    """Add both commands to the subparsers of ``mla-fast``."""
    p = commands.add_parser("prepare", help="decode a data set of the paper once, into a cache that reads faster")
    add_data_options(p)
    p.add_argument("--output", type=Path, required=True, help="folder of the cache; what is there already is kept")
    p.set_defaults(command=prepare)

    help = "the same as train SET ROOT: a data set of the paper, with its encoders and settings"
    p = commands.add_parser("paper", help=help, prog="mla-fast train")
    add_data_options(p)
    add_settings(p)
    cli_options.add_projection_options(p)
    cli_options.add_amp_option(p)
    help = "compute as the released code: no projection, MLA's order of patches and exact GELU, filter banks not standardised"
    p.add_argument("--as-released", action=argparse.BooleanOptionalAction, default=False, help=help)
    cli_options.add(p, "--output", Path, Path("runs/paper"), "folder of the run")
    cli_options.add_rerun_options(p)
    p.set_defaults(command=train, name="train", full_name="train SET ROOT")


def add_settings(p: argparse.ArgumentParser) -> None:
    """Add the settings of training, the paper's by default."""
    cli_options.add_config_option(p)
    cli_options.add_training_options(p, PAPER, falls="--decay-at epochs")
    cli_options.add(p, "--decay-at", cli_options.positive, PAPER["decay_at"], "epochs before the learning rate falls")
    p.add_argument("--cache", default="", help="folder that mla-fast prepare has written (default: none)")
    help = "your own encoder in place of the paper's, as audio=package.module:Encoder; called without arguments"
    cli_options.add(p, "--encoder", cli_options.pairs, {}, help)
    help = "files of weights for M3AE and CAV-MAE, as text=m3ae_base.npz,audio=cavmae.pth (default: random weights)"
    cli_options.add(p, "--weights", cli_options.pairs, {}, help)
    help = "size of M3AE and CAV-MAE without --weights; base is the paper's, small tries a run out in a quarter of the time"
    cli_options.add(p, "--size", str, PAPER["size"], help, choices=SIZES)
    cli_options.add_device_option(p)


def is_meant(typed: Sequence[str]) -> bool:
    """Return whether a command line of ``train`` names a data set of the paper in place of --data; at its beginning in whatever
    spelling, to be told of the right one."""

    def plain(word: str) -> str:
        return word.lower().replace("-", "").replace("_", "")

    named = any(word in SETS for word in typed) or plain(next(iter(typed), "")) in map(plain, SETS)
    return named and not any(word.split("=")[0] == "--data" for word in typed)


def add_data_options(p: argparse.ArgumentParser) -> None:
    """Add a data set, its folder, and how it is read."""
    p.add_argument("dataset", choices=SETS, help="data set of the paper")
    p.add_argument("root", type=Path, help="folder of the data set, as published")
    cli_options.add(p, "--modalities", cli_options.names, [], "modalities to use, as audio,text (default: all)")
    p.add_argument("--split", default="", help="split to use where a data set has several: lists, speaker or session")
    cli_options.add(p, "--tokenizer", str, PAPER["tokenizer"], "name or folder of a tokenizer of transformers")
    cli_options.add(p, "--workers", cli_options.count, PAPER["workers"], "processes that decode samples")


def prepare(arguments: argparse.Namespace) -> None:
    """Decode all parts into a cache, and print what could not be."""
    settings = settings_of(arguments)
    data = make_dataset(arguments, settings, "all")
    print(data.describe())
    report = datasets.prepare(data, arguments.output, workers=settings["workers"])
    print(f"{report['samples']} samples in {arguments.output}, {report['written']} arrays written now")
    for reason, count in Counter(reason.split(" (")[0] for _, reason in report["failed"].values()).items():
        paths = [path for path, why in report["failed"].values() if why.split(" (")[0] == reason]
        print(f"  {reason}: {count} ({listed(paths, 3)})")


def train(arguments: argparse.Namespace) -> None:
    """Train as the paper does, evaluate on the test part after the last epoch, and write checkpoint.pt and metrics.json."""
    cli_output.check_output(arguments)
    settings = settings_of(arguments)
    data = make_parts(arguments, settings)
    for dataset in data.values():
        print(dataset.describe())
    torch.manual_seed(settings["seed"])
    trainer = _trainer(arguments, settings, data["train"])
    checkpoint = arguments.output / "checkpoint.pt"
    trainer.config = {**settings, "dataset": arguments.dataset, "class_names": data["train"].class_names}
    trainer.config["identity"] = {part: each.identity() for part, each in data.items()}
    if arguments.resume:
        _resume(trainer, checkpoint)
    cli_output.begin(arguments, trainer, arguments.epochs)
    how = {"workers": settings["workers"], "device": trainer.device}
    loaders = {p: datasets.Loader(d, settings["batch_size"], shuffle=p == "train", **how) for p, d in data.items()}
    trainer.fit(loaders["train"], settings["epochs"], validation=loaders.get("validation"), checkpoint=checkpoint)
    cli_output.finish(arguments.output, trainer, loaders["test"], complete=False)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings by name, the paper's unless they were given."""
    settings = {name: getattr(arguments, name, value) for name, value in PAPER.items()}
    if settings["as_released"]:
        settings["projection"] = "none"
    return settings


def make_dataset(arguments: argparse.Namespace, settings: dict[str, Any], part: str) -> datasets.LazyDataset:
    """Return a part of the data set; raise ValueError for a split that it does not have."""
    options: dict[str, Any] = {"modalities": settings["modalities"] or None, "cache": settings["cache"] or None}
    if arguments.dataset in WITH_TEXT:
        options["tokenizer"] = settings["tokenizer"]
    if settings["split"]:
        if arguments.dataset not in ("crema-d", "iemocap"):
            raise ValueError(f"--split: expected none, {arguments.dataset} has one split alone, got {settings['split']}")
        options["split"] = settings["split"]
    if settings["as_released"] and arguments.dataset == "iemocap":
        options["readers"] = {"audio": Fbank()}
        if options["cache"]:
            print("note: the cache is of standardised filter banks, which the released code does not have: all is decoded anew")
            options["cache"] = None
    make: Any = SETS[arguments.dataset]
    data: datasets.LazyDataset = make(arguments.root, part, **options)
    return data


def make_parts(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, datasets.LazyDataset]:
    """Return all parts of the data set by name, "train" first."""
    train_set = make_dataset(arguments, settings, "train")
    others = (part for part in train_set.parts if part != "train")
    return {"train": train_set, **{part: make_dataset(arguments, settings, part) for part in others}}


def _trainer(arguments: argparse.Namespace, settings: dict[str, Any], data: datasets.LazyDataset) -> Trainer:
    device = cli_options.device(arguments.device)
    encoders, features = make_encoders(arguments.dataset, settings, data)
    model = MultimodalModel(encoders, new_head(features, data.classes)).to(device)
    how = {name: settings[name] for name in ("lr", "momentum", "weight_decay")}
    of_head = {name: settings[name] for name in ("projection", "order", "target", "bias", "alpha")}
    optimizer = MLAOptimizer(torch.optim.SGD(model.parameters(), **how), model.head, **of_head)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [settings["decay_at"]])
    amp = cli_options.autocast_dtype(settings["amp"])
    return Trainer(model, optimizer, scheduler=scheduler, seed=settings["seed"], amp=amp)


def make_encoders(dataset: str, settings: dict[str, Any], data: datasets.LazyDataset) -> tuple[dict[str, nn.Module], int]:
    """Return an encoder for each modality, one's own or the paper's, and the width of their features."""
    for option in ("encoder", "weights"):
        check_names(option, settings[option], data.modalities)
    encoders = {name: make_encoder(dataset, name, settings) for name in data.modalities}
    return encoders, one_width({name: _width(name, e, data, name in settings["encoder"]) for name, e in encoders.items()})


def _width(modality: str, encoder: nn.Module, data: datasets.LazyDataset, own: bool) -> int:
    """Return s of an encoder's features: the paper's say it, one's own is tried."""
    known: Any = None if own else getattr(encoder, "out_features", None)
    return width_of(modality, encoder, data.readers[modality].empty()[None]) if known is None else int(known)


def make_encoder(dataset: str, modality: str, settings: dict[str, Any]) -> nn.Module:
    """Return an encoder of one's own if there is one, otherwise the paper's."""
    path = settings["encoder"].get(modality)
    if path is not None:
        return own_encoder(modality, path)
    if dataset == "clip-food101":
        return nn.Identity()
    if dataset not in WITH_TEXT:
        return ResNet18(1 if modality == "audio" else 3)
    weights = settings["weights"].get(modality)
    if weights is None:
        print(
            f"note: the encoder of {modality} starts from random weights, the paper's from pretrained: --weights {modality}=FILE"
        )
    if modality == "audio":
        return CAVMAEAudio(size=SIZES[settings["size"]]) if weights is None else load_cavmae(weights)
    as_released: dict[str, Any] = {"patch_order": "official", "gelu": "none"} if settings["as_released"] else {}
    return M3AE(modality, settings["size"], **as_released) if weights is None else load_m3ae(weights, modality, **as_released)


def _resume(trainer: Trainer, checkpoint: Path) -> None:
    """Continue a run; raise ValueError if a setting but the epochs differs, FileNotFoundError if there is none."""
    before, config = cli_output.read_resumed(checkpoint)["config"], json.loads(json.dumps(trainer.config))
    for name, value in config.items():
        saved = (before or {}).get(name, PAPER.get(name))
        if name == "identity" and saved != value:
            raise ValueError("--resume: expected the data of the saved run, got others")
        if name not in ("epochs", "workers", "cache") and saved != value:
            raise ValueError(f"--resume: expected the saved run's {name}, {saved}, got {value}")
    trainer.resume(checkpoint)
    trainer.config = config

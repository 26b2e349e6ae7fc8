"""``mla-fast prepare`` and ``mla-fast paper``: the paper's data sets, encoders and settings."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from mla_fast import cli_train, datasets
from mla_fast.checkpoint import read_checkpoint
from mla_fast.data.dataset import listed
from mla_fast.datasets.audio import Fbank
from mla_fast.encoders import M3AE, CAVMAEAudio, ResNet18, load_cavmae, load_m3ae
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.settings import PROJECTIONS
from mla_fast.trainer import Trainer

SETS = {
    "crema-d": datasets.CremaD,
    "kinetics-sounds": datasets.KineticsSounds,
    "food-101": datasets.Food101,
    "mvsa": datasets.MVSA,
    "iemocap": datasets.IEMOCAP,
}
WITH_TEXT = ("food-101", "mvsa", "iemocap")
PAPER = {
    "epochs": 100,
    "batch_size": 64,
    "lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "decay_at": 70,
    "seed": 0,
    "workers": 2,
    "projection": "rls",
    "split": "",
    "tokenizer": "bert-base-uncased",
    "cache": "",
    "modalities": [],
    "encoder": {},
    "weights": {},
    "as_released": False,
}


def add_commands(commands: Any) -> None:
    """Add both commands to the subparsers of ``mla-fast``."""
    p = commands.add_parser("prepare", help="decode a data set of the paper once, into a cache that reads faster")
    _add_data_options(p)
    p.add_argument("--output", type=Path, required=True, help="folder of the cache; what is there already is kept")
    p.set_defaults(command=prepare)

    p = commands.add_parser("paper", help="train on a data set of the paper, with its encoders and settings")
    _add_data_options(p)
    p.add_argument("--config", type=Path, help="a .toml of these settings, which options on the command line override")
    for name in ("epochs", "batch_size", "decay_at", "seed"):
        p.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {PAPER[name]}")
    for name in ("lr", "momentum", "weight_decay"):
        p.add_argument(f"--{name.replace('_', '-')}", type=float, help=f"default: {PAPER[name]}")
    p.add_argument("--projection", choices=PROJECTIONS, help="default: rls, the paper's")
    p.add_argument("--cache", help="folder that mla-fast prepare has written")
    help = "of one's own in place of the paper's, called without arguments, as audio=package.module.Encoder"
    p.add_argument("--encoder", type=_pairs, help=help)
    p.add_argument("--weights", type=_pairs, help="files for M3AE and CAV-MAE, as text=m3ae_base.npz,audio=cavmae.pth")
    help = "no projection, MLA's order of patches and exact GELU, filter banks not standardised"
    p.add_argument("--as-released", action="store_true", default=None, help=f"as the released code computes: {help}")
    p.add_argument("--device", default="auto")
    p.add_argument("--output", type=Path, default=Path("runs/paper"), help="folder for checkpoint.pt and metrics.json")
    again = p.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --output, to more --epochs if you like")
    again.add_argument("--overwrite", action="store_true", help="delete the run in --output and begin anew")
    p.set_defaults(command=train)


def _add_data_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("dataset", choices=SETS)
    p.add_argument("root", type=Path, help="its folder, as published")
    p.add_argument("--modalities", type=lambda text: text.split(","), help="of its modalities these, as audio,text")
    p.add_argument("--split", help="lists, speaker or session, where a data set has several")
    p.add_argument("--tokenizer", help="name or folder of a tokenizer of transformers (default: bert-base-uncased)")
    p.add_argument("--workers", type=int, help="processes that decode (default: 2)")


def _pairs(text: str) -> dict[str, str]:
    pairs = dict(pair.split("=", 1) for pair in text.split(",") if "=" in pair)
    if len(pairs) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"expected MODALITY=VALUE, several with commas between, got {text!r}")
    return pairs


def prepare(arguments: argparse.Namespace) -> None:
    """Decode all parts into a cache, and print what could not be."""
    settings = _settings(arguments)
    data = _dataset(arguments, settings, "all")
    print(data.describe())
    report = datasets.prepare(data, arguments.output, workers=settings["workers"])
    print(f"{report['samples']} samples in {arguments.output}, {report['written']} arrays written now")
    for reason, count in Counter(reason.split(" (")[0] for _, reason in report["failed"].values()).items():
        paths = [path for path, why in report["failed"].values() if why.split(" (")[0] == reason]
        print(f"  {reason}: {count} ({listed(paths, 3)})")


def train(arguments: argparse.Namespace) -> None:
    """Train as the paper does, evaluate on the test part after the last epoch, and write checkpoint.pt and metrics.json."""
    cli_train.check_output(arguments)
    settings = _settings(arguments)
    data = {"train": _dataset(arguments, settings, "train")}
    data |= {part: _dataset(arguments, settings, part) for part in data["train"].parts if part != "train"}
    for dataset in data.values():
        print(dataset.describe())
    torch.manual_seed(settings["seed"])
    trainer = _trainer(arguments, settings, data["train"])
    checkpoint = arguments.output / "checkpoint.pt"
    trainer.config = {**settings, "dataset": arguments.dataset, "class_names": data["train"].class_names}
    if arguments.resume:
        _resume(trainer, checkpoint)
    elif arguments.overwrite:
        cli_train.remove(arguments.output)
    loaders = {part: _loader(dataset, settings, part == "train") for part, dataset in data.items()}
    trainer.fit(loaders["train"], settings["epochs"], validation=loaders.get("validation"), checkpoint=checkpoint)
    cli_train.finish(arguments.output, trainer, trainer.evaluate(loaders["test"], use_test=True), complete=False)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the paper's settings, overridden by those of --config, and these by the options that were given."""
    path = getattr(arguments, "config", None)
    settings = PAPER | ({} if path is None else _read_toml(path))
    settings |= {name: value for name in PAPER if (value := getattr(arguments, name, None)) is not None}
    if settings["as_released"]:
        settings["projection"] = "none"
    return settings


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info < (3, 11):
        raise ImportError(f"{path}: expected Python 3.11 or later to read TOML, got {sys.version.split()[0]}")
    given: dict[str, Any] = importlib.import_module("tomllib").loads(path.read_text())
    for name, value in given.items():
        if name not in PAPER or not isinstance(value, type(PAPER[name])):
            known = f"{type(PAPER[name]).__name__} {name}" if name in PAPER else f"settings among {', '.join(PAPER)}"
            raise ValueError(f"{path}: expected {known}, got {name} = {value!r}")
    return given


def _dataset(arguments: argparse.Namespace, settings: dict[str, Any], part: str) -> datasets.LazyDataset:
    options: dict[str, Any] = {"modalities": settings["modalities"] or None, "cache": settings["cache"] or None}
    if arguments.dataset in WITH_TEXT:
        options["tokenizer"] = settings["tokenizer"]
    if settings["split"]:
        if arguments.dataset not in ("crema-d", "iemocap"):
            raise ValueError(f"--split: expected none, {arguments.dataset} has one split alone, got {settings['split']}")
        options["split"] = settings["split"]
    if settings["as_released"] and arguments.dataset == "iemocap":
        options["readers"] = {"audio": Fbank()}
    make: Any = SETS[arguments.dataset]
    data: datasets.LazyDataset = make(arguments.root, part, **options)
    return data


def _loader(data: datasets.LazyDataset, settings: dict[str, Any], shuffle: bool) -> DataLoader[Any]:
    pin = torch.cuda.is_available()
    return DataLoader(data, settings["batch_size"], shuffle=shuffle, num_workers=settings["workers"], pin_memory=pin)


def _trainer(arguments: argparse.Namespace, settings: dict[str, Any], data: datasets.LazyDataset) -> Trainer:
    device = cli_train.device(arguments.device)
    for option in ("encoder", "weights"):
        for name in settings[option]:
            if name not in data.modalities:
                raise ValueError(f"--{option}: expected modalities among {', '.join(data.modalities)}, got {name!r}")
    encoders = {name: _encoder(arguments.dataset, name, settings) for name in data.modalities}
    with torch.no_grad():
        widths = {n: e.eval()(data.readers[n].empty()[None]).shape[1] for n, e in encoders.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"--encoder: expected features of one width, got {widths}")
    head = nn.Linear(next(iter(widths.values())), data.classes)
    nn.init.xavier_normal_(head.weight)
    nn.init.zeros_(head.bias)
    model = MultimodalModel(encoders, head).to(device)
    how = {name: settings[name] for name in ("lr", "momentum", "weight_decay")}
    optimizer = MLAOptimizer(torch.optim.SGD(model.parameters(), **how), model.head, projection=settings["projection"])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [settings["decay_at"]])
    return Trainer(model, optimizer, scheduler=scheduler, seed=settings["seed"])


def _encoder(dataset: str, modality: str, settings: dict[str, Any]) -> nn.Module:
    """Return an encoder of one's own if there is one, otherwise the paper's."""
    path = settings["encoder"].get(modality)
    if path is not None:
        module, _, name = path.rpartition(".")
        sys.path.insert(0, "")  # a file beside the one who types
        try:
            encoder: nn.Module = getattr(importlib.import_module(module), name)()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"--encoder: expected {modality}=package.module.Encoder, got {path!r} ({error})") from error
        finally:
            sys.path.remove("")
        return encoder
    if dataset not in WITH_TEXT:
        return ResNet18(1 if modality == "audio" else 3)
    weights = settings["weights"].get(modality)
    if weights is None:
        print(
            f"note: the encoder of {modality} starts from random weights, the paper's from pretrained: --weights {modality}=FILE"
        )
    if modality == "audio":
        return CAVMAEAudio() if weights is None else load_cavmae(weights)
    as_released: dict[str, Any] = {"patch_order": "official", "gelu": "none"} if settings["as_released"] else {}
    return M3AE(modality, **as_released) if weights is None else load_m3ae(weights, modality, **as_released)


def _resume(trainer: Trainer, checkpoint: Path) -> None:
    """Continue a run; raise ValueError if a setting but the epochs differs, FileNotFoundError if there is none."""
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: nothing to resume; leave out --resume to start a new run")
    before, config = read_checkpoint(checkpoint)["config"], json.loads(json.dumps(trainer.config))
    for name, value in config.items():
        if name not in ("epochs", "workers", "cache") and (before or {}).get(name) != value:
            raise ValueError(f"--resume: expected the saved run's {name}, {(before or {}).get(name)}, got {value}")
    trainer.resume(checkpoint)
    trainer.config = config

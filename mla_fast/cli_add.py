"""``mla-fast train --add``: one more modality for a model of an earlier run, from data of its own."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from mla_fast import cli_data, cli_train, data, ranks
from mla_fast.checkpoint import read_checkpoint
from mla_fast.cli_encoders import check_names
from mla_fast.cli_options import device
from mla_fast.cli_output import check_output
from mla_fast.settings import Settings
from mla_fast.trainer import Trainer

NEW = "label missing test_where test_fraction seed epochs batch_size lr momentum weight_decay amp accumulate clip_norm".split()
DEFAULTS = {
    "features": 64,
    "interaction": 0,
    "standardize": "feature",
    "label_smoothing": 0.0,
}  # of the command line, where they say nothing


def add(arguments: argparse.Namespace) -> None:
    """Add a modality to the run of a checkpoint, train it, and evaluate all before and after, where there is data of them."""
    if ranks.several():
        raise ValueError("--add: expected one process: start it without torchrun")
    if arguments.start.resolve().parent == arguments.output.resolve():
        raise ValueError(f"--output: expected another folder than that of --from, got {arguments.output}")
    check_output(arguments)
    saved = read_checkpoint(arguments.start)
    before = cli_train.described(saved["config"], arguments.start)
    config = _config(arguments, before, saved["epoch"])
    dataset, arrays = cli_data.read_for_addition(config, arguments.add, dict(arguments.layout))
    one = {**config, "modalities": [arguments.add]}
    cli_data.print_reading(dataset, arrays, one, training=True)
    parts = [_that_have_it(part) for part in cli_data.split(dataset, config)]
    layouts = {arguments.add: config["layouts"][arguments.add]}
    config["statistics"] = {**before["statistics"], **data.statistics(parts[0], config["standardize"], layouts)}
    train_set = data.apply_statistics(parts[0], config["statistics"])
    addition = config["additions"][-1]
    addition["classes"] = config["classes"] - before["classes"]
    trainer = cli_train.build(before, device(arguments.device))
    trainer.resume(arguments.start)
    config["before"] = _accuracies(trainer, config, before, list(before["encoders"]))
    config = json.loads(json.dumps(config))
    cli_train.add_to(trainer, config, config["additions"][-1])
    cli_train.carry_out(trainer, config, arguments, train_set, _test_set(config), since=addition["since"])
    print_change(config["before"], _accuracies(trainer, config, before, list(config["encoders"])), arguments.add)


def _that_have_it(dataset: data.MultimodalDataset) -> data.MultimodalDataset:
    """Return the rows of a dataset of one modality that have it."""
    if dataset.present is None:
        return dataset
    some = dataset.subset(dataset.present[:, 0].nonzero()[:, 0])
    some.present = None
    return some


def _config(arguments: argparse.Namespace, before: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Return the config of the run that begins: the model and its projection are those of the one before."""
    name = arguments.add
    if arguments.modalities:
        raise ValueError(f"--modalities: expected none with --add, which says what is new, got {', '.join(arguments.modalities)}")
    if name in before["encoders"]:
        raise ValueError(f"--add: expected a modality beside {', '.join(before['encoders'])}, got {name!r}")
    if before["interaction"]:
        raise ValueError("--add: expected a run without --interaction, which is made for the modalities that there are")
    for option, value in dataclasses.asdict(Settings()).items():
        if (given := getattr(arguments, option)) not in (value, before["head"][option]):
            raise ValueError(
                f"--{option}: expected none with --add: the projection goes on as {before['head'][option]!r}, got {given!r}"
            )
    keeps = {
        "validation": "keeps the last epoch",
        "patience": "keeps the last epoch",
        "class_weights": "weighs all classes alike",
        "missing": "takes rows that have the new modality",
        "protocol": "takes rows that have the new modality",
    }
    for option, how in keeps.items():
        if given := getattr(arguments, option):
            raise ValueError(f"--{option.replace('_', '-')}: expected none with --add, which {how}, got {given}")
    check_names("encoder", arguments.encoder, [name])
    for option in DEFAULTS:
        if (given := getattr(arguments, option)) not in (before[option], DEFAULTS[option]):
            flag = option.replace("_", "-")
            raise ValueError(f"--{flag}: expected none with --add: the run before has {before[option]}, got {given}")
    before["class_weights"] = None  # they are of data and classes that were there
    config = {**before, **{option: getattr(arguments, option) for option in NEW}}
    config |= {"validation": None, "protocol": None, "encoder": {**before["encoder"], **arguments.encoder}}
    if config["data"] == str(arguments.data.resolve()):
        for option in ("test_where", "test_fraction", "seed"):  # or what was trained on would be tested on
            if before[option] != config[option]:
                flag, same = option.replace("_", "-"), "of the run before, whose data these are"
                raise ValueError(f"--{flag}: expected {before[option]!r} {same}, got {config[option]!r}")
    config["data"], config["modalities"] = str(arguments.data.resolve()), [*before["modalities"], name]
    kept = {option: config[option] for option in ("lr", "momentum", "weight_decay", "epochs")}
    config["additions"] = [*before.get("additions", []), {"modality": name, "since": epoch, "from": before["data"], **kept}]
    return config


def _test_set(config: dict[str, Any]) -> data.MultimodalDataset:
    """Return the part held out of a run's data, of those of its modalities that are in the file."""
    config = cli_data.available(config)
    _, test_set = cli_data.split(cli_data.read_for_evaluation(config)[0], config)
    if len(config["modalities"]) == 1:
        test_set = _that_have_it(test_set)
    return data.apply_statistics(test_set, {name: config["statistics"][name] for name in config["modalities"]})


def _accuracies(trainer: Trainer, config: dict[str, Any], before: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Return the accuracy of each modality that there is held out data of: in the new file, or in that of the run before."""
    found: dict[str, float] = {}
    for run in (config, before):
        left = [name for name in names if name not in found]
        if left and Path(run["data"]).exists():
            there = cli_data.available(
                {**run, "modalities": [name for name in run["modalities"] if name in left]}, missing_ok=True
            )
            if there["modalities"]:
                test_set = _test_set({**there, "statistics": config["statistics"], "classes": config["classes"]})
                accuracy = trainer.evaluate(data.loader(test_set, 1024))["accuracy"]
                found |= {name: accuracy[name] for name in there["modalities"]}
    return found


def print_change(before: dict[str, float], after: dict[str, float], name: str) -> None:
    """Print the accuracy of each modality before and after `name` was added."""
    width = max(map(len, [*after, *before]))
    print(f"accuracy before and after {name} was added")
    for modality in {**before, **after}:
        cells = (f"{100 * of[modality]:6.1f} %" if modality in of else f"{'-':>8}" for of in (before, after))
        print(f"  {modality:{width}}  {'  '.join(cells)}")

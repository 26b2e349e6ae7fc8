"""``mla-fast eval`` and ``mla-fast predict``: what a checkpoint of ``mla-fast train`` makes of data."""

from __future__ import annotations

import argparse
import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mla_fast import cli_data, data, ranks
from mla_fast.checkpoint import read_checkpoint
from mla_fast.cli_options import autocast_dtype, device
from mla_fast.cli_result import print_result
from mla_fast.cli_train import build, check_alike, described, shuffled
from mla_fast.evaluate import evaluate as evaluate_model
from mla_fast.features import world
from mla_fast.files import replacing
from mla_fast.step import autocast
from mla_fast.threads import limited
from mla_fast.trainer import Trainer


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a checkpoint on the part held out of its data, or on all or a part of other data."""
    with ranks.together():
        trainer, config, test_set, seen_before = _read(arguments)
    check_alike(config, test_set)
    batches = ranks.share(shuffled(test_set), ranks.EveryOther)
    with _as_asked(trainer, config, arguments):
        result = evaluate_model(trainer.model, batches, trainer.device, world(), use_test=True, loss=trainer.loss)
    print_result(result, config.get("class_names"), test_set.complete)
    for name, value in ({} if seen_before else config.get("before", {})).items():
        after = f", {100 * result['accuracy'][name]:.1f} % here" if name in result["accuracy"] else ""
        print(f"{name} had {100 * value:.1f} % before {config['additions'][-1]['modality']} was added{after}")


def _read(arguments: argparse.Namespace) -> tuple[Trainer, dict[str, Any], data.MultimodalDataset, bool]:
    """Return the trainer of a checkpoint, its config, what to evaluate on, and whether some of that was trained on before."""
    saved = read_checkpoint(arguments.checkpoint)
    config = described(saved["config"], arguments.checkpoint)
    if arguments.data is not None and arguments.data.resolve() == Path(config["data"]):
        arguments.data = None  # the checkpoint's own data, of which only the part held out is new
    whole = arguments.all or (arguments.data is not None and arguments.test_where is None)
    if arguments.data is None and (whole or arguments.test_where not in (None, config["test_where"])):
        print("note: some of these rows were trained on")
    earlier = {of["from"] for of in config.get("additions", [])}
    seen_before = arguments.data is not None and str(arguments.data.resolve()) in earlier
    if seen_before:
        print("note: some of these rows were trained on, before a modality was added")
    if arguments.data is not None:
        config = {**config, "data": str(arguments.data), "missing": 0.0}  # as they are, whatever training took away
    there = cli_data.available(config)
    dataset, arrays = cli_data.read_for_evaluation(there)
    cli_data.print_reading(dataset, arrays, there)
    if arguments.test_where is not None:
        dataset = dataset.subset(data.rows_where(dataset, arguments.test_where))
    elif not whole:
        _, dataset = cli_data.split(dataset, there)
    test_set = data.apply_statistics(dataset, {name: config["statistics"][name] for name in dataset.modalities})
    cli_data.note_other_units(test_set, config)
    return _trained(config, saved, arguments.device), config, test_set, seen_before


def predict(arguments: argparse.Namespace) -> None:
    """Write the fused prediction of every row of an .npz, which needs no labels and not every modality, as a CSV."""
    output = arguments.output
    if output.exists() and not arguments.overwrite:
        raise FileExistsError(f"--output: {output} is there already; --overwrite replaces it")
    saved = read_checkpoint(arguments.checkpoint)
    config = {**described(saved["config"], arguments.checkpoint), "data": str(arguments.file)}
    dataset, arrays = cli_data.read_for_prediction(config)
    cli_data.print_reading(dataset, arrays, config)
    if absent := [m for m in config["modalities"] if m not in dataset.modalities]:
        print(f"note: the file has no {' and no '.join(absent)}; the prediction is without")
    dataset = data.apply_statistics(dataset, config["statistics"])
    cli_data.note_other_units(dataset, config)
    trainer, names = _trained(config, saved, arguments.device), cli_data.class_names(config)
    with _as_asked(trainer, config, arguments):
        rows = list(_predictions(trainer, dataset, names))
    weights = [f"weight_{modality}" for modality in trainer.model.modalities]
    with replacing(output, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "predicted", *(f"probability_{name}" for name in names), *weights])
        writer.writerows([i, *row] for i, row in enumerate(rows))
    if nothing := sum(not row[0] for row in rows):
        print(f"note: {nothing} rows have no prediction: no modality, or logits that are NaN")
    print(f"wrote {output}, {len(rows)} rows")


def _trained(config: dict[str, Any], saved: dict[str, Any], device_name: str) -> Trainer:
    trainer = build(config, device(device_name), alone=True)
    trainer.model.load_state_dict(saved["model"])
    return trainer


@contextlib.contextmanager
def _as_asked(trainer: Trainer, config: dict[str, Any], arguments: argparse.Namespace) -> Iterator[None]:
    """Compute with the --amp that is asked for, on --threads or as many as training took, if they are there."""
    threads = arguments.threads or min(config["threads"] or torch.get_num_threads(), torch.get_num_threads())
    with limited(threads if trainer.device.type == "cpu" else None), autocast(trainer.optimizer, autocast_dtype(arguments.amp)):
        yield


def _predictions(trainer: Trainer, dataset: data.MultimodalDataset, names: list[str]) -> Iterator[list[str]]:
    """Yield, for each sample, its class, the probability of each class, and the weight of each modality (eq. 8)."""
    modalities = trainer.model.modalities
    places = [modalities.index(m) for m in dataset.modalities]
    for inputs, target, *masks in data.loader(dataset, 1024):
        present = torch.zeros(len(target), len(modalities), dtype=torch.bool)
        present[:, places] = masks[0] if masks else torch.ones(len(target), len(places), dtype=torch.bool)
        fused = trainer.predict((inputs, present))
        weights = torch.zeros(len(target), len(modalities), dtype=torch.float64)
        weights[:, places] = fused.weights.cpu().double()
        probabilities = fused.logits.cpu().double().softmax(1)
        for p, weight, here in zip(probabilities, weights, present.any(1).tolist(), strict=True):
            known = here and not p.isnan().any()
            answers = [names[int(p.argmax())], *(f"{each:.6g}" for each in p.tolist())] if known else [""] * (1 + len(p))
            yield [*answers, *(f"{each:.6g}" for each in weight.tolist())]

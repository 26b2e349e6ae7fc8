"""What a run leaves in its folder: checkpoints, metrics, settings and a report."""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla_fast import ranks
from mla_fast.checkpoint import read_checkpoint
from mla_fast.cli_config import write_options
from mla_fast.cli_report import Answers, write_report
from mla_fast.cli_result import notes, print_result
from mla_fast.distributed import all_gather_object, load_portable_state_dict
from mla_fast.evaluate import evaluate
from mla_fast.trainer import Trainer
from mla_fast.trainer_checks import best_epoch

FILES = ("checkpoint.pt", "best.pt", "metrics.json", "run.toml", "report.html")
MARKER = ".launch"  # of torchrun's
MONITOR = "validation/accuracy/fused"


def check_output(arguments: argparse.Namespace) -> None:
    """Raise FileExistsError if --output has a run that nobody has said what to do with, RankError if ranks do not share it.

    What torchrun has restarted goes on from its checkpoint, as with --resume, or begins anew if it has not come to one.
    """
    ranks.check_shared(arguments.output)
    if ranks.has_restarted(arguments.output / MARKER):
        arguments.resume = ranks.from_first((arguments.output / "checkpoint.pt").exists)
        arguments.overwrite = not arguments.resume
    ranks.from_first(lambda: _check_free(arguments))


def _check_free(arguments: argparse.Namespace) -> None:
    there = [name for name in ("checkpoint.pt", "metrics.json") if (arguments.output / name).exists()]
    if there and not (arguments.resume or arguments.overwrite):
        choice = "--resume continues that run, --overwrite begins anew and deletes it"
        raise FileExistsError(f"--output: {arguments.output} has {' and '.join(there)} of another run; {choice}")


def read_resumed(checkpoint: Path) -> dict[str, Any]:
    """Return the checkpoint that --resume continues from; raise FileNotFoundError if there is none."""
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: nothing to resume; leave out --resume to start a new run")
    return read_checkpoint(checkpoint)


def begin(arguments: argparse.Namespace, trainer: Trainer, epochs: int) -> None:
    """Remove the run that --overwrite gives up, write run.toml, and have a line printed after each epoch."""
    ranks.from_first(lambda: _write_first(arguments))
    trainer.callbacks = (*trainer.callbacks, EpochLines(epochs))


def _write_first(arguments: argparse.Namespace) -> None:
    if arguments.overwrite:
        for path in (*(arguments.output / name for name in FILES), *arguments.output.glob("events.out.tfevents.*")):
            path.unlink(missing_ok=True)
    write_options(arguments, arguments.output / "run.toml")
    ranks.mark(arguments.output / MARKER)


class EpochLines:
    """Print a line for each epoch's record: the mean losses, the validation accuracy, and how long it took."""

    def __init__(self, epochs: int):
        self.epochs, self.started = epochs, time.perf_counter()

    def __call__(self, record: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        parts = ["loss " + ", ".join(f"{modality} {loss:.3f}" for modality, loss in record["loss"].items())]
        if "validation" in record:
            parts.append(f"validation accuracy {100 * record['validation']['accuracy']['fused']:.1f} %")
        epoch = f"{record['epoch']:{len(str(self.epochs))}}/{self.epochs}"
        print(f"epoch {epoch}  {'; '.join(parts)}  ({now - self.started:.1f} s)", flush=True)
        self.started = now


class KeepBest:
    """Write best.pt whenever the record of an epoch is the best so far."""

    def __init__(self, trainer: Trainer, output: Path):
        self.trainer, self.path = trainer, output / "best.pt"

    def __call__(self, record: Mapping[str, Any]) -> None:
        if best_epoch(self.trainer.history, MONITOR) == record["epoch"] - 1:
            self.trainer.save(self.path)

    def after_resume(self) -> None:
        """Write the best epoch's where a run ended between its checkpoint and this."""
        if self.trainer.history and not ranks.from_first(self._is_there):
            self(self.trainer.history[-1])

    def _is_there(self) -> bool:
        return self.path.exists() and self._epoch() == 1 + best_epoch(self.trainer.history, MONITOR)

    def _epoch(self) -> int:
        epoch: int = read_checkpoint(self.path)["epoch"]
        return epoch

    def load(self) -> int:
        """Give the model the best epoch's parameters; return the epoch."""
        saved = read_checkpoint(self.path)
        load_portable_state_dict(self.trainer.model, saved["model"])
        epoch: int = saved["epoch"]
        return epoch


def finish(output: Path, trainer: Trainer, test: Any, *, complete: bool, best: KeepBest | None = None) -> None:
    """Evaluate on the test part, write metrics.json and report.html, and print what is in them; of several ranks the first does.

    test: a loader, of all samples on every rank; complete: none of them lacks a modality; best: evaluate the best epoch, not the
    last.
    """
    head, config = trainer.optimizer.diagnostics(), trainer.config or {}
    epoch = best.load() if best is not None else trainer.epoch
    answers, group = Answers(trainer.model.modalities), trainer.optimizer.process_group
    own = ranks.share(test, ranks.EveryOther)
    result = evaluate(trainer.model, own, trainer.device, group, True, trainer.loss, answers.add)
    answers = functools.reduce(Answers.joined, all_gather_object(answers, group))
    if not ranks.is_first():
        return
    metrics = {"config": trainer.config, "history": trainer.history, "epoch": epoch, "test": result, "head": head}
    (output / "metrics.json").write_text(json.dumps(_without_nan(metrics), indent=2))
    if best is not None:
        reached = 100 * trainer.history[epoch - 1]["validation"]["accuracy"]["fused"]
        print(f"the best of {trainer.epoch} epochs on the validation part was epoch {epoch}, with {reached:.1f} %; of it:")
    print_result(result, config.get("class_names"), complete)
    if head["skipped_nonfinite"]:
        print(f"{head['skipped_nonfinite']} steps were skipped because they were not finite: lower --lr?")
    if head["skipped_lone"]:
        print(f"{head['skipped_lone']} rows were left out, alone in a batch with their modality: larger --batch-size?")
    written = ["checkpoint.pt", *(["best.pt"] if best is not None else []), "metrics.json", "run.toml"]
    try:
        write_report(output / "report.html", trainer, answers, result, epoch, notes(result, complete))
        written.append("report.html")
    except ImportError as error:
        print(f'no report.html: {error.name} is missing (pip install "mla_fast[demo]")')
    print(f"wrote {', '.join(str(output / name) for name in written[:-1])} and {output / written[-1]}")


def _without_nan(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Callbacks for ``Trainer``: any callable that takes the record of an epoch will do, such as those here."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mla_fast.files import replacing


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested record by path: ``{"loss": {"audio": 0.3}}`` becomes ``{"loss/audio": 0.3}``."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{name}"] = value
    return flat


class TensorBoard:
    """Write every number of a record to `folder` as a scalar, with the epoch as its step.

        trainer = mla.Trainer(model, optimizer, callbacks=[TensorBoard("runs/a")])

    Raises ImportError without the package ``tensorboard``.
    """

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"tensorboard: not installed ({error}); pip install tensorboard") from error

        self.writer = SummaryWriter(str(folder))

    def __call__(self, record: Mapping[str, Any]) -> None:
        for name, value in flatten(record).items():
            self.writer.add_scalar(name, value, record["epoch"])
        self.writer.flush()


class CSV:
    """Keep a table of an epoch's numbers in a file, a row for each, with columns such as ``loss/audio``.

    A run that goes on in another process adds to the file; the rows of epochs that are done again are replaced. Numbers that come
    later than the first epoch get a column, too.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __call__(self, record: Mapping[str, Any]) -> None:
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < record["epoch"]]
        rows.append(flatten(record))
        with replacing(self.path, "w") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


class Log:
    """Pass an epoch's numbers to any logger as ``log({"loss/audio": 0.3, …}, step=epoch)``.

        trainer = mla.Trainer(model, optimizer, callbacks=[Log(wandb.log)])     # or mlflow.log_metrics, aim's, comet's …

    Raises TypeError if `log` cannot be called.
    """

    def __init__(self, log: Callable[..., Any]):
        if not callable(log):
            raise TypeError(f"log: expected a function of (numbers, step=epoch), got {log!r}")
        self.log = log

    def __call__(self, record: Mapping[str, Any]) -> None:
        numbers = flatten(record)
        self.log({name: value for name, value in numbers.items() if name != "epoch"}, step=record["epoch"])

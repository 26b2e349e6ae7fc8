"""Callbacks for ``Trainer``: any callable that takes the record of an epoch will do; ``TensorBoard`` is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


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

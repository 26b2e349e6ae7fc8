"""What a ``Trainer`` can be told to do with the record of each epoch: any callable that takes the dictionary, or one of these."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested record by path: ``{"loss": {"audio": 0.3}}`` → ``{"loss/audio": 0.3}``."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{name}"] = value
    return flat


class TensorBoard:
    """Writes every number of a record as a scalar, the epoch as its step; needs the package ``tensorboard``.

    trainer = mla.Trainer(model, optimizer, callbacks=[TensorBoard("runs/a")])
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

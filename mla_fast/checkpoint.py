"""Checkpoints that are whole or not there: written beside the old one and moved over it in one step."""

from __future__ import annotations

import io
import os
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT, VERSION = "mla_fast.checkpoint", 3


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this package, was cut short, or is of another version."""


def write_checkpoint(path: str | Path, payload: dict[str, Any]) -> None:
    """Writes `payload` to `path`. If that fails (a full disk, say): OSError, and what was at `path` before is still there.

    TypeError for what ``read_checkpoint`` could not read: anything but tensors, numbers, strings and containers of these.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    buffer = io.BytesIO()
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # whatever else is saved without
    try:
        torch.save({"format": FORMAT, "version": VERSION, **_plain(payload, "checkpoint")}, buffer)
    finally:
        torch.serialization.set_crc32_options(checksums)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # what a killed process leaves there is overwritten by the next
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; the checkpoint that was there before is untouched", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)  # moved away if all went well


def _plain(value: Any, where: str) -> Any:
    """The value with Python's numbers in place of numpy's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        plain = {_plain(key, f"a key of {where}"): _plain(v, f"{where}[{key!r}]") for key, v in value.items()}
        return type(value)(plain) if type(value) in (OrderedDict, Counter) else plain
    if isinstance(value, (list, tuple)):
        plain = [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return type(value)(plain) if type(value) in (list, tuple) else plain
    if isinstance(value, set):
        return {_plain(v, f"an element of {where}") for v in value}
    if value is None or isinstance(value, (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return value
    raise TypeError(f"{where}: expected tensors and plain values, got {type(value).__name__}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What ``write_checkpoint`` wrote, on the CPU; else FileNotFoundError or CheckpointError. Never runs code from the file."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that are there
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises whatever its layers do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: expected a checkpoint written by mla_fast, got a foreign or truncated file ({reason})"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a checkpoint written by mla_fast, got another torch file")
    if payload.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected checkpoint version {VERSION}, got {payload.get('version')}")
    return payload

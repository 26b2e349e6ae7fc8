"""Checkpoint files that are never half written: a new one is written beside the old one and then replaces it in one step."""

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

from mla_fast.files import replacing

FORMAT, VERSION = "mla_fast.checkpoint", 3


class CheckpointError(ValueError):
    """Raised for a file that is not a checkpoint of this package, is damaged, or has another version."""


def write_checkpoint(path: str | Path, payload: dict[str, Any]) -> None:
    """Write `payload` to `path`, creating its folder.

    Raises OSError if that fails, say because the disk is full; the previous file at `path` is then untouched. Raises TypeError
    for anything that ``read_checkpoint`` could not read: all but tensors, numbers, strings and containers of these.
    """
    path = Path(os.path.realpath(path))  # replaces the target of a link, not the link
    buffer = io.BytesIO()
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # read_checkpoint verifies them
    try:
        torch.save({"format": FORMAT, "version": VERSION, **_plain(payload, "checkpoint")}, buffer)
    finally:
        torch.serialization.set_crc32_options(checksums)
    try:
        with replacing(path, "wb", durable=True) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; the previous checkpoint is untouched", str(path)) from error


def _plain(value: Any, where: str) -> Any:
    """Return `value` with Python's numbers in place of NumPy's; raise TypeError, naming the place, for what cannot be saved."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        items = {_plain(key, f"a key of {where}"): _plain(v, f"{where}[{key!r}]") for key, v in value.items()}
        return type(value)(items) if type(value) in (OrderedDict, Counter) else items
    if isinstance(value, (list, tuple)):
        elements = [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(elements) if type(value) is tuple else elements
    if isinstance(value, set):
        return {_plain(v, f"an element of {where}") for v in value}
    if value is None or isinstance(value, (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return value
    raise TypeError(f"{where}: expected tensors and plain values, got {type(value).__name__}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what ``write_checkpoint`` wrote, with its tensors on the CPU; never run code from the file.

    Raises FileNotFoundError, or CheckpointError for a foreign, damaged or truncated file and for one of another version.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load lets the exceptions of all its layers through
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: expected a checkpoint written by mla_fast, got a foreign or truncated file ({reason})"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a checkpoint written by mla_fast, got another torch file")
    if payload.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected checkpoint version {VERSION}, got {payload.get('version')}")
    return payload

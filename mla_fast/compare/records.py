"""Results as lines of JSON, one to a finished run: what is there is not run again, and what is cut short does no harm."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla_fast.files import replacing

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """Return all records, none if there is no such file; a last line that was being written when its process ended is left out.

    Raises ValueError for any other line that is no record.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                print(f"{path}: line {number} was cut short and is left out", file=sys.stderr)
                break
            raise ValueError(f"{path}: line {number}: expected a record in JSON, got {line[:60]!r} ({error})") from None
        found.append(record)
    return found


def append(path: Path, record: Record) -> None:
    """Add a line, and wait until it is on the disk; a line that was cut short goes first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read()
        if not whole.endswith(b"\n"):
            file.truncate(whole.rfind(b"\n") + 1)
        file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, text: str) -> None:
    """Write a file whole: whoever reads it finds the old text or the new one."""
    with replacing(path, "w", per_process=True) as file:
        file.write(text)


def key(record: Record, names: Sequence[str]) -> tuple[Any, ...]:
    """Return what tells a run from others."""
    return tuple(record.get(name) for name in names)

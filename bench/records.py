"""Results as lines of JSON: those of ``mla_fast.compare.records``, and the times of the throughput bench."""

from __future__ import annotations

from pathlib import Path

from mla_fast.compare.records import Record, append, key, read

__all__ = ["Record", "append", "key", "read", "timings"]


def timings(path: Path) -> dict[tuple, Record]:
    """The times in a file by case, provider, device and threads; the last where a case was measured several times."""
    found = {}
    for record in read(path):
        if {"median_us", "op"} <= record.keys():  # others compare ways to train
            found[record["case"], record["provider"], record["device"], record["machine"]["threads"]] = record
    return found

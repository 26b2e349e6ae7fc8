"""Options of a command that are lists: seeds, rates of missing modalities, names, layouts."""

from __future__ import annotations

import argparse
import math

from mla_fast import data


def seeds(text: str) -> list[int]:
    """Return [0, 1, 2, 5] for ``"0-2,5"``."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise argparse.ArgumentTypeError(f'expected seeds as "0-5" or "0,2,7", got {text!r}')
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"expected at least one seed, got {text!r}")
    return list(dict.fromkeys(found))


def rates(text: str) -> list[float]:
    """Return 0.1, 0.3, 0.5, 0.7 for ``"0.1:0.7"``, ``"0.1:0.7:0.1"`` in steps of 0.1; and for ``"0.2,0.5"`` these."""
    try:
        if ":" in text:
            low, high, step = (float(part) for part in (text if text.count(":") > 1 else f"{text}:0.2").split(":"))
            found = [round(low + step * i, 3) for i in range(math.floor((high - low) / step + 1e-9) + 1)]
        else:
            found = [float(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f'expected rates as "0.1:0.7" or "0.1,0.5", got {text!r}') from None
    if not found or not all(0 <= rate < 1 for rate in found):
        raise argparse.ArgumentTypeError(f"expected rates in [0, 1), got {text!r}")
    return found


def names(text: str) -> list[str]:
    """Return the names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def positive(text: str) -> int:
    """Return an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def layouts(text: str) -> dict[str, str]:
    """Return {"text": "tokens"} for ``"text=tokens"``."""
    pairs = [(name.strip(), layout.strip()) for name, _, layout in (pair.rpartition("=") for pair in text.split(","))]
    if not all(name and layout in data.LAYOUTS for name, layout in pairs):
        raise argparse.ArgumentTypeError(f"expected NAME=LAYOUT with a layout of {', '.join(data.LAYOUTS)}, got {text!r}")
    return dict(pairs)

"""Warnings that point at the line of the user's own code that led to them."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(str(Path(module).parent) + "/" for module in (__file__, torch.__file__))


def warn(message: str) -> None:
    """Warn at the innermost line that is neither this package's nor torch's, of which there may be any number between."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)

"""Work that is independent, side by side on one GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def side_by_side(jobs: Mapping[str, Callable[[], Tensor]], device: torch.device) -> dict[str, Tensor]:
    """What each job returns: the first one's work on the current CUDA stream, every other's on a stream of its own.

    All of it comes after what the current stream had to do before and before what it is given next. Autograd runs the backward
    pass of each where its forward pass ran. On other devices, one after another.
    """
    if device.type != "cuda" or len(jobs) < 2:
        return {name: job() for name, job in jobs.items()}
    here = torch.cuda.current_stream(device)
    ready = here.record_event()
    (first, work), *others = jobs.items()
    results = {first: work()}
    for number, (name, job) in enumerate(others):
        stream = _stream(here, number)
        stream.wait_event(ready)
        try:
            with torch.cuda.stream(stream):
                results[name] = job()
        finally:
            here.wait_stream(stream)
        results[name].record_stream(here)  # its memory is the other stream's, not to be reused before this one is done with it
    return results


@functools.cache
def _stream(here: torch.cuda.Stream, number: int) -> torch.cuda.Stream:
    """One that works for `here` alone, so that what either has freed is never reused before both are done with it."""
    return torch.cuda.Stream(here.device)

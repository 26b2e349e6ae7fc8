"""CUDA streams for work that is independent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def run_on_streams(jobs: Mapping[str, Callable[[], Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Run the jobs concurrently: the first on the current CUDA stream, each other one on a stream of its own.

    The jobs begin after the work that is queued on the current stream, and work queued on it later waits for all of them.
    Autograd runs the backward pass of each job on the stream of its forward pass. On other devices the jobs run one by one.
    """
    if device.type != "cuda" or len(jobs) < 2:
        return {name: job() for name, job in jobs.items()}
    current = torch.cuda.current_stream(device)
    ready = current.record_event()
    (first, work), *others = jobs.items()
    results = {first: work()}
    for number, (name, job) in enumerate(others):
        stream = _stream(current, number)
        stream.wait_event(ready)
        try:
            with torch.cuda.stream(stream):
                results[name] = job()
        finally:
            current.wait_stream(stream)
        results[name].record_stream(current)  # so that its memory is not reused before the current stream is done with it
    return results


@functools.cache
def _stream(current: torch.cuda.Stream, number: int) -> torch.cuda.Stream:
    """Return a stream that only ever works for `current`: memory that either frees is not reused before both are done with it."""
    return torch.cuda.Stream(current.device)

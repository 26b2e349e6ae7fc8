"""How many threads torch uses, and how many suit a small model: threads wait for each other longer than they work."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mla_fast.batch import rows_by_modality, unpack_batch
from mla_fast.distributed import is_distributed
from mla_fast.model import MultimodalModel

SMALL = 0.02  # seconds that a batch takes on one thread; of longer ones torch's own number is right
CLEARLY = 0.8  # several threads must take less than this share of the time of one, so that noise does not choose them


@contextmanager
def limited(count: int | None) -> Iterator[None]:
    """Use `count` threads inside, where it is given."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside. Matrices this small gain little from a second, and wait long for it where the machine is busy."""
    with limited(1):
        yield


def measured(model: MultimodalModel, batch: tuple[Any, ...], loss: Any = None) -> tuple[int, dict[int, float]]:
    """Return how many threads to train `model` with, and the seconds that a batch took by number of threads, where measured.

    Passes go forward and backward through a copy: neither parameters, buffers nor torch's generator move. Nothing is measured
    on a GPU, in one of several processes or where there is one thread; a model is not small if its batch takes one thread long.
    """
    many, device = torch.get_num_threads(), next(model.parameters()).device
    if many == 1 or device.type != "cpu" or is_distributed(model):
        return many, {}
    rows = rows_by_modality(model, *unpack_batch(model, batch, device, loss))
    inputs = {modality: part.inputs for modality, part in rows.items() if len(part.target) > 1}
    seconds = {1: _seconds(model, inputs, 1)}
    if seconds[1] > SMALL:
        return many, {}
    seconds[many] = _seconds(model, inputs, many)
    return (many if seconds[many] < CLEARLY * seconds[1] else 1), seconds


def _seconds(model: MultimodalModel, inputs: dict[str, Any], threads: int) -> float:
    """Return what a batch takes at its fastest; once where that is long."""
    twin = copy.deepcopy(model).train()
    fastest = float("inf")
    with limited(threads), torch.random.fork_rng(devices=[]):
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            logits = twin(inputs)
            if logits:
                sum(z.float().square().mean() for z in logits.values()).backward()
            fastest = min(fastest, time.perf_counter() - start)
            if fastest > 5 * SMALL:
                break
    return fastest


def said(seconds: dict[int, float], chosen: int) -> str:
    """Return the line that a command prints of what was measured."""
    (one, alone), (many, together) = seconds.items()
    return (
        f"threads: {chosen}, since a batch takes {1e3 * alone:.1f} ms with {one} and {1e3 * together:.1f} ms with {many}; "
        "--threads chooses"
    )

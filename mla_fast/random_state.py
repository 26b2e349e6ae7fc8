"""States of the random generators, so that an interrupted run resumes with the numbers it would have drawn."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states() -> dict[str, Any]:
    """Return the states of torch (on every device), Python and NumPy, as tensors, numbers and tuples."""
    numpy_state: Any = np.random.get_state()
    name, keys, *rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restore what ``random_states`` returned; leave CUDA alone if the number of devices has changed."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


class Replayable:
    """Iterate with a private state of torch's CPU generator: started again from the same state, it yields the same items.

    begin: returns the iterator; it is called, and every item drawn, with the private state in place of the global one.
    state: where the private state starts; the attribute `state` is the current one.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]], state: Tensor):
        self.state = state
        self._iterator = self._with_own_state(begin)

    def __iter__(self) -> Replayable:
        return self

    def __next__(self) -> Any:
        return self._with_own_state(functools.partial(next, self._iterator))

    def _with_own_state(self, function: Callable[[], Any]) -> Any:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            return function()
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(outside)

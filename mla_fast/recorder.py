"""What a CUDA graph asks of torch: a stream to warm up and to capture on, one pool of memory, and to know who waits."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class Recorder:
    """Runs functions eagerly on a side stream, or records them there; their graphs share one pool of memory."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.recorded: weakref.WeakSet[Recorded] = weakref.WeakSet()

    def eager(self, function: Callable[[], Tensor]) -> tuple[Tensor, str]:
        """(what it returns, where it waited for the device, if it did)."""
        here, before = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(here)
        with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(self.stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = function()
            finally:
                torch.cuda.set_sync_debug_mode(before)
                here.wait_stream(self.stream)
        waited = ""
        for w in caught:
            if "synchronizing CUDA operation" in str(w.message):
                waited = f"{w.filename}:{w.lineno}"
            # The one is about set_sync_debug_mode, the other about steps outside of a graph.
            elif "prototype feature" not in str(w.message) and "capturable=True" not in str(w.message):
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return result, waited

    def capture(self, function: Callable[[], Tensor]) -> Recorded:
        """Records it; RuntimeError for what cannot be recorded."""
        # A pool ends with the last graph that has it, and cannot be had again.
        pool = next((other.graph.pool() for other in self.recorded), None)
        recorded = Recorded(function, self.stream, pool)
        self.recorded.add(recorded)
        return recorded


class Recorded:
    """A function as a CUDA graph; each replay writes to `outputs`."""

    def __init__(self, function: Callable[[], Tensor], stream: torch.cuda.Stream, pool: tuple[int, int] | None):
        self.graph = torch.cuda.CUDAGraph()
        before, generator = torch.cuda.current_stream(stream.device), torch.cuda.default_generators[stream.device.index]
        state = generator.clone_state()
        try:
            # Other threads, as a loader's that pins memory, may do as they like meanwhile.
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.outputs = function()
        except BaseException:  # torch leaves its stream current, and its random numbers those of a capture
            torch.cuda.set_stream(before)
            generator.graphsafe_set_state(state)
            raise

    def replay(self) -> None:
        self.graph.replay()

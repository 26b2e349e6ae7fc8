"""CUDA graphs: warming up and capturing on a side stream, in one pool of memory, and finding what waits for the device."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class Recorder:
    """Run functions eagerly on a side stream, or capture them there as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.recorded: weakref.WeakSet[Recorded] = weakref.WeakSet()

    def eager(self, function: Callable[[], Tensor]) -> tuple[Tensor, str]:
        """Run `function`; return its result and the ``file:line`` where it last waited for the device, "" if nowhere."""
        current, before = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(current)
        with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(self.stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = function()
            finally:
                torch.cuda.set_sync_debug_mode(before)
                current.wait_stream(self.stream)
        waited = ""
        for w in caught:
            if "synchronizing CUDA operation" in str(w.message):
                waited = f"{w.filename}:{w.lineno}"
            # These two say that set_sync_debug_mode is a prototype, and that a capturable optimizer ran outside a graph.
            elif "prototype feature" not in str(w.message) and "capturable=True" not in str(w.message):
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return result, waited

    def capture(self, function: Callable[[], Tensor]) -> Recorded:
        """Capture `function` as a CUDA graph; raise RuntimeError if it cannot be captured."""
        # A pool ends with the last graph that uses it and cannot be reopened, so only graphs that are alive can share theirs.
        recorded = Recorded(function, self.stream, next(iter(self.recorded), None))
        self.recorded.add(recorded)
        return recorded


class Recorded:
    """A function captured as a CUDA graph, in the memory pool of `sharing` if given; each replay writes to `outputs`."""

    def __init__(self, function: Callable[[], Tensor], stream: torch.cuda.Stream, sharing: Recorded | None):
        self.graph = torch.cuda.CUDAGraph()
        before, generator = torch.cuda.current_stream(stream.device), torch.cuda.default_generators[stream.device.index]
        state = generator.clone_state()
        pool = None if sharing is None else sharing.graph.pool()
        try:
            # Other threads, such as one that pins memory for a loader, may call CUDA during the capture.
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.outputs = function()
        except BaseException:  # torch leaves its capture stream and the generator state of the capture in place
            torch.cuda.set_stream(before)
            generator.graphsafe_set_state(state)
            raise

    def replay(self) -> None:
        """Run the graph once."""
        self.graph.replay()

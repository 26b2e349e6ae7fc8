"""What a provider is, the gate in front of it, and the ways to run a step: as it is, in a CUDA graph, compiled.

Providers go by name. "ours": the operator as the optimizer calls it; "ours functional": the public function; "released": the
released code's arithmetic; "eager …": rivals of which the best counts; "compile …": likewise; "ours graph" and "graph eager …":
in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.throughput.roofline import Traffic

Step = Callable[[], Any]


class GateError(AssertionError):
    """A provider does not compute what it should, and is not timed."""


class Provider(NamedTuple):
    """start() gives the step and the gate that it has to pass. What a step costs comes round again after `period` steps."""

    name: str
    start: Callable[[], tuple[Step, Callable[[], None]]]
    traffic: Traffic | None = None
    period: int = 1


def check(name: str, got: Tensor, expected: Tensor, bound: float) -> None:
    """The correctness gate: the error relative to float64 stays under the bound, or nothing is timed."""
    if got.shape != expected.shape:
        raise GateError(f"{name}: shape {list(got.shape)} instead of {list(expected.shape)}; not timed")
    error = ((got.double() - expected).norm() / expected.norm()).item()
    if not error <= bound:
        raise GateError(f"{name}: relative error {error:.1e} against float64, more than {bound:.0e}; not timed")


def capture(step: Step) -> Step:
    """The step as a CUDA graph; replaying it returns the tensors that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and libraries' handles made before anything is captured
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay():
        graph.replay()
        return out

    replay.step = step  # which keeps alive the tensors that the graph reads
    return replay


def captured(make: Callable[..., Step]) -> Callable[..., Step]:
    """A maker of steps turned into one of CUDA graphs."""
    return lambda *state: capture(make(*state))


def compilations(compiled: bool, on_gpu: bool, function: Callable, stacked: Callable | None = None) -> Iterator[tuple]:
    """(name, function, mode) of what torch.compile is given, if it is wanted at all."""
    if compiled:
        yield "compile", function, None
        if stacked is not None:
            yield "compile stacked", stacked, None
        if on_gpu:  # on the CPU the mode changes nothing
            yield "compile reduce-overhead", function, "reduce-overhead"


def compile_step(function: Callable, mode: str | None, *arguments: Any) -> Step:
    """torch.compile for these shapes alone. With "reduce-overhead" its graph takes the tensors where they are, uncopied."""
    run = torch.compile(function, mode=mode, dynamic=False)
    if mode is None:
        return lambda: run(*arguments)
    for t in arguments:
        if isinstance(t, Tensor):
            torch._dynamo.mark_static_address(t)

    def step():
        torch.compiler.cudagraph_mark_step_begin()  # the last step's result may be overwritten
        return run(*arguments)

    return step


def random(device: torch.device) -> torch.Generator:
    """Seeded like the default generator, which a capture that fails may leave unusable."""
    return torch.Generator(device).manual_seed(torch.initial_seed())

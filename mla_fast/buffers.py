"""Running statistics, as BatchNorm's: a bad row must not spoil them for ever, and a backward pass that computes a part again, as
activation checkpointing does, must not count its rows again."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from mla_fast.head import on_host
from mla_fast.parts import modules_in

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class Statistics(NamedTuple):
    """Values [n] of the statistics of a part on one device. places: the buffers of modules, and names in them: a forward pass may
    put other tensors there. marks: of the tensors that had these values."""

    places: list[tuple[dict[str, Any], str]]
    values: Tensor
    marks: list[tuple[int, int]] = []


def kept(part: nn.Module) -> list[Statistics]:
    """Copy what a forward pass of `part` may change for good, for each device: the vectors of floating-point numbers among the
    buffers of modules in training mode. Masks and tables, which have more dimensions, are left alone."""
    found: dict[torch.device, list[tuple[dict[str, Any], str]]] = {}
    for module in modules_in(part):
        if module.training and (buffers := module._buffers):
            for name, buffer in buffers.items():
                if buffer is not None and _is_vector(buffer):
                    found.setdefault(buffer.device, []).append((buffers, name))
    return [Statistics(places, _flat(places)) for places in found.values()]


def put_back_unless_finite(taken: list[Statistics]) -> list[Statistics]:
    """Give all of them their values back where one has become NaN or +∞; on a device, which nobody waits for, by itself. Return
    what they are then."""
    after = []
    for places, before, _ in taken:
        if not _are_vectors(places) or (now := _flat(places)).shape != before.shape:
            continue  # they are something else now
        if not _is_finite(now):
            both = torch.stack([before, now])
            # ∞ − ∞ is NaN. A mask may have −∞; the variance beside a mean of −∞ is NaN.
            lost = (both - both.clamp_min(torch.finfo(both.dtype).min)).isnan().sum(1)
            now = torch.where(lost[1] > lost[0], before, now)
            _write(places, now)
        after.append(Statistics(places, now))
    return after


def hold_in_backward(after: list[Statistics], output: Tensor) -> None:
    """See to it that the backward pass of a part's output leaves its statistics as they are `after` the forward pass."""
    if after and output.requires_grad:
        output.register_hook(functools.partial(_hold, [of._replace(marks=_marks(of.places)) for of in after]))


def _hold(after: list[Statistics], _: Tensor) -> None:
    held = [of for of in after if of.marks == _marks(of.places)]  # others have counted a later batch
    if held:
        Variable._execution_engine.queue_callback(functools.partial(_put_back_if_changed, held))


def _put_back_if_changed(held: list[Statistics]) -> None:
    for places, values, marks in held:
        if marks != _marks(places) and _are_vectors(places) and sum(len(of[name]) for of, name in places) == len(values):
            _write(places, values)


def _is_vector(buffer: Any) -> bool:
    plain = type(buffer) is Tensor and buffer.dtype in FLOATS and buffer.dim() == 1  # a lazy one has no values yet
    return plain and buffer.layout == torch.strided and buffer.is_contiguous()


def _are_vectors(places: list[tuple[dict[str, Any], str]]) -> bool:
    return all(_is_vector(of.get(name)) for of, name in places)


def _is_finite(values: Tensor) -> bool:
    """Whether the host sees at once that they are."""
    if torch.compiler.is_compiling():
        return False
    try:
        return on_host(values) and math.isfinite(values.dot(values).item())
    except RuntimeError:  # under vmap there is no number to see
        return False


def _flat(places: list[tuple[dict[str, Any], str]]) -> Tensor:
    flat = torch.cat([of[name] for of, name in places])
    return flat.detach() if flat.requires_grad else flat


def _write(places: list[tuple[dict[str, Any], str]], values: Tensor) -> None:
    buffers = [of[name].data for of, name in places]  # since a graph that another batch has left may have saved them
    parts = values.split([len(buffer) for buffer in buffers])
    torch._foreach_copy_(buffers, list(parts))


def _marks(places: list[tuple[dict[str, Any], str]]) -> list[tuple[int, int]]:
    """Return what tells whether a forward pass has been here: buffers that are others, or that were written to. Of BatchNorm's
    it is the count of batches: torch does not say that a kernel has written statistics, and InstanceNorm counts nothing."""
    modules = {id(of): of for of, _ in places}.values()
    return [
        (id(buffer), buffer._version)
        for of in modules
        for buffer in of.values()
        if type(buffer) is Tensor and not buffer.is_inference()
    ]

"""Running statistics, as BatchNorm's: a bad row must not spoil them for ever, and a backward pass that computes a part again, as
activation checkpointing does, must not count its rows again."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from mla_fast.head import on_host
from mla_fast.parts import modules_in
from mla_fast.watch import is_due

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
Places = list[tuple[dict[str, Any], str]]  # the buffers of modules, and names in them: a forward pass may put others there


class Statistics(NamedTuple):
    """Values [n] of the statistics of a part on one device."""

    places: Places
    values: Tensor


class Backward:
    """What is known of a part's backward passes. computes: whether one has computed the part again."""

    computes, passes = False, 0

    def due(self) -> bool:
        """Count a pass; returns whether to look at it, at first often."""
        self.passes += 1
        return is_due(self.passes)


_BACKWARD: WeakKeyDictionary[nn.Module, Backward] = WeakKeyDictionary()


def statistics_of(part: nn.Module) -> list[Statistics]:
    """Copy what a forward pass of `part` may change for good, for each device: the vectors of floating-point numbers among the
    buffers of modules in training mode. Masks and tables, which have more dimensions, are left alone."""
    found: dict[torch.device, Places] = {}
    for module in modules_in(part):
        if module.training and (buffers := module._buffers):
            for name, buffer in buffers.items():
                if type(buffer) is Tensor and _is_vector(buffer):  # a lazy one has no values yet
                    found.setdefault(buffer.device, []).append((buffers, name))
    return [Statistics(places, _flat(places)) for places in found.values()]


def restore_unless_finite(taken: list[Statistics]) -> list[Statistics]:
    """Give all of them their values back where one has become NaN or +∞; on a device, which nobody waits for, by itself. Return
    what they are then."""
    after = []
    for places, before in taken:
        try:
            now = _flat(places)
        except (KeyError, TypeError, RuntimeError):  # they are something else now
            continue
        if now.shape != before.shape:
            continue
        if not _is_finite(now):
            both = torch.stack([before, now])
            # ∞ − ∞ is NaN. A mask may have −∞; the variance beside a mean of −∞ is NaN.
            lost = (both - both.clamp_min(torch.finfo(both.dtype).min)).isnan().sum(1)
            now = torch.where(lost[1] > lost[0], before, now)
            _write(places, now)
        after.append(Statistics(places, now))
    return after


def hold_in_backward(part: nn.Module, after: list[Statistics], output: Tensor) -> None:
    """See to it that the backward pass of a part's output leaves its statistics as they are `after` the forward pass, where it
    computes the part again: that is looked at in passes 1, 2, 4, … and every 64th."""
    if after and output.requires_grad:
        known = _BACKWARD.get(part)
        if known is None:
            known = _BACKWARD[part] = Backward()
        if known.due() or known.computes:
            output.register_hook(functools.partial(_hold, known, [(of, _marks(of.places)) for of in after]))


def _hold(known: Backward, after: list[tuple[Statistics, Any]], _: Tensor) -> None:
    held = [(of, marks) for of, marks in after if marks == _marks(of.places)]  # others have counted a later batch
    if held:
        Variable._execution_engine.queue_callback(functools.partial(_put_back_if_written, known, held))


def _put_back_if_written(known: Backward, held: list[tuple[Statistics, Any]]) -> None:
    for (places, values), marks in held:
        if marks != _marks(places):
            known.computes = True
            _write(places, values)


def _is_vector(buffer: Tensor) -> bool:
    return buffer.dim() == 1 and buffer.dtype in FLOATS and buffer.layout is torch.strided and buffer.is_contiguous()


def _is_finite(values: Tensor) -> bool:
    """Whether the host sees at once that they are."""
    if torch.compiler.is_compiling():
        return False
    try:
        return on_host(values) and math.isfinite(values.dot(values).item())
    except RuntimeError:  # under vmap there is no number to see
        return False


def _flat(places: Places) -> Tensor:
    flat = torch.cat([of[name] for of, name in places])
    return flat.detach() if flat.requires_grad else flat


def _write(places: Places, values: Tensor) -> None:
    buffers = [of[name].data for of, name in places]  # since a graph that another batch has left may have saved them
    torch._foreach_copy_(buffers, list(values.split([len(buffer) for buffer in buffers])))


def _marks(places: Places) -> list[tuple[int, int]]:
    """Return what tells whether a forward pass has been here: buffers that are others, or that were written to. Of BatchNorm's
    it is the count of batches: torch does not say that a kernel has written statistics, and InstanceNorm counts nothing."""
    modules = {id(of): of for of, _ in places}.values()
    return [(id(b), b._version) for of in modules for b in of.values() if type(b) is Tensor and not b.is_inference()]

"""What a forward pass in training changes for good, as BatchNorm's running statistics: a bad row must not spoil it for ever."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mla_fast.head import on_host
from mla_fast.parts import modules_in

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
Places = list[tuple[dict[str, Any], str]]  # where modules hold buffers: a forward pass may put others there


def kept(part: nn.Module) -> list[tuple[Places, Tensor]]:
    """Return the floating-point buffers that a forward pass of `part` may change, those of modules in training mode, and copies
    of their values [n]; for each device."""
    found: dict[torch.device, Places] = {}
    for module in modules_in(part):
        if module.training and (buffers := module._buffers):
            for name, buffer in buffers.items():
                if type(buffer) is Tensor and buffer.dtype in FLOATS:  # a lazy one has no values yet
                    found.setdefault(buffer.device, []).append((buffers, name))
    return [(places, _flat(places)) for places in found.values()]


def put_back_unless_finite(taken: list[tuple[Places, Tensor]]) -> None:
    """Give all of them their values back where one that was finite is no more; on a device, which nobody waits for, by itself."""
    for places, before in taken:
        now = _flat(places)
        if (on_host(now) and math.isfinite(now.dot(now).item())) or now.shape != before.shape:
            continue
        both = torch.stack([before, now])
        lost = (both - both).isnan().sum(1)  # ∞ − ∞ is NaN; a mask may have −∞ all along
        # By .data, since a graph that another batch has left may have saved them.
        buffers = [of_module[name].data for of_module, name in places]
        values = torch.where(lost[1] > lost[0], before, now).split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [value.view_as(buffer) for buffer, value in zip(buffers, values, strict=True)])


def _flat(places: Places) -> Tensor:
    buffers = [of_module[name] for of_module, name in places]
    flat = torch.cat([buffer if buffer.dim() == 1 else buffer.flatten() for buffer in buffers])
    return flat.detach() if flat.requires_grad else flat

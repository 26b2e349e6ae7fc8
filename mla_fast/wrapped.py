"""What the wrapped optimizer needs before, while and after it takes a step."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

AMP = ("grad_scale", "found_inf")  # the attributes by which torch.amp reaches a fused optimizer


def step(optimizer: torch.optim.Optimizer, amp: dict[str, Tensor]) -> None:
    """Take its step, with those of AMP that `amp` has and no other. No try … finally around it: torch.compile cannot resume
    inside one."""
    _start_momentum(optimizer)
    _set_amp(optimizer, amp)  # which also removes what a step that raised has left
    optimizer.step()
    _set_amp(optimizer, {})


def _set_amp(optimizer: torch.optim.Optimizer, values: dict[str, Tensor]) -> None:
    for name in AMP:
        if name in values:
            setattr(optimizer, name, values[name])
        elif hasattr(optimizer, name):
            delattr(optimizer, name)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Put zeros where fused SGD has no momentum yet, from where its first step is the same.

    Left to itself it fails once some parameters have momentum and others have none (an encoder's first step), and keeps
    uninitialised memory for momentum where found_inf takes back the very first step. With dampening the first step differs.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not group["fused"] or group["momentum"] == 0 or group["dampening"] != 0:
            continue
        for p in group["params"]:
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def check(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError for what MLAOptimizer cannot wrap."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"optimizer: {type(optimizer).__name__} needs a closure that it calls several times a step; not supported"
        )

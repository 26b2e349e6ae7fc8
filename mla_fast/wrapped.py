"""What the wrapped optimizer needs before, while and after it takes a step."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

AMP = ("grad_scale", "found_inf")  # the attributes by which torch.amp reaches a fused optimizer


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield all that it steps, group by group."""
    return (p for group in optimizer.param_groups for p in group["params"])


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


_HOOKS = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
SHARED = ("param_groups", "state", "defaults", *(f"_optimizer_{when}_hooks" for when in _HOOKS))


def shared(name: str) -> property:
    """Make an attribute of an MLAOptimizer the wrapped optimizer's own: schedulers, scalers and the user see and change that."""

    def write(outer: Any, value: Any) -> None:
        if "optimizer" in vars(outer):  # not while the base class prepares its own
            setattr(outer.optimizer, name, value)

    return property(lambda outer: getattr(outer.optimizer, name), write)


def check(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError for what MLAOptimizer cannot wrap."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if _needs_closure(optimizer):
        raise TypeError(
            f"optimizer: {type(optimizer).__name__} needs a closure that it calls several times a step (as L-BFGS and SAM do), "
            "which would have to be projected each time; not supported"
        )


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its ``step`` does nothing without a closure, by its signature, by SAM's two steps, or by what it does with None."""
    step = inspect.unwrap(type(optimizer).step)
    closure = inspect.signature(step).parameters.get("closure")
    if closure is None:
        return False
    if closure.default is inspect.Parameter.empty or hasattr(optimizer, "second_step"):
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(step)))
    except (OSError, TypeError, SyntaxError):  # there is no source to read
        return False
    return _calls_unguarded(tree) or any(_refuses_none(node) for node in ast.walk(tree))


def _names_closure(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Name) and part.id == "closure" for part in ast.walk(node))


def _refuses_none(node: ast.AST) -> bool:
    """``assert closure is not None``, or ``if closure is None: raise``."""
    if isinstance(node, ast.Assert):
        return ast.unparse(node.test) in ("closure", "closure is not None")
    raises = isinstance(node, ast.If) and any(isinstance(part, ast.Raise) for part in node.body)
    return raises and ast.unparse(node.test) in ("not closure", "closure is None")  # type: ignore[attr-defined]


def _calls_unguarded(node: ast.AST) -> bool:
    """Whether ``closure()`` is called where no condition has asked for it."""
    condition = node.values[0] if isinstance(node, ast.BoolOp) else getattr(node, "test", None)
    if condition is not None and _names_closure(condition):
        return False
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "closure":
        return True
    for child in ast.iter_child_nodes(node):
        if _calls_unguarded(child):
            return True
        if isinstance(child, ast.If) and _names_closure(child.test) and isinstance(child.body[-1], ast.Return):
            return False  # what follows is for the other case
    return False

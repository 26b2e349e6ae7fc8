"""Parameter groups of an optimizer whose model grows: one for each modality that was added, by its name."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from mla_fast.wrapped import parameters_of

NAME = "modality"  # what a group is called by


def check_joins(optimizer: torch.optim.Optimizer, encoder: nn.Module, settings: dict[str, Any]) -> None:
    """Raise ValueError for parameters that the optimizer has already, and for settings that it does not know."""
    held = set(parameters_of(optimizer))
    if any(p in held for p in encoder.parameters()):
        raise ValueError("encoder: expected parameters that are not the optimizer's yet, got some that it steps already")
    if unknown := [name for name in settings if name not in optimizer.defaults]:
        raise ValueError(f"{unknown[0]}: expected a setting of the optimizer, {', '.join(optimizer.defaults)}")
    for name, value in settings.items():
        if not _is_like(value, default := optimizer.defaults[name]):
            raise TypeError(f"{name}: expected a value like the optimizer's, {default!r}, got {value!r}")


def _is_like(value: Any, default: Any) -> bool:
    """Whether a setting may be `value` where it is `default` by default; None tells nothing."""
    if isinstance(default, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(value) == len(default) and all(map(_is_like, value, default))
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, (Real, Tensor)):
        return isinstance(value, (Real, Tensor)) and not isinstance(value, bool)
    return True


def join(optimizer: torch.optim.Optimizer, name: str, encoder: nn.Module, settings: dict[str, Any]) -> None:
    """Step an encoder's parameters from now on, in a group of their own."""
    parameters: list[Any] = list(encoder.parameters())
    if any("param_names" in group for group in optimizer.param_groups):
        parameters = [(f"encoders.{name}.{of}", p) for of, p in encoder.named_parameters()]
    optimizer.add_param_group({"params": parameters, **settings, NAME: name})


def leave(optimizer: torch.optim.Optimizer, name: str, encoder: nn.Module) -> None:
    """Step an encoder's parameters no more, and forget what is known of them."""
    gone = set(encoder.parameters())
    for group in list(optimizer.param_groups):
        kept = [i for i, p in enumerate(group["params"]) if p not in gone]
        for of in ("params", "param_names"):
            if of in group:
                group[of] = [group[of][i] for i in kept]
        if not kept and group.get(NAME) == name:
            optimizer.param_groups.remove(group)
    drop_state(optimizer, gone)


def drop_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Forget momentum and the like of these parameters, and their gradients."""
    for p in parameters:
        p.grad = None
        optimizer.state.pop(p, None)


def replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Step `new` in the place of `old`, of which it has the first rows; what is known of the others is zero."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    known = optimizer.state.pop(old, None)
    if known is not None:
        optimizer.state[new] = {name: _with_rows(value, old, new) for name, value in known.items()}


def _with_rows(value: Any, old: Tensor, new: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.dim() != old.dim() or value.dim() == 0:
        return value
    if len(value) != len(old) or any(n not in (1, of) for n, of in zip(value.shape[1:], old.shape[1:], strict=True)):
        return value  # of Adafactor's factors that of the rows is [C, 1]
    return torch.cat([value, value.new_zeros(len(new) - len(old), *value.shape[1:])])


def names(groups: Iterable[dict[str, Any]]) -> list[str]:
    """Return the modalities that have a group of their own, in its order."""
    return [group[NAME] for group in groups if NAME in group]


def extended(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a saved state of an optimizer with its own of the modalities that were added since; ValueError where the saved one
    has others."""
    before, now = names(saved["param_groups"]), names(optimizer.param_groups)
    if before == now:
        return saved
    if before != now[: len(before)]:
        had, has = (", ".join(map(repr, added)) or "no modality" for added in (before, now))
        raise ValueError(f"state_dict: expected one with {has} added, got one with {had} added")
    own = optimizer.state_dict()
    later = [group for group in own["param_groups"] if NAME in group and group[NAME] not in before]
    kept = {i: own["state"][i] for group in later for i in group["params"] if i in own["state"]}
    return {**saved, "param_groups": saved["param_groups"] + later, "state": saved["state"] | kept}

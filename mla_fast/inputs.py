"""What an encoder is given: a tensor [N, …], or several of one N in tuples, lists and dictionaries, as tokens and their mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = Any


def leaves(x: Inputs) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else pytree.tree_leaves(x)


def count(argument: str, name: str | int, x: Inputs) -> int:
    """N, or TypeError or ValueError that names argument[name] where x is nothing of the kind."""
    if isinstance(x, Tensor) and x.dim():
        return x.shape[0]
    tensors = leaves(x)
    if not tensors or not all(isinstance(t, Tensor) and t.dim() for t in tensors):
        expected = "expected a tensor [N, …], or such tensors in tuples, lists and dicts"
        raise TypeError(f"{argument}[{name!r}]: {expected}, got {outline(x)}")
    N = tensors[0].shape[0]
    if any(t.shape[0] != N for t in tensors):
        raise ValueError(f"{argument}[{name!r}]: expected tensors of the same N, got {outline(x)}")
    return N


def check_by_modality(inputs: Mapping[str, Inputs]) -> None:
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: expected a dict by modality, got {outline(inputs)}")


def counts(inputs: Mapping[str, Inputs]) -> dict[str, int]:
    """N of each modality, or TypeError or ValueError."""
    check_by_modality(inputs)
    return {modality: count("inputs", modality, x) for modality, x in inputs.items()}


def moved(x: Inputs, device: torch.device) -> Inputs:
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)
    return pytree.tree_map(lambda t: t.to(device, non_blocking=True), x)


def outline(value: Any) -> str:
    """What something is, for an error: a tensor's dtype and shape, a container's kind and contents."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) < 5:
        return f"({', '.join(map(outline, value))})"
    kind = type(value).__name__
    return f"{kind} with {', '.join(map(str, value))}" if isinstance(value, Mapping) else kind

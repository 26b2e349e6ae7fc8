"""The inputs of an encoder: a tensor [N, …], or several of one N (tokens and their mask, say) in tuples, lists and mappings."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = Any  # a recursive type would refuse a user's own named tuples and typed dicts


def tree_map(function: Callable[[Any], Any], inputs: Inputs) -> Any:
    """Apply `function` to everything in nested tuples, named tuples, lists and mappings; return the results in like containers.

    Subclasses of dict and UserDict, as a tokenizer's BatchEncoding, are copied; other mappings become dicts.
    """
    if isinstance(inputs, Mapping):
        # A copy is of the same class, whatever its constructor takes; that of a mapping of unknown kind may share its items.
        mapped = copy.copy(inputs) if isinstance(inputs, (dict, UserDict)) else {}
        for name, x in inputs.items():
            mapped[name] = tree_map(function, x)
        return mapped
    if isinstance(inputs, (tuple, list)):
        values = [tree_map(function, x) for x in inputs]
        return inputs._make(values) if hasattr(inputs, "_make") else type(inputs)(values)
    return function(inputs)


def leaves(inputs: Inputs) -> list[Any]:
    """Return everything in nested tuples, named tuples, lists and mappings, in the order that ``tree_map`` goes through it in."""
    if isinstance(inputs, (Mapping, tuple, list)):
        parts = inputs.values() if isinstance(inputs, Mapping) else inputs
        return [leaf for part in parts for leaf in leaves(part)]
    return [inputs]


def to_device(inputs: Inputs, device: torch.device) -> Any:
    """Return `inputs` with every tensor on `device`, copied without waiting where the device allows it."""
    return tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, inputs)


def sample_count(argument: str, name: str | int, x: Inputs) -> int:
    """Return N of one modality's inputs.

    Raises TypeError unless all of `x` are tensors of at least one dimension, and ValueError if their first dimensions differ;
    both call it ``argument[name]``.
    """
    if isinstance(x, Tensor) and x.dim():
        return x.shape[0]
    tensors = leaves(x)
    if not tensors or not all(isinstance(t, Tensor) and t.dim() for t in tensors):
        expected = "expected a tensor [N, …], or such tensors in tuples, lists and mappings"
        raise TypeError(f"{argument}[{name!r}]: {expected}, got {describe(x)}")
    N: int = tensors[0].shape[0]
    if any(t.shape[0] != N for t in tensors):
        raise ValueError(f"{argument}[{name!r}]: expected tensors of the same N, got {describe(x)}")
    return N


def check_by_modality(inputs: Mapping[str, Inputs]) -> None:
    """Raise TypeError unless `inputs` is a mapping."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: expected a dict {{modality: tensor}}, got {describe(inputs)}")


def sample_counts(inputs: Mapping[str, Inputs]) -> dict[str, int]:
    """Return {modality: N}; raise TypeError or ValueError as ``sample_count`` does."""
    check_by_modality(inputs)
    return {modality: sample_count("inputs", modality, x) for modality, x in inputs.items()}


def describe(value: Any) -> str:
    """Describe a value for an error message: a tensor by dtype and shape, a container by its kind and contents."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) < 5:
        return f"({', '.join(map(describe, value))})"
    kind = type(value).__name__
    return f"{kind} with {', '.join(map(str, value))}" if isinstance(value, Mapping) else kind

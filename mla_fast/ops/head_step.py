"""What surrounds the projection in a head's step where nobody waits for the device: a check before it, an undo after it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mla_fast.ops.backend import operator


@operator(
    "head_check_(Tensor[] looked_at, int layers, Tensor(a!) account, Tensor(b!)[] first, Tensor? found_inf, Tensor[] kept, "
    "Tensor(c!)[] snapshot) -> (Tensor, Tensor, Tensor)"
)
def _check(looked_at: list[Tensor], layers: int, account: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if any(t.dtype == torch.float64 for t in looked_at) else torch.float32
    bad, skip = account.new_empty((), dtype=torch.float32), account.new_empty(layers, dtype=torch.float32)
    return bad, account.new_empty(2 * layers, dtype=wide), skip


@operator("head_restore_(Tensor(a!)[] tensors, Tensor[] snapshot, Tensor bad) -> ()")
def _restore(*_: Any) -> None:
    return None


def head_check_(
    backend: str, looked_at: list[Tensor], layers: int, account: Tensor, first: list[Tensor],
    found_inf: Tensor | None, kept: list[Tensor], all_reduce: Callable[[Tensor], Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Begin a head's step: return (bad float32 [], squares [2 · layers], skip float32 [layers], copies of kept).

    looked_at holds G and x̄ of each layer in turn, then whatever else must be finite; squares are the sums of theirs. bad is 1
    where one of them or its norm is not finite or found_inf is not 0, and 0 elsewhere; all_reduce takes its maximum over the
    ranks, in place. account, int32 [2], counts the bad steps. skip is bad; with first (float32 [] of each layer, 1 until a step
    has been taken) it is max(bad, first), and first becomes first · bad.
    """
    copies = [torch.empty_like(t) for t in kept]
    if backend == "triton" and all_reduce is None and _one_launch(kept, copies, len(looked_at)):
        op = _check.on(backend, account.device)
        return *op(looked_at, layers, account, first, found_inf, kept, copies), copies
    bad, norms = _not_finite(looked_at, found_inf)
    if all_reduce is not None:
        all_reduce(bad)
    account[0].add_(bad.to(torch.int32))
    skip = bad.expand(layers)
    if first:
        skip = torch.stack([torch.maximum(bad, f) for f in first])
    for f in first:
        f.mul_(bad)
    for copy, t in zip(copies, kept, strict=True):
        copy.copy_(t)
    squares = torch.stack(norms[: 2 * layers]).square() if layers else bad.new_empty(0)
    return bad, squares, skip, copies


def _not_finite(looked_at: list[Tensor], found_inf: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """``head_check_``'s bad, and the norms."""
    norms = [torch.linalg.vector_norm(t) for t in looked_at]
    total = torch.stack(norms).sum()
    bad = torch.nan_to_num(total - total, nan=1.0)
    if found_inf is not None:
        bad = bad.logical_or(found_inf.reshape(()))
    return bad.to(torch.float32), norms


def head_restore_(backend: str, tensors: list[Tensor], copies: list[Tensor], bad: Tensor) -> None:
    """Undo a step where bad [] is 1: the first of the tensors become their copies again, and the others zeros."""
    old, created = tensors[: len(copies)], tensors[len(copies) :]
    if backend == "triton" and all(t.is_contiguous() for t in created) and _one_launch(old, copies, len(created)):
        _restore.on(backend, bad.device)(tensors, copies, bad)
        return
    good = bad == 0
    for t, before in itertools.zip_longest(tensors, copies):
        torch.where(good, t, torch.zeros_like(t) if before is None else before.to(t.dtype), out=t)


def _one_launch(tensors: list[Tensor], copies: list[Tensor], more: int) -> bool:
    """Whether the kernels can go through them all in one launch, and through each as through a stretch of memory."""
    from mla_fast.kernels.head_step import MAX_TENSORS

    alike = all(t.stride() == c.stride() and t.shape == c.shape for t, c in zip(tensors, copies, strict=True))
    return alike and len(tensors) + more <= MAX_TENSORS

"""Cross-entropy over rows of logits that become their own gradient, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mla_fast.ops.backend import operator

AT_A_TIME = 1 << 20  # logits whose exponentials stand beside them, without a kernel


@operator("softmax_sums(Tensor z, Tensor target, Tensor? class_weight, bool weighted) -> Tensor")
def _sums(z: Tensor, *_: Any) -> Tensor:
    return z.new_empty(4, len(z), dtype=torch.promote_types(z.dtype, torch.float32))


@operator(
    "softmax_delta_(Tensor(a!) z, Tensor target, Tensor top, Tensor log_S, Tensor own, Tensor spread, Tensor rest, "
    "Tensor? class_weight, bool smoothed) -> ()"
)
def _delta(*_: Any) -> None:
    return None


def softmax_sums(backend: str, z: Tensor, target: Tensor, class_weight: Tensor | None, weighted: bool) -> Tensor:
    """Return top = max z, log_S = log Σ_c exp(z_c − top), z_y and, if weighted, Σ_c w_c z_c of each row, [4, n].

    z: [n, C]; target: int64 [n]; class_weight: w [C], None for ones. Of a label outside 0 … C − 1 z_y is 0. In float32, of
    float64 logits in float64.
    """
    if not z.shape[1]:  # of a rank that has no class
        return z.new_tensor([-torch.inf, 0, 0, 0], dtype=torch.promote_types(z.dtype, torch.float32))[:, None].repeat(1, len(z))
    if backend == "triton":
        return _sums.on(backend, z.device)(z, target, class_weight, weighted)
    wide = torch.promote_types(z.dtype, torch.float32)
    top = z.amax(1).to(wide)
    base = torch.where(top.isinf(), 0, top)[:, None]
    log_S = torch.cat([(part.to(wide) - b).exp_().sum(1) for part, b in _pieces(z, base)]).log_()
    here = (target >= 0) & (target < z.shape[1])
    z_y = torch.where(here, z.gather(1, torch.where(here, target, 0)[:, None])[:, 0].to(wide), 0)
    if not weighted:
        return torch.stack([top, log_S, z_y, torch.zeros_like(top)])
    return torch.stack([top, log_S, z_y, z.sum(1, dtype=wide) if class_weight is None else _product(z, class_weight.to(wide))])


def softmax_delta_(
    backend: str, z: Tensor, target: Tensor, top: Tensor, log_S: Tensor, own: Tensor, spread: Tensor, rest: Tensor,
    class_weight: Tensor | None, smoothed: bool,
) -> None:  # fmt: skip
    """z_c ← spread exp(z_c − top − log_S) − rest w_c − own [c = y] of each row; rest is not read unless smoothed."""
    if not z.shape[1]:
        return
    if backend == "triton":
        _delta.on(backend, z.device)(z, target, top, log_S, own, spread, rest, class_weight, smoothed)
        return
    if z.dtype != top.dtype:  # in the wider one, some rows at a time
        for part, *rows in _pieces(z, target, top, log_S, own, spread, rest):
            delta = part.to(top.dtype)
            softmax_delta_(backend, delta, *rows, class_weight, smoothed)  # type: ignore[call-arg,arg-type]
            part.copy_(delta)
        return
    z.sub_(top[:, None]).sub_(log_S[:, None]).exp_().mul_(spread[:, None])
    if smoothed:
        z.sub_(rest[:, None] if class_weight is None else torch.outer(rest, class_weight.to(z.dtype)))
    here = (target >= 0) & (target < z.shape[1])
    z.scatter_add_(1, torch.where(here, target, 0)[:, None], torch.where(here, -own, 0)[:, None])


def _pieces(z: Tensor, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield some rows of all at a time."""
    count = max(AT_A_TIME // max(z.shape[1], 1), 1)
    return zip(*(t.split(count) for t in (z, *rows)), strict=True)


def _product(z: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([part.to(weight.dtype) @ weight for part in (piece for (piece,) in _pieces(z))])

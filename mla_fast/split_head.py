"""Cross-entropy of a head that ``fully_shard`` has split by rows: they stay where they are, and the softmax is over the ranks.

    z_r = H W_rᵀ + b_r,  δ = ∂L/∂z      of the samples H [N, s] of all ranks and the classes of rank r
    G_r = δ_rᵀ H,  ∂L/∂b_r = Σ_n δ_rn    complete where they are
    ∂L/∂H = Σ_r δ_r W_r                  each rank gets the rows of its own samples

The ranks send N features there and N gradients back, of each row its label, what it counts and four numbers of the softmax. A
call of the head would send all of W [C, s] to each of them, and its gradient back.

What ``fully_shard`` has done to a module is known by its class and the class of its hooks, which torch does not document: with
another torch the head would be called, as it is wherever it is more than a product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast import ops
from mla_fast.head import HeadLayer, local
from mla_fast.ops import Terms


def put_back(head: nn.Module) -> None:
    """Split again what a call without a backward pass, as of an evaluation, has left together."""
    for module in head.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def kind_before(module: nn.Module) -> type:
    """Return what ``fully_shard`` has made its own class of."""
    return type(module).__bases__[-1]


def gathers(hook: Any) -> bool:
    """Whether a hook is of ``fully_shard``, which puts the weight together for a call."""
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"


def fullest(layer: HeadLayer, bare: bool, rows: Mapping[str, int], group: dist.ProcessGroup | None) -> dict[str, int]:
    """Return how many rows of each modality the rank with most of them has, of the modalities whose features are less to send
    than the weight; none where the head has to be called.

    bare: whether this rank may spare a call. rows: of each modality, on this rank. All ranks come to the same: they ask each
    other, once a batch, and the host waits for the answer before the encoders begin. Nobody asks of a head that is whole, or
    whose rows are on other ranks than those of `group`.
    """
    if group is None or not layer.sharded or _mesh(layer.module).size() != dist.get_world_size(group):
        return {}
    counts = torch.tensor([*rows.values(), not bare], device=local(layer.module.weight).device)
    dist.all_reduce(counts, dist.ReduceOp.MAX, group)
    *most, called = counts.tolist()
    C, ranks = layer.module.out_features, dist.get_world_size(group)
    return {} if called else {m: n for m, n in zip(rows, most, strict=True) if ranks * n < C}


def backward(module: nn.Linear, features: Tensor, target: Tensor, terms: Terms, most: int) -> tuple[Tensor, Tensor]:
    """Leave this rank's part of the head's gradients, the mean over ranks, in ``.grad``; return (mean loss, ∂L/∂features).

    features: [n, s] of this rank; target: int64 [n]; terms: of this rank's loss, without smoothing or class weights; most: the
    largest n of any rank.
    """
    mesh, n = _mesh(module), len(features)
    group, ranks, room = mesh.get_group(), mesh.size(), (0, 0, 0, most - n)
    weight, bias = local(module.weight), None if module.bias is None else local(module.bias)
    part = -(-module.out_features // ranks)  # as torch.chunk splits
    about = torch.stack([target.double(), terms.own.double() / ranks], 1)  # rows that only fill up count nothing
    label, own = _gathered(F.pad(about, room), group, ranks).unbind(1)
    own = own.to(terms.own.dtype)
    of_all = Terms(own, torch.zeros_like(own), None, float(module.out_features), False)
    H, own_label = _gathered(F.pad(features, room), group, ranks), label.long() - mesh.get_local_rank() * part
    loss, of_features, of_weight, of_bias = ops.gradients(H, own_label, weight, bias, of_all, over=_Softmax(group, part))
    assert of_features is not None and of_weight is not None
    found = _added_up(of_features.to(of_weight.dtype), group, ranks)
    _leave_gradient(module.weight, of_weight)
    if of_bias is not None:
        _leave_gradient(module.bias, of_bias)
    return loss, (found[:n] * ranks).to(features.dtype)


class _Softmax:
    """Maximum and sums over the classes of all ranks."""

    def __init__(self, group: dist.ProcessGroup, largest: int):
        self.group, self.largest = group, largest

    def __call__(self, sums: Tensor) -> Tensor:
        top, log_S, z_y, z_w = sums
        highest = top.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, self.group)
        base = torch.where(highest.isinf(), 0, highest)
        added = torch.stack([torch.exp(log_S + (top - base)), z_y, z_w])
        dist.all_reduce(added, group=self.group)
        S, z_y, z_w = added
        return torch.stack([highest, S.log() + (base - highest), z_y, z_w])


def _gathered(x: Tensor, group: dist.ProcessGroup, ranks: int) -> Tensor:
    """Return [ranks · n, …] of the ranks' [n, …]."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 warns of the latter
    found = x.new_empty(ranks * len(x), *x.shape[1:])
    gather(found, x.contiguous(), group=group)
    return found


def _added_up(x: Tensor, group: dist.ProcessGroup, ranks: int) -> Tensor:
    """Return this rank's [n, …] of the sum of the ranks' [ranks · n, …]."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    found = x.new_empty(len(x) // ranks, *x.shape[1:])
    scatter(found, x, group=group)
    return found


def _leave_gradient(p: Any, gradient: Tensor) -> None:
    """Leave this rank's rows of a gradient as those of ``p.grad``."""
    from torch.distributed.tensor import DTensor  # takes a second

    shape = {"shape": p.shape, "stride": p.stride()}
    p.grad = DTensor.from_local(gradient.to(p.dtype), p.device_mesh, p.placements, run_check=False, **shape)


def _mesh(module: nn.Linear) -> Any:
    weight: Any = module.weight
    return weight.device_mesh

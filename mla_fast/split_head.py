"""Cross-entropy of a head that ``fully_shard`` has split by rows: they stay where they are, and the softmax is over the ranks.

    z_r = H W_rᵀ + b_r,  δ = ∂L/∂z      of the samples H [N, s] of all ranks and the classes of rank r
    G_r = δ_rᵀ H,  ∂L/∂b_r = Σ_n δ_rn    complete where they are
    ∂L/∂H = Σ_r δ_r W_r                  each rank gets the rows of its own samples

The ranks send N s features there and N s numbers of their gradients back, and four numbers a row for the softmax. A call of the
head would send all of W [C, s] to each of them, and its gradient back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast import ops
from mla_fast.head import local
from mla_fast.ops import Terms

# Their names since torch 2.13, which warns of those before.
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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


def pays(module: nn.Linear, total: float, group: dist.ProcessGroup | None) -> bool:
    """Whether features are less to send than weights. total: samples of a rank in the mean; the same on all ranks, as they agree.

    False where other ranks than those of `group` have the rows.
    """
    mesh = _mesh(module)
    return group is not None and mesh.size() == dist.get_world_size(group) and total * mesh.size() < len(module.weight)


def backward(module: nn.Linear, features: Tensor, target: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Leave this rank's part of the head's gradients, the mean over ranks, in ``.grad``; return (mean loss, ∂L/∂features).

    features: [n, s] of this rank, of any n; target: int64 [n]; terms: of this rank's loss, without smoothing or class weights.
    """
    mesh, n, s = _mesh(module), len(features), features.shape[1]
    group, ranks = mesh.get_group(), mesh.size()
    weight, bias = local(module.weight), None if module.bias is None else local(module.bias)
    part = -(-len(module.weight) // ranks)  # as torch.chunk splits
    largest = features.new_full((), n, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    room = int(largest) - n
    H = _gathered(F.pad(features, (0, 0, 0, room)), group, ranks)
    about = torch.stack([target.double(), terms.own.double() / ranks], 1)  # rows that only fill up count nothing
    labels, own = _gathered(F.pad(about, (0, 0, 0, room)), group, ranks).unbind(1)
    own = own.to(terms.own.dtype)
    of_all = Terms(own, torch.zeros_like(own), None, float(len(module.weight)), False)
    label = labels.long() - mesh.get_local_rank() * part
    loss, of_features, of_weight, of_bias = ops.gradients(H, label, weight, bias, of_all, over=_Softmax(group, part))
    assert of_features is not None and of_weight is not None
    sent = of_features.to(of_weight.dtype)
    found = sent.new_empty(n + room, s)
    reduce_scatter(found, sent, group=group)
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
    found = x.new_empty(ranks * len(x), *x.shape[1:])
    gather(found, x.contiguous(), group=group)
    return found


def _leave_gradient(p: Any, gradient: Tensor) -> None:
    """Leave this rank's rows of a gradient as those of ``p.grad``."""
    from torch.distributed.tensor import DTensor  # takes a second

    shape = {"shape": p.shape, "stride": p.stride()}
    p.grad = DTensor.from_local(gradient.to(p.dtype), p.device_mesh, p.placements, run_check=False, **shape)


def _mesh(module: nn.Linear) -> Any:
    weight: Any = module.weight
    return weight.device_mesh

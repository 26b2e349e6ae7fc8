"""A linear head's cross-entropy with all of its gradients in one call (eq. 2), without autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_fast import reference
from mla_fast.ops.backend import available, operator

SMALL = 1 << 21  # multiplications of one product; above, matrix libraries are faster than one loop on one thread


@operator(
    "linear_cross_entropy(Tensor features, Tensor target, Tensor weight, Tensor? bias, float total) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _linear_cross_entropy(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, total: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (N, s), C = features.shape, len(weight)
    loss, grad_features, grad, grad_bias, x_bar = map(features.new_empty, ((), (N, s), (C, s), (C,), (s,)))
    return loss, grad_features, grad, grad_bias, x_bar


def head_gradients(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, total: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what ``reference.linear_cross_entropy`` does, unchecked.

    A small head on the CPU takes one compiled call: a dozen of torch's on matrices this thin take two to three times as long, a
    tenth of a small model's step.
    """
    small = features.device.type == "cpu" and len(features) <= 512 and features.numel() * len(weight) <= SMALL
    if small and available("cpp") and features.dtype in (torch.float32, torch.float64):
        return _linear_cross_entropy.on("cpp", features.device)(features, target, weight, bias, total)
    return reference.linear_cross_entropy(features, target, weight, bias, total)

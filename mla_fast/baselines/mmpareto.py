"""MMPareto: Wei and Hu, "MMPareto: boosting multimodal learning with innocent unimodal assistance", ICML 2024."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mla_fast.baselines.multi_loss import MultiLoss


class MMPareto(MultiLoss):
    """Merge, for each encoder, the gradients of the joint and of its own loss so that neither loss has to rise.

        d = 2 (w_j g_j + w_u g_u),  w_j + w_u = 1;  w_j = ½ where g_j · g_u ≥ 0, and else that of the shortest mixture,
        w_j = (‖g_u‖² − g_j · g_u) / ‖g_j − g_u‖² in [0, 1];  d ← γ d · max(1, ‖g_j + g_u‖ / ‖d‖)

    g_j and g_u are the gradients of the joint and of the modality's own loss by all parameters of its encoder. Heads take their
    plain gradients. The released code keeps w_j between .001 and .999.
    """

    grid = {"gamma": (1.5, 1.0, 2.0)}

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int, gamma: float = 1.5):
        super().__init__(encoders, features, classes)
        self.gamma = gamma

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        losses = self.losses(*self.embed(inputs, present), target)
        self.used = [encoder for name, encoder in self.encoders.items() if name in inputs]
        self.own_losses = [loss for name, loss in zip(self.encoders, losses, strict=False) if name in inputs]
        return losses.sum()

    def gradients(self, loss: Tensor) -> None:
        """Take one backward pass for each modality's own loss and one for the sum, whose difference is the joint loss's."""
        parameters = [[p for p in encoder.parameters() if p.requires_grad] for encoder in self.used]
        pairs = zip(self.own_losses, parameters, strict=True)
        own = [torch.autograd.grad(loss_m, those, retain_graph=True, materialize_grads=True) for loss_m, those in pairs]
        super().gradients(loss)
        for those, g_own in zip(parameters, own, strict=True):
            g_u = torch.cat([g.flatten() for g in g_own])
            g_all = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in those])
            merged = merge(g_all - g_u, g_u, self.gamma)
            for p, g in zip(those, merged.split([p.numel() for p in those]), strict=True):
                p.grad = g.view_as(p)
        self.own_losses = []


def merge(g_j: Tensor, g_u: Tensor, gamma: float) -> Tensor:
    """Return γ d [n] of the joint and the unimodal gradient [n] of an encoder."""
    dot, tiny = g_j @ g_u, torch.finfo(g_j.dtype).tiny
    w_j = ((g_u @ g_u - dot) / (g_j - g_u).square().sum().clamp_min(tiny)).clamp(0, 1)
    w_j = torch.where(dot >= 0, 0.5, w_j)
    d = 2 * (w_j * g_j + (1 - w_j) * g_u)
    longer: Tensor = (g_j + g_u).norm() / d.norm().clamp_min(tiny)
    return gamma * d * longer.clamp_min(1)

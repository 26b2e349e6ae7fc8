"""MLB, multi-loss gradient modulation: Kontras, Chatzichristos, Blaschko and De Vos, BMVC 2024."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mla_fast.baselines.joint import mean_probability, scale_gradients
from mla_fast.baselines.multi_loss import MultiLoss


class MLB(MultiLoss):
    """Slow down the modality that is ahead and speed up the one that is behind, on multi-loss training.

        s_m = mean over the batch of softmax(z_m)[y] of the modality's own head,  ρ_m = mean of s_u over the others / s_m
        k_m = 1 + tanh(α (ρ_m − 1)) where ρ_m ≤ 1, else 1 + (β − 1) tanh(α (ρ_m − 1))

    k_m multiplies the gradients of encoder m and of its own head.
    """

    grid = {"alpha": (0.5, 0.8), "beta": (2.0, 10.0, 5.0)}
    scales_gradients = True

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int, alpha: float = 0.5, beta: float = 2.0):
        super().__init__(encoders, features, classes)
        self.alpha, self.beta = alpha, beta

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        h, available = self.embed(inputs, present)
        with torch.no_grad():
            self.coefficients = balance(mean_probability(self.own(h), available, target), self.alpha, self.beta)
        return self.losses(h, available, target).sum()

    def gradients(self, loss: Tensor) -> None:
        super().gradients(loss)
        scale_gradients(self.encoders.values(), self.coefficients)
        scale_gradients(self.heads, self.coefficients)


def balance(scores: Tensor, alpha: float, beta: float) -> Tensor:
    """Return k [M] of scores s [M]."""
    ratios = (scores.sum() - scores) / (len(scores) - 1) / scores.clamp_min(1e-12)
    steps = (alpha * (ratios - 1)).tanh()
    return 1 + torch.where(ratios <= 1, steps, (beta - 1) * steps)

"""OGM and OGM-GE, on-the-fly gradient modulation: Peng, Wei, Deng, Wang and Hu, CVPR 2022."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.concat import Concat
from mla_fast.baselines.joint import mean_probability


class OGM(Concat):
    """Train a head on the concatenated features, and slow down the encoder of the modality that is ahead.

        s_m = mean over the batch of softmax(W_m h_m + b / M)[y]                   eq. 8
        ρ_m = s_m / mean of s_u over the other modalities u                        eq. 9, for M = 2 the paper's ratio
        k_m = 1 − tanh(α ρ_m) where ρ_m > 1, else 1                                eq. 10
        g ← k_m g for each parameter's gradient g of encoder m                     eq. 11

    The released code modulates convolutions alone and the first half of the training; here as in the paper it is the whole
    encoder and all of it. The default α is that of the released command.
    """

    grid = {"alpha": (0.1, 0.3, 0.8)}
    scales_gradients = True

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int, alpha: float = 0.1):
        super().__init__(encoders, features, classes)
        self.alpha = alpha

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        h, available = self.embed(inputs, present)
        with torch.no_grad():
            self.coefficients = modulation(mean_probability(self.shares(h), available, target), self.alpha)
        return F.cross_entropy(self.fuse(h, available), target)

    @torch.no_grad()
    def gradients(self, loss: Tensor) -> None:
        super().gradients(loss)
        for k, encoder in zip(self.coefficients, self.encoders.values(), strict=True):
            for p in encoder.parameters():
                if p.grad is not None:
                    p.grad = self.modulated(k, p.grad)

    def modulated(self, k: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient that an encoder of coefficient k takes its step with."""
        return k * gradient


class OGMGE(OGM):
    """Add noise to every encoder's modulated gradient: g ← k_m g + N(0, std(g)²), eq. 13, "generalisation enhancement".

    The noise has the deviation of the gradient's entries before modulation, as in the released code.
    """

    def modulated(self, k: Tensor, gradient: Tensor) -> Tensor:
        noise = gradient.std(correction=0) * torch.randn_like(gradient)
        return super().modulated(k, gradient) + noise


def modulation(scores: Tensor, alpha: float) -> Tensor:
    """Return k [M] of scores [M]: eqs. 9 and 10."""
    others = (scores.sum() - scores) / (len(scores) - 1)
    ratios = scores / others
    return torch.where(ratios > 1, 1 - (alpha * ratios).tanh(), 1.0)

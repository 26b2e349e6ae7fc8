"""OGM-GE, on-the-fly gradient modulation: Peng, Wei, Deng, Wang and Hu, CVPR 2022."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mla_fast.baselines import Concat

ALPHA = 0.1


class OGMGE(Concat):
    """Concatenation, but the encoder of the modality that is ahead is slowed down, and all encoders get noise.

        s_m = mean over the batch of softmax(W_m h_m + b / M)[y]                   eq. 8
        ρ_m = s_m / mean of s_u over the other modalities u                        eq. 9, for M = 2 the paper's ratio
        k_m = 1 − tanh(α ρ_m) where ρ_m > 1, else 1                                eq. 10
        g ← k_m g + N(0, std(g)²) for each parameter's gradient g of encoder m     eqs. 11 and 13

    The noise has the deviation of the gradient's entries, as in the released code, which modulates convolutions alone and the
    first half of the training; here as in the paper it is the whole encoder and all of it. α is that of the released command.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int, alpha: float = ALPHA):
        super().__init__(encoders, features, classes)
        self.alpha = alpha

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        h, here = self.embed(inputs, present)
        self.coefficients = modulation(self.scores(h.detach(), here, target), self.alpha)
        return nn.functional.cross_entropy(self.fuse(h, here), target)

    @torch.no_grad()
    def scores(self, h: Tensor, here: Tensor, target: Tensor) -> Tensor:
        """s [M]: how much each modality's share of the logits gives to the right classes."""
        M = len(h)
        logits = torch.einsum("mns,cms->mnc", h, self.head.weight.unflatten(1, (M, -1))) + self.head.bias / M
        right = logits.softmax(-1)[:, torch.arange(len(target)), target]  # [M, N]
        return (right * here).sum(1) / here.sum(1).clamp_min(1)

    @torch.no_grad()
    def adjust_gradients(self) -> None:
        for k, encoder in zip(self.coefficients, self.encoders.values(), strict=True):
            for p in encoder.parameters():
                noise = p.grad.std(correction=0) * torch.randn_like(p.grad)
                p.grad = k * p.grad + noise


def modulation(scores: Tensor, alpha: float) -> Tensor:
    """k [M] of scores [M]: eqs. 9 and 10."""
    others = (scores.sum() - scores) / (len(scores) - 1)
    ratios = scores / others
    return torch.where(ratios > 1, 1 - (alpha * ratios).tanh(), 1.0)

"""G-Blending, gradient blending: Wang, Tran and Feiszli, CVPR 2020."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mla_fast.baselines.joint import Setup, on_device
from mla_fast.baselines.multi_loss import MultiLoss
from mla_fast.parts import evaluating


class GBlending(MultiLoss):
    """Weigh the losses of the joint and the modalities' own heads by how well each generalises, estimated once (offline).

        L = Σ_k w_k CE(z_k, y) over the modalities' own heads and the joint head
        w_k ∝ |G_k / O_k²|,  Σ w_k = 1,  G = V_0 − V_n,  O = (V_n − T_n) − (V_0 − T_0)

    T and V are the losses on the training and the held-out samples before and after n epochs (a super-epoch) in which a copy
    of the model is trained on loss k alone; n is at most 10 and the epochs of the run. O is at least 10⁻⁴, as in MultiBench.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int, super_epoch: int = 10):
        super().__init__(encoders, features, classes)
        self.super_epoch = super_epoch
        self.weights: Tensor
        self.register_buffer("weights", torch.full((len(encoders) + 1,), 1 / (len(encoders) + 1)))

    def prepare(self, setup: Setup) -> int:
        n, rates = min(self.super_epoch, setup.epochs), []
        for k in range(len(self.weights)):
            alone = copy.deepcopy(self)
            alone.weights = torch.zeros_like(self.weights).index_fill(0, torch.tensor([k], device=self.weights.device), 1)
            before = [alone.mean_losses(part)[k] for part in (setup.train, setup.held_out)]
            setup.fit(alone, n)
            after = [alone.mean_losses(part)[k] for part in (setup.train, setup.held_out)]
            rates.append(torch.stack(before + after))
        T_0, V_0, T_n, V_n = torch.stack(rates, 1)
        self.weights = blending_weights(T_0, V_0, T_n, V_n)
        self.passes_before = 2.0 * n  # each encoder: with its own loss, and with the joint one
        return super().prepare(setup)

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        return (self.weights * self.losses(*self.embed(inputs, present), target)).sum()

    @torch.no_grad()
    def mean_losses(self, loader: Iterable[Sequence[Any]]) -> Tensor:
        """Return the losses [M + 1] over all batches, in evaluation mode."""
        total, samples = torch.zeros_like(self.weights), 0
        with evaluating(self):
            for inputs, target, present in on_device(self, loader):
                total += len(target) * self.losses(*self.embed(inputs, present), target)
                samples += len(target)
        return total / samples


def blending_weights(T_0: Tensor, V_0: Tensor, T_n: Tensor, V_n: Tensor) -> Tensor:
    """Return w [K] of the training losses T and held-out losses V, each [K], before and after."""
    gain, overfitting = V_0 - V_n, (V_n - T_n) - (V_0 - T_0)
    ratio = (gain / overfitting.clamp_min(1e-4).square()).abs()
    return ratio / ratio.sum().clamp_min(1e-12)

"""AGM, adaptive gradient modulation: Li, Li, Hu, Lei, Li and Zhang, ICCV 2023."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.concat import Concat
from mla_fast.baselines.joint import unimodal_losses


class AGM(Concat):
    """Scale the gradient through each modality's response by how far it is ahead of its usual lead.

        φ_a = ½ [z(a, v) − z(0, v) + z(a, 0)], the Shapley value; z = Σ φ_m, and with one linear head φ_m = W_m h_m + b / M
        S_m = CE(φ_m, y),  r_a = exp(S_v − S_a),  r*_a = exp(τ_v − τ_a), τ_m the mean of S_m over the batches before
        k_a = exp(α min(r*_a − r_a, 10)) multiplies the gradient that flows back through φ_a;  L = CE(Σ φ_m, y)

    For M modalities r_m = exp(M / (M − 1) · (mean of S − S_m)), which is the same for two. A modality is left out by features of
    zero, as everywhere here; the released code encodes inputs of zero. The modality that leads more than usual gets k < 1: the
    paper's sign, which some ports turn around.
    """

    grid = {"alpha": (1.0, 0.3, 2.0)}
    scales_gradients = True

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int, alpha: float = 1.0):
        super().__init__(encoders, features, classes)
        self.alpha = alpha
        self.tau: Tensor
        self.register_buffer("tau", torch.zeros(len(encoders)))
        self.batches = 0

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        h, available = self.embed(inputs, present)
        phi = self.shares(h)  # [M, N, C]
        scores = unimodal_losses(phi.detach(), available, target)
        k = coefficients(scores, self.tau, self.alpha)[:, None, None]
        self.batches += 1
        self.tau = self.tau + (scores - self.tau) / self.batches
        scaled = k * phi + (1 - k) * phi.detach()  # the values of phi, k times its gradient
        return F.cross_entropy(scaled.sum(0), target)


def coefficients(scores: Tensor, tau: Tensor, alpha: float) -> Tensor:
    """Return k [M] of the batch's losses S [M] and their running means τ [M]."""
    return (alpha * (ratios(tau) - ratios(scores)).clamp_max(10)).exp()


def ratios(losses: Tensor) -> Tensor:
    """Return r [M] of losses [M]: above 1 where a modality is ahead of the others."""
    M = len(losses)
    return (M / (M - 1) * (losses.mean() - losses)).exp()

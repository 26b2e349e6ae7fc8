"""QMF, quality-aware multimodal fusion: Zhang, Wu, Zhang, Hu, Fu, Zhou and Peng, ICML 2023."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.accuracy.baselines.late_fusion import LateFusion, unimodal_losses

SCALE, RANK_WEIGHT = 0.1, 0.1


class QMF(LateFusion):
    """A classifier for each modality, weighted sample by sample with its confidence, which is trained to follow its losses.

        E_m = −log Σ_c exp(z_mc),   w_m = −0.1 E_m,   z = Σ_m w_m z_m over the modalities that are there
        L = CE(z, y) + Σ_m CE(z_m, y) + λ Σ_m mean_i max(0, g(κ_i, κ_j)(w_i − w_j) + |κ_i − κ_j|)

    κ_i is the mean loss of sample i so far, of modality m, scaled so that those of all samples seen are in [0, 1]; j is the next
    sample of the batch; g is the sign of κ_i − κ_j: who has the larger loss shall have less confidence. Scales and λ are those of
    the released code for pairs of images. It subtracts the margin |κ_i − κ_j|; it is added here as by Moon et al. (ICML 2020),
    whose loss this is.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features, classes)
        # Of each sample [M, samples]; as long as the largest index seen.
        self.register_buffer("total_loss", torch.zeros(len(encoders), 0))
        self.register_buffer("times", torch.zeros(len(encoders), 0))

    def fuse(self, h: Tensor, here: Tensor) -> Tensor:
        return weighted(self.logits(h), here)

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        h, here = self.embed(inputs, present)
        logits = self.logits(h)
        self.remember(logits.detach(), here, target, index)
        kappa = self.mean_losses()[:, index]
        ranking = sum(rank_loss(w[seen], k[seen]) for w, k, seen in zip(confidence(logits), kappa, here, strict=True))
        classification = F.cross_entropy(weighted(logits, here), target) + unimodal_losses(logits, here, target).sum()
        return classification + RANK_WEIGHT * ranking

    def remember(self, logits: Tensor, here: Tensor, target: Tensor, index: Tensor) -> None:
        """Adds the losses of a batch to those of its samples."""
        new = max(int(index.max()) + 1 - self.times.shape[1], 0)
        self.total_loss, self.times = F.pad(self.total_loss, (0, new)), F.pad(self.times, (0, new))
        losses = F.cross_entropy(logits.transpose(1, 2), target.expand(len(logits), -1), reduction="none")
        self.total_loss[:, index] += losses * here
        self.times[:, index] += here

    def mean_losses(self) -> Tensor:
        """κ [M, samples] in [0, 1]; 0 for samples that have not been seen."""
        seen = self.times > 0
        means = self.total_loss / self.times.clamp_min(1)
        low = means.masked_fill(~seen, torch.inf).amin(1, keepdim=True)
        high = means.amax(1, keepdim=True)
        return torch.where(seen, (means - low) / (high - low).clamp_min(1e-12), 0)


def confidence(logits: Tensor) -> Tensor:
    """w = −0.1 E = 0.1 log Σ exp z: [..., C] → [...]"""
    return SCALE * logits.logsumexp(-1)


def weighted(logits: Tensor, here: Tensor) -> Tensor:
    """Σ_m w_m z_m: logits [M, N, C], here bool [M, N] → [N, C]"""
    return ((confidence(logits) * here)[..., None] * logits).sum(0)


def rank_loss(w: Tensor, kappa: Tensor) -> Tensor:
    """Mean over a batch of max(0, g(κ_i, κ_j)(w_i − w_j) + |κ_i − κ_j|), j the sample after i, in a ring; w and kappa [N]."""
    gap = kappa - kappa.roll(-1)
    hinge = gap.sign() * (w - w.roll(-1)) + gap.abs()
    return hinge.relu().sum() / max(len(w), 1)

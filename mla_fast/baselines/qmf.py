"""QMF, quality-aware multimodal fusion: Zhang, Wu, Zhang, Hu, Fu, Zhou and Peng, ICML 2023."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.joint import unimodal_losses
from mla_fast.baselines.late_fusion import LateFusion

SCALE, RANK_WEIGHT = 0.1, 0.1


class QMF(LateFusion):
    """Weight the classifier of each modality, sample by sample, by its confidence, which is trained to follow its losses.

        E_m = −log Σ_c exp(z_mc),   w_m = −0.1 E_m,   z = Σ_m w_m z_m over the modalities that are there
        L = CE(z, y) + Σ_m CE(z_m, y) + λ Σ_m mean_i max(0, g(κ_i, κ_j)(w_i − w_j) + |κ_i − κ_j|)

    κ_i is the mean loss of sample i so far, of modality m, scaled so that those of all samples seen are in [0, 1]; j is the next
    sample of the batch; g is the sign of κ_i − κ_j: who has the larger loss shall have less confidence. Scales and λ are those of
    the released code for pairs of images. It subtracts the margin |κ_i − κ_j|; it is added here as by Moon et al. (ICML 2020),
    whose loss this is.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features, classes)
        self.total_loss: Tensor  # of each sample [M, samples]; as long as the largest index seen
        self.times: Tensor
        self.register_buffer("total_loss", torch.zeros(len(encoders), 0))
        self.register_buffer("times", torch.zeros(len(encoders), 0))

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        return weighted(self.logits(h), available)

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        h, available = self.embed(inputs, present)
        logits = self.logits(h)
        self.remember(logits.detach(), available, target, index)
        kappa = self.mean_losses()[:, index]
        pairs = zip(confidence(logits), kappa, available, strict=True)
        ranking = torch.stack([rank_loss(w[seen], k[seen]) for w, k, seen in pairs]).sum()
        classification = F.cross_entropy(weighted(logits, available), target) + unimodal_losses(logits, available, target).sum()
        return classification + RANK_WEIGHT * ranking

    def remember(self, logits: Tensor, available: Tensor, target: Tensor, index: Tensor | None) -> None:
        """Add the losses of a batch to those of its samples."""
        if index is None:
            raise ValueError("index: QMF remembers samples and expects their places in the training set, got none")
        new = max(int(index.max()) + 1 - self.times.shape[1], 0)
        self.total_loss, self.times = F.pad(self.total_loss, (0, new)), F.pad(self.times, (0, new))
        losses = F.cross_entropy(logits.transpose(1, 2), target.expand(len(logits), -1), reduction="none")
        self.total_loss[:, index] += losses * available
        self.times[:, index] += available

    def mean_losses(self) -> Tensor:
        """Return κ [M, samples] in [0, 1], 0 for samples that have not been seen."""
        seen = self.times > 0
        means = self.total_loss / self.times.clamp_min(1)
        low = means.masked_fill(~seen, torch.inf).amin(1, keepdim=True)
        high = means.amax(1, keepdim=True)
        return torch.where(seen, (means - low) / (high - low).clamp_min(1e-12), 0)


def confidence(logits: Tensor) -> Tensor:
    """Return w = −0.1 E = 0.1 log Σ exp z, [...], of logits [..., C]."""
    return SCALE * logits.logsumexp(-1)


def weighted(logits: Tensor, available: Tensor) -> Tensor:
    """Return Σ_m w_m z_m [N, C] of logits [M, N, C] over the modalities available, bool [M, N]."""
    return ((confidence(logits) * available)[..., None] * logits).sum(0)


def rank_loss(w: Tensor, kappa: Tensor) -> Tensor:
    """Return the mean of max(0, g(κ_i, κ_j)(w_i − w_j) + |κ_i − κ_j|) over w and kappa [N], j the sample after i, in a ring."""
    gap = kappa - kappa.roll(-1)
    hinge = gap.sign() * (w - w.roll(-1)) + gap.abs()
    return hinge.relu().sum() / max(len(w), 1)

"""Late fusion: a classifier for each modality, trained on its own, and the mean of their logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines import JointModel


class LateFusion(JointModel):
    """z_m = W_m h_m + b_m,  L = Σ_m CE(z_m, y),  z = mean of z_m over the modalities that are there.

    No parameter is shared, so the sum trains each classifier as it would be trained alone. A modality alone is its classifier.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.heads = nn.ModuleList(nn.Linear(features, classes) for _ in encoders)

    def logits(self, h: Tensor) -> Tensor:
        """[M, N, C], one classifier's after the other."""
        return torch.stack([head(x) for head, x in zip(self.heads, h, strict=True)])

    def fuse(self, h: Tensor, here: Tensor) -> Tensor:
        counts = here.sum(0).clamp_min(1)
        return (self.logits(h) * here[..., None]).sum(0) / counts[:, None]

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        h, here = self.embed(inputs, present)
        return unimodal_losses(self.logits(h), here, target).sum()


def unimodal_losses(logits: Tensor, here: Tensor, target: Tensor) -> Tensor:
    """CE of each modality [M], the mean over the samples that have it, 0 without any; logits [M, N, C], here bool [M, N]."""
    losses = F.cross_entropy(logits.transpose(1, 2), target.expand(len(logits), -1), reduction="none")
    return (losses * here).sum(1) / here.sum(1).clamp_min(1)

"""Late fusion: a classifier for each modality, trained on its own, and the mean of their logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mla_fast.baselines.joint import JointModel, unimodal_losses


class LateFusion(JointModel):
    """Train a classifier for each modality; predict by the mean of the logits of the modalities that are there.

        z_m = W_m h_m + b_m,  L = Σ_m CE(z_m, y),  z = mean of z_m

    No parameter is shared, so the sum trains each classifier as it would be trained alone. A modality alone is its classifier.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.heads = nn.ModuleList(nn.Linear(features, classes) for _ in encoders)

    def logits(self, h: Tensor) -> Tensor:
        """Return the logits of every classifier, [M, N, C]."""
        return torch.stack([head(x) for head, x in zip(self.heads, h, strict=True)])

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        counts = available.sum(0).clamp_min(1)
        return (self.logits(h) * available[..., None]).sum(0) / counts[:, None]

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        h, available = self.embed(inputs, present)
        return unimodal_losses(self.logits(h), available, target).sum()

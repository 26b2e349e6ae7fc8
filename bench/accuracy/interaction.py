"""The interaction head without MLA: the control that tells what of the gain is the head's, and what alternation's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mla_fast as mla
from mla_fast.baselines import JointModel


class MultiLossInteraction(JointModel):
    """Σ_m CE(z_m) + CE(mean_m z_m + r), trained jointly and without a stop-gradient; predicts by mean_m z_m + r."""

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.head = nn.Linear(features, classes)
        self.interaction = mla.Interaction(features, classes, list(encoders))

    def _logits(self, h: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """(z [M, N, C], mean_m z_m + r)."""
        z = self.head(h)
        there = available[..., None]
        mean = torch.where(there, z, 0).sum(0) / available.sum(0).clamp(min=1)[:, None]
        return z, mean + self.interaction(dict(zip(self.modalities, h, strict=True)), available.T)

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        return self._logits(h, available)[1]

    def loss(self, inputs, target, present=None, index=None) -> Tensor:
        h, available = self.embed(inputs, present)
        z, fused = self._logits(h, available)
        each = F.cross_entropy(z.transpose(1, 2), target.expand(len(z), -1), reduction="none")
        unimodal = (each * available).sum(1) / available.sum(1).clamp(min=1)
        return unimodal.sum() + F.cross_entropy(fused, target)


CONTROLS = {"Multi-loss + interaction": MultiLossInteraction}
INTERACTIONS = {"MLA + interaction": "encoders", "MLA + detached interaction": "detached"}

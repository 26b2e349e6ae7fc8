"""Joint training of one head on the sum of the features."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mla_fast.baselines.joint import JointModel


class Sum(JointModel):
    """Apply one linear head to the sum of the modalities' features: z = W Σ_m h_m + b.

    A modality alone uses the same head. As the head is linear, these logits are the modality's share of the joint logits.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.head = nn.Linear(features, classes)

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        logits: Tensor = self.head(h.sum(0))
        return logits

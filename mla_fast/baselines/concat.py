"""Joint training of one head on the concatenated features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mla_fast.baselines.joint import JointModel


class Concat(JointModel):
    """Apply one linear head to the concatenated features of the modalities: z = Σ_m W_m h_m + b.

    A modality alone uses its columns W_m of the head.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.head = nn.Linear(features * len(encoders), classes)

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        logits: Tensor = self.head(h.transpose(0, 1).flatten(1))
        return logits

    def shares(self, h: Tensor) -> Tensor:
        """Return each modality's share W_m h_m + b / M of the logits, [M, N, C]; they sum to the logits."""
        M = len(h)
        return torch.einsum("mns,cms->mnc", h, self.head.weight.unflatten(1, (M, -1))) + self.head.bias / M

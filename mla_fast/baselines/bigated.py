"""Gated fusion: Kiela, Grave, Joulin and Mikolov, "Efficient large-scale multi-modal classification", AAAI 2018."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mla_fast.baselines.joint import JointModel


class BiGated(JointModel):
    """Pass the last modality's features through gates that the others open, both after a linear map of their own:

        z = W (σ(U [h_1, …, h_{M−1}] + c) ⊙ (V h_M + d)) + b

    It is the sum over features of products of the two sides, a bilinear form of rank s with one side squashed. A modality
    alone: the features of the others are zero.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.gate = nn.Linear(features * (len(encoders) - 1), features)
        self.value = nn.Linear(features, features)
        self.head = nn.Linear(features, classes)

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        gate = self.gate(h[:-1].transpose(0, 1).flatten(1)).sigmoid()
        logits: Tensor = self.head(gate * self.value(h[-1]))
        return logits

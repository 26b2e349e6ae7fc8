"""FiLM, feature-wise linear modulation: Perez, Strub, de Vries, Dumoulin and Courville, AAAI 2018."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mla_fast.baselines.joint import JointModel


class FiLM(JointModel):
    """Scale and shift the last modality's features, feature by feature, as the others say (eqs. 1 and 2 of the paper):

        γ, β = F [h_1, …, h_{M−1}] + c,    z = W (γ ⊙ h_M + β) + b

    A modality alone: the features of the others are zero.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features)
        self.film = nn.Linear(features * (len(encoders) - 1), 2 * features)
        self.head = nn.Linear(features, classes)

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        gamma, beta = self.film(h[:-1].transpose(0, 1).flatten(1)).chunk(2, 1)
        logits: Tensor = self.head(gamma * h[-1] + beta)
        return logits

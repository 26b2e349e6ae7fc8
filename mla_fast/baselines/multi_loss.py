"""Multi-loss: a joint head and a head for each modality, trained on the sum of their losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.concat import Concat
from mla_fast.baselines.joint import unimodal_losses


class MultiLoss(Concat):
    """Train a joint head beside a head of its own for each modality, all losses with equal weight.

        z = W [h_1, …, h_M] + b,  z_m = W_m h_m + b_m,  L = CE(z, y) + Σ_m CE(z_m, y)

    The joint head predicts; a sample with a single modality is predicted by that modality's own head. G-Blending (Wang, Tran
    and Feiszli, CVPR 2020) with equal weights is this method.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int):
        super().__init__(encoders, features, classes)
        self.heads = nn.ModuleList(nn.Linear(features, classes) for _ in encoders)

    def own(self, h: Tensor) -> Tensor:
        """Return the logits of the modalities' own heads, [M, N, C]."""
        return torch.stack([head(x) for head, x in zip(self.heads, h, strict=True)])

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        single = available.sum(0) == 1
        own = (self.own(h) * available[..., None]).sum(0)
        return torch.where(single[:, None], own, super().fuse(h, available))

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        return self.losses(*self.embed(inputs, present), target).sum()

    def losses(self, h: Tensor, available: Tensor, target: Tensor) -> Tensor:
        """Return the losses of each modality's own head and of the joint head, [M + 1]."""
        joint = F.cross_entropy(super().fuse(h, available), target)
        return torch.cat([unimodal_losses(self.own(h), available, target), joint[None]])

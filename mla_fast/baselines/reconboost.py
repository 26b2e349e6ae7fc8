"""ReconBoost: Hua, Xu, Bao, Yang and Huang, "ReconBoost: boosting can achieve modality reconcilement", ICML 2024."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.joint import Setup
from mla_fast.baselines.late_fusion import LateFusion

STAGE = 4  # epochs of a stage and of a rectification, at most


class ReconBoost(LateFusion):
    """Train one modality at a time on what the others get wrong, and all together after each such stage.

        stage of modality k:  q = softmax(β Σ_{j≠k} z_j),  L_k = mean of −(w_1 − w_2 q[y]) log softmax(z_k)[y] / C
        rectification:        L = CE(β Σ z_m, y) for all parameters and β;  prediction: β Σ z_m

    A stage moves modality k alone, q has no gradient. As many passes over each modality as in other methods: stages and
    rectifications last up to 4 epochs, what is left of the passes is rectification. The paper's memory consolidation is left out,
    which has no gradient in the released code. That code starts from encoders trained alone; this one from the initial values.
    """

    grid = {"w_1": (5.0, 4.0, 8.0)}

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int, w_1: float = 5.0, w_2: float = 1.0):
        super().__init__(encoders, features, classes)
        self.w_1, self.w_2 = w_1, w_2
        self.beta = nn.Parameter(torch.ones(()))
        self.plan: list[int | None] = []
        self.turn: int | None = None  # the modality whose stage it is, None in rectification

    def prepare(self, setup: Setup) -> int:
        self.plan = schedule(setup.epochs, len(self.encoders))
        return len(self.plan)

    def begin_epoch(self, epoch: int) -> None:
        if epoch >= len(self.plan):
            raise ValueError(f"epochs: expected at most the {len(self.plan)} that prepare(setup) returned, got more")
        self.turn = self.plan[epoch]

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        return self.beta * (self.logits(h) * available[..., None]).sum(0)

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        if self.turn is not None:
            return self.stage_loss(self.turn, inputs, target, present)
        return F.cross_entropy(self.fuse(*self.embed(inputs, present)), target)

    def stage_loss(self, k: int, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None) -> Tensor:
        """Return L_k, of which nothing but modality k has a gradient."""
        with torch.no_grad():
            h, available = self.embed(inputs, present)
            others = available.clone()
            others[k] = False
            q = self.fuse(h, others).softmax(1)[torch.arange(len(target), device=target.device), target]
        modality = self.modalities[k]
        if modality in inputs:
            h, _ = self.embed({modality: inputs[modality]}, present)
        logits: Tensor = self.heads[k](h[k])
        own = F.cross_entropy(logits, target, reduction="none")
        weighted = (self.w_1 - self.w_2 * q) * own * available[k]
        return weighted.sum() / available[k].sum().clamp_min(1) / logits.shape[1]


def schedule(epochs: int, M: int) -> list[int | None]:
    """Return whose turn it is in each epoch, None for all, so that each of M modalities is trained on `epochs` times."""
    length = max(1, min(STAGE, epochs // (2 * (1 + M))))
    cycle: list[int | None] = []
    for k in range(M):
        cycle += [k] * length + [None] * length
    cycles, left = divmod(epochs, length * (1 + M))
    return cycle * cycles + [None] * left

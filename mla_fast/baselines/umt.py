"""UMT, uni-modal teacher, and UME, uni-modal ensemble: Du, Teng, Li, Liu, Yuan, Wang, Yuan and Zhao, ICML 2023."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.concat import Concat
from mla_fast.baselines.joint import Setup
from mla_fast.baselines.late_fusion import LateFusion


class UME(LateFusion):
    """Train each modality alone and predict by the mean of the softmax outputs; the logits are the logarithm of that mean."""

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        log_p = self.logits(h).log_softmax(-1).masked_fill(~available[..., None], -torch.inf)
        mean = log_p.logsumexp(0) - available.sum(0).clamp_min(1)[:, None].log()
        return torch.where(available.any(0)[:, None], mean, 0.0)


class UMT(Concat):
    """Train jointly while each encoder's features stay close to those of an encoder that was trained alone beforehand.

        L = CE(z, y) + λ Σ_m mean of (h_m − teacher_m(x_m))²

    The mean is over the samples that have the modality and over the features. The teachers are trained by ``prepare`` for as many
    passes as the run has, from the same initial values, and are frozen. ValueError without ``prepare``.
    """

    grid = {"weight": (10.0, 1.0, 0.1)}

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int, weight: float = 10.0):
        super().__init__(encoders, features, classes)
        self.classes, self.weight = classes, weight
        self.teachers: Teachers | None = None

    def prepare(self, setup: Setup) -> int:
        alone = LateFusion(copy.deepcopy(dict(self.encoders.items())), self.features, self.classes).to(next(self.parameters()))
        setup.fit(alone, setup.epochs)
        self.teachers = Teachers(alone)
        self.passes_before = float(setup.epochs)
        return super().prepare(setup)

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        if self.teachers is None:
            raise ValueError("teachers: UMT expects prepare(setup) before training")
        h, available = self.embed(inputs, present)
        distances = (h - self.teachers(inputs, present)).square().mean(-1)  # [M, N]
        penalty = (distances * available).sum(1) / available.sum(1).clamp_min(1)
        return F.cross_entropy(self.fuse(h, available), target) + self.weight * penalty.sum()


class Teachers:
    """Features [M, N, s] of encoders that are frozen, in evaluation mode, and no part of the model that learns from them."""

    def __init__(self, model: LateFusion):
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], present: Tensor | None) -> Tensor:
        return self.model.embed(inputs, present)[0]

"""Diagnosing & Re-learning: Wei, Li, Feng and Hu, "Diagnosing and re-learning for balanced multimodal learning", ECCV 2024."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mla_fast.baselines.concat import Concat
from mla_fast.baselines.joint import Setup, on_device
from mla_fast.parts import evaluating

TIMES = 3


class Relearning(Concat):
    """Train jointly, and put encoders back towards their initial values where their features separate the training data alone.

        g_m = |P_train − P_held out|, P the purity of k-means with K = C on the features of modality m, scaled to [0, 1]
        a_m = tanh(λ g_m),  θ_m ← a_m θ_m,initial + (1 − a_m) θ_m

    Three times, after each quarter of the epochs; the paper has every 20 epochs of 80 to 100. ValueError without ``prepare``;
    ImportError without scikit-learn.
    """

    grid = {"strength": (3.0, 1.0, 10.0)}

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int, strength: float = 3.0):
        super().__init__(encoders, features, classes)
        self.classes, self.strength = classes, strength
        self.setup: Setup | None = None

    def prepare(self, setup: Setup) -> int:
        self.setup = setup
        self.initial = {name: copy.deepcopy(encoder.state_dict()) for name, encoder in self.encoders.items()}
        return super().prepare(setup)

    def begin_epoch(self, epoch: int) -> None:
        if self.setup is None:
            raise ValueError("setup: Relearning expects prepare(setup) before training")
        every = max(1, self.setup.epochs // (TIMES + 1))
        if epoch % every == 0 and 1 <= epoch // every <= TIMES:
            self.relearn(self.setup)

    def relearn(self, setup: Setup) -> None:
        """Move each encoder towards its initial values by the gap between the purities of training and held-out features."""
        both = [self.class_features(part) for part in (setup.train, setup.held_out)]
        for m, modality in enumerate(self.modalities):
            parts = (part[m] for part in both)
            train, held_out = (purity(h[seen], target[seen], self.classes) for h, seen, target in parts)
            a = math.tanh(self.strength * abs(train - held_out))
            with torch.no_grad():
                for name, p in self.encoders[modality].named_parameters():
                    p.lerp_(self.initial[modality][name].to(p), a)

    @torch.no_grad()
    def class_features(self, loader: Iterable[Sequence[Any]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return for each modality the features [N, s] of all samples, which have it [N], and their classes [N]."""
        with evaluating(self):
            parts = [(*self.embed(inputs, present), target) for inputs, target, present in on_device(self, loader)]
        h, available = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
        target = torch.cat([part[2] for part in parts])
        return [(h[m], available[m], target) for m in range(len(h))]


def purity(features: Tensor, target: Tensor, classes: int) -> float:
    """Return the share of samples in the most frequent class of their cluster, by k-means on features [N, s] scaled to [0, 1]."""
    from sklearn.cluster import KMeans

    if len(target) < classes or not features.isfinite().all():
        return 0.0  # as for the other part: no clusters, nothing known
    low, high = features.amin(0), features.amax(0)
    scaled = (features - low) / torch.where(high > low, high - low, 1)
    clusters = KMeans(classes, n_init=1, random_state=0).fit_predict(scaled.double().cpu().numpy())
    table = torch.zeros(classes, classes, dtype=torch.long)
    ones = torch.ones(len(target), dtype=torch.long)
    table.index_put_((torch.from_numpy(clusters).long(), target.cpu()), ones, accumulate=True)
    return float(table.amax(1).sum()) / len(target)

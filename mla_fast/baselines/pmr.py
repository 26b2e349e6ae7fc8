"""PMR, prototypical modal rebalance: Fan, Xu, Wang, Wang and Guo, CVPR 2023."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.concat import Concat
from mla_fast.baselines.joint import Setup, mean_probability, on_device, unimodal_losses

SHARE = 0.1  # of the training batches, from which prototypes are made
KEPT = 0.2  # of the old prototypes


class PMR(Concat):
    """Pull the features of the modality that is behind towards the prototypes of their classes.

        c_m = class means of h_m over the first tenth of the training batches of each epoch,  c ← .2 c_old + .8 c_new
        sim_m = −‖h_m − c_m‖ [C],  s_m = mean over the batch of softmax(sim_m)[y]
        L = CE(z, y) + α CE(sim_m, y) for the modality m of the smaller s_m, as in the released code

    For two modalities, for which the paper defines it: ValueError for another number, and without ``prepare``.
    """

    defined_for = 2
    grid = {"alpha": (1.0, 0.3, 3.0)}

    def __init__(self, encoders: Mapping[str, nn.Module], features: int, classes: int, alpha: float = 1.0):
        if len(encoders) != 2:
            raise ValueError(f"encoders: expected two modalities, for which PMR is defined, got {', '.join(encoders) or 'none'}")
        super().__init__(encoders, features, classes)
        self.alpha = alpha
        self.prototypes: Tensor  # [2, C, s]
        self.register_buffer("prototypes", torch.zeros(2, classes, features))
        self.setup: Setup | None = None

    def prepare(self, setup: Setup) -> int:
        self.setup = setup
        return super().prepare(setup)

    @torch.no_grad()
    def begin_epoch(self, epoch: int) -> None:
        if self.setup is None:
            raise ValueError("setup: PMR expects prepare(setup) before training")
        batches = list(on_device(self, self.setup.train))
        sums, counts = torch.zeros_like(self.prototypes), self.prototypes.new_zeros(self.prototypes.shape[:2])
        for inputs, target, present in itertools.islice(batches, max(1, round(SHARE * len(batches)))):
            h, available = self.embed(inputs, present)
            of_class = F.one_hot(target, len(counts[0])).to(h.dtype) * available[..., None]  # [2, N, C]
            sums += of_class.transpose(1, 2) @ h
            counts += of_class.sum(1)
        seen = (counts > 0)[..., None]
        new = sums / counts.clamp_min(1)[..., None]
        mixed = new if epoch == 0 else KEPT * self.prototypes + (1 - KEPT) * new
        self.prototypes = torch.where(seen, mixed, self.prototypes)

    def loss(
        self, inputs: Mapping[str, Tensor], target: Tensor, present: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        h, available = self.embed(inputs, present)
        similar = similarities(h, self.prototypes)
        with torch.no_grad():
            weaker = mean_probability(similar, available, target).argmin()
        pull = unimodal_losses(similar, available, target)[weaker]
        return F.cross_entropy(self.fuse(h, available), target) + self.alpha * pull


def similarities(h: Tensor, prototypes: Tensor) -> Tensor:
    """Return −‖h − c‖ [M, N, C] of features h [M, N, s] and prototypes c [M, C, s]."""
    distances: Tensor = (h[:, :, None] - prototypes[:, None]).norm(dim=-1)
    return -distances

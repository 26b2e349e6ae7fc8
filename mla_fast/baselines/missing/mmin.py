"""MMIN, missing modality imagination network: Zhao, Li and Jin, ACL 2021."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.joint import Setup
from mla_fast.baselines.missing.autoencoder import ResidualAutoencoder, side_by_side
from mla_fast.baselines.missing.checks import check_number, cross_entropy
from mla_fast.baselines.missing.parts import Frozen, Inputs, MissingModel, TaughtModel, mlp

LAYERS, BLOCKS = (256, 128, 64), 5


class Teacher(MissingModel):
    """Encoders and a classifier trained on complete data, from which MMIN's encoders start and learn what to imagine."""

    betas = (0.9, 0.999)

    def __init__(self, widths: Mapping[str, int], classes: int, dropout: float = 0.3):
        super().__init__(widths, classes, dropout)
        self.classifier = mlp(self.joined, classes, dropout=dropout)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        logits: Tensor = self.classifier(side_by_side(h))
        return logits

    def loss(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        index: Tensor | None = None,
        full: Inputs | None = None,
    ) -> Tensor:
        return cross_entropy(self(self.true_values(inputs, present, full)), target)


class MMIN(TaughtModel):
    """Imagine the features of missing modalities, and from them those that were there.

        stage 1 (``prepare``):  a teacher E'_m, K' on complete data, by CE; the encoders start from its encoders
        stage 2:  (r, c) = A(h),  (h', ·) = A'(r),  z = K(c)
                  L = CE(z, y) + w_1 MSE(r, t) + w_2 MSE(h', sg(h))

    h are the features of what is visible, side by side; t the teacher's of what is missing, with zeros in place of what is
    visible; c the codes of all five blocks of A. A and A' are ``ResidualAutoencoder`` with layers 256, 128, 64. Prediction needs
    no teacher. It costs as many passes again as the run has. ValueError without ``prepare``.
    """

    grid = {"imagination": (4.0, 1.0, 0.2), "cycle": (2.0, 1.0)}

    def __init__(
        self, widths: Mapping[str, int], classes: int, imagination: float = 4.0, cycle: float = 2.0, dropout: float = 0.5
    ):
        super().__init__(widths, classes, dropout)
        check_number("imagination", imagination)
        check_number("cycle", cycle)
        self.imagination, self.cycle = imagination, cycle
        self.forth = ResidualAutoencoder(self.joined, LAYERS, BLOCKS)
        self.back = ResidualAutoencoder(self.joined, LAYERS, BLOCKS)
        self.classifier = mlp(LAYERS[-1] * BLOCKS, classes, dropout=dropout)

    def make_teacher(self) -> Teacher:
        return Teacher(self.widths, self.classes).to(next(self.parameters()))

    def prepare(self, setup: Setup) -> int:
        teacher = self.make_teacher()
        setup.fit(teacher, setup.epochs)
        self.encoders.load_state_dict(teacher.encoders.state_dict())
        self.teacher, self.passes_before = Frozen(teacher), float(setup.epochs)
        return super().prepare(setup)

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.forth(side_by_side(h))[1])
        return logits

    def loss(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        index: Tensor | None = None,
        full: Inputs | None = None,
    ) -> Tensor:
        features, available = self.embed(inputs, present)
        h = side_by_side(features)
        r, codes = self.forth(h)
        imagined = F.mse_loss(r, reverse_features(self, self.teacher, self.true_values(inputs, present, full), available))
        returned = F.mse_loss(self.back(r)[0], h.detach())
        return cross_entropy(self.classifier(codes), target) + self.imagination * imagined + self.cycle * returned


@torch.no_grad()
def reverse_features(model: MissingModel, teacher: Frozen | None, true: Inputs, available: Tensor) -> Tensor:
    """Return the teacher's features [N, 128 M] of what is missing, what is visible being zero.

    true: {modality: [N, d_m]} with nothing masked; available: bool [M, N].
    """
    if teacher is None:
        raise ValueError(f"teacher: {type(model).__name__} expects prepare(setup) before training")
    return side_by_side(teacher.beside(model).embed(true, ~available.T)[0])

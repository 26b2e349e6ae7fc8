"""IF-MMIN, invariant features for MMIN: Zuo, Liu, Zhao, Gao and Li, ICASSP 2023."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.joint import Setup
from mla_fast.baselines.missing.autoencoder import ResidualAutoencoder, side_by_side
from mla_fast.baselines.missing.checks import check_number, cross_entropy
from mla_fast.baselines.missing.mmin import BLOCKS, LAYERS, Teacher, reverse_features
from mla_fast.baselines.missing.parts import FEATURES, Frozen, Inputs, TaughtModel, mlp

MOMENTS = 5


def invariant_encoder() -> nn.Sequential:
    """Return S, two linear layers 128 → 128 with LeakyReLU after each, the same for all modalities."""
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.LeakyReLU(), nn.Linear(FEATURES, FEATURES), nn.LeakyReLU())


class InvariantTeacher(Teacher):
    """Train encoders, S and a classifier on complete data.

    L = CE(K'([h; S(h_1); …; S(h_M)]), y) + mean over pairs of CMD(S(h_a), S(h_b))

    The encoders are drawn as MMIN's teacher's, S and K' by torch's default.
    """

    clip = 0.5

    def __init__(self, widths: Mapping[str, int], classes: int, dropout: float = 0.3):
        super().__init__(widths, classes, dropout)
        self.invariant = invariant_encoder()
        self.classifier = mlp(2 * self.joined, classes, dropout=dropout)

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        logits: Tensor = self.classifier(side_by_side(torch.cat([h, self.invariant(h)])))
        return logits

    def loss(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        index: Tensor | None = None,
        full: Inputs | None = None,
    ) -> Tensor:
        h, available = self.embed(self.true_values(inputs, present, full))
        pairs = itertools.combinations(self.invariant(h), 2)
        apart = torch.stack([central_moment_discrepancy(a, b) for a, b in pairs]).mean()
        return cross_entropy(self.fuse(h, available), target) + apart


class InvariantAutoencoder(ResidualAutoencoder):
    """Give every block what is invariant: x_0 = h,  x_i = φ_i(x_{i−1} + s),  out = Linear(ReLU(Linear(x_B)))."""

    def __init__(self, width: int, layers: Sequence[int] = LAYERS, blocks: int = BLOCKS):
        super().__init__(width, layers, blocks)

    def imagine(self, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return out [N, width] and the codes [N, B · layers[-1]] of features h and invariant features s [N, width]."""
        codes, x = [], h
        for encoder, decoder in zip(self.encoders, self.decoders, strict=True):
            codes.append(encoder(x + s))
            x = decoder(codes[-1])
        return self.transition(x), torch.cat(codes, 1)


class IFMMIN(TaughtModel):
    """Imagine missing features with the help of features that modalities have in common.

        stage 1 (``prepare``):  ``InvariantTeacher`` on complete data; encoders and S start from it
        stage 2:  s = [S(h_1); …; S(h_M)],  (r, c) = A(h, s),  z = K(c)
                  L = CE(z, y) + MSE(r, t) + λ MSE(s, s')

    t is as in ``MMIN``, s' the teacher's s of complete data. λ is 1, the code's default; its script passes 100 under a name that
    the code does not read. The rate is 1e-3 as in the paper's Table 2, the code's is 2e-4. The teacher costs as many passes again
    as the run has. ValueError without ``prepare``.
    """

    grid = {"invariance": (1.0, 100.0)}
    clip = 1.0

    def __init__(self, widths: Mapping[str, int], classes: int, invariance: float = 1.0, dropout: float = 0.5):
        super().__init__(widths, classes, dropout)
        check_number("invariance", invariance)
        self.invariance = invariance
        self.invariant = invariant_encoder()
        self.forth = InvariantAutoencoder(self.joined)
        self.classifier = mlp(LAYERS[-1] * BLOCKS, classes, dropout=dropout)

    def make_teacher(self) -> InvariantTeacher:
        return InvariantTeacher(self.widths, self.classes).to(next(self.parameters()))

    def prepare(self, setup: Setup) -> int:
        teacher = self.make_teacher()
        setup.fit(teacher, setup.epochs)
        self.encoders.load_state_dict(teacher.encoders.state_dict())
        self.invariant.load_state_dict(teacher.invariant.state_dict())
        self.teacher, self.passes_before = Frozen(teacher), float(setup.epochs)
        return super().prepare(setup)

    def imagine(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return r, the codes and s of features h [M, N, 128]."""
        s = side_by_side(self.invariant(h))
        return *self.forth.imagine(side_by_side(h), s), s

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.imagine(h)[1])
        return logits

    def loss(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        index: Tensor | None = None,
        full: Inputs | None = None,
    ) -> Tensor:
        h, available = self.embed(inputs, present)
        true = self.true_values(inputs, present, full)
        r, codes, s = self.imagine(h)
        imagined = F.mse_loss(r, reverse_features(self, self.teacher, true, available))
        common = F.mse_loss(s, self.common(true))
        return cross_entropy(self.classifier(codes), target) + imagined + self.invariance * common

    @torch.no_grad()
    def common(self, true: Inputs) -> Tensor:
        """Return the teacher's s [N, 128 M] of complete data."""
        teacher = self.teacher.beside(self) if self.teacher is not None else None
        assert isinstance(teacher, InvariantTeacher)
        return side_by_side(teacher.invariant(teacher.encode(true)))


def central_moment_discrepancy(a: Tensor, b: Tensor, moments: int = MOMENTS) -> Tensor:
    """Return ‖μ_a − μ_b‖ + Σ_{k=2…5} ‖mean (a − μ_a)^k − mean (b − μ_b)^k‖ of [N, s]: CMD, Zellinger et al., ICLR 2017."""
    centred = a - a.mean(0), b - b.mean(0)
    gaps = [a.mean(0) - b.mean(0)]
    gaps += [(centred[0] ** k).mean(0) - (centred[1] ** k).mean(0) for k in range(2, moments + 1)]
    return torch.stack([gap.norm() for gap in gaps]).sum()

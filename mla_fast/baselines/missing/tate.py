"""TATE, tag-assisted Transformer encoder: Zeng, Liu and Zhou, SIGIR 2022."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.joint import Setup
from mla_fast.baselines.missing.checks import check_number, cross_entropy
from mla_fast.baselines.missing.parts import FEATURES, Frozen, Inputs, TaughtModel

HEADS = 4


class TATE(TaughtModel):
    """Tell a Transformer by a tag which modalities are missing, and let its codes follow those of complete data.

        token_m = [W_{m,u} h_m for the other modalities u; tag],  E = encoder(tokens),  D = decoder(E)
        g = Σ_m a_m E_m,  a = softmax over m of w·((U E_m) ⊙ σ(M E_m)),  z = Linear(Linear without bias(g))
        L = Σ_i CE(z, y) + w (Σ_i [KL(E, E') + KL(D, tokens)] + MAE(tag, σ(the last entries of g)))

    KL(p, q) is KL(p‖q) + KL(q‖p) between softmaxes over the features, the mean over tokens; sums are over the batch. W_{m,u} is
    W_{u,m}. The tag is (1, 0, …) where nothing is missing, otherwise one in the place 1 + m of each missing modality. E' is E of
    complete data in a network that ``prepare`` trains on them, without E', for as many passes again.

    Adapted: the original has a token for every frame, word and second, this one token for each modality, E_m's output. Of its
    code's faults none is copied: there the tag is the same for all samples, dropout stays on in tests, and E' sees masked data.
    W_{m,u} have biases.
    ValueError without ``prepare``.
    """

    grid = {"weight": (0.1, 0.01, 1.0)}
    betas, decay, clip = (0.9, 0.999), 1e-4, math.inf

    def __init__(self, widths: Mapping[str, int], classes: int, weight: float = 0.1, dropout: float = 0.2):
        super().__init__(widths, classes, dropout)
        check_number("weight", weight)
        self.weight, M = weight, len(widths)
        pairs = list(itertools.combinations(range(M), 2))
        part = -(-FEATURES // max(M - 1, 1))
        token = part * max(M - 1, 1)
        self.tag_width = 1 + M + -(token + 1 + M) % HEADS  # heads must divide the width of a token with its tag
        self.pairs = {pair: i for i, (a, b) in enumerate(pairs) for pair in ((a, b), (b, a))}
        width = token + self.tag_width
        self.shared = nn.ModuleList(nn.Linear(FEATURES, part) for _ in pairs)
        self.encoder = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout, batch_first=True)
        self.decoder = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout, batch_first=True)
        self.pooling = GatedPooling(width)
        self.classifier = nn.Sequential(nn.Linear(width, FEATURES, bias=False), nn.Linear(FEATURES, classes))

    def make_teacher(self) -> TATE:
        return _OnCompleteData(self)

    def prepare(self, setup: Setup) -> int:
        teacher = self.make_teacher()
        setup.fit(teacher, setup.epochs)
        self.teacher, self.passes_before = Frozen(teacher), float(setup.epochs)
        return super().prepare(setup)

    def tokens(self, h: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tagged tokens [N, M, width] and the tags [N, tag_width]."""
        M = len(h)
        others = [[self.shared[self.pairs[m, u]](h[m]) for u in range(M) if u != m] for m in range(M)]
        missing = ~available.T
        tag = torch.cat([~missing.any(1, keepdim=True), missing], 1).to(h)
        tag = F.pad(tag, (0, self.tag_width - tag.shape[1]))
        return torch.stack([torch.cat([*each, tag], 1) for each in others], 1), tag

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pooling(self.encoder(self.tokens(h, available)[0])))
        return logits

    def codes(self, h: Tensor, available: Tensor) -> Tensor:
        """Return E [N, M, width]."""
        E: Tensor = self.encoder(self.tokens(h, available)[0])
        return E

    def loss(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        index: Tensor | None = None,
        full: Inputs | None = None,
    ) -> Tensor:
        if self.teacher is None:
            raise ValueError("teacher: TATE expects prepare(setup) before training")
        h, available = self.embed(inputs, present)
        with torch.no_grad():
            teacher = self.teacher.beside(self)
            assert isinstance(teacher, TATE)
            guide = teacher.codes(*teacher.embed(self.true_values(inputs, present, full)))
        return self.guided_loss(h, available, target, guide)

    def guided_loss(self, h: Tensor, available: Tensor, target: Tensor, guide: Tensor | None) -> Tensor:
        """Return the loss of features h [M, N, 128]; guide: E' [N, M, width], None to leave it out."""
        tokens, tag = self.tokens(h, available)
        E = self.encoder(tokens)
        g = self.pooling(E)
        penalty = symmetric_kl(self.decoder(E), tokens).sum() + (tag - g[:, -self.tag_width :].sigmoid()).abs().mean()
        if guide is not None:
            penalty = penalty + symmetric_kl(E, guide).sum()
        total: Tensor = cross_entropy(self.classifier(g), target, reduction="sum") + self.weight * penalty
        return total


class _OnCompleteData(TATE):
    """The same network, of its own initial values, trained on complete data without a guide."""

    def __init__(self, like: TATE):
        super().__init__(like.widths, like.classes, like.weight, like.dropout)
        self.to(next(like.parameters()))

    def loss(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        index: Tensor | None = None,
        full: Inputs | None = None,
    ) -> Tensor:
        whole = self.true_values(inputs, present, full)
        return self.guided_loss(*self.embed(whole), target, None)


class GatedPooling(nn.Module):
    """Map tokens x [N, M, width] → Σ_m a_m x_m [N, width],  a = softmax over m of w·((U x_m) ⊙ σ(M x_m))."""

    def __init__(self, width: int):
        super().__init__()
        self.value, self.gate = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = (self.score(self.value(x) * self.gate(x).sigmoid()).softmax(1) * x).sum(1)
        return pooled


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """Return KL(p‖q) + KL(q‖p) [N] of p = softmax(a), q = softmax(b) over the last axis of [N, M, width], the mean over M."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean(1)

"""Modality competition, made visible: a two-layer network on the data of Huang et al. (ICML 2022), trained jointly and by MLA.

    f_j(x) = Σ_r Σ_{l ≤ 16} σ(⟨w_jlr, x^r⟩)        σ(u) = u⁴ / 4 on [0, 1], u − 3/4 above, 0 below

The sums over l are the initial values of a linear head on all units of a modality, shared by the modalities and trained too.

Trained jointly, each class is learned from the modality that wins a race between the two, and the other one is not found. One
modality at a time, both are. It is the alternation that does it: without the projection the result is the same here.

This is an illustration in a regime that was tuned to show it: the initial scale, the learning rate and the width are chosen so
that the loss is small when one modality has won. It says what can happen, not how often it does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mla_fast.baselines import JointModel, Sum, fit_joint
from mla_fast.data import MultimodalDataset, competition, competition_directions
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.threads import one_thread
from mla_fast.trainer import Trainer

CLASSES = 10
UNITS = 16  # per class and modality
TRAIN_SAMPLES, TEST_SAMPLES = 300, 4000
TEST_MU = 0.3
INITIAL_SCALE = 0.05
LEARNING_RATE = 2.0
HEAD_RATE = 0.1  # of the learning rate
ROUNDS = 800  # each modality is seen once a round


class Learned(NamedTuple):
    """What a network has learned.

    found: share of the (class, modality) pairs that it has a unit for; accuracy: on all test samples; one_sufficient: on those
    where a single modality shows the class.
    """

    found: float
    accuracy: float
    one_sufficient: float


class Units(nn.Module):
    """[N, d] → activations φ [N, K · 16], the units of class 0 first."""

    def __init__(self, features: int, generator: torch.Generator, scale: float = INITIAL_SCALE):
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(CLASSES * UNITS, features, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        u = x @ self.weight.T
        return u.clamp(0, 1).square().square() / 4 + (u - 1).relu()


def block_sum_head() -> nn.Linear:
    """The head that makes f_j the sum of the units of class j. It is trained from there."""
    head = nn.Linear(CLASSES * UNITS, CLASSES, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(CLASSES).repeat_interleave(UNITS, 1))
    return head


def found_pairs(encoders: nn.ModuleDict, directions: Tensor) -> Tensor:
    """bool [K, M]: Γ_jr = max_l ⟨w_jlr, M^r_j⟩ is at least half of the largest Γ. directions [M, d, K]"""
    gammas = []
    for units, M_r in zip(encoders.values(), directions, strict=True):
        per_class = units.weight.detach().unflatten(0, (CLASSES, UNITS))  # [K, 16, d]
        gammas.append(torch.einsum("jld,dj->jl", per_class, M_r).amax(1))
    gamma = torch.stack(gammas, 1)
    return gamma >= gamma.max() / 2


@one_thread()
def train_joint(seed: int, *, rounds: int = ROUNDS, mu: float = 0.0, scale: float = INITIAL_SCALE) -> Learned:
    """Full-batch gradient descent, the head on the sum of both modalities' activations in each of `rounds` steps.

    mu: of the training data, see ``data.competition``; scale: of the units' initial weights.
    """
    train, test, directions = _data(seed, mu)
    model = _sum_model(_encoders(seed, train, scale))
    fit_joint(model, _sgd(model), [(train.inputs, train.target)] * rounds, epochs=1)
    with torch.no_grad():
        return _learned(model(test.inputs), test, found_pairs(model.encoders, directions))


@one_thread()
def train_unimodal(seed: int, *, rounds: int = ROUNDS, mu: float = 0.0, scale: float = INITIAL_SCALE) -> Learned:
    """A network for each modality, trained on its own with a head of its own; their logits are added in the end."""
    train, test, directions = _data(seed, mu)
    encoders = _encoders(seed, train, scale)
    logits = []
    for modality, units in encoders.items():
        model = _sum_model({modality: units})
        fit_joint(model, _sgd(model), [({modality: train.inputs[modality]}, train.target)] * rounds, epochs=1)
        with torch.no_grad():
            logits.append(model({modality: test.inputs[modality]}))
    return _learned(sum(logits), test, found_pairs(nn.ModuleDict(encoders), directions))


@one_thread()
def train_mla(
    seed: int,
    *,
    rounds: int = ROUNDS,
    mu: float = 0.0,
    scale: float = INITIAL_SCALE,
    projection: str = "rls",
    target: str = "gradient",
) -> Learned:
    """The same network, data and initial values, with a step on one modality and then one on the other in each round.

    mu, scale: as for ``train_joint``; projection, target: as for ``MLAOptimizer``.
    """
    train, test, directions = _data(seed, mu)
    model = MultimodalModel(_encoders(seed, train, scale), block_sum_head())
    optimizer = MLAOptimizer(_sgd(model), head=model.head, projection=projection, target=target)
    Trainer(model, optimizer, progress=False).fit([(train.inputs, train.target)] * rounds, epochs=1)
    return _learned(
        model.packed_logits(test.inputs).unflatten(0, (len(test.inputs), -1)).sum(0),
        test,
        found_pairs(model.encoders, directions),
    )


def _sum_model(encoders: dict[str, Units]) -> Sum:
    model = Sum(encoders, CLASSES * UNITS, CLASSES)
    model.head = block_sum_head()
    return model


def _stream(seed: int, which: int) -> int:
    """A seed of its own for each thing that is drawn: from one seed, directions and weights would be the same numbers."""
    return 4 * seed + which


def _data(seed: int, mu: float) -> tuple[MultimodalDataset, MultimodalDataset, Tensor]:
    """(train, test, directions). With mu = 0 every training sample shows its class in both modalities; many a test sample shows
    it in one only."""
    directions = competition_directions(_stream(seed, 0))
    train = competition(TRAIN_SAMPLES, mu, _stream(seed, 1), directions=directions)
    return train, competition(TEST_SAMPLES, TEST_MU, _stream(seed, 2), directions=directions), directions


def _encoders(seed: int, train: MultimodalDataset, scale: float) -> dict[str, Units]:
    generator = torch.Generator().manual_seed(_stream(seed, 3))
    return {modality: Units(x.shape[1], generator, scale) for modality, x in train.inputs.items()}


def _sgd(model: JointModel | MultimodalModel) -> torch.optim.SGD:
    head = {"params": model.head.parameters(), "lr": HEAD_RATE * LEARNING_RATE}
    return torch.optim.SGD([{"params": model.encoders.parameters()}, head], lr=LEARNING_RATE)


def _learned(logits: Tensor, test: MultimodalDataset, found: Tensor) -> Learned:
    right = (logits.argmax(1) == test.target).double()
    one = torch.from_numpy(test.fields["sufficient"]).sum(1) == 1
    return Learned(found.double().mean().item(), right.mean().item(), right[one].mean().item())

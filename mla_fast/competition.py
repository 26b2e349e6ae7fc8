"""Demonstrate modality competition: a two-layer network on the data of Huang et al. (ICML 2022), trained jointly and by MLA.

    f_j(x) = Σ_r Σ_{l ≤ 16} σ(⟨w_jlr, x^r⟩)        σ(u) = u⁴ / 4 on [0, 1], u − 3/4 above, 0 below

The sums over l are how a linear head on all units of a modality is initialised; the modalities share it, and it is trained.

In joint training the two modalities compete: each class is learned from one of them, and the other one is not learned. Trained
one modality at a time, both are. The alternation alone achieves this: without the projection the result is the same here.

This illustration is in a regime tuned to show the effect: the initial scale, the learning rate and the width are chosen so that
the loss is small as soon as one modality is learned. It shows what can happen, not how often it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mla_fast.baselines import Sum, fit_joint
from mla_fast.data import MultimodalDataset, sparse_coding, sparse_coding_directions
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
    """The result of an experiment.

    found: the share of the (class, modality) pairs for which it has a unit.
    accuracy: on all test samples.
    one_sufficient: the accuracy on the test samples in which a single modality shows the class.
    """

    found: float
    accuracy: float
    one_sufficient: float


class Units(nn.Module):
    """Map [N, d] → activations φ [N, K · 16], the units of class 0 first."""

    def __init__(self, features: int, generator: torch.Generator, scale: float = INITIAL_SCALE):
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(CLASSES * UNITS, features, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        u = x @ self.weight.T
        return u.clamp(0, 1).square().square() / 4 + (u - 1).relu()


def block_sum_head() -> nn.Linear:
    """Return a head initialised so that f_j is the sum of the units of class j."""
    head = nn.Linear(CLASSES * UNITS, CLASSES, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(CLASSES).repeat_interleave(UNITS, 1))
    return head


def found_pairs(encoders: nn.ModuleDict, directions: Tensor) -> Tensor:
    """Return whether Γ_jr = max_l ⟨w_jlr, M^r_j⟩ is at least half of the largest Γ, bool [K, M]; directions are [M, d, K]."""
    gammas = []
    for units, M_r in zip(encoders.values(), directions, strict=True):
        per_class = units.get_parameter("weight").detach().unflatten(0, (CLASSES, UNITS))  # [K, 16, d]
        gammas.append(torch.einsum("jld,dj->jl", per_class, M_r).amax(1))
    gamma = torch.stack(gammas, 1)
    return gamma >= gamma.max() / 2


@one_thread()
def train_joint(seed: int, *, rounds: int = ROUNDS, mu: float = 0.0, scale: float = INITIAL_SCALE) -> Learned:
    """Train by full-batch gradient descent, with the head on the sum of both modalities' activations in each of `rounds` steps.

    mu: of the training data, see ``data.sparse_coding``; scale: of the units' initial weights.
    """
    train, test, directions = _data(seed, mu)
    model = _sum_model(_encoders(seed, train, scale))
    fit_joint(model, _sgd(model), [(train.inputs, train.target)] * rounds, epochs=1)
    with torch.no_grad():
        return _evaluate(model(test.inputs), test, found_pairs(model.encoders, directions))


@one_thread()
def train_unimodal(seed: int, *, rounds: int = ROUNDS, mu: float = 0.0, scale: float = INITIAL_SCALE) -> Learned:
    """Train a separate network, with a head of its own, for each modality; predict by the sum of their logits."""
    train, test, directions = _data(seed, mu)
    encoders = _encoders(seed, train, scale)
    logits = []
    for modality, units in encoders.items():
        model = _sum_model({modality: units})
        fit_joint(model, _sgd(model), [({modality: train.inputs[modality]}, train.target)] * rounds, epochs=1)
        with torch.no_grad():
            logits.append(model({modality: test.inputs[modality]}))
    return _evaluate(torch.stack(logits).sum(0), test, found_pairs(nn.ModuleDict(encoders), directions))


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
    """Train the same network, from the same data and initial values, with one step on each modality in turn in every round.

    mu, scale: as for ``train_joint``; projection, target: as for ``MLAOptimizer``.
    """
    train, test, directions = _data(seed, mu)
    model = MultimodalModel(_encoders(seed, train, scale), block_sum_head())
    optimizer = MLAOptimizer(_sgd(model), head=model.head, projection=projection, target=target)
    Trainer(model, optimizer, progress=False).fit([(train.inputs, train.target)] * rounds, epochs=1)
    return _evaluate(
        model.logits_of(model.packed_features(test.inputs)).unflatten(0, (len(test.inputs), -1)).sum(0),
        test,
        found_pairs(model.encoders, directions),
    )


def _sum_model(encoders: Mapping[str, nn.Module]) -> Sum:
    model = Sum(encoders, CLASSES * UNITS, CLASSES)
    model.head = block_sum_head()
    return model


def _derived_seed(seed: int, which: int) -> int:
    """Return a seed for one of four draws: from a common seed, directions and weights would be the same numbers."""
    return 4 * seed + which


def _data(seed: int, mu: float) -> tuple[MultimodalDataset, MultimodalDataset, Tensor]:
    """Return (train, test, directions). In many test samples only one modality shows the class; with mu = 0 no training sample
    is like that."""
    directions = sparse_coding_directions(_derived_seed(seed, 0))
    train = sparse_coding(TRAIN_SAMPLES, mu, _derived_seed(seed, 1), directions=directions)
    return train, sparse_coding(TEST_SAMPLES, TEST_MU, _derived_seed(seed, 2), directions=directions), directions


def _encoders(seed: int, train: MultimodalDataset, scale: float) -> dict[str, Units]:
    generator = torch.Generator().manual_seed(_derived_seed(seed, 3))
    return {modality: Units(x.shape[1], generator, scale) for modality, x in train.inputs.items()}


def _sgd(model: Sum | MultimodalModel) -> torch.optim.SGD:
    head: dict[str, Any] = {"params": model.head.parameters(), "lr": HEAD_RATE * LEARNING_RATE}
    return torch.optim.SGD([{"params": model.encoders.parameters()}, head], lr=LEARNING_RATE)


def _evaluate(logits: Tensor, test: MultimodalDataset, found: Tensor) -> Learned:
    right = (logits.argmax(1) == test.target).double()
    one = torch.from_numpy(test.fields["sufficient"]).sum(1) == 1
    return Learned(found.double().mean().item(), right.mean().item(), right[one].mean().item())

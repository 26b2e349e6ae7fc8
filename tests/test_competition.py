"""Modality competition: joint training finds about half of the (class, modality) pairs, MLA all."""

import pytest
import torch
from helpers import exhaustive
from torch import nn

from mla_fast.competition import ROUNDS, Units, block_sum_head, found_pairs, train_joint, train_mla, train_unimodal


@pytest.mark.parametrize("seed,rounds", [(0, 400), *exhaustive(*((seed, ROUNDS) for seed in range(3, 5)))])  # the demo has 0 to 2
def test_joint_training_finds_half_and_mla_all(seed, rounds):
    joint, mla = (train(seed, rounds=rounds) for train in (train_joint, train_mla))
    assert joint.found <= 0.65 and mla.found >= 0.95
    assert joint.one_sufficient < 0.85 and mla.one_sufficient > 0.95
    assert joint.accuracy < mla.accuracy


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", [{"projection": "none"}, {"projection": "window", "target": "update"}], ids=str)
def test_it_is_the_alternation_that_finds_them(settings):
    assert train_mla(0, **settings).found >= 0.95


def test_each_on_its_own_finds_all():
    learned = train_unimodal(0, rounds=300, scale=0.15)
    assert learned.found == 1 and learned.one_sufficient > 0.95


def test_mu_and_the_initial_scale_are_those_asked_for():
    assert train_unimodal(0, rounds=5, mu=0.3) != train_unimodal(0, rounds=5) != train_unimodal(0, rounds=5, scale=0.1)
    assert train_joint(0, rounds=5, mu=0.3) != train_joint(0, rounds=5) != train_joint(0, rounds=5, scale=0.1)
    assert train_mla(0, rounds=5, mu=0.3) != train_mla(0, rounds=5) != train_mla(0, rounds=5, scale=0.1)


def test_repeats():
    assert train_joint(3, rounds=5) == train_joint(3, rounds=5) and train_mla(3, rounds=5) == train_mla(3, rounds=5)


def test_starts_with_nothing_learned():
    assert train_joint(0, rounds=1).one_sufficient < 0.4


def test_leaves_threads_and_global_generator_alone():
    threads = torch.get_num_threads()
    train_joint(0, rounds=1)
    state = torch.get_rng_state()
    units = Units(3, torch.Generator().manual_seed(0))
    assert torch.get_num_threads() == threads
    assert torch.equal(state, torch.get_rng_state()) and units.weight.shape == (160, 3)


def test_activation():
    units = Units(1, torch.Generator())
    with torch.no_grad():
        units.weight.fill_(1)
    u = torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    expected = torch.tensor([0, 0, 0.5**4 / 4, 0.25, 2.25], dtype=torch.float64)
    torch.testing.assert_close(units.double()(u[:, None])[:, 7], expected)


def test_the_activation_is_smooth():
    units = Units(2, torch.Generator().manual_seed(0)).double()
    assert torch.autograd.gradcheck(units, torch.randn(3, 2, dtype=torch.float64, requires_grad=True))


def test_head_starts_as_the_sum_over_each_class_units():
    phi = torch.rand(4, 160)
    torch.testing.assert_close(block_sum_head()(phi), phi.unflatten(1, (10, 16)).sum(2))


def test_found_pairs_are_those_with_a_strong_unit():
    directions = torch.stack([torch.eye(12, 10), torch.eye(12, 10).flip(0)])
    encoders = nn.ModuleDict({"r0": Units(12, torch.Generator()), "r1": Units(12, torch.Generator())})
    with torch.no_grad():
        for units in encoders.values():
            units.weight.zero_()
        encoders["r0"].weight[3 * 16 + 5] = 2 * directions[0, :, 3]
        encoders["r1"].weight[4 * 16 + 1] = 1.01 * directions[1, :, 4]
        encoders["r1"].weight[5 * 16 + 1] = 0.99 * directions[1, :, 5]
        encoders["r0"].weight[6 * 16] = 2 * directions[0, :, 7]  # a unit of class 6 that looks where class 7 shows
    assert found_pairs(encoders, directions).nonzero().tolist() == [[3, 0], [4, 1]]

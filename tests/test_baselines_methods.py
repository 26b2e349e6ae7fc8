"""What is particular to each method of balanced learning: worked examples, and who is slowed down."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from mla_fast.baselines import METHODS, Setup, agm, fit_joint, g_blending, mlb, mmpareto, ogm, pmr, reconboost, relearning
from mla_fast.encoders import MLP

S, C = 4, 3
WIDTHS = {"audio": 3, "image": 5}


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def make(method, **options):
    torch.manual_seed(0)
    return METHODS[method]({m: MLP(width, S) for m, width in WIDTHS.items()}, S, C, **options).double()


def make_batch(N=24, seed=1, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % C
    draw = {m: torch.randn(N, width, generator=generator, dtype=torch.float64) for m, width in WIDTHS.items()}
    return {m: nn.functional.one_hot(y, width) + noise * draw[m] for m, width in WIDTHS.items()}, y, None, torch.arange(N)


def fit(model, batches, epochs, lr=0.1):
    return fit_joint(model, torch.optim.SGD(model.parameters(), lr=lr), batches, epochs)


def prepare(model, batches, held_out=None, epochs=1):
    return model.prepare(Setup(batches, held_out or batches, lambda m, n: fit(m, batches, n), epochs))


@pytest.mark.parametrize(
    "factors",
    [
        lambda s: ogm.modulation(s, 0.3),
        lambda s: agm.coefficients(-s.log(), torch.zeros_like(s), 1.0),
        lambda s: mlb.balance(s, 0.8, 2.0),
    ],
    ids=["OGM", "AGM", "MLB"],
)
@pytest.mark.parametrize("M", [2, 3])
def test_the_leading_modality_gets_the_smaller_factor(factors, M):
    ahead = f64(*[0.9, 0.3, 0.3][:M])
    k = factors(ahead)
    assert k[0] < 1 and bool((k[0] < k[1:]).all()) and bool((k[1:] >= 1).all())
    torch.testing.assert_close(factors(ahead.flip(0)), k.flip(0))


def test_agm_worked_out():
    tau = torch.zeros(2, dtype=torch.float64)
    k = agm.coefficients(f64(0.5, 1.0), tau, 2.0)
    assert k[0].item() == pytest.approx(math.exp(2 * (1 - math.exp(0.5)))) and k[0].item() == pytest.approx(0.273, abs=1e-3)
    assert agm.coefficients(f64(0.7, 0.7), tau, 2.0).tolist() == [1, 1]
    assert agm.coefficients(f64(0.5, 1.0), f64(0.5, 1.0), 2.0).tolist() == [1, 1]  # as far ahead as ever
    assert agm.coefficients(f64(0.0, 99.0), f64(9.0, 0.0), 1.0)[1].item() <= math.exp(10)


def test_agm_shares_are_shapley_values_and_sum_to_the_logits():
    model = make("AGM")
    h = torch.randn(2, 6, S, dtype=torch.float64)
    here, phi = torch.ones(2, 6, dtype=torch.bool), model.shares(h)

    def z(a, v):
        return model.fuse(torch.stack([a * h[0], v * h[1]]), here)

    torch.testing.assert_close(phi[0], (z(1, 1) - z(0, 1) + z(1, 0)) / 2)
    torch.testing.assert_close(phi.sum(0), z(1, 1))


def test_agm_remembers_the_mean_loss():
    model, (inputs, y, *_) = make("AGM"), make_batch()
    first, second = slice(0, 10), slice(10, 24)
    seen = []
    for part in (first, second):
        model.loss({m: x[part] for m, x in inputs.items()}, y[part])
        seen.append(
            torch.stack([nn.functional.cross_entropy(share[part], y[part]) for share in model.shares(model.embed(inputs)[0])])
        )
    torch.testing.assert_close(model.tau, (seen[0] + seen[1]) / 2)


def test_mmpareto_worked_out():
    g_j, g_u = f64(1, 0), f64(-1, 1)
    d = mmpareto.merge(g_j, g_u, 1.0)
    assert d[0].item() == pytest.approx(d[1].item() / 2) and d @ g_j > 0 and d @ g_u > 0  # along (.2, .4)
    assert d.norm().item() == pytest.approx((g_j + g_u).norm().item())
    torch.testing.assert_close(mmpareto.merge(f64(1, 0), f64(0.5, 0.5), 1.5), 1.5 * f64(1.5, 0.5))
    torch.testing.assert_close(mmpareto.merge(f64(1, 0), f64(0, 0), 1.5), 1.5 * f64(1, 0))
    assert mmpareto.merge(f64(1, 0), f64(-1, 0), 1.5).tolist() == [0, 0]


def test_mlb_worked_out():
    k = mlb.balance(f64(0.6, 0.3), 0.8, 10.0)
    assert k[0].item() == pytest.approx(1 - math.tanh(0.4)) and k[0].item() == pytest.approx(0.620, abs=1e-3)
    assert k[1].item() == pytest.approx(1 + 9 * math.tanh(0.8))
    assert mlb.balance(f64(0.4, 0.4), 0.8, 10.0).tolist() == [1, 1]
    assert mlb.balance(f64(0.9, 1e-9), 0.8, 10.0)[1].item() == pytest.approx(10)


def test_g_blending_worked_out():
    T_0, V_0, T_n, V_n = f64(2, 2), f64(2, 2), f64(1.0, 0.5), f64(1.5, 1.0)  # G = .5, 1; O = .5, .5
    torch.testing.assert_close(g_blending.blending_weights(T_0, V_0, T_n, V_n), f64(1 / 3, 2 / 3))
    w = g_blending.blending_weights(T_0, V_0, f64(1.5, 0.5), f64(1.5, 1.0))  # no overfitting by the first
    assert w.isfinite().all() and w.sum().item() == pytest.approx(1) and w[0] > 0.99


def test_g_blending_weighs_by_training_each_loss_alone():
    train, held_out = [make_batch()], [make_batch(seed=2, noise=1.0)]
    model = make("G-Blending")
    before = copy.deepcopy(model)
    assert prepare(model, train, held_out, epochs=3) == 3 and model.passes_before == 6
    losses = []
    for k in range(3):
        alone = copy.deepcopy(before)
        optimizer, (inputs, y, *_) = torch.optim.SGD(alone.parameters(), lr=0.1), train[0]
        start = [before.losses(*before.embed(part[0]), part[1])[k].detach() for part in (train[0], held_out[0])]
        for _ in range(3):
            optimizer.zero_grad()
            alone.losses(*alone.embed(inputs), y)[k].backward()
            optimizer.step()
        end = [alone.losses(*alone.embed(part[0]), part[1])[k].detach() for part in (train[0], held_out[0])]
        losses.append(torch.stack([*start, *end]))
    torch.testing.assert_close(model.weights, g_blending.blending_weights(*torch.stack(losses, 1)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_pmr_worked_out():
    similar = pmr.similarities(f64(0.5)[None, :, None], f64(0.0, 2.0)[None, :, None])
    assert similar.tolist() == [[[-0.5, -1.5]]]
    assert similar.softmax(-1)[0, 0, 0].item() == pytest.approx(0.731, abs=1e-3)


def test_pmr_prototypes_move_towards_the_class_means():
    model, batch = make("PMR"), make_batch()
    prepare(model, [batch])
    model.begin_epoch(0)
    h = model.embed(batch[0])[0].detach()
    means = torch.stack([h[:, batch[1] == c].mean(1) for c in range(C)], 1)
    torch.testing.assert_close(model.prototypes, means)
    with torch.no_grad():
        for p in model.encoders.parameters():
            p.mul_(2)
    model.begin_epoch(1)
    h = model.embed(batch[0])[0].detach()
    new = torch.stack([h[:, batch[1] == c].mean(1) for c in range(C)], 1)
    torch.testing.assert_close(model.prototypes, 0.2 * means + 0.8 * new)


def test_reconboost_stage_moves_one_modality_alone():
    model, (inputs, y, *_) = make("ReconBoost"), make_batch()
    model.turn = 1
    loss = model.loss(inputs, y)
    loss.backward()
    assert all(p.grad is None for p in (*model.encoders["audio"].parameters(), *model.heads[0].parameters(), model.beta))
    assert all(p.grad is not None for p in (*model.encoders["image"].parameters(), *model.heads[1].parameters()))
    z_a, z_v = model.logits(model.embed(inputs)[0])
    q, p = z_a.softmax(1)[range(len(y)), y], z_v.softmax(1)[range(len(y)), y]
    torch.testing.assert_close(loss, ((5 - q) * -p.log()).mean() / C)


def test_reconboost_weighs_what_the_others_miss():
    model = make("ReconBoost")
    with torch.no_grad():
        for p in model.heads.parameters():
            p.zero_()
        model.heads[0].bias.copy_(f64(math.log(8), 0, 0))  # the other modality gives .8 to class 0
    model.turn = 1
    loss = model.loss({m: x[:1] for m, x in make_batch()[0].items()}, torch.tensor([0]))
    assert loss.item() == pytest.approx(4.2 * math.log(3) / 3)


@pytest.mark.parametrize(("epochs", "M"), [(1, 2), (7, 2), (20, 2), (20, 3), (100, 2)])
def test_reconboost_passes_are_those_of_the_others(epochs, M):
    plan = reconboost.schedule(epochs, M)
    assert {plan.count(k) + plan.count(None) for k in range(M)} == {epochs}
    if epochs >= 7:
        assert plan[-1] is None and set(plan) == {None, *range(M)}


def test_umt_learns_from_teachers_that_stand_still():
    model, batch = make("UMT"), make_batch()
    initial = copy.deepcopy(model.encoders)
    prepare(model, [batch], epochs=2)
    assert model.passes_before == 2 and not set(model.teachers.model.parameters()) & set(model.parameters())
    before = copy.deepcopy(model.teachers.model.state_dict())
    for m in WIDTHS:  # trained, from the same initial values
        assert not torch.equal(before[f"encoders.{m}.0.weight"], initial[m][0].weight)
    fit(model, [batch], 2)
    torch.testing.assert_close(before, dict(model.teachers.model.state_dict()), rtol=0, atol=0)
    model.encoders.load_state_dict(model.teachers.model.encoders.state_dict())
    expected = nn.functional.cross_entropy(model(batch[0]), batch[1])
    torch.testing.assert_close(model.loss(*batch), expected)  # student = teacher: no penalty


def test_ume_is_the_mean_of_the_probabilities():
    model, (inputs, *_) = make("UME"), make_batch()
    z = model.logits(model.embed(inputs)[0])
    torch.testing.assert_close(model(inputs).exp(), z.softmax(-1).mean(0))
    torch.testing.assert_close(model({"image": inputs["image"]}).exp(), z[1].softmax(-1))


def test_purity_of_six_points():
    points = torch.tensor([[0.0, 0], [0, 1], [1, 0], [9, 9], [9, 8], [8, 9]])
    assert relearning.purity(points, torch.tensor([0, 0, 0, 1, 1, 1]), 2) == 1
    assert relearning.purity(points, torch.tensor([0, 0, 1, 1, 1, 0]), 2) == pytest.approx(4 / 6)


@pytest.mark.parametrize(("gap", "a"), [(0.0, 0.0), (0.1, 0.291)])
def test_relearning_goes_back_by_the_gap(monkeypatch, gap, a):
    model, batch = make("Diagnosing & Re-learning"), make_batch()
    prepare(model, [batch], epochs=8)
    initial = copy.deepcopy(model.encoders.state_dict())
    fit(model, [batch], 2)
    now = copy.deepcopy(model.encoders.state_dict())
    purities = iter([0.5 + gap, 0.5] * len(WIDTHS))
    monkeypatch.setattr(relearning, "purity", lambda *_: next(purities))
    model.begin_epoch(1)  # not yet
    torch.testing.assert_close(dict(model.encoders.state_dict()), dict(now), rtol=0, atol=0)
    model.begin_epoch(2)
    expected = {name: a * initial[name] + (1 - a) * value for name, value in now.items()}
    torch.testing.assert_close(dict(model.encoders.state_dict()), expected, rtol=0, atol=0 if not a else 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method):
    model, batch = make(method), make_batch(60)
    epochs = prepare(model, [batch], epochs=60)
    first = model.loss(*batch).item() if method not in ("ReconBoost",) else math.log(C)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = fit_joint(model, optimizer, [batch], epochs)
    assert losses[-1] < first and (model(batch[0]).argmax(1) == batch[1]).double().mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_scaled_gradients_meet_adam(method):
    model, batch = make(method), make_batch()
    prepare(model, [batch])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_joint(model, torch.optim.SGD(model.parameters(), lr=0.1), [batch], 1)
        assert not caught
        prepare(model, [batch])
        fit_joint(model, torch.optim.AdamW(model.parameters()), [batch], 1)
    assert bool(caught) == (method in ("OGM", "OGM-GE", "AGM", "MLB"))
    assert not caught or "scales gradients, which AdamW nearly cancels" in str(caught[0].message)


def test_refuses():
    three = {m: MLP(3, S) for m in "abc"}
    with pytest.raises(ValueError, match="encoders: expected two modalities, for which PMR is defined, got a, b, c"):
        METHODS["PMR"](three, S, C)
    batch = make_batch()
    for method in ("UMT", "PMR", "Diagnosing & Re-learning"):
        with pytest.raises(ValueError, match=r"expects prepare\(setup\) before training"):
            fit(make(method), [batch], 1)
    with pytest.raises(ValueError, match="epochs: expected at most the 0"):
        fit(make("ReconBoost"), [batch], 1)
    with pytest.raises(ValueError, match="index: QMF remembers samples"):
        make("QMF").loss(*batch[:2])

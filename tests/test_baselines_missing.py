"""Methods for missing modalities: losses and steps written out in NumPy, worked examples, and that nothing masked is seen."""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from written_missing import LOSSES, STEP, WIDTHS, Written, batch_norm_mlp, clustering_gradient, correlation_gradient

from mla_fast import data
from mla_fast.baselines import Concat, Setup, fit_joint
from mla_fast.baselines.missing import CCA, MISSING_METHODS, TATE, FittedModel, cpm_net
from mla_fast.baselines.missing import autoencoder as ae
from mla_fast.baselines.missing.cca import canonical_directions, correlation
from mla_fast.baselines.missing.if_mmin import InvariantAutoencoder, InvariantTeacher, central_moment_discrepancy
from mla_fast.baselines.missing.mmin import Teacher
from mla_fast.baselines.missing.parts import masked_reconstruction, rate, visible
from mla_fast.baselines.missing.tate import _OnCompleteData, symmetric_kl

C, N = 4, 13
TEACHERS = {
    "MMIN's teacher": lambda widths, C, **options: Teacher(widths, C, **options),
    "IF-MMIN's teacher": lambda widths, C, **options: InvariantTeacher(widths, C, **options),
    "TATE's teacher": lambda widths, C, **options: _OnCompleteData(TATE(widths, C, **options)),
}
BATCHED = [name for name, model in MISSING_METHODS.items() if not issubclass(model, FittedModel)]
FITTED = [name for name in MISSING_METHODS if name not in BATCHED]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def batch(count=3, samples=N, seed=1, missing=0.4):
    """(inputs with NaN where they are masked, target, present, index, full)"""
    generator = torch.Generator().manual_seed(seed)
    widths = dict(list(WIDTHS.items())[:count])
    full = {m: torch.randn(samples, d, generator=generator, dtype=torch.float64) for m, d in widths.items()}
    present = data.cpm_mask(samples, count, missing, seed)
    masked = {m: x.masked_fill(~present[:, [i]], torch.nan) for i, (m, x) in enumerate(full.items())}
    return masked, torch.arange(samples) % C, present, torch.arange(samples), full


class Gives(nn.Module):
    """Return the same whatever it is given."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def fit(model, batches, epochs):
    optimizer, scheduler = model.optimizer(epochs)
    return fit_joint(model, optimizer, batches, epochs, scheduler=scheduler)


def make(name, count=3, **options):
    torch.manual_seed(0)
    usual = {"test_rounds": 5} if name == "CPM-Net" else {} if name in FITTED else {"dropout": 0.0}
    return (MISSING_METHODS | TEACHERS)[name](dict(list(WIDTHS.items())[:count]), C, **(usual | options)).double()


def prepared(name, given, count=3, **options):
    model = make(name, count, **options)
    if name in TEACHERS:
        return model
    model.prepare(Setup([given], [given], lambda m, epochs: fit(m, [given], epochs), 2))
    return model


@pytest.mark.parametrize("name", [*BATCHED, *TEACHERS])
def test_the_loss_and_the_first_step_are_those_written_out(name):
    given = batch()
    inputs, target, present, _, full = given
    model = prepared(name, given)
    model.fixed = None
    arguments = (inputs, target.numpy(), present.numpy(), full)
    loss = model.loss(*given)
    assert loss.item() == pytest.approx(LOSSES[name](model, Written(model), *arguments), rel=1e-12)
    optimizer, _ = model.optimizer(10)
    loss.backward()
    model.fixed = Written(model).features(inputs, present.numpy()) if name == "MMIN" else None
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    net, random = Written(model), np.random.default_rng(5)
    for part in dict.fromkeys(".".join(n.split(".")[:2]) for n in before):  # the derivative along a random direction
        direction = {n: random.standard_normal(p.shape) for n, p in before.items() if n.startswith(part)}
        slope = LOSSES[name](model, net.towards(direction), *arguments).imag / STEP
        found = sum((p.grad.numpy() * direction[n]).sum() for n, p in model.named_parameters() if n in direction)
        assert found == pytest.approx(slope, rel=1e-9, abs=1e-12), part
    raw = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradients(1e4 * model.loss(*given))  # so long that every part is clipped
    lengths = dict.fromkeys(part_of(n) for n in before)
    for part in lengths:
        lengths[part] = 1e4 * math.sqrt(sum(g.square().sum().item() for n, g in raw.items() if part_of(n) == part))
    clip, decay = {"IF-MMIN": 1.0, "IF-MMIN's teacher": 0.5}.get(name, 5.0), 1e-4 if name.startswith("TATE") else 0.0
    for n, p in model.named_parameters():
        shorter = 1.0 if name.startswith("TATE") else clip / lengths[part_of(n)]
        assert shorter < 1 or name.startswith("TATE")
        torch.testing.assert_close(p.grad, 1e4 * shorter * raw[n], rtol=1e-5, atol=1e-12)
    gradients = {n: p.grad.clone() + decay * before[n] for n, p in model.named_parameters()}
    optimizer.step()
    for n, p in model.named_parameters():
        step = 1e-3 * gradients[n] / (gradients[n].abs() + 1e-8)  # Adam's first
        torch.testing.assert_close(p.detach(), before[n] - step, rtol=0, atol=1e-12)


def part_of(name):
    return ".".join(name.split(".")[: 2 if name.startswith("encoders.") else 1])


@pytest.mark.parametrize("name", [*BATCHED, *TEACHERS])
def test_settings_are_those_of_the_code_that_compares_them(name):
    model = (MISSING_METHODS | TEACHERS)[name](WIDTHS, C)
    first = name.split("'")[0]
    group = model.optimizer(10)[0].param_groups[0]
    momentum = 0.9 if "teacher" in name or first == "TATE" else 0.5
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (momentum, 0.999), 1e-4 if first == "TATE" else 0)
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.2 if first == "TATE" else 0.3 if "teacher" in name else 0.5}
    if name == "MMIN's teacher":  # drawn as Kaiming et al. do
        deep = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight.numel() > 10_000]
        assert len(deep) == 8 and not any(layer.bias.any() for layer in deep)
        spread = [layer.weight.std().item() * math.sqrt(layer.in_features / 2) for layer in deep]
        assert spread == pytest.approx([1] * 8, rel=0.03)


@pytest.mark.parametrize("name", ["MMIN", "IF-MMIN"])
def test_training_starts_from_the_teacher(name):
    model = prepared(name, batch())
    teacher = model.teacher.model.state_dict()
    same = {
        n for n, p in model.state_dict().items() if n in teacher and p.shape == teacher[n].shape and torch.equal(p, teacher[n])
    }
    shared = {"encoders", "invariant"} if name == "IF-MMIN" else {"encoders"}
    assert {n for n in model.state_dict() if n.split(".")[0] in shared} == same


@pytest.mark.parametrize("name", ["MMIN", "IF-MMIN", "TATE"])
def test_a_teacher_goes_where_its_model_goes(name):
    model = prepared(name, batch()).float()
    inputs, target, present, index, full = batch()
    single = [{m: x.float() for m, x in values.items()} for values in (inputs, full)]
    assert model.loss(single[0], target, present, index, single[1]).dtype == torch.float32


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", BATCHED)
def test_no_batch_shows_what_is_masked(name, count):
    masked, target, present, index, full = batch(count)
    spoiled = {m: x.nan_to_num(7.0) for m, x in masked.items()}
    results = []
    for inputs in (masked, spoiled):
        model = prepared(name, (inputs, target, present, index, full), count)
        model.gradients(model.loss(inputs, target, present, index, full))
        grads = [torch.zeros(0) if p.grad is None else p.grad for p in model.parameters()]
        results.append([*grads, model.eval()(inputs, present)])
    assert all(map(torch.equal, *results)) and results[0][-1].isfinite().all()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", FITTED)
def test_no_fit_shows_what_is_masked(name, count):
    masked, target, present, *_ = batch(count, 63)
    spoiled = {m: x.nan_to_num(7.0) for m, x in masked.items()}
    results = []
    for inputs in (masked, spoiled):
        model = make(name, count)
        torch.manual_seed(3)
        model.fit(inputs, target, present, epochs=2)
        with torch.no_grad():
            results.append([*model.state_dict().values(), model(inputs, present)])
    assert all(map(torch.equal, *results)) and results[0][-1].isfinite().all()


@pytest.mark.parametrize("name", MISSING_METHODS)
def test_a_prediction_does_not_depend_on_its_batch_and_takes_one_modality(name):
    given = batch(samples=40)
    masked, target, present, *_ = given
    if name in BATCHED:
        model = prepared(name, given)
    else:
        model = make(name)
        model.fit(masked, target, present, epochs=2)
    model.eval()
    with torch.no_grad():
        whole = model(masked, present)
        torch.testing.assert_close(model({m: x[3:5] for m, x in masked.items()}, present[3:5]), whole[3:5])
        alone = {"image": torch.randn(6, WIDTHS["image"], dtype=torch.float64)}
        column = torch.tensor([[False, True, False]] * 6)
        others = {m: torch.full((6, d), torch.nan, dtype=torch.float64) for m, d in WIDTHS.items()}
        torch.testing.assert_close(model(alone), model(others | alone, column))


@pytest.mark.parametrize("name", BATCHED)
def test_refuses_data_that_really_lack_modalities(name):
    masked, target, present, index, full = batch()
    with pytest.raises(ValueError, match="full: expected the true values of what is masked"):
        make(name).true_values(masked, present, None)
    with pytest.raises(ValueError, match=r"full: expected finite values of all modalities.*'text'"):
        make(name).true_values(masked, present, full | {"text": masked["text"]})
    with pytest.raises(ValueError, match=r"full: expected finite values of all modalities.*'text'"):
        make(name).true_values(masked, present, {m: x for m, x in full.items() if m != "text"})
    if name in ("MMIN", "IF-MMIN", "TATE"):
        with pytest.raises(ValueError, match="teacher: .* expects prepare"):
            make(name).loss(full, target)
        assert prepared(name, (full, target)).passes_before == 2  # nothing masked, nothing needed


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="inputs: expected modalities among audio, image, text, got smell"):
        visible(WIDTHS, {"smell": torch.zeros(1, 3)}, None)
    for x in (torch.zeros(1, 4), torch.zeros(2, 3), torch.zeros(3), torch.zeros(1, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"inputs\['audio'\]: expected 1 samples of 3 floating-point numbers, got torch"):
            visible(WIDTHS, {"image": torch.zeros(1, 7), "audio": x}, None)
    for present in (torch.ones(1, 3), torch.ones(1, 3).int(), torch.ones(1, 2) > 0, torch.ones(1, 4) > 0, torch.ones(2, 3) > 0):
        for model in (make("AE"), make("CCA"), Concat({m: nn.Linear(d, 2) for m, d in WIDTHS.items()}, 2, C)):
            with pytest.raises(ValueError, match=r"present: expected bool \[1, 3\], got torch"):
                model({m: torch.zeros(1, d) for m, d in WIDTHS.items()}, present)
    for few in ({}, {"audio": 3}, {"audio": 3, "image": 0}):
        for model in MISSING_METHODS.values():
            with pytest.raises(ValueError, match="widths: expected at least two modalities"):
                model(few, C)


@pytest.mark.parametrize("name", ["CCA", "DCCA", "DCCAE"])
def test_there_is_at_least_one_direction(name):
    with pytest.raises(ValueError, match="k: expected a whole number of at least 1, got 0"):
        make(name, k=0)


@pytest.mark.parametrize("name", MISSING_METHODS)
def test_what_is_visible_has_to_be_finite(name):
    masked, target, present, index, full = batch(samples=40)
    row = int(present[:, 1].nonzero()[3])
    spoiled = masked | {"image": masked["image"].index_fill(0, torch.tensor([row]), math.inf)}
    message = rf"inputs\['image'\]: expected finite numbers in what is not missing, row {row} has others"
    with pytest.raises(ValueError, match=message):
        if name in FITTED:
            make(name).fit(spoiled, target, present)
        else:
            prepared(name, (masked, target, present, index, full)).loss(spoiled, target, present, index, full)


@pytest.mark.parametrize("name", FITTED)
def test_labels_that_are_no_classes_are_refused(name):
    masked, target, present, *_ = batch(samples=40)
    for bad, got in ((target + 1, "[1, 2, 3, 4]"), (target * 0, "[0]"), (target.double(), "torch.float64"), (target[:9], "[9]")):
        with pytest.raises(ValueError, match=rf"target: expected whole numbers \[40\] .*{re.escape(got)}"):
            make(name).begin(masked, bad, present)


def test_the_rate_is_that_of_gcnet():
    assert [rate(e, 100) for e in (0, 19, 20, 99)] == pytest.approx([1, 1, 1 - 1 / 81, 1 - 80 / 81])


@pytest.mark.parametrize("samples", [1, 63])
def test_reconstruction_counts_missing_entries_whatever_the_batch(samples):
    available = torch.ones(2, samples, dtype=torch.bool)
    zeros, ones = [torch.zeros(samples, 3), torch.zeros(samples, 5)], [torch.ones(samples, 3), torch.ones(samples, 5)]
    assert masked_reconstruction(zeros, ones, available).item() == 0
    available[1, -1] = False
    assert masked_reconstruction(zeros, ones, available).item() == pytest.approx(1)
    whole = {m: torch.randn(samples, d, dtype=torch.float64) for m, d in WIDTHS.items()}
    y, present = torch.zeros(samples, dtype=torch.long), torch.ones(samples, 3, dtype=torch.bool)
    for name, weight in (("AE", 0.2), ("CRA", 0.8)):
        model = make(name)
        assert torch.equal(model.loss(whole, y), nn.functional.cross_entropy(model(whole), y))
        nn.init.zeros_(model.decoders[2][-1].weight)
        nn.init.zeros_(model.decoders[2][-1].bias)
        one = present.clone()
        one[-1, 2] = False  # of a modality whose true values are ones, and which is imagined as zeros
        loss = model.loss(whole, y, one, full=whole | {"text": torch.ones(samples, 5, dtype=torch.float64)})
        assert loss.item() == pytest.approx(nn.functional.cross_entropy(model(whole, one), y).item() + weight, rel=1e-12)


def test_cascades_worked_out():
    class Identity(nn.Module):
        def forward(self, x):
            return x

    h, s = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    for B in (2, 3, 5):
        cascade, invariant = ae.ResidualAutoencoder(6, (4, 2), B), InvariantAutoencoder(6, (4, 2), B)
        for made in (cascade, invariant):
            made.encoders = nn.ModuleList(Identity() for _ in range(B))
            made.decoders, made.transition = nn.ModuleList(Identity() for _ in range(B)), Identity()
        torch.testing.assert_close(cascade(h)[0], 2**B * h)
        torch.testing.assert_close(invariant.imagine(h, s)[0], h + B * s)


def test_mmin_weighs_imagination_by_four_and_stops_at_what_was_there(monkeypatch):
    given = batch()
    model = prepared("MMIN", given, cycle=0.0)
    h = ae.side_by_side(model.embed(*given[0::2][:2])[0])
    constant = nn.Module()
    constant.forward = lambda x: (torch.zeros(len(x), 384, dtype=torch.float64), torch.zeros(len(x), 320, dtype=torch.float64))
    model.forth, model.back = constant, constant
    monkeypatch.setattr("mla_fast.baselines.missing.mmin.reverse_features", lambda *_: torch.ones_like(h))
    ce = nn.functional.cross_entropy(model.classifier(torch.zeros(N, 320, dtype=torch.float64)), given[1])
    assert model.loss(*given).item() == pytest.approx(ce.item() + 4)
    model.cycle = 2.0
    loss = model.loss(*given)
    assert loss.item() == pytest.approx(ce.item() + 4 + 2 * h.square().mean().item())
    loss.backward()
    assert all(p.grad is None for p in model.encoders.parameters())  # h is a constant where it is what to return to


def test_prediction_needs_no_teacher():
    for name in ("MMIN", "IF-MMIN", "TATE"):
        given = batch()
        model = prepared(name, given).eval()
        before = model(given[0], given[2])
        model.teacher = None
        assert torch.equal(model(given[0], given[2]), before)
        assert not any("teacher" in key for key in model.state_dict())


def test_discrepancies_worked_out():
    assert central_moment_discrepancy(f64([0], [2]), f64([1], [3])).item() == pytest.approx(1)
    assert central_moment_discrepancy(f64([-1], [1]), f64([-2], [2])).item() == pytest.approx(3 + 15)
    p, q = f64([[0.5, 0.5]]).log(), f64([[0.25, 0.75]]).log()
    assert symmetric_kl(p, q).item() == pytest.approx(0.27465, abs=1e-5) and symmetric_kl(p, p).item() == 0


def test_a_tag_beside_codes_of_zero_is_half_wrong():
    model, y = make("TATE", weight=0.3), torch.zeros(5, dtype=torch.long)
    h, available = torch.randn(3, 5, 128, dtype=torch.float64), torch.ones(3, 5, dtype=torch.bool)
    tokens, _ = model.tokens(h, available)
    model.decoder, model.pooling = Gives(tokens), Gives(torch.zeros(5, 132, dtype=torch.float64))
    ce = nn.functional.cross_entropy(model.classifier(torch.zeros(5, 132, dtype=torch.float64)), y, reduction="sum").item()
    assert model.guided_loss(h, available, y, None).item() == pytest.approx(ce + 0.3 * 0.5, rel=1e-12)
    guide = model.codes(h, available)
    assert model.guided_loss(h, available, y, guide).item() == pytest.approx(ce + 0.3 * 0.5, rel=1e-12)


@pytest.mark.parametrize("count, width, tag", [(2, 132, 4), (3, 132, 4)])
def test_tags_say_what_is_missing(count, width, tag):
    model = make("TATE", count)
    here = torch.tensor([[True, True, True], [False, True, True], [True, False, False]])[:, :count]
    tokens, tags = model.tokens(torch.zeros(count, 3, 128, dtype=torch.float64), here.T)
    assert tokens.shape == (3, count, width) and tags.shape == (3, tag) and torch.equal(tokens[:, 0, -tag:], tags)
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]] if count == 3 else [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert tags.tolist() == expected
    four = TATE({m: 2 for m in "abcd"}, C)
    assert four({m: torch.zeros(2, 2) for m in "abcd"}).shape == (2, C)


def test_correlations_worked_out(monkeypatch):
    x = f64([-1], [1])
    W_1, W_2 = canonical_directions(x, x, 1)
    assert (W_1.T @ (x.T @ x) @ W_2).abs().item() == pytest.approx(2 / (2 + 1e-4))
    assert correlation(x, x).item() == pytest.approx(math.sqrt((2 / 2.001) ** 2 + 1e-3)) == pytest.approx(1.0000004, abs=1e-7)
    monkeypatch.setattr("mla_fast.baselines.missing.cca.FLOOR", 0.0)
    assert correlation(x, x).item() == pytest.approx(2 / 2.001) == pytest.approx(0.9995, abs=1e-6)
    monkeypatch.undo()
    x, y = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    W_1, W_2 = canonical_directions(x, y, 3)
    S = x.T @ x / 49 + 1e-4 * torch.eye(4)
    torch.testing.assert_close(W_1.T @ S @ W_1, torch.eye(3, dtype=torch.float64))
    A = torch.randn(4, 4, dtype=torch.float64)
    found = [(v @ W_1).T @ (y @ W_2) for v in (x, x @ A) for W_1, W_2 in [canonical_directions(v, y, 3, 1e-12)]]
    torch.testing.assert_close(found[0].diagonal().abs(), found[1].diagonal().abs(), rtol=1e-6, atol=1e-8)
    roots = []
    for v in (x, y):
        values, vectors = np.linalg.eigh((v.T @ v / 49).numpy() + 1e-3 * np.eye(v.shape[1]))
        roots.append(vectors @ np.diag(values**-0.5) @ vectors.T)
    T = roots[0] @ (x.T @ y / 49).numpy() @ roots[1]
    assert correlation(x, y).item() == pytest.approx(np.sqrt(np.linalg.eigvalsh(T.T @ T + 1e-3 * np.eye(3))).sum())


def test_dcca_sums_pairs_and_dccae_adds_reconstruction():
    masked, target, present, *_ = batch(samples=63)
    plain, deep = make("DCCA", k=2), make("DCCAE", k=2)
    for model in (plain, deep):
        model.begin(masked, target, present, epochs=2)
    x = plain.imputation(masked, present)
    for m, (values, name) in enumerate(zip(x, WIDTHS, strict=True)):
        seen = masked[name][present[:, m]]
        torch.testing.assert_close(values[~present[:, m]], seen.mean(0).expand_as(values[~present[:, m]]))
        assert torch.equal(values[present[:, m]], seen)
    z = [encoder(v) for encoder, v in zip(plain.encoders, x, strict=True)]
    pairs = itertools.combinations(z, 2)
    torch.testing.assert_close(plain.loss(x), -sum(correlation(a, b) for a, b in pairs))
    deep.encoders = copy.deepcopy(plain.encoders)
    for decoder in deep.decoders:
        nn.init.zeros_(decoder[-1].weight)
        nn.init.zeros_(decoder[-1].bias)
    ones = [torch.ones_like(v) + 0.0 * v for v in x]
    added = deep.loss(ones) - plain.loss(ones)
    assert added.item() == pytest.approx(0.001 * 3)
    deep.decoders = nn.ModuleList(map(Gives, x))  # that return what they were to return
    assert torch.equal(deep.loss(x), plain.loss(x))


@pytest.mark.parametrize("name", ["DCCA", "DCCAE"])
def test_the_first_step_of_deep_correlation_is_that_written_out(name):
    masked, target, present, *_ = batch(samples=63)
    model = make(name, k=2)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.normal_(norm.bias)  # with biases of zero what is imputed by the mean stands at the kink of ReLU
    model.begin(masked, target, present, epochs=2)
    x = model.imputation(masked, present)
    model.train().loss(x).backward()
    net, values = Written(model), [v.numpy() for v in x]
    z = [batch_norm_mlp(net, f"encoders.{m}", v) for m, v in enumerate(values)]
    pulls = [np.zeros_like(v) for v in z]
    for a, b in itertools.combinations(range(3), 2):
        for m, gradient in zip((a, b), correlation_gradient(z[a], z[b]), strict=True):
            pulls[m] -= gradient
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [n for n in before if n.startswith(("encoders", "decoders"))]
    assert len(trained) == len(model.adam.param_groups[0]["params"])
    for n in trained:
        direction = np.random.default_rng(5).standard_normal(before[n].shape)
        there = net.towards({n: direction})
        moved = [batch_norm_mlp(there, f"encoders.{m}", v) for m, v in enumerate(values)]
        slope = sum((pull * code.imag).sum() / STEP for pull, code in zip(pulls, moved, strict=True))
        if name == "DCCAE":
            errors = [
                batch_norm_mlp(there, f"decoders.{m}", code) - v for m, (code, v) in enumerate(zip(moved, values, strict=True))
            ]
            slope += 0.001 * sum((e * e).mean() for e in errors).imag / STEP
        found = (dict(model.named_parameters())[n].grad.numpy() * direction).sum()
        assert found == pytest.approx(slope, rel=1e-8, abs=1e-12), n
    model.adam.step()
    for n in trained:
        p = dict(model.named_parameters())[n]
        g = p.grad + 1e-4 * before[n]
        torch.testing.assert_close(p.detach(), before[n] - 1e-3 * g / (g.abs() + 1e-8), rtol=0, atol=1e-12)


def test_cca_is_solved_at_once():
    masked, target, present, *_ = batch(samples=63)
    model = make("CCA")
    assert model.begin(masked, target, present) == 1 and model.classifier.in_features == 2 * (3 + 3 + 5)
    model.train_epoch(0)
    from sklearn.svm import LinearSVC

    features = model.project(masked, present).numpy()
    svc = LinearSVC(C=0.01, dual=False).fit(features, target.numpy())
    np.testing.assert_allclose(model(masked, present).detach().numpy(), svc.decision_function(features), atol=1e-9)
    two = CCA(WIDTHS, 3).double()
    two.fit(masked, target % 2, present)  # a class without samples, and the case of two
    z = two(masked, present).detach().numpy()
    svc = LinearSVC(C=0.01, dual=False).fit(two.project(masked, present).numpy(), (target % 2).numpy())
    assert (z[:, 2] < -1e8).all()
    np.testing.assert_array_equal(z.argmax(1), svc.predict(two.project(masked, present).numpy()))


def test_clustering_worked_out():
    h = f64([1, 0], [1, 0], [0, 1], [0, 1])
    assert cpm_net.clustering(h, torch.tensor([0, 0, 1, 1]), 2).item() == 0
    assert cpm_net.clustering(h, torch.tensor([0, 1, 0, 1]), 2).item() == pytest.approx(6)
    assert cpm_net.clustering(h[:3], torch.tensor([0, 0, 1]), 2).isfinite()  # a class of one


def test_a_class_without_samples_is_not_predicted():
    h, y = f64([1, 0], [1, 0], [-1, 0.1], [-1, 0.1]), torch.tensor([0, 0, 2, 2])
    assert cpm_net.class_means(h, y, 4, f64([0, -1])).argmax(1).item() == 0 and cpm_net.clustering(-h, y, 4).item() == 0
    apart = f64([1, 0], [-1, 0])  # each the only one of its class: F of its own is 0, of the other −1, of no other class anything
    assert cpm_net.clustering(apart, torch.tensor([0, 1]), 4).item() == 0
    masked, target, present, *_ = batch(samples=63)
    model = make("CPM-Net")
    model.fit(masked, target % 2 + 1, present, epochs=2)
    assert set(model(masked, present).argmax(1).tolist()) == {1, 2}


def test_cpm_net_is_saved_with_what_it_was_trained_on():
    masked, target, present, *_ = batch(samples=63)
    model, other = make("CPM-Net"), make("CPM-Net")
    with pytest.raises(ValueError, match="latents: CPM-Net expects begin"):
        other(masked, present)
    model.fit(masked, target, present, epochs=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(masked, present), model(masked, present))


def test_cpm_net_reconstructs_what_is_visible():
    masked, target, present, *_ = batch(samples=63)
    model = make("CPM-Net", test_rounds=2)
    model.begin(masked, target, present, epochs=3)
    h = torch.randn(63, 128, dtype=torch.float64)
    expected = 0
    for m, (name, decoder) in enumerate(zip(WIDTHS, model.decoders, strict=True)):
        here = present[:, m].numpy()
        apart = h.numpy() @ decoder.weight.detach().numpy().T + decoder.bias.detach().numpy() - masked[name].numpy()
        expected += (apart[here] ** 2).sum()
    assert model.reconstruction(h).item() == pytest.approx(expected)
    model.train_epoch(0)
    x, available = visible(WIDTHS, masked, present)
    found = model.infer(x, available)
    written = nn.Parameter(model.start.detach().expand(63, -1).clone())
    adam, model.x, model.available = torch.optim.Adam([written], 1e-3), x, available
    for _ in range(10):
        adam.zero_grad()
        model.reconstruction(written).backward()
        adam.step()
    torch.testing.assert_close(found, written.detach(), rtol=0, atol=1e-10)


def test_the_first_round_of_cpm_net_is_that_written_out(monkeypatch):
    monkeypatch.setattr(cpm_net, "STEPS", 1)
    masked, target, present, *_ = batch(samples=63)
    model = make("CPM-Net", weight=0.5)
    model.begin(masked, target, present, epochs=1)
    h, y = model.latents.detach().numpy().copy(), target.numpy()
    before = [(d.weight.detach().numpy().copy(), d.bias.detach().numpy().copy()) for d in model.decoders]
    model.train_epoch(0)

    def step(g, lr):
        return lr * g / (np.abs(g) + 1e-8)

    loss, pull = clustering_gradient(h, y, C)
    assert cpm_net.clustering(torch.tensor(h), target, C).item() == pytest.approx(loss, rel=1e-12) and loss > 0
    pull *= 0.5
    for m, (name, decoder) in enumerate(zip(WIDTHS, model.decoders, strict=True)):
        W, b = before[m]
        apart = np.where(present[:, [m]].numpy(), h @ W.T + b - masked[name].numpy(), 0)
        W, b = W - step(2 * apart.T @ h, 1e-3), b - step(2 * apart.sum(0), 1e-3)
        np.testing.assert_allclose(decoder.weight.detach().numpy(), W, rtol=0, atol=1e-12)
        np.testing.assert_allclose(decoder.bias.detach().numpy(), b, rtol=0, atol=1e-12)
        apart = np.where(present[:, [m]].numpy(), h @ W.T + b - masked[name].numpy(), 0)  # the latents follow the new decoders
        pull += 2 * apart @ W
    np.testing.assert_allclose(model.latents.detach().numpy(), h - step(pull, 1e-2), rtol=0, atol=1e-12)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MISSING_METHODS)
def test_learns(name):
    torch.manual_seed(0)
    y = torch.arange(240) % 3
    full = {m: nn.functional.one_hot(y, d).float() + 0.3 * torch.randn(240, d) for m, d in WIDTHS.items()}
    present = data.cpm_mask(240, 3, 0.3, 0)
    inputs = {m: x.masked_fill(~present[:, [i]], torch.nan) for i, (m, x) in enumerate(full.items())}
    model = MISSING_METHODS[name](WIDTHS, 3)
    if name in FITTED:
        model.fit(inputs, y, present, epochs=20)
    else:
        parts = torch.arange(240).split(40)
        batches = [({m: x[r] for m, x in inputs.items()}, y[r], present[r], r, {m: x[r] for m, x in full.items()}) for r in parts]
        epochs = model.prepare(Setup(batches, batches, lambda m, n: fit(m, batches, n), 20))
        fit(model, batches, epochs)
    with torch.no_grad():
        accuracy = (model.eval()(inputs, present).argmax(1) == y).double().mean().item()
    assert accuracy > 0.6

"""The cross-entropy of a head of many classes: what autograd finds in float64, without the logits in memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import ALTERNATION, WIDTHS, here, make_inputs, wrap
from torch import nn

import mla_fast as mla
from mla_fast import ops
from mla_fast.ops import large_head

f64 = torch.float64
IGNORED = -100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of some rows, and every head is a large one."""
    monkeypatch.setattr(large_head, "FEWEST", 3)
    monkeypatch.setattr(large_head, "LARGE", 1)
    monkeypatch.setattr(large_head, "BLOCK", 700)


def draw(N, s, C, dtype=f64, seed=0):
    """Features, weight, bias, target with a row that is ignored, and weights of classes, one of them 0."""
    g = torch.Generator().manual_seed(seed)
    features, weight, bias = (
        torch.randn(*shape, generator=g, dtype=f64, device="cpu").to(dtype) for shape in ((N, s), (C, s), (C,))
    )
    target, of_class = torch.randint(C, (N,), generator=g, device="cpu"), torch.rand(C, generator=g, dtype=f64, device="cpu")
    of_class[C // 2] = 0
    if N > 2:
        target[N // 2] = IGNORED
    return [t.to(here()) for t in (features, weight, bias, target, of_class)]


def by_autograd(features, weight, bias, target, of_class=None, smoothing=0.0):
    """(loss, gradients) of plain torch."""
    options = {"weight": of_class, "label_smoothing": smoothing, "ignore_index": IGNORED}
    leaves = [t.detach().clone().requires_grad_() for t in (features, weight, bias)]
    loss = F.cross_entropy(F.linear(*leaves), target, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def found(backend, features, weight, bias, target, class_weight=None, smoothing=0.0):
    terms = ops.terms_of(target, len(weight), weight.dtype, class_weight, smoothing, IGNORED)
    return ops.gradients(features, target, weight, bias, terms, backend="triton" if backend == "triton" else "reference")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("N,s,C", [(1, 1, 2), (3, 63, 1), (7, 64, 513), (13, 5, 4097)])
def test_it_is_what_autograd_finds(N, s, C, weighted, smoothing, backend):
    features, weight, bias, target, of_class = draw(N, s, C)
    of_class = of_class + (C == 1) if weighted else None
    expected = by_autograd(features, weight, bias, target, of_class, smoothing)
    ours = found(backend, features, weight, bias, target, of_class, smoothing)
    for mine, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_errors_are_those_of_plain_torch(dtype, backend):
    """Logits far from zero, where exp alone would overflow."""
    features, weight, bias, target, _ = draw(16, 65, 1030, dtype)
    bias = bias + 60
    exact = by_autograd(features.double(), weight.double(), bias.double(), target)
    plain = by_autograd(features, weight, bias, target)
    for mine, theirs, right in zip(found(backend, features, weight, bias, target), plain, exact, strict=True):
        slack = 4 * torch.finfo(mine.dtype).eps * right.abs().max()
        assert (mine.double() - right).abs().max() <= 2 * (theirs.double() - right).abs().max() + slack


def test_rows_that_count_by_weights_or_over_a_total(backend):
    features, weight, bias, target, _ = draw(9, 6, 11)
    target = target.clamp(min=0)
    leaves = [t.clone().requires_grad_() for t in (features, weight, bias)]
    each = F.cross_entropy(F.linear(*leaves), target, reduction="none")
    rows = torch.rand(9, dtype=f64, device=target.device)
    rows[4] = 0
    for options, loss in (({"total": 20.0}, each.sum() / 20), ({"weights": rows}, (each * rows).sum())):
        terms = ops.terms_of(target, 11, f64, **options)
        ours = ops.gradients(features, target, weight, bias, terms, backend="triton" if backend == "triton" else "reference")
        expected = loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)
        torch.testing.assert_close(tuple(ours), expected, rtol=1e-11, atol=1e-13)


def test_what_is_not_finite_stays_so_and_poison_is_not_read(backend):
    features, weight, bias, target, _ = draw(5, 4, 9)
    weight[3, 1] = torch.nan
    assert all(t.isnan().any() for t in found(backend, features, weight, bias, target))
    z = torch.full((5, 40), torch.nan, dtype=f64, device=weight.device)[:, :9]
    z.copy_(features @ draw(5, 4, 9)[1].T)
    name = "triton" if backend == "triton" else "reference"
    top, log_S, z_y, z_w = ops.softmax.softmax_sums(name, z, target, None, True)
    torch.testing.assert_close(top + log_S, z.logsumexp(1))
    torch.testing.assert_close(z_w, z.sum(1))
    assert z_y[2] == 0 and torch.equal(z_y[0], z[0, target[0]])
    ones = torch.ones(5, dtype=f64, device=z.device)
    p = z.softmax(1)
    ops.softmax.softmax_delta_(name, z, target, top, log_S, 0 * ones, ones, torch.nan * ones, None, False)
    torch.testing.assert_close(z, p)


def test_it_is_differentiable_once_and_scaled():
    features, weight, bias, target, _ = draw(8, 5, 12)
    leaves = [t.requires_grad_() for t in (features, weight, bias)]
    loss = mla.linear_cross_entropy(*leaves, target)
    expected = by_autograd(*leaves, target)
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close([t.grad for t in leaves], [3 * g for g in expected[1:]], rtol=1e-11, atol=1e-13)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: expected one backward pass, got another"):
        (3 * loss).backward()
    with torch.no_grad():
        assert not mla.linear_cross_entropy(*leaves, target).requires_grad
    weight.requires_grad_(False)
    mla.linear_cross_entropy(*leaves, target).backward()
    assert mla.linear_cross_entropy(features, weight, None, torch.full_like(target, IGNORED)).isnan()  # as torch has it


def test_autocast_computes_products_in_its_dtype():
    features, weight, _, target, _ = draw(16, 32, 300, torch.float32)
    leaves = [t.requires_grad_() for t in (features, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = mla.linear_cross_entropy(*leaves, None, target)
        plain = F.cross_entropy(F.linear(*leaves), target)
    exact = by_autograd(features.double(), weight.double(), torch.zeros(300, dtype=f64), target)
    mine, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves)
    assert loss.dtype == torch.float32 and [g.dtype for g in mine] == [torch.float32] * 2
    for ours, other, right in zip(mine, theirs, exact[1:], strict=False):
        assert 0 < (ours - right).abs().max() <= 2 * (other - right).abs().max()


@pytest.mark.parametrize(
    "change,error",
    [
        ({"features": torch.ones(4)}, r"features: expected a floating tensor \[N, s\], got torch.float32 \[4\]"),
        ({"features": torch.ones(4, 5)}, r"features: expected \[N, 3\] to match weight, got \[4, 5\]"),
        ({"target": torch.zeros(4)}, r"target: expected int64 \[4\], got torch.float32 \[4\]"),
        ({"target": torch.tensor([0, 1, 6, 0])}, "target: expected labels in 0 … 5 or -100, got 6"),
        ({"bias": torch.ones(4)}, r"bias: expected a floating tensor \[6\], got torch.float32 \[4\]"),
        ({"class_weight": torch.ones(6).long()}, r"class_weight: expected a floating tensor \[6\], got torch.int64 \[6\]"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected at least 0 and less than 1, got 1.0"),
    ],
)
def test_bad_arguments_are_named(change, error):
    options = {"features": torch.ones(4, 3), "weight": torch.ones(6, 3), "bias": None, "target": torch.zeros(4).long()} | change
    with pytest.raises((ValueError, TypeError), match=error):
        mla.linear_cross_entropy(**options)


def test_a_label_that_no_class_has_is_not_silently_wrong(backend):
    """Where nobody looks at the labels, on a GPU."""
    features, weight, bias, target, _ = draw(4, 3, 6)
    target[0] = 6
    assert found(backend, features, weight, bias, target).loss.isnan()


# In the engine. --------------------------------------------------------------------------------------------------------------


def pair(dtype=f64, **settings):
    """A model with its optimizer, and another like it."""
    torch.manual_seed(0)
    encoders = {m: nn.Sequential(nn.Linear(w, 5), nn.Tanh()) for m, w in WIDTHS.items()}
    model = mla.MultimodalModel(encoders, nn.Linear(5, 40)).to(dtype)
    other = copy.deepcopy(model)
    return (model, wrap(model, **settings)), (other, wrap(other, **settings))


def batch(seed, N=9, missing=False, dtype=f64):
    g = torch.Generator().manual_seed(seed)
    made = {m: x.to(dtype) for m, x in make_inputs(N, seed=seed).items()}, torch.randint(40, (N,), generator=g)
    return (*made, torch.rand(N, len(WIDTHS), generator=g) < 0.6) if missing else made


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("projection", ["rls", "window"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_takes_the_same_steps(projection, missing, accumulate, monkeypatch):
    ours, plain = pair(projection=projection)
    batches = [batch(seed, missing=missing) for seed in range(6)]
    calls = []
    whole = large_head.gradients
    monkeypatch.setattr(ops, "gradients", lambda *a, **k: calls.append(1) or whole(*a, **k))
    monkeypatch.setattr(large_head, "gradients", lambda *a, **k: calls.append(1) or whole(*a, **k))
    mla.Trainer(*ours, progress=False, accumulate=accumulate).fit(batches, epochs=2)
    assert len(calls) == 6 * 2 * 3
    monkeypatch.setattr(large_head, "LARGE", 10**9)
    mla.Trainer(*plain, progress=False, accumulate=accumulate).fit(batches, epochs=2)
    assert len(calls) == 6 * 2 * 3
    torch.testing.assert_close(ours[0].state_dict(), plain[0].state_dict(), rtol=1e-11, atol=1e-12)


def test_rows_of_a_graph_weigh_what_is_present():
    """As a CUDA graph has them: all N rows, of which the absent weigh nothing."""
    from mla_fast.batch import Batch
    from mla_fast.step import steps_together

    (model, optimizer), (other, loop) = pair()
    inputs, target, present = batch(1, missing=True)
    rows = Batch(inputs, present, target).rows()
    totals = {m: float(present[:, i].sum()) for i, m in enumerate(inputs)}
    steps_together(model, optimizer, rows, totals, None)
    mla.alternating_step(other, loop, (inputs, target, present))
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-11, atol=1e-12)


def test_autocast_of_the_trainer():
    ours, plain = pair(torch.float32)
    for (model, optimizer), large in ((ours, True), (plain, False)):
        large_head.LARGE = 1 if large else 10**9
        for seed in range(4):
            mla.alternating_step(model, optimizer, batch(seed, dtype=torch.float32), amp=torch.bfloat16)
    torch.testing.assert_close(ours[0].state_dict(), plain[0].state_dict(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "class_weight": torch.rand(40, dtype=f64)}])
def test_a_loop_of_ones_own(options):
    (model, optimizer), (other, loop) = pair(bias="project")
    plain = {"label_smoothing": options.get("label_smoothing", 0.0), "weight": options.get("class_weight")}
    for t in range(9):
        modality = ALTERNATION[t % 3]
        inputs, target = batch(t)
        optimizer.zero_grad()
        optimizer.head_loss(model.features(modality, inputs[modality]), target, **options).backward()
        optimizer.step(modality=modality)
        loop.zero_grad()
        F.cross_entropy(other.head(other.features(modality, inputs[modality])), target, **plain).backward()
        loop.step(modality=modality)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-11, atol=1e-12)
    assert optimizer.layers[0].projection.step == loop.layers[0].projection.step == 9


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def watched():
    head = nn.Linear(5, 3)
    head.register_forward_pre_hook(lambda *_: None)
    return head


def partly_frozen():
    head = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    head[0].requires_grad_(False)
    return head


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)),
        lambda: nn.Sequential(nn.Linear(5, 3), nn.Softplus()),
        partly_frozen,
        watched,
        lambda: Scaled(5, 3),
    ],
)
@pytest.mark.filterwarnings("ignore:head.*has a forward of its own")
def test_a_head_that_is_more_than_a_product_is_called(make):
    """Its loss would be silently another."""
    with pytest.raises(RuntimeError, match="head_loss: expected a head that is one nn.Linear"):
        wrap(make()).head_loss(torch.ones(2, 5), torch.zeros(2).long())


def test_float16_leaves_room_for_gradients_of_many_classes():
    features, weight, _, target, _ = draw(64, 8, 30000, torch.float32)
    leaves = [t.requires_grad_() for t in (features, weight)]
    exact = by_autograd(features.double(), weight.double(), torch.zeros(30000, dtype=f64), target)
    with torch.autocast("cpu", torch.float16):
        loss = mla.linear_cross_entropy(*leaves, None, target)
    found = torch.autograd.grad(loss * 2**16, leaves)
    never = torch.ones(30000, dtype=torch.bool).index_fill(0, target.clamp(min=0), False)
    ours, right = found[1][never].double() / 2**16, exact[2][never]
    assert (ours - right).norm() <= 1e-3 * right.norm()


def test_logits_of_ones_own_are_what_is_trained_on():
    class Tempered(mla.MultimodalModel):
        def logits(self, modality, features):
            return 0.1 * super().logits(modality, features)

    torch.manual_seed(0)
    encoders = {m: nn.Sequential(nn.Linear(w, 5), nn.Tanh()) for m, w in WIDTHS.items()}
    model = Tempered(encoders, nn.Linear(5, 40)).double()
    optimizer = wrap(model)
    inputs, target = batch(0)
    with torch.no_grad():
        expected = F.cross_entropy(model({"audio": inputs["audio"]})["audio"], target)
    losses = mla.alternating_step(model, optimizer, (inputs, target))
    torch.testing.assert_close(losses["audio"], expected)


@pytest.mark.parametrize("N", [0, 5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_of_no_row_there_is_no_mean_and_no_gradient(N, weighted, smoothing):
    features, weight, bias, _, of_class = draw(N, 7, 6)
    target, of_class = torch.full((N,), IGNORED, device=here()), of_class if weighted else None
    expected = by_autograd(features, weight, bias, target, of_class, smoothing)
    leaves = [t.requires_grad_() for t in (features, weight, bias)]
    loss = mla.linear_cross_entropy(*leaves, target, class_weight=of_class, label_smoothing=smoothing, ignore_index=IGNORED)
    loss.backward()
    for ours, theirs in zip((loss.detach(), *(t.grad for t in leaves)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)

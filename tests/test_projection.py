"""P against its closed form and the reference, over long runs."""

import pytest
import torch
from helpers import PROJECTIONS, exhaustive, here, normal, relative

from mla_fast import ops, reference
from mla_fast.projection import make_projection
from mla_fast.settings import Settings

pytestmark = pytest.mark.many_launches  # test_kernels.py has what is short enough for the interpreter

ORDERS = ("update_first", "project_first")


def make(projection="rls", size=7, dtype=torch.float64, backend="reference", **settings):
    return make_projection(Settings(projection, **settings), size, dtype, here(), backend)


def projected(projection, grad, *step):
    """What a step makes of G, which stays as it is."""
    own = grad.clone()
    squares = projection(own, *step)
    total = (grad.square() if squares is None else squares).sum()
    torch.testing.assert_close(total, own.square().sum(), rtol=1e-5, atol=1e-12)
    return own


def draws(seed=0):
    """An endless supply of (G [3, size], x̄ [size]), float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda size: (normal(generator, 3, size, dtype=torch.float64), normal(generator, size, dtype=torch.float64))


def follow(projection, count, draw, names=("audio", "image", "text")):
    """`count` steps; returns the x̄ that were seen [count, size]."""
    seen = []
    for t in range(count):
        grad, x_bar = (v.to(projection.dtype) for v in draw(projection.size))
        projection(grad, x_bar, names[t % len(names)], None)
        seen.append(x_bar)
    return torch.stack(seen)


def copied(tensors):
    return {name: t.clone() for name, t in tensors.items()}


@pytest.mark.parametrize("size", [1, 7, 63])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("order", ORDERS)
def test_rls_reaches_the_closed_form(size, alpha, order, backend):
    projection = make(size=size, alpha=alpha, order=order, backend=backend)
    x_bars = follow(projection, 500, draws())
    entered = x_bars if order == "project_first" else x_bars[1:]  # Algorithm 1's first step enters nothing
    P = projection.matrix()
    assert (P - reference.rls_closed_form(entered, alpha)).abs().max() < 1e-9
    assert torch.equal(P, P.T)


@pytest.mark.parametrize("count", [500, *exhaustive(10_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("C,unseen", [(1, 4), (20, 0)])
def test_thousands_of_updates(dtype, C, unseen, count, backend):
    """P stays bitwise symmetric and its eigenvalues in (0, 1]; a correction that waits for the next step changes no bit of it.

    Where the features leave a direction unseen its eigenvalue is 1 and may exceed it by rounding: over t updates a random walk,
    √t eps, of which twice is allowed.
    """
    s, eps = 16, torch.finfo(dtype).eps
    lazy, plain = (make(size=s, dtype=dtype, order="project_first", backend=backend) for _ in range(2))
    plain.pending = plain.slot = None
    generator = torch.Generator().manual_seed(3)
    basis = normal(generator, s, s - unseen, dtype=dtype) / 10
    grads, coordinates = normal(generator, count, C, s, dtype=dtype), normal(generator, count, s - unseen, dtype=dtype)
    for t in range(count):
        x_bar = basis @ coordinates[t]
        assert torch.equal(projected(lazy, grads[t], x_bar, None, None), projected(plain, grads[t], x_bar, None, None))
        if t % 500 == 499:
            P = lazy.matrix()
            assert torch.equal(P, plain.P) and torch.equal(P, P.T)
            eigenvalues = torch.linalg.eigvalsh(P.double())
            assert 0 < eigenvalues.min() and eigenvalues.max() <= 1 + (2 * t**0.5 * eps if unseen else 0)


@pytest.mark.parametrize("order", ORDERS)
def test_official_is_the_released_arithmetic(order):
    projection = make("official", alpha=0.1, order=order)
    P, draw = torch.eye(7, dtype=torch.float64), draws()
    for t in range(20):
        grad, x_bar = draw(7)
        before, skip = P, order == "update_first" and t == 0
        P = P if skip else reference.official_update(P, x_bar, 0.1)
        expected = grad if skip else reference.official_project(grad, before if order == "project_first" else P)
        torch.testing.assert_close(projected(projection, grad, x_bar, None, None), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(projection.matrix(), P, rtol=1e-12, atol=1e-12)


def test_window_projects_away_the_others_alone(backend):
    projection, draw, means = make("window", alpha=0.3, backend=backend), draws(), {}
    for t in range(12):
        modality = ("audio", "image", "audio", "text")[t % 4]
        grad, x_bar = draw(7)
        others = [mean for name, mean in means.items() if name != modality]
        P = reference.window_projection(torch.stack(others) if others else grad[:0], 0.3)
        torch.testing.assert_close(projected(projection, grad, x_bar, modality, None), grad @ P, rtol=1e-12, atol=1e-12)
        means[modality] = x_bar
        torch.testing.assert_close(projection.matrix(), P, rtol=1e-12, atol=1e-12)


def test_window_never_keeps_a_matrix(backend):
    projection = make("window", size=1000, dtype=torch.float32, backend=backend)
    follow(projection, 6, draws())
    assert projection.tensors()["means"].shape == (projection.CAPACITY, 1000) and len(projection.means) == 3
    assert projection.norm_and_trace()[1] == pytest.approx(998, abs=0.1)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("steps", [0, 1, 9])
def test_norm_and_trace_are_those_of_the_matrix(name, steps, backend):
    projection = make(name, alpha=0.2, backend=backend)
    if steps:
        follow(projection, steps, draws())
    P = projection.matrix()
    assert projection.norm_and_trace() == pytest.approx((P.norm().item(), P.trace().item()), rel=1e-12)


@pytest.mark.parametrize("name", ["rls", "window", "official"])
@pytest.mark.parametrize("poison", ["found_inf", "x_bar", "grad"])
def test_found_inf_leaves_the_state(name, poison, backend):
    projection, draw = make(name, backend=backend), draws()
    follow(projection, 5, draw)
    before = copied(projection.tensors())
    grad, x_bar = draw(7)
    if poison != "found_inf":
        (grad if poison == "grad" else x_bar).view(-1)[2] = torch.nan
    projection(grad, x_bar, "audio", torch.ones(1))
    after = projection.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert projection.step == 6


def test_found_inf_on_a_new_modality_projects_nothing_away(backend):
    projection, (grad, x_bar) = make("window", backend=backend), draws()(7)
    projection(grad, x_bar * torch.nan, "audio", torch.ones(1))
    assert torch.equal(projected(projection, grad, x_bar, "image", torch.zeros(1)), grad)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_saved_state_continues_to_the_last_bit(name, backend):
    projection, fresh = (make(name, backend=backend) for _ in range(2))
    follow(projection, 5, draws())
    follow(fresh, 3, draws(seed=2))  # to be forgotten
    fresh.load_state_dict(projection.state_dict())
    draw = draws(seed=1)
    for modality in ("image", "text", "audio", "image"):
        grad, x_bar = draw(7)
        assert torch.equal(projected(projection, grad, x_bar, modality, None), projected(fresh, grad, x_bar, modality, None))
    assert torch.equal(projection.matrix(), fresh.matrix())


@pytest.mark.parametrize("name", ["rls", "window", "official"])
def test_a_saved_state_is_a_copy(name, backend):
    projection, fresh = (make(name, backend=backend) for _ in range(2))
    follow(projection, 5, draws())
    saved = projection.state_dict()
    before = copied(saved["tensors"])
    fresh.load_state_dict(saved)
    for p in (projection, fresh):
        follow(p, 5, draws(seed=1))
        assert all(torch.equal(t, before[key]) for key, t in saved["tensors"].items())


@pytest.mark.parametrize("name", ["rls", "window", "official"])
def test_the_state_stays_where_a_captured_step_finds_it(name, backend):
    projection, draw = make(name, backend=backend), draws()
    follow(projection, 3, draw)
    before = {key: t.data_ptr() for key, t in vars(projection).items() if isinstance(t, torch.Tensor)}
    for found_inf in (None, torch.zeros(1), torch.ones(1)):
        grad, x_bar = draw(7)
        projection(grad, x_bar, "audio", found_inf)
    assert {key: t.data_ptr() for key, t in vars(projection).items() if isinstance(t, torch.Tensor)} == before


def test_float32_rls_is_as_good_as_eager_float32(backend):
    generator = torch.Generator().manual_seed(4)
    projection = make(size=63, dtype=torch.float32, backend=backend)
    exact = torch.eye(63, dtype=torch.float64)
    eager = exact.float()
    for t in range(1000):
        x_bar, grad = torch.rand(63, generator=generator, device="cpu").to(here()), torch.ones(1, 63)
        projection(grad, x_bar, None, None)
        if t:
            exact, eager = reference.rls_update(exact, x_bar.double(), 1.0), reference.rls_update(eager, x_bar, 1.0)
    assert relative(projection.matrix(), exact) <= 2 * relative(eager, exact)


def test_alpha_follows_the_step(backend):
    projection, plain = make(alpha=lambda t: 1.0 + t % 3, backend=backend), torch.eye(7, dtype=torch.float64)
    for t, x_bar in enumerate(follow(projection, 8, draws())):
        plain = plain if t == 0 else reference.rls_update(plain, x_bar, 1.0 + t % 3)
    torch.testing.assert_close(projection.matrix(), plain, rtol=1e-12, atol=1e-12)
    assert projection.alpha().item() == 3.0


@pytest.mark.parametrize("name", ["projection", "order", "target", "bias"])
def test_unknown_settings_are_named(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected one of .*, got 'rsl'"):
        Settings(**{name: "rsl"})


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), True, "1", None, lambda t: 0.0, lambda t: torch.ones(())])
def test_bad_alpha_is_named(alpha):
    with pytest.raises(ValueError, match="^alpha: expected a positive finite number"):
        make(alpha=alpha)


def test_settings_are_saved_as_plain_values():
    settings = Settings("window", "project_first", "update", "project", 2)
    assert Settings(**settings.state_dict()) == settings
    assert Settings(alpha=lambda t: 1.0).state_dict()["alpha"] is None


@pytest.mark.parametrize("name", ["rls", "official"])
@pytest.mark.parametrize("tensors", [{}, {"P": torch.eye(8, dtype=torch.float64)}, {"P": torch.eye(7)}])
def test_a_matrix_of_another_kind_is_refused(name, tensors):
    with pytest.raises(ValueError, match=r"^state_dict: expected P torch.float64 \[7, 7\], got"):
        make(name).check(tensors)


@pytest.mark.parametrize("tensors", [{}, {"means": torch.zeros(16, 8, dtype=torch.float64)}, {"means": torch.zeros(16, 7)}])
def test_means_of_another_kind_are_refused(tensors):
    with pytest.raises(ValueError, match=r"^state_dict: expected means torch.float64 \[rows, 7\], got"):
        make("window").check(tensors)


def test_no_projection_has_no_state():
    with pytest.raises(ValueError, match="^state_dict: projection 'none' keeps no tensors, got P"):
        make("none").check({"P": torch.eye(7)})


def test_backend_is_the_one_asked_for(backend):
    projection = make(backend=backend)
    assert projection.backend == backend
    assert (projection.pending is None) == (backend == "reference")
    with pytest.raises(ValueError, match="^backend: expected one of"):
        make(backend="cuda")
    assert make(backend="auto").backend == ops.resolve("auto", here())

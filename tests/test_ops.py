"""The operators against the reference in float64, on fresh random inputs, at awkward sizes, in poisoned memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import exhaustive, relative
from torch.library import opcheck

import mla_fast as mla
from mla_fast import ops, reference

needs_cpp = pytest.mark.skipif(not ops.available("cpp"), reason=str(ops.MISSING["cpp"]))
many_launches = pytest.mark.many_launches
SIZES = [1, 2, 7, 63, 64, 65, 513]
CLASSES = [1, 6, 7, 20, 21, 101]
ORDERS = ["update_first", "project_first"]


def poison():
    """Fills what the allocator hands out next with NaN, so that a result that was never written shows."""
    blocks = [torch.full((n,), torch.nan, dtype=torch.float64) for n in (8, 64, 512, 4096, 65536)]
    del blocks


def problem(s, C, dtype=torch.float64, scale=1.0):
    """P [s, s] some steps on its way, x̄ [s] and G [C, s]."""
    P = reference.rls_closed_form(torch.randn(5, s, dtype=torch.float64), 1.0)
    P = ((P + P.T) / 2).contiguous()
    return P.to(dtype), (scale * torch.randn(s, dtype=torch.float64)).to(dtype), torch.randn(C, s, dtype=torch.float64).to(dtype)


CORE = [(1, 1), (63, 6), (65, 101), (130, 21), (200, 6)]
SHAPES = {*itertools.product(SIZES, [1, 6, 101]), *itertools.product([63, 130], CLASSES)}


@pytest.mark.parametrize("s,C", [*CORE, *exhaustive(*sorted(SHAPES.difference(CORE)), where="triton")])
@pytest.mark.parametrize("order", ORDERS)
def test_rls_float64_equals_the_reference(s, C, order, backend):
    P, x_bar, grad = problem(s, C)
    expected_P, expected = reference.rls_project(P, x_bar, grad, 0.7, project_first=order == "project_first")
    poison()
    projected = mla.rls_project_(P, x_bar, grad, 0.7, order=order, backend=backend)
    assert relative(projected, expected) < 1e-12
    assert relative(P, expected_P) < 1e-14
    assert torch.equal(P, P.T)


@pytest.mark.parametrize("s,C", [(63, 6), *(pytest.param(*shape, marks=many_launches) for shape in [(128, 101), (513, 6)])])
@pytest.mark.parametrize("alpha", [0.1, *exhaustive(1.0, 100.0, where="triton")])
def test_rls_float32_is_as_good_as_eager_float32(s, C, alpha, backend):
    """Against float64 over many steps: at most twice the error of the same recursion in eager float32."""
    exact = torch.eye(s, dtype=torch.float64)
    eager, ours = exact.float(), exact.float()
    errors = []
    for _ in range(20 if backend == "triton" else 50):
        x_bar, grad = torch.rand(s), torch.randn(C, s)
        exact, expected = reference.rls_project(exact, x_bar.double(), grad.double(), alpha)
        eager, eager_projected = reference.rls_project(eager, x_bar, grad, alpha)
        projected = mla.rls_project_(ours, x_bar, grad, alpha, backend=backend)
        errors.append((relative(projected, expected), relative(eager_projected, expected)))
    assert relative(ours, exact) <= 2 * relative(eager, exact) + 1e-7
    assert sum(e for e, _ in errors) <= 2 * sum(e for _, e in errors) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *exhaustive(torch.float64, where="triton")])
@pytest.mark.parametrize(
    "s,C", [(1, 1), (63, 6), *(pytest.param(*shape, marks=many_launches) for shape in [(130, 20), (64, 101)])]
)
def test_pending_form_is_the_plain_form_to_the_last_bit(s, C, dtype, backend):
    plain, lazy, pending = torch.eye(s, dtype=dtype), torch.eye(s, dtype=dtype), torch.zeros(1, s, dtype=dtype)
    for step in range(12):
        x_bar, grad = torch.randn(s, dtype=dtype), torch.randn(C, s, dtype=dtype)
        a = mla.rls_project_(plain, x_bar, grad, 1.0, backend=backend)
        b = mla.rls_project_(lazy, x_bar, grad, 1.0, pending=pending, backend=backend)
        assert torch.equal(a, b)
        if step % 5 == 4:  # as state_dict does in the middle of a run
            ops.rls_fold(ops.resolve(backend, lazy.device), lazy, pending)
            assert torch.equal(plain, lazy) and not pending.any()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("s", [1, 16, 63, 64, 65, 130, 513])
def test_the_lower_triangle_is_not_read_before_it_is_made_up(s, dtype):
    """As the optimizer keeps it on the CPU: left of the diagonal's blocks P is out of date, and poisoned here, until a fold or a
    step of so many classes that all of P is multiplied."""
    plain, P, pending = torch.eye(s, dtype=dtype), torch.eye(s, dtype=dtype), torch.zeros(1, s, dtype=dtype)
    slot, alpha, block = torch.zeros(2, dtype=torch.int32), torch.tensor(0.7, dtype=torch.float64), torch.arange(s) // 64
    for step, C in enumerate([6, 1, 20, 101, 6, 6, 0, 6, 101, 101]):
        x_bar, grad = torch.randn(s, dtype=dtype), torch.randn(C, s, dtype=dtype)
        overflow = torch.tensor([float(step == 4)])
        a = ops.rls_step("cpp", plain, x_bar, grad, alpha, None, None, overflow)
        poison()
        b = ops.rls_step("cpp", P, x_bar, grad, alpha, pending, slot, overflow)
        assert torch.equal(a, b)
        if slot[0]:
            P[block[:, None] > block] = torch.nan
        assert step == 4 or bool(slot[0]) == (C <= 20)
        if step == 6:
            ops.rls_fold("cpp", P, pending, slot)
            assert torch.equal(plain, P) and torch.equal(P, P.T) and not pending.any() and not slot.any()
    ops.rls_fold("cpp", P, pending, slot)
    assert torch.equal(plain, P) and torch.equal(P, P.T)


@many_launches
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_thousand_updates_stay_symmetric_and_definite(dtype, backend):
    P = torch.eye(24, dtype=dtype)
    grad = torch.zeros(1, 24, dtype=dtype)
    for x_bar in torch.randn(10_000, 24, dtype=dtype) / 24**0.5:
        mla.rls_project_(P, x_bar, grad, 1.0, backend=backend)
    assert torch.equal(P, P.T)
    eigenvalues = torch.linalg.eigvalsh(P.double())
    assert 0 < eigenvalues.min() and eigenvalues.max() <= 1


def test_rls_takes_any_layout_and_floating_dtype(backend):
    P, x_bar, grad = problem(63, 6, torch.float32)
    expected_P, expected = reference.rls_project(P.double(), x_bar.double(), grad.double(), 1.0)
    strided = mla.rls_project_(P.clone(), torch.stack([x_bar, x_bar], 1)[:, 0], grad.T.contiguous().T, 1.0, backend=backend)
    assert relative(strided, expected) < 1e-6
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        projected = mla.rls_project_(P.clone(), x_bar, grad.to(dtype), torch.tensor([1.0]), backend=backend)
        assert projected.dtype == dtype
        assert relative(projected, expected) < 4 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("poisoned", ["x_bar", "grad", "inf", "found_inf"])
@pytest.mark.parametrize("C", [6, *exhaustive(101, where="triton")])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(poisoned, C, lazy, backend):
    P, x_bar, grad = problem(33, C)
    pending = torch.zeros(33, dtype=P.dtype) if lazy else None
    mla.rls_project_(P, x_bar, grad, 1.0, pending=pending, backend=backend)
    before = P - torch.outer(pending, pending) if lazy else P.clone()
    found_inf = torch.ones(1) if poisoned == "found_inf" else torch.zeros(1)
    if poisoned == "x_bar":
        x_bar[7] = torch.nan
    elif poisoned != "found_inf":
        grad[-1, 5] = torch.nan if poisoned == "grad" else torch.inf
    returned = mla.rls_project_(P, x_bar, grad, 1.0, pending=pending, found_inf=found_inf, backend=backend)
    torch.testing.assert_close(returned, grad, equal_nan=True, rtol=0, atol=0)
    now = P - torch.outer(pending, pending) if lazy else P
    torch.testing.assert_close(now, before, rtol=0, atol=2**-52 if lazy else 0)


@pytest.mark.parametrize("J", [0, 1, 2, *exhaustive(7, where="triton")])
@pytest.mark.parametrize("s", [1, 63, 513, *exhaustive(2, 7, 64, 65, where="triton")])
@pytest.mark.parametrize("C", [6, *exhaustive(1, where="triton"), pytest.param(101, marks=many_launches)])
def test_window_float64_equals_the_reference(J, s, C, backend):
    means, grad = torch.randn(J, s, dtype=torch.float64), torch.randn(C, s, dtype=torch.float64)
    expected = reference.project(grad, reference.window_projection(means, 0.3))
    poison()
    assert relative(mla.window_project(means, grad, 0.3, backend=backend), expected) < 1e-12


def test_window_float32_is_as_good_as_eager_float32(backend):
    means, grad = torch.rand(3, 513), torch.randn(6, 513)
    expected = reference.project(grad.double(), reference.window_projection(means.double(), 0.1))
    eager = reference.project(grad, reference.window_projection(means, 0.1))
    assert relative(mla.window_project(means, grad, 0.1, backend=backend), expected) <= 2 * relative(eager, expected) + 1e-7


def test_window_takes_any_layout_and_floating_dtype(backend):
    means, grad = torch.randn(2, 40), torch.randn(6, 40)
    expected = mla.window_project(means, grad, 1.0, backend="reference")
    strided = mla.window_project(means.T.contiguous().T, grad.T.contiguous().T, 1.0, backend=backend)
    torch.testing.assert_close(strided, expected)
    half = mla.window_project(means.bfloat16(), grad.bfloat16(), 1.0, backend=backend)
    assert half.dtype == torch.bfloat16 and relative(half, expected) < 0.02


@needs_cpp
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_the_result(threads):
    P, x_bar, grad = problem(513, 6, torch.float32)
    P = torch.eye(513)
    results = []
    for n in (1, threads):
        torch.set_num_threads(n)
        Q = P.clone()
        results.append((mla.rls_project_(Q, x_bar, grad, 1.0), Q, mla.window_project(x_bar[None], grad, 1.0)))
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, *exhaustive(torch.float64)])
def test_registration(dtype):
    P, x_bar, grad = problem(7, 3, dtype)
    alpha = torch.tensor(1.0, dtype=torch.float64)
    pending, slot = torch.zeros(1, 7, dtype=dtype), torch.zeros(2, dtype=torch.int32)
    opcheck(torch.ops.mla_fast.rls_project_.default, (P, x_bar, grad, alpha))
    opcheck(torch.ops.mla_fast.rls_project_.default, (P, x_bar, grad, alpha, pending, slot, torch.zeros(1), True))
    opcheck(torch.ops.mla_fast.rls_fold_.default, (P, pending, slot))
    opcheck(torch.ops.mla_fast.window_project.default, (x_bar[None], grad, alpha))
    means, gram = torch.rand(3, 7, dtype=dtype), torch.zeros(3, 3, dtype=torch.float64)
    opcheck(torch.ops.mla_fast.window_step_.default, (means, gram, 1, x_bar, grad, alpha, torch.zeros(1)))
    logits = torch.randn(2, 4, 5, dtype=dtype, requires_grad=True)
    opcheck(torch.ops.mla_fast.entropy_fusion.default, ([logits], None, None))
    opcheck(torch.ops.mla_fast.entropy_fusion.default, (list(logits.detach().unbind(0)), torch.rand(4, 2) > 0.5, None))


def test_bad_arguments_are_named(backend):
    P, x, G = torch.eye(4), torch.randn(4), torch.randn(3, 4)
    cases = [
        ("x_bar", lambda: mla.rls_project_(P, torch.randn(2, 4), G, 1.0)),
        ("grad", lambda: mla.rls_project_(P, x, torch.randn(3, 5), 1.0)),
        ("grad", lambda: mla.rls_project_(P, x, torch.ones(3, 4, dtype=torch.long), 1.0)),
        ("P", lambda: mla.rls_project_(torch.eye(5), x, G, 1.0)),
        ("P", lambda: mla.rls_project_(P.half(), x, G, 1.0)),
        ("P", lambda: mla.rls_project_(torch.eye(8)[::2, ::2], x, G, 1.0)),
        ("P", lambda: mla.rls_project_(P.clone().requires_grad_(), x, G, 1.0)),
        ("pending", lambda: mla.rls_project_(P, x, G, 1.0, pending=torch.zeros(3))),
        ("order", lambda: mla.rls_project_(P, x, G, 1.0, order="first")),
        ("alpha", lambda: mla.rls_project_(P, x, G, 0.0)),
        ("alpha", lambda: mla.rls_project_(P, x, G, torch.tensor(-1.0, device="cpu"))),
        ("alpha", lambda: mla.rls_project_(P, x, G, torch.ones(2))),
        ("alpha", lambda: mla.window_project(x[None], G, float("nan"))),
        ("means", lambda: mla.window_project(x, G, 1.0)),
        ("means", lambda: mla.window_project(torch.ones(1, 4, dtype=torch.long), G, 1.0)),
        ("grad", lambda: mla.window_project(x[None], G[0], 1.0)),
        ("backend", lambda: mla.window_project(x[None], G, 1.0, backend="cuda")),
    ]
    for name, call in cases:
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: "):
            call()
    assert torch.equal(P, torch.eye(4))


def test_backends_that_cannot_run_say_why(monkeypatch):
    monkeypatch.setitem(ops.MISSING, "triton", "there is no GPU")
    with pytest.raises(ops.BackendError, match="triton"):
        mla.window_project(torch.ones(1, 4), torch.ones(2, 4), 1.0, backend="triton")
    with pytest.raises((ops.BackendError, ValueError), match="cpp"):
        ops.resolve("cpp", torch.device("meta"))
    assert ops.resolve("auto", torch.device("meta")) == "reference"


def test_a_fallback_is_announced_once(monkeypatch):
    monkeypatch.setitem(ops.MISSING, "cpp", "it was not built; build it with make")
    monkeypatch.setattr("mla_fast.ops.backend._announced", set())
    with pytest.warns(UserWarning, match="build it with make") as warned:
        for _ in range(3):
            assert ops.resolve("auto", torch.device("cpu")) == "reference"
    assert len(warned) == 1


@pytest.mark.parametrize("C", [6, 20])
def test_autocast_is_not_for_the_projection(C, backend):
    P, x_bar, grad = problem(64, C, torch.float32)
    pending, plain = torch.zeros(64), P.clone()
    expected = [mla.rls_project_(plain, x_bar, grad, 1.0, backend="reference") for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backend == "cpp"):
        for want in expected:
            assert relative(mla.rls_project_(P, x_bar, grad, 1.0, pending=pending, backend=backend), want) < 1e-5


@pytest.mark.parametrize("scale", [1e4, *(pytest.param(scale, marks=many_launches) for scale in [1e3, 1e6])])
def test_a_mean_that_is_projected_away_already_is_no_reason_to_skip(scale, backend):
    """‖x̄‖²/α of 1e6 and far beyond what float32 can hold: d becomes rounding, of either sign."""
    P, grad = torch.eye(64), torch.randn(6, 64)
    x_bar = torch.rand(64)
    x_bar *= scale / x_bar.norm()
    exact = reference.project(grad.double(), reference.rls_closed_form(x_bar.double()[None], 1.0))
    for _ in range(20 if backend == "triton" else 100):
        projected = mla.rls_project_(P, x_bar, grad, 1.0, backend=backend)
    assert relative(projected, exact) < 0.01 and torch.isfinite(P).all()


def test_autocast_is_not_for_the_reference_backend():
    P, x_bar, grad = problem(64, 6, torch.float32)
    means, logits, other = torch.randn(2, 64), 20 * torch.randn(3, 9, 7), P.clone()

    def everything(P):
        options = {"backend": "reference"}
        fused = mla.entropy_fusion(logits, **options)
        return [mla.rls_project_(P, x_bar, grad, 1.0, **options), P, mla.window_project(means, grad, 1.0, **options), *fused]

    expected = everything(P)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(everything(other), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("alpha", [1e-20, *exhaustive(1e-14, 1e-300, where="triton")])
def test_window_of_parallel_means_and_hardly_any_alpha(alpha, backend):
    """Nothing but rounding is left of the second and third: they have no say."""
    mean, grad = torch.rand(513), torch.randn(6, 513)
    projected = mla.window_project(torch.stack([mean, 2 * mean, mean]), grad, alpha, backend=backend)
    along = mean.double() / mean.double().norm()
    expected = grad.double() - (grad.double() @ along)[:, None] * along
    assert relative(projected, expected) < (1e-4 if backend == "reference" else 1e-6)


@pytest.mark.parametrize("ratio", [1e2, 1e6, 1e10])
def test_window_of_nearly_parallel_means(ratio, backend):
    mean = torch.randn(64, dtype=torch.float64)
    means = (mean * ratio**0.5 / mean.norm() + 1e-3 * torch.randn(3, 64)).float()
    grad = torch.randn(6, 64)
    expected = reference.project(grad.double(), reference.window_projection(means.double(), 1.0))
    bound = 1e-2 if backend == "reference" else 1e-6
    assert relative(mla.window_project(means, grad, 1.0, backend=backend), expected) < bound


@needs_cpp
def test_autograd_learns_that_P_has_changed():
    P, H = torch.eye(4), torch.randn(3, 4, requires_grad=True)
    loss = (H @ P).sum()
    mla.rls_project_(P, torch.ones(4), torch.ones(2, 4), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_cpp
def test_direct_callers_are_kept_within_bounds():
    op = torch.ops.mla_fast
    P, x, G, alpha = torch.eye(4), torch.ones(4), torch.ones(2, 4), torch.ones((), dtype=torch.float64)
    z, w, gram = torch.randn(2, 3, 5), torch.rand(3, 2), torch.zeros(2, 2, dtype=torch.float64)
    for call in (
        lambda: op.rls_project_(P, x[None].expand(5, 4), G, alpha),
        lambda: op.rls_project_(P, x, G, torch.ones(0, dtype=torch.float64)),
        lambda: op.rls_project_(P, x, G, alpha, None, None, torch.zeros(0)),
        lambda: op.rls_project_(P, x, G, alpha, torch.zeros(2, 4)),
        lambda: op.window_step_(torch.zeros(2, 4), gram, 2, x, G, alpha),
        lambda: op.window_step_(torch.zeros(2, 4), gram, 0, x.double(), G, alpha),
        lambda: op.window_step_(torch.zeros(2, 4), gram, 0, x, torch.ones(4, 2).T, alpha),
        lambda: op.window_project(x[None], G, torch.ones(2, dtype=torch.float64)),
        lambda: op.entropy_fusion_backward([z], None, w[:2], w, None, None, None, None),
        lambda: op.entropy_fusion_backward([z], None, w, w, torch.rand(2, 5), None, None, None),
    ):
        with pytest.raises(RuntimeError):
            call()
    for bad in (torch.zeros(0), torch.zeros(2), torch.zeros(1, device="meta")):
        with pytest.raises(ValueError, match="^found_inf: "):
            mla.rls_project_(P, x, G, 1.0, found_inf=bad)


def autograd_of_the_head(features, target, weight, bias, total):
    """Without a bias its gradient is found all the same."""
    bias = features.new_zeros(len(weight)) if bias is None else bias
    leaves = [t.double().requires_grad_() for t in (features, weight, bias)]
    loss = F.cross_entropy(F.linear(*leaves), target, reduction="sum") / total
    return loss.detach(), *torch.autograd.grad(loss, leaves), features.double().mean(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "N,s,C", [(1, 1, 1), (1, 63, 6), (7, 130, 31), (64, 128, 10), (3, 513, 101), (65, 513, 31), (64, 513, 101)]
)
def test_linear_cross_entropy_is_what_autograd_finds(N, s, C, with_bias, dtype):
    """The last size is left to matrix products; logits far from zero, where exp alone would overflow."""
    features, weight = torch.randn(N, s).to(dtype), 3 * torch.randn(C, s).to(dtype)
    bias, target = torch.randn(C).to(dtype) + 100 if with_bias else None, torch.randint(C, (N,))
    arguments = features, target, weight, bias, 2.5 * N
    assert (N * s * C > ops.cross_entropy.SMALL) == ((N, s) == (64, 513))
    results = zip(ops.head_gradients(*arguments), reference.linear_cross_entropy(*arguments), strict=True)
    logits = F.linear(features.double(), weight.double(), None if bias is None else bias.double())
    rounding = 2 * torch.finfo(dtype).eps * max(1, logits.abs().max().item())  # of a logit, which the rest depends on
    for (ours, eager), right in zip(results, autograd_of_the_head(*arguments), strict=True):
        assert ours.dtype == dtype and ours.shape == right.shape
        scale = max(1, right.abs().max().item())
        assert (ours - right).abs().max() <= 2 * (eager - right).abs().max() + rounding * scale
        assert (eager - right).abs().max() <= 2 * rounding * scale


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_linear_cross_entropy_keeps_what_is_no_number(bits, where):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    features, weight, bias, target = torch.randn(4, 8), torch.randn(5, 8), torch.randn(5), torch.tensor([0, 1, 2, 3])
    {"weight": weight, "bias": bias}[where][4] = nan
    loss, gradient, grad, grad_bias, _ = ops.head_gradients(features, target, weight, bias, 4.0)
    assert all(t.isnan().all() for t in (loss, gradient, grad, grad_bias))


@pytest.mark.skipif(not ops.available("cpp"), reason="no extension")
def test_linear_cross_entropy_is_registered_and_checked():
    features, weight, target = torch.randn(5, 4), torch.randn(3, 4), torch.tensor([0, 1, 2, 0, 1])
    op = torch.ops.mla_fast.linear_cross_entropy.default
    opcheck(op, (features, target, weight, torch.randn(3), 5.0))
    opcheck(op, (torch.randn(4, 5).T, target, torch.randn(4, 3).T, None, 5.0))
    assert [t.shape for t in op(features[:0], target[:0], weight, None, 5.0)] == [(), (0, 4), (3, 4), (3,), (4,)]
    for bad in (
        (features, target + 1, weight, None, 5.0),
        (features, target[:4], weight, None, 5.0),
        (features[:, :3], target, weight, None, 5.0),
        (features.double(), target, weight, None, 5.0),
    ):
        with pytest.raises(RuntimeError, match="linear_cross_entropy: "):
            op(*bad)

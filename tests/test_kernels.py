"""The Triton kernels: what the operators' tests, which run them too, do not reach. On a GPU if there is one, else interpreted."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PROJECTIONS,
    adam,
    everything,
    exhaustive,
    fused_sgd,
    head_steps,
    here,
    make_head,
    make_model,
    make_steps,
    momentum_sgd,
    on_device,
    relative,
    spoil,
    train,
    wrap,
)
from torch.library import opcheck

import mla_fast as mla
from mla_fast import ops, reference
from mla_fast.projection import make_projection
from mla_fast.settings import Settings

pytestmark = pytest.mark.skipif(not ops.available("triton"), reason=f"triton: {ops.MISSING['triton']}")
f64 = torch.float64
ALPHA = 0.7
LIBRARY = torch.ops.mla_fast_interpreted if ops.INTERPRETED else torch.ops.mla_fast
needs_cuda = pytest.mark.skipif(ops.INTERPRETED, reason="needs a GPU")


@pytest.fixture(autouse=True)
def on_the_device():
    if ops.INTERPRETED:
        yield
    else:
        with torch.device("cuda"):
            yield


def state(s, R, dtype=torch.float32):
    """P = I, nothing pending, and the slot. What must not be read is NaN."""
    pending = torch.full((R, s), torch.nan, dtype=dtype) if R > 1 else torch.zeros(1, s, dtype=dtype)
    return torch.eye(s, dtype=dtype), pending, torch.zeros(2, dtype=torch.int32) if R > 1 else None


@pytest.fixture
def narrow_blocks(monkeypatch):
    """More classes than one block holds, without the interpreter's paying for 128 of them."""
    from mla_fast import kernels

    monkeypatch.setattr(kernels.launch, "MAX_BLOCK_C", 16)
    kernels.launch.forget()
    yield
    kernels.launch.forget()


def window_state(K, s, dtype=torch.float32):
    """Means [K, s] and their products."""
    means = torch.rand(K, s, dtype=dtype)
    return means, means.double() @ means.double().T


def folded(P, pending, slot):
    P, pending, slot = (None if t is None else t.clone() for t in (P, pending, slot))
    ops.rls_fold("triton", P, pending, slot)
    return P


@pytest.mark.parametrize(
    "s,C,R,project_first",
    [
        (1, 1, 4, False),
        (33, 6, 4, False),
        (33, 6, 4, True),
        (65, 17, 1, False),
        *exhaustive(*((*case, first) for case in [(63, 6, 4), (130, 17, 2), (33, 0, 1), (33, 0, 4)] for first in (False, True))),
        *exhaustive((1, 1, 4, True), (65, 17, 1, True)),
    ],
)
def test_deferred_and_wide_steps_follow_the_reference(s, C, R, project_first, narrow_blocks):
    """Past two foldings, with more classes than one block holds, and with none."""
    (P, pending, slot), exact = state(s, R), torch.eye(s, dtype=f64)
    alpha = torch.tensor(ALPHA, dtype=f64)
    for step in range(2 * R + 2):
        x_bar, grad = torch.rand(s), torch.randn(C, s)
        projected = ops.rls_step("triton", P, x_bar, grad, alpha, pending, slot, None, project_first)
        exact, expected = reference.rls_project(exact, x_bar.double(), grad.double(), ALPHA, project_first=project_first)
        assert projected.shape == (C, s) and (C == 0 or relative(projected, expected) < 2e-6)
        assert torch.equal(P, P.T)
        if step % 3 == 0 or step > 2 * R:
            assert relative(folded(P, pending, slot), exact) < 1e-6


def test_foldings_change_no_bit_of_a_deferred_run():
    """The P that is written every fourth step is the P of corrections entered one by one."""
    s, R = 20, 4
    P, pending, slot = state(s, R)
    alpha, entered = torch.tensor(ALPHA, dtype=f64), torch.eye(s)
    for step in range(2 * R):
        ops.rls_step("triton", P, torch.rand(s), torch.randn(3, s), alpha, pending, slot)
        u = pending[step % R]
        entered = torch.addcmul(entered, u[:, None], u[None, :], value=-1)  # fused or not, as the kernel
        torch.testing.assert_close(folded(P, pending, slot), entered, rtol=0, atol=2**-22)


@pytest.mark.parametrize("R,C", [(1, 19), (4, 3), *exhaustive((1, 3), (4, 19))])
@pytest.mark.parametrize("what", ["x_bar", "grad", "found_inf"])
def test_a_bad_step_moves_nothing(R, C, what, narrow_blocks):
    s = 21
    P, pending, slot = state(s, R)
    alpha, found_inf = torch.tensor(ALPHA, dtype=f64), torch.zeros(1)
    for _ in range(R + 1):
        ops.rls_step("triton", P, torch.rand(s), torch.randn(C, s), alpha, pending, slot, found_inf)
    before = folded(P, pending, slot)
    x_bar, grad = torch.rand(s), torch.randn(C, s)
    for value in (1,) if what == "found_inf" else (torch.nan, -torch.inf):
        if what == "found_inf":
            found_inf.fill_(1)
        else:
            (x_bar if what == "x_bar" else grad[-1])[s // 2] = value
        returned = ops.rls_step("triton", P, x_bar, grad, alpha, pending, slot, found_inf)
        torch.testing.assert_close(returned, grad, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(folded(P, pending, slot), before)


@pytest.mark.parametrize("s,C,R", [(1, 1, 1), (33, 7, 2), (65, 8, 1), *exhaustive((63, 7, 2), (70, 17, 2))])
def test_a_step_in_place_is_the_step(s, C, R, narrow_blocks):
    """To the last bit, with the squares of what it leaves; and nothing moves where found_inf is set."""
    from mla_fast import kernels

    (P, pending, slot), (P_too, pending_too, slot_too) = state(s, R), state(s, R)
    alpha, found_inf = torch.tensor(ALPHA, dtype=f64), torch.zeros(1)
    for step in range(R + 2):
        found_inf.fill_(step == R)
        x_bar, grad = torch.rand(s), torch.randn(C, s)
        projected = kernels.rls_project_(P, x_bar, grad, alpha, pending, slot, found_inf)
        squares = kernels.rls_step_(P_too, x_bar, grad_too := grad.clone(), alpha, pending_too, slot_too, found_inf)
        assert torch.equal(grad_too, projected) and torch.equal(P_too, P) and torch.equal(grad_too, grad) == (step == R)
        torch.testing.assert_close(squares.sum().double(), projected.double().square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1, 63, *exhaustive(130)])
def test_rows_of_P_begin_at_multiples_of_16_numbers(size):
    """Whatever the size; what is saved knows nothing of it."""
    padded = make_projection(Settings(alpha=ALPHA), size, torch.float32, here(), "triton")
    plain = make_projection(Settings(alpha=ALPHA), size, f64, here(), "reference")
    assert padded.P.stride(0) % 16 == 0
    for _ in range(3):
        x_bar, grad = torch.rand(size), torch.randn(2, size)
        exact = grad.double()
        padded(grad, x_bar, None, None), plain(exact, x_bar.double(), None, None)
        assert relative(grad, exact) < 2e-6
    saved = padded.tensors()["P"]
    assert saved.is_contiguous() and relative(saved, plain.matrix()) < 1e-6
    padded.load_state_dict({**padded.state_dict(), "tensors": {"P": 2 * saved}})
    assert torch.equal(padded.matrix(), 2 * saved) and padded.P.stride(0) % 16 == 0


def one_of_each(s=70, C=17, N=3):
    """Every kernel on several programs; all that it leaves behind."""
    from mla_fast import kernels

    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    alpha, left = torch.tensor(ALPHA, dtype=f64), []
    for R, classes in ((1, C), (2, 3), (2, C)):
        P, pending, slot = state(s, R)
        for _ in range(R + 1):
            left.append(ops.rls_step("triton", P, normal(s), normal(classes, s), alpha, pending, slot).clone())
        ops.rls_fold("triton", P, pending, slot)
        left += [P, pending]
    means, gram, grad = normal(3, s), normal(3, 3).double(), normal(9, s)
    left += [ops.window_step_("triton", means, gram, 1, normal(s), grad, alpha), means, gram, grad]
    left.append(ops.window_project(means, normal(3, s), ALPHA, backend="triton"))
    account, first, kept = torch.zeros(2, dtype=torch.int32), [torch.ones(())], [normal(90, s), normal(7)]
    for found_inf in (None, torch.ones(())):
        copies = [torch.empty_like(t) for t in kept]
        left += kernels.head_check_([normal(90, s), normal(s), normal(C)], 1, account, first, found_inf, kept, copies)
        left += [account.clone(), first[0].clone(), *copies]
    changed = [normal(90, s), normal(7), normal(5000)]
    kernels.head_restore_(changed, copies, torch.ones(()))
    left += changed
    for classes in (C, 4100):
        logits, present = normal(3, N, classes).requires_grad_(), normal(N, 3) > 0
        fused = mla.entropy_fusion(logits, present, backend="triton")
        sum((part * normal(*part.shape)).sum() for part in fused).backward()
        left += [*(part.detach() for part in fused), logits.grad]
    return left


@pytest.mark.parametrize("dtype", [torch.float32, *exhaustive(f64)])
@pytest.mark.parametrize(
    "K,s,C", [(1, 1, 1), (2, 63, 6), (3, 513, 2), (7, 1100, 1), (2, 2100, 1), *exhaustive((5, 40, 0), (4, 2100, 1))]
)
def test_a_window_step_in_place(K, s, C, dtype):
    """Against the reference in float64; what it must not read is NaN, and what it must not write stays."""
    own, alpha, eps = K - 1, torch.tensor(ALPHA, dtype=f64), torch.finfo(dtype).eps
    means, gram = window_state(K, s, dtype)
    means[own], gram[own], gram[:, own] = torch.nan, torch.nan, torch.nan
    x_bar, grad = torch.rand(s, dtype=dtype), torch.randn(C, s, dtype=dtype)
    before = [t.clone() for t in (means, gram, grad)]
    squares = ops.window_step_("triton", means, gram, own, x_bar, grad, alpha, torch.ones(1))
    for now, then in zip((means, gram, grad), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    assert relative(squares.sum(), grad.double().square().sum()) < 4 * eps or C == 0
    expected = reference.project(grad.double(), reference.window_projection(means[:own].double(), ALPHA))
    squares = ops.window_step_("triton", means, gram, own, x_bar, grad, alpha, torch.zeros(1))
    assert C == 0 or (relative(grad, expected) < 20 * eps and relative(squares.sum(), expected.square().sum()) < 20 * eps)
    exact = means.double() @ means.double().T
    assert torch.equal(means[own], x_bar) and torch.equal(gram[own], gram[:, own]) and relative(gram, exact) < 1e-13


def test_products_of_means_do_not_depend_on_how_many_there_are():
    """So a state whose products are formed anew when it is loaded goes on as if it had not been saved."""
    means, _ = window_state(9, 300)
    whole = ops.window_gram("triton", means)
    for K in (1, 2, 4, 5):
        assert torch.equal(ops.window_gram("triton", means[:K]), whole[:K, :K])


def test_more_modalities_than_there_is_room_for():
    window, exact = (make_projection(Settings("window"), 5, f64, here(), b) for b in ("triton", "reference"))
    window._buffer, window._products = window._buffer[:2], window._products[:2, :2]
    for t in range(7):
        grad, x_bar = torch.randn(1, 5, dtype=f64), torch.rand(5, dtype=f64)
        projected = grad.clone()
        window(projected, x_bar, f"modality {t % 6}", None), exact(grad, x_bar, f"modality {t % 6}", None)
        assert relative(projected, grad) < 1e-13
    assert relative(window.gram, window.means @ window.means.T) < 1e-15 and len(window._buffer) == 8


def test_a_loaded_window_forms_its_products_anew():
    window, loaded = (make_projection(Settings("window"), 5, torch.float32, here(), "triton") for _ in range(2))
    for modality in ("audio", "image", "text"):
        window(torch.randn(1, 5), torch.rand(5), modality, None)
    loaded.load_state_dict(window.state_dict())
    x_bar, grad = torch.rand(5), torch.randn(1, 5)
    again = grad.clone()
    window(grad, x_bar, "audio", None), loaded(again, x_bar, "audio", None)
    assert torch.equal(again, grad) and torch.equal(loaded.gram, window.gram)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_sums_of_pairs_as_they_are_compiled(dtype, monkeypatch):
    """In place of the sums in float64 that the interpreter is given."""
    from mla_fast import kernels

    if ops.INTERPRETED:
        monkeypatch.setattr(kernels.pairs, "INTERPRETED", False)
    large = torch.randn(1, 128 if ops.INTERPRETED else 4096, dtype=dtype)
    large *= 10 ** torch.randint(8, large.shape)
    means = torch.cat([large, -large.flip(1)]).view(2, -1)
    products = ops.window_gram("triton", means)
    exact = [math.fsum((a * b).tolist()) for a, b in zip(means.double()[[0, 0, 1]], means.double()[[0, 1, 1]], strict=True)]
    for got, want in zip((products[0, 0], products[0, 1], products[1, 1]), exact, strict=True):
        assert abs(got.item() - want) < 1e-12 * abs(exact[0])


def backwards(count):
    return torch.arange(count).flip(0)


@pytest.mark.skipif(not ops.INTERPRETED, reason="a GPU runs programs in an order of its own")
@pytest.mark.parametrize("order_of", [backwards, *exhaustive(torch.randperm)])
def test_programs_in_any_order_do_the_same_to_the_last_bit(order_of, narrow_blocks, monkeypatch):
    """The interpreter takes a grid's programs one by one from the first to the last; a GPU takes many at once."""
    from triton.runtime.interpreter import interpreter_builder

    forwards, in_order, orders = one_of_each(), interpreter_builder.set_grid_idx, {}

    def out_of_order(*index):
        grid = interpreter_builder.grid_dim
        if grid not in orders:
            orders[grid] = order_of(math.prod(grid)).view(grid)
        in_order(*(int(i) for i in torch.unravel_index(orders[grid][index], grid)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", out_of_order)
    for got, want in zip(one_of_each(), forwards, strict=True):
        assert torch.equal(got, want)
    assert max(map(math.prod, orders)) > 8, "nothing to put in another order"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rls_takes_half_precision_features_and_gradients(dtype):
    (P, pending, slot), s = state(40, 1), 40
    x_bar, grad, alpha = torch.rand(s).to(dtype), torch.randn(6, s).to(dtype), torch.tensor(ALPHA, dtype=f64)
    projected = ops.rls_step("triton", P, x_bar, grad, alpha, pending, slot)
    exact, expected = reference.rls_project(torch.eye(s, dtype=f64), x_bar.double(), grad.double(), ALPHA)
    assert projected.dtype == dtype and relative(projected, expected) < 2 * torch.finfo(dtype).eps
    assert relative(folded(P, pending, slot), exact) < 1e-6  # P knows nothing of the gradient's dtype


def test_masks_of_any_layout():
    logits = 5 * torch.randn(3, 5, 7)
    wide = torch.rand(5, 6) > 0.4
    for present in ((torch.rand(3, 5) > 0.4).T, (torch.rand(3) > 0.4).expand(5, 3), wide[:, :3], wide[:, ::2]):
        fused = mla.entropy_fusion(logits, present, backend="triton")
        for got, want in zip(fused, reference.entropy_fusion(logits.double(), present), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min, -1e30])
@pytest.mark.parametrize("C", [7, 9000])
def test_masked_classes_at_the_beginning_of_a_row(least, C):
    logits = torch.randn(2, 3, C)
    logits[..., : C // 2] = least
    fused, expected = mla.entropy_fusion(logits, backend="triton"), reference.entropy_fusion(logits.double())
    torch.testing.assert_close(fused.entropy.double(), expected[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(fused.weights.double(), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("every_form", [False, *exhaustive(True)])
def test_registration(every_form):
    """Of each operator one form, or all."""
    s, alpha = 7, torch.tensor(1.0, dtype=f64)
    (P, pending, slot), x_bar, grad = state(s, 1), torch.rand(s), torch.randn(3, s)
    if every_form:
        opcheck(LIBRARY.rls_project_.default, (P, x_bar, grad, alpha))
        opcheck(LIBRARY.rls_project_.default, (P, x_bar, grad, alpha, torch.zeros(2, s), torch.zeros(2, dtype=torch.int32)))
    opcheck(LIBRARY.rls_project_.default, (P, x_bar, grad, alpha, pending, slot, torch.zeros(1), True))
    opcheck(LIBRARY.rls_step_.default, (P, x_bar, grad.clone(), alpha, pending, slot, torch.zeros(1), True))
    opcheck(LIBRARY.rls_fold_.default, (P, pending))
    opcheck(LIBRARY.window_project.default, (x_bar[None], grad, alpha))
    opcheck(LIBRARY.window_step_.default, (*window_state(3, s), 1, x_bar, grad, alpha, torch.zeros(1)))
    account, first, kept, one = torch.zeros(2, dtype=torch.int32), [torch.ones(())], [grad.clone(), torch.rand(3)], torch.ones(())
    looked_at, copies = [grad, x_bar, torch.rand(3).bfloat16()], [torch.empty_like(t) for t in kept]
    opcheck(LIBRARY.head_check_.default, (looked_at, 1, account, first, one, kept, [c.zero_() for c in copies]))
    opcheck(LIBRARY.head_restore_.default, ([*kept, torch.rand(4)], copies, one))
    logits = torch.randn(2, 4, 5, requires_grad=True)
    opcheck(LIBRARY.entropy_fusion.default, ([logits], None, None))
    if every_form:
        opcheck(LIBRARY.head_check_.default, (looked_at, 0, account, [], None, [], []))
        opcheck(LIBRARY.entropy_fusion.default, (list(logits.detach().unbind(0)), torch.rand(4, 2) > 0.5, None))
        opcheck(LIBRARY.entropy_fusion.default, ([torch.randn(3, 5)], None, torch.tensor([[0, 2], [-1, 1]])))


@pytest.mark.parametrize("C,s", [(3, 63), *exhaustive((1, 1), (0, 5), (9, 513))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *exhaustive(torch.float32, f64)])
def test_the_check_is_what_the_reference_says(C, s, dtype):
    """Several layers, and what is not finite in each of the tensors in turn."""
    wide = torch.promote_types(dtype, torch.float32)
    looked_at = [torch.randn(shape).to(wide) for shape in ((C, s), (s,), (2, 3), (3,))]
    looked_at += [torch.randn(C).to(dtype), torch.rand(6).to(dtype)]
    kept = [torch.randn(C, s).to(dtype), torch.randn(5, 4).T, torch.arange(3), torch.tensor(7.0)]
    state = {
        backend: (torch.zeros(2, dtype=torch.int32), [torch.ones(()), torch.zeros(())]) for backend in ("reference", "triton")
    }
    bads = [(at, (torch.nan, -torch.inf)[at % 2], None) for at in range(len(looked_at))]
    for at, value, found_inf in [(None, 0, None), *bads, (None, 0, torch.zeros(1)), (None, 0, torch.ones(1))]:
        spoiled = [t.clone() for t in looked_at]
        if at is not None and spoiled[at].numel():
            spoiled[at].view(-1)[-1] = value
        results = []
        for backend, (account, first) in state.items():
            bad, squares, skip, copies = ops.head_check_(backend, spoiled, 2, account, first, found_inf, kept)
            assert all(torch.equal(c, t) and c.stride() == t.stride() for c, t in zip(copies, kept, strict=True))
            results.append((bad, skip, account, *first, squares.nan_to_num(posinf=torch.nan)))
        torch.testing.assert_close(*results, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_a_step_is_taken_back_where_the_device_says_so(bad):
    kept = [torch.randn(90, 60), torch.randn(3).bfloat16(), torch.tensor(3.0)]
    changed = [t + 1 for t in kept]
    after = [t.clone() for t in changed]
    ops.head_restore_("triton", changed + [torch.ones(5000)], kept, torch.tensor(bad))
    assert all(torch.equal(t, expected) for t, expected in zip(changed, kept if bad else after, strict=True))
    widened, created = torch.zeros(3), torch.ones(5, dtype=torch.int64)  # state of another dtype than it had
    ops.head_restore_("triton", [widened, created], kept[1:2], torch.tensor(bad))
    assert torch.equal(widened, bad * kept[1].float()) and bool(created.any()) is not bool(bad)


@pytest.mark.parametrize("M,N,C", [(1, 1, 1), (2, 5, 101), (3, 33, 6), *exhaustive((5, 2, 9000))])
def test_packed_rows_fuse_as_tensors_with_a_mask_do(M, N, C):
    from mla_fast import kernels

    present = torch.rand(N, M) > 0.4
    slot = torch.full((N, M), -1)
    slot.T[present.T] = torch.randperm(int(present.sum()))
    K = int(present.sum()) + 2  # two rows that nobody names
    logits, packed = 5 * torch.randn(M, N, C), torch.full((K, C), torch.nan)
    packed[slot.T[present.T]] = logits[present.T]
    expected = kernels.entropy_fusion([logits], present)
    results = kernels.entropy_fusion([packed], None, slot)
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)
    grads = [torch.randn_like(t) for t in results]
    (dense,) = kernels.entropy_fusion_backward([logits], present, *expected[1:], *grads)
    (rows,) = kernels.entropy_fusion_backward([packed], None, *results[1:], *grads, slot=slot)
    assert torch.equal(rows[slot.T[present.T]], dense[present.T])
    assert rows.count_nonzero() == dense.count_nonzero()


@pytest.mark.parametrize("C", [1, 129, 4097, 9001])
def test_long_and_short_rows_have_the_same_gradient(C):
    """Across the boundaries of the launch configurations, against autograd of the reference in float64."""
    present = torch.tensor([[True, True], [True, False], [False, False]])
    logits = (5 * torch.randn(2, 3, C)).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    weights = [torch.randn(3, C), torch.randn(3, 2), torch.randn(3, 2)]
    for z, fused in (
        (logits, mla.entropy_fusion(logits, present, backend="triton")),
        (exact, reference.entropy_fusion(exact, present)),
    ):
        sum((part * w.to(part.dtype)).sum() for part, w in zip(fused, weights, strict=True)).backward()
        assert not z.grad[1, 1].any() and not z.grad[:, 2].any()
    assert relative(logits.grad, exact.grad) < 1e-5


@pytest.mark.parametrize(
    "projection,order,target,bias",
    [
        ("rls", "update_first", "gradient", "free"),
        ("rls", "project_first", "update", "project"),
        ("window", "update_first", "update", "project"),
        *exhaustive(
            ("rls", "update_first", "update", "project"),
            ("rls", "project_first", "gradient", "free"),
            ("window", "update_first", "gradient", "free"),
        ),
    ],
)
def test_a_short_training_is_that_of_the_reference_backend(projection, order, target, bias):
    parameters = []
    for backend in ("reference", "triton"):
        model = make_model(f64)
        settings = {"projection": projection, "order": order, "target": target, "bias": bias, "alpha": 0.3}
        optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, backend=backend, **settings)
        train(model, optimizer, make_steps(4, f64))
        optimizer.state_dict()  # which folds
        train(model, optimizer, make_steps(2, f64, start=4))
        parameters.append([p.detach() for p in model.parameters()])
    for reference_p, triton_p in zip(*parameters, strict=True):
        assert relative(triton_p, reference_p) < 1e-12


@pytest.mark.parametrize("make", [momentum_sgd, *exhaustive(adam, fused_sgd)])
@pytest.mark.parametrize("projection,target", [("rls", "gradient"), ("rls", "update"), ("window", "gradient")])
def test_bad_steps_on_a_device(monkeypatch, projection, target, make):
    """With the first step and one later on that are not finite, against the reference backend, which tests without a kernel."""
    on_device(monkeypatch)
    left = []
    for backend in ("reference", "triton"):
        head = make_head()
        optimizer = wrap(head, make, projection=projection, target=target, backend=backend)
        for number, step in enumerate(head_steps(5)):
            if number in (0, 3):
                spoil(head, optimizer, ("features", "bias")[number % 2], torch.nan, step)
                optimizer.step(modality=step[0])
            else:
                train(head, optimizer, [step])
        report = optimizer.diagnostics()
        assert report["skipped_nonfinite"] == 2
        left.append((everything(head, optimizer), report["layers"]["head"]["gradient_kept"]))
    torch.testing.assert_close(*left, rtol=1e-5, atol=1e-6)


def test_the_deferred_form_is_chosen_by_size_and_saved_folded(monkeypatch):
    from mla_fast import kernels

    assert [kernels.launch.pending_rows(s) for s in (1, 4096, 8191, 8192, 8193)] == [1, 1, 1, 4, 1]
    monkeypatch.setattr(kernels.launch, "pending_rows", lambda s: 4)
    deferred = make_projection(Settings(alpha=ALPHA), 9, torch.float32, here(), "triton")
    plain = make_projection(Settings(alpha=ALPHA), 9, f64, here(), "reference")
    for t in range(11):
        x_bar, grad = torch.rand(9), torch.randn(2, 9)
        exact = grad.double()
        deferred(grad, x_bar, None, None), plain(exact, x_bar.double(), None, None)
        assert relative(grad, exact) < 2e-6
        if t % 3 == 2:
            saved = deferred.tensors()["P"]
            assert relative(saved, plain.matrix()) < 1e-6 and not deferred.pending.any() and not deferred.slot.any()


def test_kernels_compile_without_spilling():
    """Some, from the launchers themselves; `make kernels-check` compiles every configuration of every kernel for every target."""
    only = "^(rls s=1024 C=6|window step K=2 s=768 torch.float32|fusion M=3 C=6 torch.float32 slot)$"
    done = subprocess.run(
        [sys.executable, "-m", "bench.throughput.aot", "--targets", "sm_90", "--only", only],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "5 kernels in 5 launches, 0 bytes spilled" in done.stdout
    assert "| rls_read_kernel | rls s=1024 C=6 |" in done.stdout


LAUNCHES_TWICE = """
import sys
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from mla_fast import kernels
from bench.throughput.aot import TARGETS, Driver

launched, through_triton = [], []
driver.set_active(Driver(TARGETS["sm_90"], lambda *args: launched.append(args)))
run = JITFunction.run
JITFunction.run = lambda self, *args, **kwargs: through_triton.append(self.__name__) or run(self, *args, **kwargs)

def known(arguments):
    "What must be the same. Results and scratch are new at each call."
    def one(a):
        if isinstance(a, torch.Tensor):
            return a.dtype, a.shape, a.data_ptr() % 16
        return known(a) if isinstance(a, tuple) else getattr(a, "data", a)  # Triton's lazy dictionaries are new, too
    return [one(a) for a in arguments]

def seen(call):
    launched.clear(), through_triton.clear()
    call()
    return known(launched), list(through_triton)

s, C, N = 512, 6, 16
P, x, G, alpha = torch.empty(s, s), torch.empty(s), torch.empty(C, s), torch.ones((), dtype=torch.float64)
slot, means, z = torch.zeros(2, dtype=torch.int32), torch.empty(3, s), [torch.empty(N, C) for _ in range(3)]
gram = torch.empty(3, 3, dtype=torch.float64)
small, present, rows = torch.empty(N, 3), torch.ones(N, 3, dtype=torch.bool), torch.zeros(N, 3, dtype=torch.int64)
backward = kernels.entropy_fusion_backward
few = sys.argv[1] == "few"
for pending in () if few else (None, torch.empty(1, s), torch.empty(4, s)):
    for options in ({}, {"found_inf": torch.zeros(1), "project_first": True}):
        step = lambda: kernels.rls_project_(P, x, G, alpha, pending, slot, **options)
        (first, compiled), (second, again) = seen(step), seen(step)
        assert first == second and len(first) > 1 and compiled and not again, (compiled, again)
for call in (
    lambda: kernels.head_check_([G, x], 1, slot, [x[0]], None, [G, x], [P[:C], torch.empty(s)]),
    lambda: kernels.window_step_(means, gram, 1, x, G, alpha),
    lambda: kernels.entropy_fusion(z),
    lambda: kernels.rls_fold_(P, torch.empty(4, s), slot),
    lambda: kernels.head_restore_([G, x], [P[:C]], x[0]),
    lambda: kernels.window_project(means, G, alpha),
    lambda: kernels.window_step_(means, gram, 1, x, G, alpha, torch.zeros(1)),
    lambda: kernels.entropy_fusion(z, present),
    lambda: kernels.entropy_fusion(z[:1], None, rows),
    lambda: backward(z, None, small, small, z[0], None, None),
    lambda: backward(z, present, small, small, None, small, small),
)[: 3 if few else None]:
    (first, compiled), (second, again) = seen(call), seen(call)
    assert first == second and len(first) == len(compiled) == 1 and not again, (compiled, again)

plain = lambda x, G, means=means: seen(lambda: kernels.window_step_(means, gram, 1, x, G, alpha))
(usual, again), (other, compiled) = plain(x, G), plain(x.bfloat16(), G)
assert not again and compiled and other[0][4] != usual[0][4], "another dtype is another variant"
other, compiled = seen(lambda: kernels.window_step_(means, gram, 1, x, torch.empty(1, s), alpha))
assert other[0][4] != usual[0][4], "one class is another variant than several"
crooked = torch.empty(C * s + 1)[1:].view(C, s)
other, compiled = plain(x, crooked)
assert compiled and other[0][4] != usual[0][4], "and so is an address that is no multiple of 16"
assert plain(x, crooked) == (other, []) and plain(x, G) == (usual, [])
if few:
    sys.exit()
wide = torch.empty(65, 65), torch.empty(65), torch.empty(C, 65), alpha, torch.empty(1, 65)
assert seen(lambda: kernels.rls_project_(*wide))[1] and not seen(lambda: kernels.rls_project_(*wide))[1]

driver.set_active(Driver(TARGETS["gfx942"], lambda *args: launched.append(args)))
kernels.launch.HIP = True
kernels.launch.forget()
small, huge = (seen(lambda: kernels.entropy_fusion([torch.empty(rows, 1000)])) for rows in (64, 1 << 20))
assert huge[1] and huge[0][0][4] != small[0][0][4], "AMD's variants differ above 2 GiB"
print("the same")
"""


@pytest.mark.parametrize("which", ["few", *exhaustive("all")])
def test_later_launches_go_around_triton_and_are_the_same(which):
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES_TWICE, which], env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.exhaustive
def test_the_bench_of_launches():
    done = subprocess.run(
        [sys.executable, "-m", "bench.throughput.launches", "--seconds", "0.01"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "| entropy_fusion | 1 |" in done.stdout, done.stderr[-2000:]


@needs_cuda
@pytest.mark.parametrize("s,R", [(512, 1), (512, 4), (4096, 4)])
def test_a_thousand_updates_stay_within_the_promise(s, R):
    (P, pending, slot), exact = state(s, R), torch.eye(s, dtype=f64)
    alpha = torch.tensor(1.0, dtype=f64)
    for _ in range(1000 if s == 512 else 40):
        x_bar, grad = torch.rand(s) / s**0.5, torch.randn(101, s)
        projected = ops.rls_step("triton", P, x_bar, grad, alpha, pending, slot)
        exact, expected = reference.rls_project(exact, x_bar.double(), grad.double(), 1.0)
    assert relative(projected, expected) <= 2e-6
    assert relative(folded(P, pending, slot), exact) <= 1e-6


@needs_cuda
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("deferred", [False, True])
def test_steps_replay_in_a_cuda_graph(projection, deferred, monkeypatch):
    """A captured round of the modalities, replayed with α, learning rate and features that change between replays, equals the
    same steps taken one by one."""
    from mla_fast import kernels

    if deferred:
        monkeypatch.setattr(kernels.launch, "pending_rows", lambda s: 4)
    names, s, C, N = ("audio", "image", "text"), 48, 6, 16
    features, target = torch.randn(3, N, s), torch.randint(C, (3, N))

    def build():
        torch.manual_seed(0)
        head = torch.nn.Linear(s, C)
        sgd = torch.optim.SGD(head.parameters(), lr=torch.tensor(0.1), momentum=0.9, fused=True)
        alpha = torch.tensor(1.0, dtype=f64)
        return head, mla.MLAOptimizer(sgd, head, projection=projection, alpha=alpha)

    def one_round(head, optimizer):
        for m, name in enumerate(names):
            optimizer.zero_grad()
            F.cross_entropy(head(features[m]), target[m]).backward()
            optimizer.step(modality=name)

    (head, optimizer), (plain, stepwise) = build(), build()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one_round(head, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_round(head, optimizer)
    for _ in range(3):
        one_round(plain, stepwise)
    for replay in range(5):
        features.copy_(torch.randn(3, N, s))
        for o in (optimizer, stepwise):
            o.param_groups[0]["lr"].fill_(0.1 / (replay + 1))
            o.settings.alpha.fill_(0.5 + replay)
        graph.replay()
        one_round(plain, stepwise)
        torch.testing.assert_close(head.weight, plain.weight, rtol=1e-5, atol=1e-6)


@needs_cuda
def test_a_step_does_not_wait_for_the_device():
    head = torch.nn.Linear(64, 6)
    optimizer = mla.MLAOptimizer(torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, fused=True), head)
    steps = head_steps(6, 64)
    train(head, optimizer, steps[:3])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(head, optimizer, steps[3:])
    finally:
        torch.cuda.set_sync_debug_mode("default")

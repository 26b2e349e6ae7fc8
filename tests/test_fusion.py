"""Entropy-weighted fusion against the reference in float64."""

import pytest
import torch
from helpers import exhaustive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import mla_fast as mla
from mla_fast import ops, reference
from mla_fast.ops import fusion

needs_cpp = pytest.mark.skipif(not ops.available("cpp"), reason=str(ops.MISSING["cpp"]))
SHAPES = [(1, 1, 1), (2, 9, 17), (3, 64, 101), (5, 2, 513), (2, 0, 4), (3, 2, 4000)]
MORE_SHAPES = [(1, 5, 7), (2, 1, 6), (2, 9, 16), (3, 17, 1025)]


def bound(dtype):
    """On fused logits of size up to 30: the rounding of the output, or 5e-6 of float32 arithmetic."""
    return {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 0.13, torch.float16: 0.016}[dtype]


def random_logits(shape, dtype=torch.float64):
    return (torch.rand(shape, dtype=torch.float64) * 60 - 30).to(dtype)


@pytest.mark.parametrize("shape", [*SHAPES, *exhaustive(*((shape,) for shape in MORE_SHAPES), where="triton")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *exhaustive(torch.float64, torch.float16, where="triton")])
@pytest.mark.parametrize("masked", [True, *exhaustive(False, where="triton")])
def test_equals_the_reference(shape, dtype, masked, backend):
    logits = random_logits(shape, dtype)
    present = torch.rand(shape[1], shape[0]) > 0.4 if masked else None
    expected = reference.entropy_fusion(logits.double(), present)
    # Eager float32 takes the logarithm of rounded probabilities, which shows in 2e-5 with 4,000 classes; the interpreter rounds
    # products before it adds them; a GPU's float32 exp and division are approximations, good to 2 ulp.
    slack = {"reference": 6, "triton": 1.5 if ops.INTERPRETED else 2}.get(backend, 1)
    for given_as in (logits, list(logits), logits.transpose(0, 2).contiguous().transpose(0, 2)):
        fused = mla.entropy_fusion(given_as, present, backend=backend)
        assert fused.logits.dtype == dtype and fused.weights.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(fused.logits.double(), expected[0], rtol=0, atol=slack * bound(dtype))
        torch.testing.assert_close(fused.weights.double(), expected[1], rtol=slack * 1e-5, atol=1e-6)
        torch.testing.assert_close(fused.entropy.double(), expected[2], rtol=0, atol=slack * 5e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_absent_logits_are_not_read(poison, backend):
    logits, present = random_logits((3, 33, 7), torch.float32), torch.rand(33, 3) > 0.5
    present[0] = False
    absent = ~present.T[..., None].expand_as(logits)
    clean = mla.entropy_fusion(logits.masked_fill(absent, 0), present, backend=backend)
    dirty = mla.entropy_fusion(logits.masked_fill(absent, poison), present, backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert not any(part[0].any() for part in dirty)
    sums = dirty.weights.sum(1)
    torch.testing.assert_close(sums, present.any(1).float())


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF - (1 << 32), 0x7F800001])
def test_no_number_stays_none(bits, backend):
    """Whatever NaN it is: a GPU makes others than a CPU. An absent modality has weight zero all the same."""
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    logits = torch.randn(3, 5, 7)
    logits[0, 2, 4] = nan
    present = torch.ones(5, 3, dtype=torch.bool)
    present[2, 2] = False
    fused = mla.entropy_fusion(logits, present, backend=backend)
    assert fused.logits[2].isnan().all() and fused.weights[2, :2].isnan().all() and fused.weights[2, 2] == 0
    others = [0, 1, 3, 4]
    assert all(part[others].isfinite().all() for part in fused)


@pytest.mark.parametrize("offset", [1e2, 1e5])
def test_what_all_logits_have_in_common_does_not_count(offset, backend):
    logits = offset + torch.randint(-300, 300, (3, 9, 21)) / 128
    grads = []
    for z, name in ((logits.double(), "reference"), (logits, backend)):
        z.requires_grad_()
        mla.entropy_fusion(z, backend=name).entropy.square().sum().backward()
        grads.append(z.grad.double())
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=2e-6 * grads[0].abs().max().item())


@pytest.mark.parametrize("M", [8, 9, 20])
def test_many_modalities(M, backend):
    logits, present = random_logits((M, 6, 5), torch.float32), torch.rand(6, M) > 0.4
    expected = reference.entropy_fusion(logits.double(), present)
    plan = mla.dispatch(present)
    packed = plan.fuse(torch.cat(plan.pack(list(logits))), backend=backend)
    for fused in (mla.entropy_fusion(logits, present, backend=backend), packed):
        for got, want in zip(fused, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.skipif(not ops.available("triton"), reason=str(ops.MISSING["triton"]))
def test_more_modalities_than_the_kernel_takes_are_announced_and_compile(monkeypatch):
    device = "cpu" if ops.INTERPRETED else "cuda"
    logits = torch.randn(9, 5, 4, device=device)
    monkeypatch.setattr("mla_fast.ops.backend._announced", set())
    compiled = torch.compile(lambda z: mla.entropy_fusion(z, backend="triton").logits, fullgraph=True, backend="eager")(logits)
    with pytest.warns(UserWarning, match="its reference backend for entropy fusion of 9 modalities: the kernel takes at most 8"):
        assert torch.equal(mla.entropy_fusion(logits, backend="triton").logits, compiled)


def test_a_sample_does_not_see_its_batch(backend):
    logits = random_logits((3, 40, 11), torch.float32)
    whole = mla.entropy_fusion(logits, backend=backend)
    alone = mla.entropy_fusion(logits[:, 17:18], backend=backend)
    assert torch.equal(whole.logits[17:18], alone.logits)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_large_and_masked_classes(scale, backend):
    logits = scale * torch.randn(2, 5, 6)
    logits[..., 2] = -torch.inf
    fused = mla.entropy_fusion(logits, backend=backend)
    assert torch.isfinite(fused.entropy).all() and torch.isfinite(fused.weights).all()
    assert (fused.logits[:, 2] == -torch.inf).all()
    logits[0, 0, 0] = torch.nan
    fused = mla.entropy_fusion(logits, backend=backend)
    assert fused.logits[0].isnan().any() and torch.isfinite(fused.entropy[1:]).all()


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 3),
        *exhaustive(((1, 3, 1),), ((2, 2, 5),), where="triton"),
        pytest.param((3, 2, 17), marks=pytest.mark.many_launches),
    ],
)
@pytest.mark.parametrize("masked", [True, *exhaustive(False, where="triton")])
@pytest.mark.parametrize("separate", [False, *exhaustive(True, where="triton")])
def test_gradient(shape, masked, separate, backend):
    present = torch.rand(shape[1], shape[0]) > 0.4 if masked else None
    inputs = torch.randn(shape, dtype=torch.float64)
    leaves = [z.clone().requires_grad_() for z in inputs] if separate else [inputs.requires_grad_()]
    assert gradcheck(lambda *z: mla.entropy_fusion(z if separate else z[0], present, backend=backend), leaves)


@needs_cpp
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_gradient_of_other_dtypes(dtype, tolerance):
    values, present = torch.randn(3, 9, 37).to(dtype), torch.rand(9, 3) > 0.3
    weight = torch.randn(9, 37)
    grads = []
    for logits, backend in ((values.double(), "reference"), (values.clone(), "cpp")):
        fused = mla.entropy_fusion(logits.requires_grad_(), present, backend=backend)
        ((fused.logits * weight).sum() + fused.entropy.square().sum() + fused.weights.square().sum()).backward()
        grads.append(logits.grad.double())
    torch.testing.assert_close(grads[1], grads[0], rtol=tolerance, atol=tolerance)
    assert not grads[1][~present.T].any()


@needs_cpp
def test_second_derivative_is_refused():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(mla.entropy_fusion(logits).logits.square().sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.sum().backward()


@needs_cpp
def test_what_the_operators_have_no_rules_for_is_refused():
    """Taken for constants, they would have derivatives of zero."""
    logits, slopes = torch.randn(3, 8, 5), torch.randn(3, 8, 5)
    plan = mla.dispatch(torch.ones(8, 3, dtype=torch.bool), backend="cpp")
    fuse, packed = (lambda z: mla.entropy_fusion(z).logits), logits.flatten(0, 1)
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(fuse(logits), mla.entropy_fusion(logits, backend="cpp").logits)  # which has no tangent
        with pytest.raises(NotImplementedError, match='^entropy_fusion: .* need backend="reference"'):
            fuse(torch.autograd.forward_ad.make_dual(logits, slopes))
    for name, call in (
        ("entropy_fusion", lambda: torch.func.jvp(fuse, (logits,), (slopes,))),
        ("entropy_fusion", lambda: torch.func.jacfwd(lambda z: plan.fuse(z).logits)(packed)),
        ("pack_rows", lambda: torch.func.jvp(lambda z: plan.pack(list(z)), (logits,), (slopes,))),
        ("segment_mean", lambda: torch.func.jvp(plan.segment_mean, (packed,), (packed,))),
        ("entropy_fusion", lambda: torch.func.vmap(fuse)(logits[None])),
        ("segment_mean", lambda: torch.func.vmap(plan.segment_mean)(packed[None])),
    ):
        with pytest.raises(NotImplementedError, match=f'^{name}: .* need backend="reference"'):
            call()
    for call in (  # which torch refuses by itself
        lambda: torch.func.hessian(lambda z: fuse(z).sum())(logits),
        lambda: torch.func.grad(lambda z: fuse(list(z)).sum())(logits),
        lambda: torch.func.grad(lambda z: plan.segment_mean(z).sum())(packed),
        lambda: torch.func.jacrev(lambda z: tuple(plan.pack(list(z))))(logits),
    ):
        with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
            call()
    _, got = torch.func.jvp(lambda z: mla.entropy_fusion(z, backend="reference").logits, (logits,), (slopes,))
    step = 1e-3 * slopes.double()
    ahead, behind = (reference.entropy_fusion(logits.double() + h, None)[0] for h in (step, -step))
    torch.testing.assert_close(got.double(), (ahead - behind) / 2e-3, rtol=1e-3, atol=1e-3)


@needs_cpp
def test_compiles_without_a_graph_break():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(logits, present):
        return mla.entropy_fusion(logits, present).logits.logsumexp(1).sum()

    logits, present = torch.randn(2, 6, 5, requires_grad=True), torch.rand(6, 2) > 0.3
    compiled = torch.autograd.grad(loss(logits, present), logits)[0]
    eager = torch.autograd.grad(mla.entropy_fusion(logits, present).logits.logsumexp(1).sum(), logits)[0]
    torch.testing.assert_close(compiled, eager)


@settings(max_examples=60, deadline=None)
@given(M=st.integers(1, 5), N=st.integers(0, 9), C=st.integers(1, 70), seed=st.integers(0, 2**31), rate=st.floats(0, 1))
def test_any_shape_and_mask(M, N, C, seed, rate):
    generator = torch.Generator().manual_seed(seed)
    logits = 8 * torch.randn(M, N, C, generator=generator)
    present = torch.rand(N, M, generator=generator) >= rate
    expected = reference.entropy_fusion(logits.double(), present)
    backend = "cpp" if ops.available("cpp") else "reference"
    for got, want in zip(mla.entropy_fusion(logits, present, backend=backend), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=5e-6)


@needs_cpp
def test_threads_do_not_change_the_result():
    logits = torch.randn(3, 700, 101)
    one = mla.entropy_fusion(logits)
    torch.set_num_threads(2)
    for a, b in zip(one, mla.entropy_fusion(logits), strict=True):
        assert torch.equal(a, b)


@needs_cpp
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_fused_at_once_is_the_same(masked):
    logits = torch.randn(3, 33, 7)
    present = torch.rand(33, 3) > 0.4 if masked else None
    for given_as in (logits, list(logits), tuple(logits)):
        assert fusion._at_once(given_as, present) is not None
        for a, b in zip(mla.entropy_fusion(given_as, present), mla.entropy_fusion(logits, present, backend="cpp"), strict=True):
            assert torch.equal(a, b)
    for given_as in (logits.requires_grad_(), list(logits)):
        assert fusion._at_once(given_as, present).logits.requires_grad
        with torch.no_grad():
            assert not fusion._at_once(given_as, present).logits.requires_grad


def test_bad_arguments_are_named():
    z, present = torch.randn(2, 3, 4), torch.ones(3, 2, dtype=torch.bool)
    cases = [
        ("logits", lambda: mla.entropy_fusion(z[0])),
        ("logits", lambda: mla.entropy_fusion([z[0], z[1, :2]])),
        ("logits", lambda: mla.entropy_fusion([z[0], z[1, :, :3]])),
        ("logits", lambda: mla.entropy_fusion([z, z])),
        ("logits", lambda: mla.entropy_fusion([z])),
        ("logits", lambda: mla.entropy_fusion([z[0], None])),
        ("logits", lambda: mla.entropy_fusion(iter(z))),
        ("logits", lambda: mla.entropy_fusion([])),
        ("logits", lambda: mla.entropy_fusion(z[:0])),
        ("logits", lambda: mla.entropy_fusion(z[..., :0])),
        ("logits", lambda: mla.entropy_fusion(z.long())),
        ("logits", lambda: mla.entropy_fusion([z[0], z[1].double()])),
        ("present", lambda: mla.entropy_fusion(z, present.T)),
        ("present", lambda: mla.entropy_fusion(z, present[:2])),
        ("present", lambda: mla.entropy_fusion(z, present.float())),
        ("present", lambda: mla.entropy_fusion(z, present[:, 0])),
        ("present", lambda: mla.entropy_fusion(z, present.tolist())),
        ("logits", lambda: mla.dispatch(present).fuse(torch.ones(6, 4, dtype=torch.int64))),
    ]
    for name, call in cases:
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: "):
            call()

"""Dispatch against a reference that goes index by index, on random masks, layouts and dtypes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

import mla_fast as mla
from mla_fast import ops

needs_cpp = pytest.mark.skipif(not ops.available("cpp"), reason=str(ops.MISSING["cpp"]))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]


def by_hand(present, padded):
    """(rows, offsets, counts, slot) as lists, one element after another."""
    N, M = present.shape
    offsets, rows, slot, counts = [0], [-1] * (N * M), [[-1] * M for _ in range(N)], []
    for m in range(M):
        k = offsets[-1]
        for n in range(N):
            if present[n, m]:
                rows[k], slot[n][m] = n, k
                k += 1
        counts.append(k - offsets[-1])
        offsets.append(offsets[-1] + (N if padded else counts[-1]))
    return rows, offsets, counts, slot


def packed_by_hand(x, present, m, size):
    rows = [x[n] for n in range(len(x)) if present[n, m]]
    rows += [torch.zeros_like(x[0])] * (size - len(rows)) if len(x) else []
    return torch.stack(rows) if rows else x[:0]


def payload(shape, dtype, contiguous=True):
    x = torch.randint(-100, 100, shape).to(dtype) if not dtype.is_floating_point else torch.randn(shape).to(dtype)
    if contiguous or x.dim() < 2:
        return x
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    N=st.sampled_from([0, 1, 7, 64]),
    M=st.integers(1, 8),
    rate=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    padded=st.booleans(),
    contiguous=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_plan_pack_and_unpack_equal_an_index_by_index_reference(backend, N, M, rate, padded, contiguous, seed):
    torch.manual_seed(seed)
    present = torch.rand(N, M) >= rate
    if not contiguous:
        present = present.T.contiguous().T
    plan = mla.dispatch(present, padded=padded, backend=backend)
    rows, offsets, counts, slot = by_hand(present, padded)
    assert plan.rows.tolist() == rows and plan.offsets.tolist() == offsets
    assert list(plan.counts) == counts and plan.slot.tolist() == slot
    shapes = [(N, *(3, 2, 1, 5)[: (seed + m) % 5]) for m in range(M)]
    inputs = [payload(shape, DTYPES[(seed + m) % len(DTYPES)], contiguous) for m, shape in enumerate(shapes)]
    packed = plan.pack(inputs)
    for m, (x, got) in enumerate(zip(inputs, packed, strict=True)):
        want = packed_by_hand(x, present, m, N if padded else counts[m])
        assert got.dtype == x.dtype and torch.equal(got, want)
        assert got.tolist() == x[plan.samples[m]].tolist() or padded
    for m, (x, back) in enumerate(zip(inputs, plan.unpack(packed), strict=True)):
        here = present[:, m].reshape(-1, *[1] * (x.dim() - 1))
        assert torch.equal(back, torch.where(here, x, torch.zeros_like(x)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_byte_but_zero_is_true(backend):
    mask = torch.tensor([[255, 0, 2], [255, 255, 0]], dtype=torch.uint8)
    plan, clean = (mla.dispatch(present, backend=backend) for present in (mask.view(torch.bool), mask != 0))
    assert plan.counts == (2, 1, 1) and torch.equal(plan.slot, clean.slot) and torch.equal(plan.rows, clean.rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_modalities_of_several_tensors_are_packed_as_each_would_be(padded, backend):
    present = torch.rand(20, 3) > 0.4
    plan = mla.dispatch(present, ("text", "audio", "video"), padded=padded, backend=backend)
    tokens, mask, audio = torch.randint(9, (20, 4)), torch.rand(20, 4) > 0.5, torch.randn(20, 3)
    frames, times, speaker = torch.randn(20, 2, 5), torch.rand(20), torch.arange(20)
    packed = plan.pack({"text": {"ids": tokens, "mask": mask}, "audio": audio, "video": (frames, [times, speaker])})
    text, video = packed["text"], packed["video"]
    assert text.keys() == {"ids", "mask"} and isinstance(video, tuple) and isinstance(video[1], list)
    got = [text["ids"], text["mask"], packed["audio"], video[0], *video[1]]
    for m, x, part in zip((0, 0, 1, 2, 2, 2), (tokens, mask, audio, frames, times, speaker), got, strict=True):
        assert torch.equal(part, packed_by_hand(x, present, m, plan.sizes[m]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_batch(backend):
    present = torch.rand(4096, 3) > 0.5
    plan = mla.dispatch(present, ("a", "b", "c"), backend=backend)
    inputs = {"a": torch.randn(4096, 129), "b": torch.randn(4096, 3, 5).half(), "c": torch.arange(4096)}
    for m, (x, got) in enumerate(zip(inputs.values(), plan.pack(inputs).values(), strict=True)):
        assert torch.equal(got, x[present[:, m]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("s,padded", list(itertools.product([1, 63, 513], [False, True])))
def test_segment_means(s, dtype, padded, backend):
    present = torch.rand(70, 4) > 0.5
    present[:, 2] = False
    plan = mla.dispatch(present, padded=padded, backend=backend)
    features = (1 + torch.randn(sum(plan.sizes), s)).to(dtype)
    if padded:  # what lies behind the rows that are there does not count
        features[plan.rows < 0] = torch.nan
    means = plan.segment_mean(features)
    assert means.dtype == torch.promote_types(dtype, torch.float32)
    for m, rows in enumerate(features.split(plan.sizes)):
        want = rows[: plan.counts[m]].double().mean(0) if plan.counts[m] else torch.zeros(s, dtype=torch.float64)
        torch.testing.assert_close(means[m].double(), want, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
def test_features_and_their_means(dtype, padded, backend):
    present = torch.rand(200, 4) > 0.5
    present[:, 2] = False
    features = [(1 + torch.randn(200, *shape)).to(dtype) for shape in ((1025,), (3, 7), (5,), ())]
    for m, x in enumerate(features):
        x[~present[:, m]] = torch.nan
    plan = mla.dispatch(present, ("a", "b", "c", "d"), padded=padded, backend=backend)
    named = dict(zip("abcd", features, strict=True))
    packed, means = plan.pack_features(named)
    for m, (name, x) in enumerate(named.items()):
        assert torch.equal(packed[name], plan.pack(named)[name])
        want = x[present[:, m]].double().mean(0) if plan.counts[m] else torch.zeros(x.shape[1:], dtype=torch.float64)
        assert means[name].dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(means[name].double(), want, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2])
def test_more_than_the_caches_hold(threads):
    """Streamed, of which a row of 4100 bytes cannot be: bit for bit on any number of threads."""
    torch.set_num_threads(threads)
    present = torch.rand(4096, 2) > 0.4
    features = [torch.randn(4096, width) for width in (1040, 1025)]
    plan = mla.dispatch(present)
    packed, means = plan.pack_features(features)
    for m, x in enumerate(features):
        rows = x[present[:, m]]
        assert torch.equal(packed[m], rows) and torch.equal(plan.pack(features)[m], rows)
        torch.testing.assert_close(means[m].double(), rows.double().mean(0), rtol=0, atol=2e-7)
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(plan.pack_features(features)[1], means, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_fuse_is_fusion_with_a_mask(padded, backend):
    present = torch.rand(20, 3) > 0.5
    present[3] = False
    plan = mla.dispatch(present, padded=padded, backend=backend)
    logits = 5 * torch.randn(3, 20, 7)
    packed = torch.cat(plan.pack(list(logits)))
    if padded:
        packed[plan.rows < 0] = torch.nan
    fused, expected = plan.fuse(packed, backend=backend), mla.entropy_fusion(logits, present, backend=backend)
    for got, want in zip(fused, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("nowhere", [None, 0, 2])
def test_gradients(nowhere, padded, backend):
    present = torch.rand(6, 3) > 0.4
    if nowhere is not None:
        present[:, nowhere] = False
    plan = mla.dispatch(present, padded=padded, backend=backend)
    inputs = [torch.randn(6, *shape, dtype=torch.float64, requires_grad=True) for shape in ((2,), (), (3, 1))]
    assert gradcheck(lambda *x: tuple(plan.pack(x)), inputs)
    assert gradcheck(lambda *x: tuple(itertools.chain(*plan.pack_features(x))), inputs)
    packed = [torch.randn(t.shape, dtype=torch.float64, requires_grad=True) for t in plan.pack(inputs)]
    assert gradcheck(lambda *x: tuple(plan.unpack(x)), packed)
    features = torch.randn(sum(plan.sizes), 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(plan.segment_mean, features)
    assert gradcheck(lambda z: tuple(plan.fuse(z, backend=backend)), features)


@needs_cpp
def test_registration():
    present = torch.rand(5, 2) > 0.5
    op = torch.ops.mla_fast
    for padded in (False, True):
        opcheck(op.dispatch_plan.default, (present, padded))
        rows, offsets, counts, slot = op.dispatch_plan(present, padded)
        sizes = [5, 5] if padded else counts.tolist()
        inputs = [torch.randn(5, 3, requires_grad=True), torch.arange(5)]
        opcheck(op.pack_rows.default, (inputs, rows, offsets, slot, sizes))
        features = [torch.randn(5, 3, requires_grad=True), torch.randn(5, 2, 2)]
        opcheck(op.pack_features.default, (features, rows, offsets, slot, sizes))
        packed = [t.detach() for t in op.pack_rows(inputs, rows, offsets, slot, sizes)]
        opcheck(op.unpack_rows.default, (packed, slot, offsets))
        features = torch.randn(sum(sizes), 4, requires_grad=True)
        opcheck(op.segment_mean.default, (features, offsets, counts if padded else None))
        opcheck(op.entropy_fusion.default, ([features], None, slot))


@pytest.mark.parametrize("poison", [torch.nan, 1e30])
def test_prediction_and_training_do_not_read_what_is_absent(poison):
    def outcome(value):
        torch.manual_seed(0)
        model = mla.MultimodalModel({"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(2, 4)}, torch.nn.Linear(4, 3))
        optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model.head)
        present = torch.rand(30, 2) > 0.5
        inputs, target = {"a": torch.randn(30, 3), "b": torch.randn(30, 2)}, torch.randint(3, (30,))
        for m, x in enumerate(inputs.values()):
            x[~present[:, m]] = value
        trainer = mla.Trainer(model, optimizer, progress=False)
        trainer.fit([(inputs, target, present)] * 3, epochs=2)
        return [*model.state_dict().values(), *model.predict(inputs, present)]

    for clean, dirty in zip(outcome(0.0), outcome(poison), strict=True):
        assert torch.equal(clean, dirty)


def test_absent_rows_are_not_encoded():
    class Counting(torch.nn.Linear):
        rows = 0

        def forward(self, x):
            Counting.rows += len(x)
            return super().forward(x)

    model = mla.MultimodalModel({"a": Counting(3, 4), "b": Counting(2, 4)}, torch.nn.Linear(4, 3))
    present = torch.rand(40, 2) > 0.5
    model.predict({"a": torch.randn(40, 3), "b": torch.randn(40, 2)}, present)
    assert Counting.rows == present.sum()
    nothing = model.predict({"a": torch.randn(4, 3), "b": torch.randn(4, 2)}, torch.zeros(4, 2, dtype=torch.bool))
    assert not any(part.any() for part in nothing)


def test_bad_input_is_named():
    present = torch.rand(5, 2) > 0.5
    plan = mla.dispatch(present, ("a", "b"))
    K, x = sum(plan.counts), torch.randn(5, 3)
    for argument, error, call in (
        ("present", TypeError, lambda: mla.dispatch(present.float())),
        ("present: expected a bool tensor, got ndarray", TypeError, lambda: mla.dispatch(present.numpy())),
        ("present", ValueError, lambda: mla.dispatch(present[0])),
        ("present", ValueError, lambda: mla.dispatch(torch.zeros(4, 0, dtype=torch.bool))),
        ("modalities", ValueError, lambda: mla.dispatch(present, ("a",))),
        ("backend", ValueError, lambda: mla.dispatch(present, backend="triton")),
        ("inputs", ValueError, lambda: plan.pack({"b": x, "a": x})),
        ("inputs", ValueError, lambda: plan.pack([x])),
        ("inputs", ValueError, lambda: plan.pack([x, x[:4]])),
        ("inputs", ValueError, lambda: plan.pack([x, x.to("meta")])),
        ("inputs", TypeError, lambda: plan.pack([x, x.numpy()])),
        ("features", ValueError, lambda: plan.pack_features([x, x[:4]])),
        ("features", TypeError, lambda: plan.pack_features([x, x.long()])),
        ("packed", ValueError, lambda: plan.unpack([torch.randn(99, 3)] * 2)),
        ("logits", TypeError, lambda: plan.fuse(plan.pack([x, x]))),
        ("logits", ValueError, lambda: plan.fuse(torch.randn(K + 1, 3))),
        ("logits", ValueError, lambda: plan.fuse(torch.randn(K, 3, device="meta"))),
        ("features", ValueError, lambda: plan.segment_mean(torch.randn(K))),
        ("features", ValueError, lambda: plan.segment_mean(torch.ones(K, 3, dtype=torch.int64))),
    ):
        with pytest.raises(error, match=f"^{argument}"):
            call()


@needs_cpp
def test_direct_callers_are_kept_within_bounds():
    op, present = torch.ops.mla_fast, torch.tensor([[True, False], [True, True]])
    rows, offsets, counts, slot = op.dispatch_plan(present)
    x = torch.randn(2, 3)
    for call in (
        lambda: op.pack_rows([x, x], rows, offsets, slot, [2, -1]),
        lambda: op.pack_rows([x, x], rows, offsets + 3, slot, [2, 1]),
        lambda: op.pack_rows([x, x], rows + 5, offsets, slot, [2, 1]),
        lambda: op.pack_rows([x, x[:1]], rows, offsets, slot, [2, 1]),
        lambda: op.pack_features([x, x.long()], rows, offsets, slot, [2, 1]),
        lambda: op.pack_features([x, x], rows + 5, offsets, slot, [2, 1]),
        lambda: op.unpack_rows([x, x[:0]], slot, offsets),
        lambda: op.segment_mean(x, offsets + 1),
        lambda: op.segment_mean(torch.randn(9, 3), torch.tensor([0, 5, 3])),
        lambda: op.entropy_fusion([x], None, slot),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.skipif(not (torch.cuda.is_available() and ops.available("cpp on CUDA")), reason="needs a GPU")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("N,M", [(0, 2), (1, 1), (7, 3), (1025, 3), (300, 64), (5000, 17), (140_000, 3)])
def test_on_a_gpu(N, M, padded):
    """As on the CPU, with several groups to a block, several launches, and masks and rows of all widths that begin anywhere."""
    generator, widths = torch.Generator().manual_seed(N), (3, 1025 if N < 2000 else 65, 8, 1)
    present = torch.rand(N + 1, M, generator=generator)[1:] > 0.4
    whole = [torch.randn(N, widths[m % 4], generator=generator).to(DTYPES[m % 4]) for m in range(M)]
    features, on_gpu = ([x.to(device)[:, m % 2 :] for m, x in enumerate(whole)] for device in ("cpu", "cuda"))
    expected = mla.dispatch(present, padded=padded, backend="reference")
    with torch.device("cuda"):  # the sizes go to the host all the same
        plan = mla.dispatch(torch.cat([present[:1], present]).cuda()[1:], padded=padded, backend="cpp")
    assert plan.counts == expected.counts
    for name in ("rows", "offsets", "slot"):
        assert torch.equal(getattr(plan, name).cpu(), getattr(expected, name)), name
    packed, means = plan.pack_features(on_gpu)
    wanted = expected.pack_features(features)
    for got, want in zip(packed, wanted[0], strict=True):
        assert torch.equal(got.cpu(), want)
    for got, want in zip(means, wanted[1], strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-5)
    for got, want in zip(plan.unpack(packed), expected.unpack(wanted[0]), strict=True):
        assert torch.equal(got.cpu(), want)
    x = torch.randn(sum(plan.sizes), 5, generator=generator)
    torch.testing.assert_close(plan.segment_mean(x.cuda()).cpu(), expected.segment_mean(x), rtol=0, atol=1e-5)


def test_a_readable_plan():
    present = torch.tensor([[True, False], [True, True]])
    assert repr(mla.dispatch(present, ("audio", "image"))) == "DispatchPlan(2 samples; audio: 2, image: 1; cpu)"
    assert "padded" in repr(mla.dispatch(present, padded=True))

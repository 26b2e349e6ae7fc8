"""Fusion of modalities that were trained on different classes, against the definition in float64, sample by sample."""

import math

import pytest
import torch
from helpers import assert_bitwise, exhaustive
from torch.autograd import gradcheck

import mla_fast as mla
from mla_fast import reference
from mla_fast.seen import SeenClasses

SETS = {
    "nested": [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3], [1, 2]],
    "disjoint": [[0, 1, 2], [3, 4], [5, 6]],
    "overlapping": [[0, 1, 2, 3], [2, 3, 4, 5], [3, 5, 6, 0]],
    "nobody knows 6, one knows nothing": [[0, 1, 2, 3, 4, 5], [4, 1], []],
    "the same": [[0, 1, 4], [0, 1, 4], [0, 1, 4]],
}


def masks(sets, C=7):
    seen = torch.zeros(len(sets), C, dtype=torch.bool)
    for m, classes in enumerate(sets):
        seen[m, classes] = True
    return seen


def problem(M=3, N=9, C=7, seed=0):
    torch.manual_seed(seed)
    return 4 * torch.randn(M, N, C, dtype=torch.float64), torch.rand(N, M) > 0.3


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("masked", [True, *exhaustive(False, where="triton")])
def test_equals_the_definition(name, masked, backend):
    logits, present = problem()
    present, seen = present if masked else None, masks(SETS[name])
    expected = reference.seen_fusion(logits.cpu(), seen.cpu(), None if present is None else present.cpu())
    plan = mla.dispatch(torch.ones(9, 3, dtype=torch.bool) if present is None else present)
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        z = logits.to(dtype)
        packed = plan.fuse(torch.cat(plan.pack(list(z))), seen, backend=backend)
        for fused in (mla.entropy_fusion(z, present, seen, backend=backend), packed):
            for got, want in zip(fused, expected, strict=True):
                assert got.dtype == dtype
                torch.testing.assert_close(got.double().cpu(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("trial", range(20))
def test_any_sets(trial):
    torch.manual_seed(trial)
    M, C = int(torch.randint(1, 5, ())), int(torch.randint(1, 9, ()))
    logits, present = problem(M, 5, C, trial)
    seen = torch.rand(M, C) < torch.rand(())
    expected = reference.seen_fusion(logits, seen, present)
    for got, want in zip(mla.entropy_fusion(logits, present, seen), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_where_all_have_seen_all_nothing_changes(masked, backend):
    logits, present = problem()
    present, all_seen = present if masked else None, torch.ones(3, 7, dtype=torch.bool)
    assert_bitwise(
        tuple(mla.entropy_fusion(logits, present, all_seen, backend=backend)),
        tuple(mla.entropy_fusion(logits, present, backend=backend)),
    )


def test_a_sample_whose_modalities_have_seen_all_is_fused_as_ever():
    logits, present = problem()
    present[:, 2], present[:, 0] = False, True
    seen = masks([range(7), range(7), [1, 2]])
    got, want = mla.entropy_fusion(logits, present, seen), mla.entropy_fusion(logits, present)
    assert_bitwise((got.logits, got.weights, got.entropy), (want.logits, want.weights, want.entropy))


def test_two_modalities_by_hand():
    """p(c) = p_old(S) p_fused(c | S) for c in S, p_old(c) outside."""
    logits, _ = problem(M=2)
    S = [1, 2, 5]
    got = mla.entropy_fusion(logits, seen=masks([range(7), S])).logits.softmax(1)
    for n in range(9):
        old = logits[0, n].softmax(0)
        z = logits[:, n, S]
        e = [-sum(float(p) * math.log(float(p)) for p in z[m].softmax(0)) for m in range(2)]
        share = math.exp(-e[0]) / (math.exp(-e[0]) + math.exp(-e[1]))
        within = (share * z[0] + (1 - share) * z[1]).softmax(0)
        expected = old.clone()
        expected[S] = old[S].sum() * within
        torch.testing.assert_close(got[n], expected)


def test_disjoint_sets_share_the_mass_by_their_entropies():
    logits, _ = problem(M=2)
    got = mla.entropy_fusion(logits, seen=masks([[0, 1], [2, 3, 4, 5, 6]])).logits.softmax(1)
    parts = [logits[0][:, :2].softmax(1), logits[1][:, 2:].softmax(1)]
    e = torch.stack([torch.special.entr(p).sum(1) for p in parts])
    torch.testing.assert_close(got, torch.cat([(-e).softmax(0)[m][:, None] * parts[m] for m in range(2)], 1))


def test_overlapping_sets_are_tied_by_what_they_have_in_common():
    logits, _ = problem(M=2)
    got = mla.entropy_fusion(logits, seen=masks([[0, 1, 2], [2, 3, 4, 5, 6]])).logits
    torch.testing.assert_close(got[:, :3] - got[:, 2:3], logits[0][:, :3] - logits[0][:, 2:3])
    torch.testing.assert_close(got[:, 2:] - got[:, 2:3], logits[1][:, 2:] - logits[1][:, 2:3])


def test_who_has_seen_nothing_and_what_nobody_has_seen():
    logits, present = problem()
    present[0], present[1] = torch.tensor([False, False, True]), torch.tensor([False, True, True])
    fused = mla.entropy_fusion(logits, present, masks([range(7), [1, 2], []]))
    assert not fused.logits[0].any() and not fused.weights[0].any() and not fused.weights[:, 2].any()
    assert (fused.logits[1] == -torch.inf).tolist() == [True, False, False, True, True, True, True]
    assert fused.weights[1].tolist() == [0, 1, 0]
    torch.testing.assert_close(fused.weights.sum(1)[1:], present[1:, :2].any(1).to(torch.float64))
    logits[2] = torch.nan  # is not read
    assert_bitwise(tuple(mla.entropy_fusion(logits, present, masks([range(7), [1, 2], []]))), tuple(fused))


@pytest.mark.parametrize("name", ["nested", "disjoint", "overlapping"])
def test_gradient(name):
    logits, present = problem(N=3)
    seen = masks(SETS[name])
    covered = mla.entropy_fusion(logits, present, seen).logits.isfinite()

    def finite(z):
        fused = mla.entropy_fusion(z, present, seen)
        return torch.where(covered, fused.logits, 0), fused.weights, fused.entropy

    assert gradcheck(finite, logits.requires_grad_())


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (TypeError, [[True]]),
        (TypeError, torch.ones(3, 7)),
        (ValueError, torch.ones(7, 3, dtype=torch.bool)),
        (ValueError, torch.ones(2, 7, dtype=torch.bool)),
    ],
)
def test_bad_masks_are_named(error, seen):
    logits, present = problem()
    with pytest.raises(error, match="^seen: expected"):
        mla.entropy_fusion(logits, present, seen)
    with pytest.raises(error, match="^seen: expected"):
        mla.dispatch(present).fuse(logits.flatten(0, 1)[: int(present.sum())], seen)


def test_the_record():
    seen = SeenClasses()
    seen.record("a", torch.tensor([0, 2, 2]), 4)
    seen.record("a", torch.tensor([1, 3]), 4, torch.tensor([0.5, 0.0]))  # a row that weighs nothing is not of this modality
    assert seen.of("a") is None and not list(seen.buffers())  # nothing has been added
    seen.grow("ab", 4, 2)
    first, second = [True, True, True, False, False, False], [True] * 4 + [False] * 2
    assert seen.of("ba").tolist() == [second, first] and len(list(seen.buffers())) == 1
    again = SeenClasses()
    again.counts = True
    again.take(seen.recorded())
    assert torch.equal(again.of("ab"), seen.of("ab"))
    seen.add("c", "ab", 6)
    assert seen.of("cb").tolist() == [[False] * 6, second]
    seen.forget("b")
    assert seen.of("ca").tolist() == [[False] * 6, first] and seen.names == ("a", "c")
    seen.record("c", torch.tensor([5, 5]), 6)
    seen.declare("c", torch.arange(6) == 3)
    assert seen.of("c")[0].tolist() == [False, False, False, True, False, True]
    seen.take({name: torch.ones(6, dtype=torch.bool) for name in "ac"})
    assert seen.of("ac") is None


def test_what_was_seen_is_read_once_between_changes(monkeypatch):
    """On a device every reading waits."""
    seen, reads = SeenClasses(), []
    seen.add("b", ["a"], 3)
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: reads.append(t) or cpu(t))
    for _ in range(3):
        assert seen.of("b").tolist() == [[False] * 3]
    assert len(reads) == 1
    seen.record("b", torch.tensor([1]), 3)
    row = seen.rows[1]
    for expected in ([False, True, False], [True] * 3):
        for _ in range(2):
            assert seen.of("b") is None if all(expected) else seen.of("b").tolist() == [expected]
        row.fill_(1.0)
    assert len(reads) == 3
    row.data.zero_()  # as a replayed graph writes: torch does not count it
    seen.changed()
    assert seen.of("b").tolist() == [[False] * 3]


def test_another_head_begins_anew():
    seen = SeenClasses()
    for name in "ab":
        seen.record(name, torch.tensor([0, 2]), 3)
    seen.record("a", torch.tensor([9]), 10)
    assert list(seen.recorded()) == ["a"] and seen.classes == 10

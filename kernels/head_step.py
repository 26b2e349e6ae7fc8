"""What surrounds the projection in a head's step on the GPU, in one launch before it and one after the wrapped optimizer's step.

    bad  = 1 if any of x̄, G and the free biases' gradients is not finite, or torch.amp found an overflow, else 0
    skip = max(bad, first),  first ← first · bad       for each layer: Algorithm 1's first step is neither projected nor enters P

``head_check_kernel`` finds these with ‖G‖² and ‖x̄‖² of each layer, counts the bad steps, and copies the parameters and the
optimizer's state that the step is about to change. ``head_restore_kernel`` puts the copies back where bad is 1. Nobody waits for
the device to say which.

A program takes one chunk of one tensor. Whichever arrives last, by a counter that it sets back to zero, adds up what all have
left; it does so in the order of the chunks, so the sums do not depend on which one it is.
"""

import torch
import triton
import triton.language as tl

from .launch import Launch, dtypes, remembered
from .pairs import widened

CHUNK, BLOCK = 4096, 1024  # numbers that a program takes, and at a time
PARTS = 128  # chunks' sums that the last program adds at a time
MAX_TENSORS = 64  # to a launch, which goes through them one by one


@triton.jit
def _square_sum(ptr, length, chunk, dtype: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype)
    for begin in range(0, CHUNK, BLOCK):
        i = chunk.to(tl.int64) * CHUNK + begin + tl.arange(0, BLOCK)
        x = widened(tl.load(ptr + i, mask=i < length, other=0.0)).to(dtype)
        total += x * x
    return tl.sum(total, 0)


@triton.jit
def _copy(to, ptr, length, chunk, ZERO: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk of ptr, or of zeros, in the dtype of `to`."""
    dtype: tl.constexpr = to.dtype.element_ty
    for begin in range(0, CHUNK, BLOCK):
        i = chunk.to(tl.int64) * CHUNK + begin + tl.arange(0, BLOCK)
        if ZERO:
            x = tl.zeros([BLOCK], dtype)
        else:
            x = tl.load(ptr + i, mask=i < length)
            if x.dtype != dtype:
                x = (x.to(tl.float32) if x.dtype == tl.bfloat16 or dtype == tl.bfloat16 else x).to(dtype)
        tl.store(to + i, x, mask=i < length)


@triton.jit
def head_check_kernel(
    ptrs, lengths, kept_ptrs, kept_lengths, snapshot_ptrs, first_ptrs, found_inf_ptr, account_ptr, part_ptr, bad_ptr,
    squares_ptr, skip_ptr,
    TENSORS: tl.constexpr, KEPT: tl.constexpr, LAYERS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_FOUND_INF: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ptrs: G and x̄ of each layer in turn, then whatever else must be finite. account: bad steps so far, programs arrived."""
    program, begin = tl.program_id(0), 0
    dtype: tl.constexpr = part_ptr.dtype.element_ty
    for t in tl.static_range(TENSORS):
        end = begin + tl.cdiv(lengths[t], CHUNK)
        if (program >= begin) & (program < end):
            tl.store(part_ptr + program, _square_sum(ptrs[t], lengths[t], program - begin, dtype, CHUNK, BLOCK))
        begin = end
    for t in tl.static_range(KEPT):
        end = begin + tl.cdiv(kept_lengths[t], CHUNK)
        if (program >= begin) & (program < end):
            _copy(snapshot_ptrs[t], kept_ptrs[t], kept_lengths[t], program - begin, False, CHUNK, BLOCK)
        begin = end

    tl.debug_barrier()  # this program's sum is there before it says so
    if tl.atomic_add(account_ptr + 1, 1) == tl.num_programs(0) - 1:
        bad, begin = 0.0, 0
        for t in tl.static_range(TENSORS):
            end = begin + tl.cdiv(lengths[t], CHUNK)
            sums = tl.zeros([PARTS], dtype)
            for part in range(begin, end, PARTS):
                at = part + tl.arange(0, PARTS)
                sums += tl.load(part_ptr + at, mask=at < end, other=0.0, cache_modifier=".cg")  # of other programs
            total = tl.sum(sums, 0)
            bad = tl.where(total - total == 0, bad, 1.0)  # neither NaN nor Inf
            if t < 2 * LAYERS:
                tl.store(squares_ptr + t, total)
            begin = end
        if HAS_FOUND_INF:
            bad = tl.where(tl.load(found_inf_ptr) == 0, bad, 1.0)
        tl.store(bad_ptr, bad)
        tl.store(account_ptr, tl.load(account_ptr) + bad.to(tl.int32))
        tl.store(account_ptr + 1, 0)
        for layer in tl.static_range(LAYERS):
            skip = bad
            if HAS_FIRST:
                first = tl.load(first_ptrs[layer])
                skip = tl.maximum(bad, first)
                tl.store(first_ptrs[layer], first * bad)
            tl.store(skip_ptr + layer, skip)


@triton.jit
def head_restore_kernel(
    bad_ptr, ptrs, lengths, snapshot_ptrs,
    TENSORS: tl.constexpr, KEPT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tensors beyond the KEPT that have a copy become zeros."""
    if tl.load(bad_ptr) != 0:
        program, begin = tl.program_id(0), 0
        for t in tl.static_range(TENSORS):
            end = begin + tl.cdiv(lengths[t], CHUNK)
            if (program >= begin) & (program < end):
                if t < KEPT:
                    _copy(ptrs[t], snapshot_ptrs[t], lengths[t], program - begin, False, CHUNK, BLOCK)
                else:
                    _copy(ptrs[t], ptrs[t], lengths[t], program - begin, True, CHUNK, BLOCK)
            begin = end


def head_check_(looked_at, layers, account, first, found_inf, kept, snapshot):
    """(bad float32 [], [‖G‖², ‖x̄‖²] of each layer [2 · layers], skip float32 [layers]).

    looked_at: G and x̄ of each layer in turn, then whatever else must be finite; account: int32 [2], the
    bad steps so far, which grow by bad, and zero; first: float32 [1] of each layer, or none; found_inf: float32 [1] or None;
    kept: tensors without gaps in memory, that snapshot, of the same strides and dtypes, becomes copies of.
    """
    _check_alike("snapshot", snapshot, kept)
    looked_at = [t.contiguous() for t in looked_at]
    bad, skip = account.new_empty((), dtype=torch.float32), account.new_empty(layers, dtype=torch.float32)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in looked_at) else torch.float32
    squares = account.new_empty(2 * layers, dtype=wide)
    lengths, kept_lengths = _lengths(looked_at), _lengths(kept)
    parts = account.new_empty(max(_programs(lengths), 1), dtype=wide)
    kinds = dtypes(*looked_at, *kept), len(first), found_inf is None
    check = _check(lengths, kept_lengths, layers, kinds, account.get_device())
    check(
        (max(_programs(lengths) + _programs(kept_lengths), 1), 1, 1), *map(_tuple, (looked_at, lengths, kept, kept_lengths)),
        _tuple(snapshot), _tuple(first), found_inf, account, parts, bad, squares, skip,
    )  # fmt: skip
    return bad, squares, skip


def head_restore_(tensors, snapshot, bad):
    """Where bad [] is 1, tensors become what snapshot holds of the first of them, and the others zeros."""
    _check_alike("snapshot", snapshot, tensors[: len(snapshot)])
    lengths = _lengths(tensors)
    if programs := _programs(lengths):
        restore = _restore(lengths, dtypes(*tensors, *snapshot), bad.get_device())
        restore((programs, 1, 1), bad, tuple(tensors), lengths, _tuple(snapshot))


def _check_alike(name, copies, tensors):
    if any(c.numel() != t.numel() or c.stride() != t.stride() for c, t in zip(copies, tensors, strict=True)):
        expected, got = ([(list(t.shape), t.stride()) for t in group] for group in (tensors, copies))
        raise ValueError(f"{name}: expected shapes and strides {expected}, got {got}")


def _lengths(tensors):
    return tuple(t.numel() for t in tensors)


def _programs(lengths):
    return sum(triton.cdiv(length, CHUNK) for length in lengths)


def _tuple(values):
    """None for none: Triton knows no empty tuple of tensors."""
    return tuple(values) or None


@remembered
def _check(lengths, kept_lengths, layers, kinds, device):
    """kinds: the dtypes of what is looked at and kept, how many `first` there are, and whether found_inf is None."""
    _, first, no_found_inf = kinds
    return Launch(
        head_check_kernel, TENSORS=len(lengths), KEPT=len(kept_lengths), LAYERS=layers, HAS_FIRST=first > 0,
        HAS_FOUND_INF=not no_found_inf, CHUNK=CHUNK, BLOCK=BLOCK, PARTS=PARTS,
    )  # fmt: skip


@remembered
def _restore(lengths, kinds, device):
    """kinds: the dtypes of the tensors, then of their copies."""
    kept = len(kinds) - len(lengths)
    return Launch(head_restore_kernel, TENSORS=len(lengths), KEPT=kept, CHUNK=CHUNK, BLOCK=BLOCK)

"""Entropy-weighted fusion on the GPU (eqs. 6–8), forward and backward in one kernel each.

    t = z − max z      S = Σ exp t      e = log S − Σ t exp t / S          (eq. 7, shifted so that nothing overflows)
    λ = exp(−e) / Σ exp(−e) over the modalities that are present           (eq. 8; 0 ≤ e ≤ log C, so no maximum is needed)
    fused = Σ_m λ_m z_m                                                    (eq. 6)

Since exp(−e) needs no maximum over the modalities, they can be taken one after another: each row is read, its entropy formed,
and its share added to the sum, which is divided by Σ exp(−e) at the end. A row that fits in registers is read once; a longer one
twice. A program takes several samples where rows are short.

The logits are M tensors [N, C], never copied together, or packed rows [K, C] with slot [N, M], the row of each (sample,
modality) or −1. What is absent is not read; a sample with nothing present gets zeros.
"""

import torch
import triton
import triton.language as tl

from .launch import Launch, dtypes, fusion_config, remembered


@triton.jit
def _rows_of(m: tl.constexpr, ptrs, strides, present_ptr, n, N, M: tl.constexpr, MASK: tl.constexpr):
    """Modality m's rows of samples n: where each begins, which there are, their numbers. MASK: "" (all), "present", "slot"."""
    here, row = n < N, n.to(tl.int64)
    at = row * M + m
    if MASK == "slot":
        row = tl.load(present_ptr + at, mask=here, other=-1).to(tl.int64)
        here = row >= 0
    if MASK == "present":
        here = tl.load(present_ptr + at, mask=here, other=0) != 0
    return ptrs[m] + row * strides[m], here, row


@triton.jit
def _load_block(rows, here, c, C: tl.constexpr, ALIGN: tl.constexpr, dtype: tl.constexpr):
    """[BLOCK_N, BLOCK_C] of logits, −inf outside."""
    inside = here[:, None] & (c < C)[None, :]
    return tl.load(tl.multiple_of(rows[:, None] + c[None, :], (1, ALIGN)), mask=inside, other=-float("inf")).to(dtype)


@triton.jit
def _online(z, top, S, T):
    """max z, Σ exp(z − max) and Σ (z − max) exp(z − max) of a row, extended by a block of it."""
    new = tl.maximum(top, tl.max(z, 1))
    shift = tl.where(S == 0, 0.0, top - new)  # nothing so far: top may be −inf
    t = z - tl.where(new == -float("inf"), 0.0, new)[:, None]
    p = tl.exp(t)
    scale = tl.exp(shift)
    T = T * scale + tl.where(scale == 0, 0.0, shift * scale) * S + tl.sum(tl.where(p == 0, 0.0, t * p), 1)
    return new, S * scale + tl.sum(p, 1), T


@triton.jit
def _column(tile, at):
    """Column `at` ([1, M_PAD], one True) of a small tile [BLOCK_N, M_PAD]."""
    return tl.sum(tl.where(at, tile, 0.0), 1)


@triton.jit(do_not_specialize=["N"])
def entropy_fusion_kernel(
    ptrs, strides, present_ptr, fused_ptr, weights_ptr, entropy_ptr, N, C: tl.constexpr,
    M: tl.constexpr, M_PAD: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr, ONE_READ: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = weights_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, M_PAD)[None, :]
    e_all, w_all = tl.zeros([BLOCK_N, M_PAD], dtype), tl.zeros([BLOCK_N, M_PAD], dtype)
    total = tl.zeros([BLOCK_N], dtype)
    fused = tl.zeros([BLOCK_N, BLOCK_C], dtype)
    for m in tl.static_range(M):
        rows, here, _ = _rows_of(m, ptrs, strides, present_ptr, n, N, M, MASK)
        top, S, T = tl.full([BLOCK_N], -float("inf"), dtype), tl.zeros([BLOCK_N], dtype), tl.zeros([BLOCK_N], dtype)
        if ONE_READ:
            z = _load_block(rows, here, tl.arange(0, BLOCK_C), C, ALIGN, dtype)
            top, S, T = _online(z, top, S, T)
        else:
            for begin in range(0, C, BLOCK_C):
                z = _load_block(rows, here, begin + tl.arange(0, BLOCK_C), C, ALIGN, dtype)
                top, S, T = _online(z, top, S, T)
        e = tl.where(here, tl.log(S) - T / S, 0.0)
        # exp(−e) without e's rounding, and in float64: its error, times logits that differ by 60, is that of the fused ones.
        wide = S.to(tl.float64)
        w = tl.where(here, (tl.exp(T.to(tl.float64) / wide) / wide).to(dtype), 0.0)
        if ONE_READ:
            fused += tl.where(here[:, None], w[:, None] * z, 0.0)
        total += w
        e_all = tl.where(cols == m, e[:, None], e_all)
        w_all = tl.where(cols == m, w[:, None], w_all)

    total = tl.where(total == 0, 1.0, total)[:, None]  # nothing present
    w_all = tl.where(w_all == 0, 0.0, w_all / total)
    at = n[:, None].to(tl.int64) * M + cols
    inside = (n < N)[:, None] & (cols < M)
    tl.store(weights_ptr + at, w_all, mask=inside)
    tl.store(entropy_ptr + at, e_all, mask=inside)
    out = fused_ptr + n[:, None].to(tl.int64) * C
    if ONE_READ:
        c = tl.arange(0, BLOCK_C)[None, :]
        fused = fused / total
        tl.store(tl.multiple_of(out + c, (1, ALIGN)), fused.to(fused_ptr.dtype.element_ty), mask=(n < N)[:, None] & (c < C))
    else:
        for begin in range(0, C, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            fused = tl.zeros([BLOCK_N, BLOCK_C], dtype)
            for m in tl.static_range(M):
                rows, here, _ = _rows_of(m, ptrs, strides, present_ptr, n, N, M, MASK)
                z = _load_block(rows, here, c, C, ALIGN, dtype)
                fused += tl.where(here[:, None], _column(w_all, cols == m)[:, None] * z, 0.0)
            stored = (n < N)[:, None] & (c < C)[None, :]
            tl.store(tl.multiple_of(out + c[None, :], (1, ALIGN)), fused.to(fused_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["N"])
def entropy_fusion_backward_kernel(
    ptrs, strides, present_ptr, weights_ptr, entropy_ptr, g_fused_ptr, g_weights_ptr, g_entropy_ptr, grad_ptrs, N,
    C: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr,
    HAS_FUSED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """∂L/∂z_m = λ_m g − (∂L/∂e_m) p (log p + e_m), with ∂L/∂λ_m = g · z_m + …, ∂L/∂e_m = −λ_m (∂L/∂λ_m − Σ λ ∂L/∂λ) + …"""
    dtype: tl.constexpr = weights_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, M_PAD)[None, :]
    at = n[:, None].to(tl.int64) * M + cols
    inside = (n < N)[:, None] & (cols < M)
    lam = tl.load(weights_ptr + at, mask=inside, other=0.0)
    ent = tl.load(entropy_ptr + at, mask=inside, other=0.0)
    g_rows = g_fused_ptr + n.to(tl.int64) * C if HAS_FUSED else n

    d_lam, zeros = tl.zeros([BLOCK_N, M_PAD], dtype), tl.zeros([BLOCK_N, M_PAD], dtype)
    tops, log_sums = zeros, zeros  # apart: logits are alike in size, and cancel with their maximum exactly
    for m in tl.static_range(M):
        rows, here, _ = _rows_of(m, ptrs, strides, present_ptr, n, N, M, MASK)
        top, S, T = tl.full([BLOCK_N], -float("inf"), dtype), tl.zeros([BLOCK_N], dtype), tl.zeros([BLOCK_N], dtype)
        gz = tl.zeros([BLOCK_N], dtype)
        for begin in range(0, C, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            z = _load_block(rows, here, c, C, ALIGN, dtype)
            top, S, T = _online(z, top, S, T)
            if HAS_FUSED:
                present = here[:, None] & (c < C)[None, :]
                g = tl.load(tl.multiple_of(g_rows[:, None] + c[None, :], (1, ALIGN)), mask=present, other=0.0).to(dtype)
                gz += tl.sum(tl.where(present, g * z, 0.0), 1)
        d_lam = tl.where(cols == m, gz[:, None], d_lam)
        log_sums = tl.where(cols == m, tl.log(S)[:, None], log_sums)
        tops = tl.where(cols == m, top[:, None], tops)
    if HAS_WEIGHTS:
        d_lam += tl.load(g_weights_ptr + at, mask=inside, other=0.0)
    d_ent = -lam * (d_lam - tl.sum(tl.where(lam == 0, 0.0, lam * d_lam), 1)[:, None])
    if HAS_ENTROPY:
        d_ent += tl.load(g_entropy_ptr + at, mask=inside, other=0.0)

    for m in tl.static_range(M):
        rows, here, row = _rows_of(m, ptrs, strides, present_ptr, n, N, M, MASK)
        to = grad_ptrs[m] + row * C
        writes = here if MASK == "slot" else n < N  # what is absent gets zeros where it has a row
        lam_m, ent_m = _column(lam, cols == m)[:, None], _column(ent, cols == m)[:, None]
        d_ent_m, top_m = _column(d_ent, cols == m)[:, None], _column(tops, cols == m)[:, None]
        log_sum_m = _column(log_sums, cols == m)[:, None]
        for begin in range(0, C, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            log_p = (_load_block(rows, here, c, C, ALIGN, dtype) - top_m) - log_sum_m
            p = tl.exp(log_p)
            grad = -d_ent_m * tl.where(p == 0, 0.0, p * (log_p + ent_m))
            if HAS_FUSED:
                present = here[:, None] & (c < C)[None, :]
                g = tl.load(tl.multiple_of(g_rows[:, None] + c[None, :], (1, ALIGN)), mask=present, other=0.0).to(dtype)
                grad += lam_m * g
            grad = tl.where(here[:, None], grad, 0.0).to(grad_ptrs[0].dtype.element_ty)
            stored = writes[:, None] & (c < C)[None, :]
            tl.store(tl.multiple_of(to[:, None] + c[None, :], (1, ALIGN)), grad, mask=stored)


def entropy_fusion(logits, present=None, slot=None):
    """(fused [N, C], weights [N, M], entropy [N, M]) of M tensors [N, C], of one [M, N, C], or with slot [N, M] of packed rows
    [K, C]; fused in the logits' dtype, the others in float32 (float64 for float64)."""
    rows, N, M, C, mask, kind = _layout(logits, present, slot)
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    fused = rows[0].new_empty(N, C)
    weights, entropy = rows[0].new_empty(N, M, dtype=wide), rows[0].new_empty(N, M, dtype=wide)
    if N:
        strides = tuple(z.stride(0) for z in rows)
        kinds = dtypes(*rows, mask)
        fuse, BLOCK_N = _forward(M, C, kind, _alignment(C, *rows), wide.itemsize, kinds, strides, fused.get_device())
        fuse((triton.cdiv(N, BLOCK_N), 1, 1), rows, strides, mask, fused, weights, entropy, N)
    return fused, weights, entropy


def entropy_fusion_backward(logits, present, weights, entropy, g_fused, g_weights, g_entropy, slot=None):
    """The gradients of the logits, in their shapes; packed rows that no slot names get zeros."""
    rows, N, M, C, mask, kind = _layout(logits, present, slot)
    grads = [(torch.empty_like if slot is None else torch.zeros_like)(z, memory_format=torch.contiguous_format) for z in logits]
    to = _by_modality(grads, M)
    given = [None if g is None else g.contiguous() for g in (g_fused, g_weights, g_entropy)]
    if N:
        strides = tuple(z.stride(0) for z in rows)
        align = _alignment(C, *rows, *([] if g_fused is None else given[:1]))
        kinds = dtypes(*rows, mask, weights, entropy, *given)
        back, BLOCK_N = _backward(M, C, kind, align, weights.element_size(), kinds, strides, weights.get_device())
        grid = triton.cdiv(N, BLOCK_N), 1, 1
        back(grid, rows, strides, mask, weights.contiguous(), entropy.contiguous(), *given, to, N)
    return grads


@remembered
def _forward(M, C, mask, align, itemsize, kinds, strides, device):
    """(the launch, samples to a program) for tensors of these dtypes and strides."""
    config = fusion_config("entropy_fusion", C, M, itemsize)
    one_read = C <= config["BLOCK_C"]
    common = dict(C=C, M=M, M_PAD=triton.next_power_of_2(M), MASK=mask, ALIGN=align)
    return Launch(entropy_fusion_kernel, **common, ONE_READ=one_read, **config), config["BLOCK_N"]


@remembered
def _backward(M, C, mask, align, itemsize, kinds, strides, device):
    config = fusion_config("entropy_fusion_backward", C, M, itemsize)
    has = dict(zip(("HAS_FUSED", "HAS_WEIGHTS", "HAS_ENTROPY"), (dtype is not None for dtype in kinds[-3:]), strict=True))
    common = dict(C=C, M=M, M_PAD=triton.next_power_of_2(M), MASK=mask, ALIGN=align)
    return Launch(entropy_fusion_backward_kernel, **common, **has, **config), config["BLOCK_N"]


def _layout(logits, present, slot):
    """(the modalities' rows as tensors whose last stride is 1, N, M, C, what masks them, and how)."""
    logits = [z if z.stride(-1) == 1 else z.contiguous() for z in logits]
    C = logits[0].shape[-1]
    if slot is not None:
        return _by_modality(logits, slot.shape[1]), *slot.shape, C, slot.contiguous(), "slot"
    rows = _by_modality(logits, len(logits))
    mask = None if present is None else present.contiguous()
    return rows, rows[0].shape[0], len(rows), C, mask, "" if mask is None else "present"


def _by_modality(tensors, M):
    """A tensor for each modality: the M given, the slices of one that is stacked, or M times the one that all are packed in."""
    if tensors[0].dim() == 3:
        return tensors[0].unbind()
    return tuple(tensors) if len(tensors) == M else tuple(tensors) * M


def _alignment(C, *tensors):
    """The bytes, a power of two up to 16, that divide the address of every row: what the compiler cannot see in C = 1000."""
    address = C * tensors[0].element_size()
    for t in tensors:
        address |= t.data_ptr() | t.stride(0) * t.element_size()
    return min(address & -address, 16)

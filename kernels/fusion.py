"""Entropy-weighted fusion on the GPU (eqs. 6–8), forward and backward in one kernel each.

    t = z − max z      S = Σ exp t      e = log S − Σ t exp t / S          (eq. 7, shifted so that nothing overflows)
    λ = exp(−e) / Σ exp(−e) over the modalities that are present           (eq. 8; 0 ≤ e ≤ log C, so no maximum is needed)
    fused = Σ_m λ_m z_m                                                    (eq. 6)

exp(−e) needs no maximum over the modalities. Where a sample's rows fit in registers, all are asked for before the first is waited
for, and read once; longer ones are gone through one after another, twice. A program takes several samples where rows are short.

The logits are M tensors [N, C], never copied together, or packed rows [K, C] with slot [N, M], the row of each (sample,
modality) or −1. What is absent is not read; a sample with nothing present gets zeros.
"""

import torch
import triton
import triton.language as tl

from .launch import Launch, alignment, dtypes, fusion_config, remembered
from .pairs import fma, normalized, reciprocal


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
def _load_block(rows, here, c, C: tl.constexpr, ALIGN: tl.constexpr, dtype: tl.constexpr, outside: tl.constexpr = -float("inf")):
    """[BLOCK_N, BLOCK_C] of logits, −inf outside, or of their gradients, with zeros there."""
    inside = here[:, None] & (c < C)[None, :]
    return tl.load(tl.multiple_of(rows[:, None] + c[None, :], (1, ALIGN)), mask=inside, other=outside).to(dtype)


@triton.jit
def _online(z, top, S, T):
    """max z, Σ exp(z − max) and Σ (z − max) exp(z − max) of a row, extended by a block of it."""
    new = tl.maximum(top, tl.max(z, 1))
    shift = tl.where(S == 0, 0.0, top - new)  # nothing so far: top may be −inf
    t = z - tl.where(new == -float("inf"), 0.0, new)[:, None]
    t = tl.maximum(t, -200.0, propagate_nan=tl.PropagateNan.ALL)  # whose exp counts for nothing; −inf would make t p NaN
    p = tl.exp(t)
    scale = tl.exp(shift)
    T = T * scale + tl.where(scale == 0, 0.0, shift * scale) * S + tl.sum(t * p, 1)
    return new, S * scale + tl.sum(p, 1), T


@triton.jit
def _sums(rows, here, C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, dtype: tl.constexpr):
    """``_online`` over all of the rows, in blocks."""
    top, S = tl.full([here.shape[0]], -float("inf"), dtype), tl.zeros([here.shape[0]], dtype)
    T = tl.zeros([here.shape[0]], dtype)
    for begin in range(0, C, BLOCK_C):
        z = _load_block(rows, here, begin + tl.arange(0, BLOCK_C), C, ALIGN, dtype)
        top, S, T = _online(z, top, S, T)
    return top, S, T


@triton.jit
def _sums_of_tile(z, dtype: tl.constexpr):
    zero = tl.zeros([z.shape[0]], dtype)
    return _online(z, zero - float("inf"), zero, zero)


@triton.jit
def _exp_quotient(T, S):
    """exp(T / S) / S for T ≤ 0 < S to an ulp, without the rounding of T / S: an error of the weights, times logits that differ by
    60, is one of the fused logits. In pairs of float32; the argument is reduced to |r| ≤ log(2) / 2, since a GPU's own exp would
    round its product with log2(e)."""
    q = T / S
    if T.dtype == tl.float64:
        return tl.exp(q) / S
    else:
        n = tl.floor(q * 1.44269504 + 0.5)
        rest = tl.fma(n, 2.12194440e-4, fma(-q, S, T) / S)  # log(2) has two parts, the first exact in products with n
        r, r_lo = normalized(tl.fma(-n, 0.693359375, q), rest)
        y = tl.fma(r, tl.fma(r, 1.381459879e-3, 8.368716575e-3), 4.166838899e-2)
        y = tl.fma(r, tl.fma(r, y, 1.666652113e-1), 4.999999404e-1)
        p = 1.0 + r
        p_lo = (r - (p - 1.0)) + tl.fma(r * r, y, tl.fma(r, r_lo, r_lo))
        inverse, inverse_lo = reciprocal(S, 0.0)
        power = ((tl.maximum(n, -126.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        return power * tl.fma(p, inverse, tl.fma(p, inverse_lo, p_lo * inverse))


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
    tiles = ()
    if ONE_READ:  # all of them are on their way before the first is waited for
        for m in tl.static_range(M):
            rows, here, _ = _rows_of(m, ptrs, strides, present_ptr, n, N, M, MASK)
            tiles = tiles + (_load_block(rows, here, tl.arange(0, BLOCK_C), C, ALIGN, dtype),)
    S_all, T_all = tl.full([BLOCK_N, M_PAD], 1.0, dtype), tl.zeros([BLOCK_N, M_PAD], dtype)
    given = tl.zeros([BLOCK_N, M_PAD], tl.int32)
    for m in tl.static_range(M):
        rows, here, _ = _rows_of(m, ptrs, strides, present_ptr, n, N, M, MASK)
        if ONE_READ:
            top, S, T = _sums_of_tile(tiles[m], dtype)
        else:
            top, S, T = _sums(rows, here, C, ALIGN, BLOCK_C, dtype)
        S_all, T_all = tl.where(cols == m, S[:, None], S_all), tl.where(cols == m, T[:, None], T_all)
        given = tl.where(cols == m, here.to(tl.int32)[:, None], given)

    e_all = tl.where(given != 0, tl.log(S_all) - T_all / S_all, 0.0)
    w_all = tl.where(given != 0, _exp_quotient(T_all, S_all), 0.0)
    total = tl.sum(w_all, 1)
    total = tl.where(total == 0, 1.0, total)[:, None]  # nothing present
    w_all = tl.where(w_all == 0, 0.0, w_all / total)
    at = n[:, None].to(tl.int64) * M + cols
    inside = (n < N)[:, None] & (cols < M)
    tl.store(weights_ptr + at, w_all, mask=inside)
    tl.store(entropy_ptr + at, e_all, mask=inside)
    out = fused_ptr + n[:, None].to(tl.int64) * C
    for begin in range(0, C, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        fused = tl.zeros([BLOCK_N, BLOCK_C], dtype)
        for m in tl.static_range(M):
            rows, here, _ = _rows_of(m, ptrs, strides, present_ptr, n, N, M, MASK)
            if ONE_READ:
                z = tiles[m]
            else:
                z = _load_block(rows, here, c, C, ALIGN, dtype)
            share = _column(w_all, cols == m)[:, None] * z
            fused += share if MASK == "" else tl.where(here[:, None], share, 0.0)
        stored = (n < N)[:, None] & (c < C)[None, :]
        tl.store(tl.multiple_of(out + c[None, :], (1, ALIGN)), fused.to(fused_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["N"])
def entropy_fusion_backward_kernel(
    ptrs, strides, present_ptr, weights_ptr, entropy_ptr, g_fused_ptr, g_weights_ptr, g_entropy_ptr, grad_ptrs, N,
    C: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr,
    HAS_FUSED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_ENTROPY: tl.constexpr, ONE_READ: tl.constexpr,
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
    tiles = ()
    if ONE_READ:  # as in the forward kernel
        if HAS_FUSED:
            g_tile = _load_block(g_rows, n < N, tl.arange(0, BLOCK_C), C, ALIGN, dtype, 0.0)
        for m in tl.static_range(M):
            rows, here, _ = _rows_of(m, ptrs, strides, present_ptr, n, N, M, MASK)
            tiles = tiles + (_load_block(rows, here, tl.arange(0, BLOCK_C), C, ALIGN, dtype),)

    d_lam, zeros = tl.zeros([BLOCK_N, M_PAD], dtype), tl.zeros([BLOCK_N, M_PAD], dtype)
    tops, log_sums = zeros, zeros  # apart: logits are alike in size, and cancel with their maximum exactly
    for m in tl.static_range(M):
        rows, here, _ = _rows_of(m, ptrs, strides, present_ptr, n, N, M, MASK)
        top, S, T = tl.full([BLOCK_N], -float("inf"), dtype), tl.zeros([BLOCK_N], dtype), tl.zeros([BLOCK_N], dtype)
        gz = tl.zeros([BLOCK_N], dtype)
        for begin in range(0, C, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            if ONE_READ:
                z = tiles[m]
            else:
                z = _load_block(rows, here, c, C, ALIGN, dtype)
            top, S, T = _online(z, top, S, T)
            if HAS_FUSED:
                present = here[:, None] & (c < C)[None, :]
                if ONE_READ:
                    g = g_tile
                else:
                    g = _load_block(g_rows, here, c, C, ALIGN, dtype, 0.0)
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
            if ONE_READ:
                z = tiles[m]
            else:
                z = _load_block(rows, here, c, C, ALIGN, dtype)
            log_p = (z - top_m) - log_sum_m
            p = tl.exp(log_p)
            grad = -d_ent_m * tl.where(p == 0, 0.0, p * (log_p + ent_m))
            if HAS_FUSED:
                if ONE_READ:
                    g = g_tile
                else:
                    g = _load_block(g_rows, here, c, C, ALIGN, dtype, 0.0)
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
        fuse, BLOCK_N = _forward(M, C, kind, alignment(C, *rows), wide.itemsize, kinds, strides, fused.get_device())
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
        align = alignment(C, *rows, *([] if g_fused is None else given[:1]))
        kinds = dtypes(*rows, mask, weights, entropy, *given)
        back, BLOCK_N = _backward(M, C, kind, align, weights.element_size(), kinds, strides, weights.get_device())
        grid = triton.cdiv(N, BLOCK_N), 1, 1
        back(grid, rows, strides, mask, weights.contiguous(), entropy.contiguous(), *given, to, N)
    return grads


@remembered
def _forward(M, C, mask, align, itemsize, kinds, strides, device):
    """(the launch, samples to a program) for tensors of these dtypes and strides."""
    config = fusion_config("entropy_fusion", C, M, itemsize)
    common = dict(C=C, M=M, M_PAD=triton.next_power_of_2(M), MASK=mask, ALIGN=align, ONE_READ=C <= config["BLOCK_C"])
    return Launch(entropy_fusion_kernel, **common, **config), config["BLOCK_N"]


@remembered
def _backward(M, C, mask, align, itemsize, kinds, strides, device):
    config = fusion_config("entropy_fusion_backward", C, M, itemsize)
    has = dict(zip(("HAS_FUSED", "HAS_WEIGHTS", "HAS_ENTROPY"), (dtype is not None for dtype in kinds[-3:]), strict=True))
    common = dict(C=C, M=M, M_PAD=triton.next_power_of_2(M), MASK=mask, ALIGN=align, ONE_READ=C <= config["BLOCK_C"])
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

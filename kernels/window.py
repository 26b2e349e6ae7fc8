"""The window's step on the GPU: the gradient projected away from the other modalities' latest feature means, in one launch.

Eq. 5 started anew from I for each of the J means has a closed form, X [J, s] being the means:

    P = I − Xᵀ (α I + X Xᵀ)⁻¹ X            G P = G − Bᵀ X,   B = (α I + X Xᵀ)⁻¹ X Gᵀ   [J, C]

so there is no s × s matrix and not even P's columns. Of X Xᵀ a step changes one row, so it is kept beside the means; each program
takes one row g of G and needs X g alone, solves for its column of B, and goes through X again (or has kept it in registers). One
more program has x̄ for its row: X x̄ is the new row of X Xᵀ.

α I + X Xᵀ is nearly singular where means are long and alike, so X g, the solution and g − bᵀ X are computed in pairs of floats.
"""

import torch
import triton
import triton.language as tl

from .launch import Launch, dtypes, remembered, window_config
from .pairs import add_product, entry, fma, from_float64, minus_product, narrowed, product, reciprocal, to_float64, total, widened


@triton.jit
def _solve(A, A_lo, b, b_lo, J, least: tl.constexpr):
    """A⁻¹ b by Gauss–Jordan without pivots, A being positive definite. What rounding leaves of a mean that depends on others is
    no mean: b is 0 there. Every program does this: up to J = 4 some 190 float32 instructions for each mean, none in float64."""
    r = tl.arange(0, A.shape[0])
    smallest = least * tl.sum(tl.where(r[:, None] == r[None, :], A, 0.0), 1)
    for q in range(J):
        row, row_lo = entry(A, A_lo, (r == q)[:, None], 0)
        column, column_lo = entry(A, A_lo, (r == q)[None, :], 1)
        pivot, pivot_lo = entry(column, column_lo, r == q, 0)
        independent = pivot > tl.sum(tl.where(r == q, smallest, 0.0), 0)
        inverse, inverse_lo = reciprocal(tl.where(independent, pivot, 1.0), tl.where(independent, pivot_lo, 0.0))
        inverse, inverse_lo = tl.where(independent, inverse, 0.0), tl.where(independent, inverse_lo, 0.0)
        row, row_lo = product(row, row_lo, inverse, inverse_lo)
        b_q, b_q_lo = entry(b, b_lo, r == q, 0)
        b_q, b_q_lo = product(b_q, b_q_lo, inverse, inverse_lo)
        left, left_lo = minus_product(A, A_lo, column[:, None], column_lo[:, None], row[None, :], row_lo[None, :])
        A = tl.where((r == q)[:, None], row[None, :], left)
        A_lo = tl.where((r == q)[:, None], row_lo[None, :], left_lo)
        rest, rest_lo = minus_product(b, b_lo, column, column_lo, b_q, b_q_lo)
        b, b_lo = tl.where(r == q, b_q, rest), tl.where(r == q, b_q_lo, rest_lo)
    return b, b_lo


@triton.jit
def _load_row(x_ptr, G_ptr, row, j, stop, x_stop, like: tl.constexpr, REMEMBER: tl.constexpr, dtype: tl.constexpr):
    """A row of G, or x̄ as it will stand in `means`: of the two bounds one is 0."""
    g = widened(tl.load(G_ptr + row + j, mask=j < stop, other=0.0)).to(dtype)
    if REMEMBER:
        g += widened(narrowed(widened(tl.load(x_ptr + j, mask=j < x_stop, other=0.0)), like)).to(dtype)
    return g


@triton.jit
def _load_means(means_ptr, mean, here, j, s, dtype: tl.constexpr):
    """[rows, BLOCK], zeros outside."""
    mask = here[:, None] & (j < s)[None, :]
    return widened(tl.load(means_ptr + mean.to(tl.int64)[:, None] * s + j[None, :], mask=mask, other=0.0)).to(dtype)


@triton.jit
def _store(out_ptr, j, projected, g, stop, limit):
    """A block of a row, the same as before where limit is 0; returns the squares of what then stands there."""
    out = narrowed(tl.where(j < limit, projected, g), out_ptr.dtype.element_ty)
    tl.store(out_ptr + j, out, mask=j < tl.minimum(stop, limit))
    out = widened(out).to(g.dtype)
    return out * out


@triton.jit
def _remember(means_ptr, gram_ptr, x_ptr, s, gram_stride, own, limit, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """x̄ into its row of means, and its product with itself into the Gram matrix, unless limit is 0."""
    j = tl.arange(0, BLOCK)
    hi, lo = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for begin in range(0, s, BLOCK):
        x = tl.load(x_ptr + begin + j, mask=begin + j < s, other=0.0)
        x = narrowed(widened(x), means_ptr.dtype.element_ty)
        tl.store(means_ptr + own.to(tl.int64) * s + begin + j, x, mask=begin + j < limit)
        x = widened(x).to(dtype)
        hi, lo = add_product(hi, lo, x, x)
    hi, lo = total(hi, lo, 0)
    if limit > 0:
        tl.store(gram_ptr + own * (gram_stride + 1), to_float64(hi, lo))


@triton.jit(do_not_specialize=["own", "J", "gram_stride"])
def window_project_kernel(
    means_ptr, gram_ptr, x_ptr, G_ptr, out_ptr, squares_ptr, alpha_ptr, found_inf_ptr, s, C, J, own, gram_stride,
    REMEMBER: tl.constexpr, HAS_FOUND_INF: tl.constexpr, J_PAD: tl.constexpr, J_TILE: tl.constexpr, BLOCK: tl.constexpr,
    ONE_READ: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Row c of G P from the J means beside row `own`, and ‖·‖² of what then stands in out, which may be G itself.

    With REMEMBER, program 0 has x̄ in place of a row of G and brings means and Gram matrix up to date: their row and column
    `own`, which no other program reads. Where found_inf is set nothing changes.
    """
    dtype: tl.constexpr = squares_ptr.dtype.element_ty
    like: tl.constexpr = means_ptr.dtype.element_ty
    c = tl.program_id(0) - 1 if REMEMBER else tl.program_id(0)
    row = tl.maximum(c, 0).to(tl.int64) * s
    stop = tl.where((c < 0) | (c >= C), 0, s)  # there is a program even where there is no row
    x_stop = tl.where(c < 0, s, 0)
    limit = s
    if HAS_FOUND_INF:
        limit = tl.where(tl.load(found_inf_ptr) != 0, 0, s)
    r = tl.arange(0, J_PAD)
    mean = r + (r >= own).to(tl.int32)
    at = gram_ptr + mean[:, None] * gram_stride + mean[None, :]
    gram = tl.load(at, mask=(r < J)[:, None] & (r < J)[None, :], other=0.0)
    alpha = tl.where(r < J, tl.load(alpha_ptr), 1.0)

    # X g. The order of its sums depends on s alone, so that the Gram matrix of a saved state, formed anew, is what it was.
    if ONE_READ:
        j = tl.arange(0, BLOCK)
        g = _load_row(x_ptr, G_ptr, row, j, stop, x_stop, like, REMEMBER, dtype)
        X = _load_means(means_ptr, mean, r < J, j, s, dtype)
        zero = tl.zeros([J_PAD, BLOCK], dtype)
        hi, lo = add_product(zero, zero, X, g[None, :])
        b, b_lo = total(hi, lo, 1)
    else:
        b, b_lo = tl.zeros([J_PAD], dtype), tl.zeros([J_PAD], dtype)
        for first in range(0, J, J_TILE):
            t = first + tl.arange(0, J_TILE)
            hi, lo = tl.zeros([J_TILE, BLOCK], dtype), tl.zeros([J_TILE, BLOCK], dtype)
            for begin in range(0, s, BLOCK):
                j = begin + tl.arange(0, BLOCK)
                g = _load_row(x_ptr, G_ptr, row, j, stop, x_stop, like, REMEMBER, dtype)
                X = _load_means(means_ptr, t + (t >= own).to(tl.int32), t < J, j, s, dtype)
                hi, lo = add_product(hi, lo, X, g[None, :])
            hi, lo = total(hi, lo, 1)
            for q in tl.static_range(J_TILE):
                b_q, b_q_lo = entry(hi, lo, tl.arange(0, J_TILE) == q, 0)
                b, b_lo = tl.where(r == first + q, b_q, b), tl.where(r == first + q, b_q_lo, b_lo)

    if c < 0:
        products, inside = to_float64(b, b_lo), r < tl.where(limit > 0, J, 0)
        tl.store(gram_ptr + own * gram_stride + mean, products, mask=inside)
        tl.store(gram_ptr + mean * gram_stride + own, products, mask=inside)
        if REMEMBER:
            _remember(means_ptr, gram_ptr, x_ptr, s, gram_stride, own, limit, BLOCK, dtype)
    else:
        A, A_lo = from_float64(gram + tl.where(r[:, None] == r[None, :], alpha[:, None], 0.0), dtype)
        b, b_lo = _solve(A, A_lo, b, b_lo, J, LEAST)
        squares = tl.zeros([BLOCK], dtype)
        if ONE_READ:
            rest, rest_lo = g, tl.zeros([BLOCK], dtype)
            for q in tl.static_range(J_PAD):
                b_q, b_q_lo = entry(b, b_lo, r == q, 0)
                x = tl.sum(tl.where((r == q)[:, None], X, 0.0), 0)
                rest, rest_lo = add_product(rest, fma(-b_q_lo, x, rest_lo), -b_q, x)
            squares += _store(out_ptr + row, j, rest + rest_lo, g, stop, limit)
        else:
            for begin in range(0, s, BLOCK):
                j = begin + tl.arange(0, BLOCK)
                g = widened(tl.load(G_ptr + row + j, mask=j < stop, other=0.0)).to(dtype)
                rest, rest_lo = g, tl.zeros([BLOCK], dtype)
                for q in tl.static_range(J_PAD):
                    x_ptrs = means_ptr + (q + (own <= q).to(tl.int64)) * s + j
                    x = widened(tl.load(x_ptrs, mask=j < tl.where(q < J, s, 0), other=0.0)).to(dtype)
                    b_q, b_q_lo = entry(b, b_lo, r == q, 0)
                    rest, rest_lo = add_product(rest, fma(-b_q_lo, x, rest_lo), -b_q, x)
                squares += _store(out_ptr + row, j, rest + rest_lo, g, stop, limit)
        tl.store(squares_ptr + c, tl.sum(squares, 0), mask=c < C)


def window_project(means, grad, alpha):
    """G P for means [J, s] and grad [C, s] of any floating dtypes; alpha 0-d float64. Returns [C, s] in grad's dtype."""
    means, grad = means.contiguous(), grad.contiguous()
    out, wide = torch.empty_like(grad), means.double()
    _launch(means, wide @ wide.T, None, grad, out, alpha, len(means), None)
    return out


def window_step_(means, gram, own, x_bar, grad, alpha, found_inf=None):
    """The same in place, without row `own` of means [K, s], the modality's own, which then becomes x_bar [s]. gram float64
    [K, K], the products of the means, gets the new ones. With found_inf [1] set all stay as they are. Returns [C] numbers: ‖·‖²
    of the rows of grad afterwards."""
    K, s = means.shape
    if not (means.is_contiguous() and grad.is_contiguous() and 0 <= own < K and x_bar.shape == (s,) and grad.shape[1:] == (s,)):
        got = f"{list(means.shape)}, {own}, {list(x_bar.shape)} and {list(grad.shape)}"
        raise ValueError(
            f"window_step_: expected contiguous means [K, s] and grad [C, s], own in 0 … K − 1, x_bar [s], got {got}"
        )
    if gram.shape != (K, K) or gram.dtype != torch.float64 or gram.stride(1) != 1:
        got = f"{gram.dtype} {list(gram.shape)}, strides {gram.stride()}"
        raise ValueError(f"window_step_: expected gram float64 [{K}, {K}], strides [·, 1], got {got}")
    return _launch(means, gram, x_bar.contiguous(), grad, grad, alpha, own, found_inf)


def _launch(means, gram, x_bar, grad, out, alpha, own, found_inf):
    C, s = grad.shape
    J = len(means) - (x_bar is not None)
    wide = torch.promote_types(torch.promote_types(means.dtype, grad.dtype), torch.float32)
    squares = torch.empty(C, dtype=wide, device=grad.device) if s else torch.zeros(C, dtype=wide, device=grad.device)
    if s:
        project = _project(s, J, wide, dtypes(means, x_bar, grad, alpha, found_inf), means.get_device())
        grid = max(C + (x_bar is not None), 1), 1, 1
        project(grid, means, gram, x_bar, grad, out, squares, alpha, found_inf, s, C, J, own, gram.stride(0))
    return squares


@remembered
def _project(s, J, wide, kinds, device):
    """kinds: the dtypes of means, x̄, G, α and found_inf."""
    _, x_bar, _, _, found_inf = kinds
    flags = {"REMEMBER": x_bar is not None, "HAS_FOUND_INF": found_inf is not None}
    least = 1e-15 if wide == torch.float64 else 1e-13  # some ten last digits of a pair, or of a Gram matrix in float64
    return Launch(window_project_kernel, **flags, LEAST=least, enable_fp_fusion=False, **window_config(s, J, wide.itemsize))

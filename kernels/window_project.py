"""The window's step on the GPU: the gradient projected away from the other modalities' latest feature means, in one launch.

Eq. 5 started anew from I for each of the J means has a closed form, X [J, s] being the means:

    P = I − Xᵀ (α I + X Xᵀ)⁻¹ X            G P = G − Bᵀ X,   B = (α I + X Xᵀ)⁻¹ X Gᵀ   [J, C]

so there is no s × s matrix and not even P's columns: each program takes one row of G, forms the J × J matrix and its own
column of X Gᵀ on the way through X, solves, and goes through X again. In float64, since α I + X Xᵀ is nearly singular where
means are long and alike; it is a few products per element that is loaded.
"""

import torch
import triton
import triton.language as tl

from .launch import Launch, dtypes, remembered, window_config


@triton.jit
def _wide(x):
    """float64, from bfloat16 by way of float32: the interpreter cannot do it in one."""
    return (x.to(tl.float32) if x.dtype == tl.bfloat16 else x).to(tl.float64)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    return (x.to(tl.float32) if dtype == tl.bfloat16 else x).to(dtype)


@triton.jit(do_not_specialize=["own", "J"])
def window_project_kernel(
    means_ptr, x_ptr, G_ptr, out_ptr, alpha_ptr, found_inf_ptr, s, C, J, own,
    REMEMBER: tl.constexpr, HAS_FOUND_INF: tl.constexpr, J_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row c of G P from all rows of means [J, s] but row `own` (−1: all of them). With REMEMBER, program 0 then puts x̄ into
    that row, which no program reads; not where found_inf is set."""
    c = tl.program_id(0)
    stop = tl.where(c < C, s, 0)  # there is a program even where there is no row
    row = c.to(tl.int64) * s
    r = tl.arange(0, J_PAD)
    others = (r < J) & (r != own)
    A = tl.where((r[:, None] == r[None, :]) & others[:, None], tl.load(alpha_ptr), 0.0)  # α I + X Xᵀ
    A = tl.where((r[:, None] == r[None, :]) & (others[:, None] == 0), 1.0, A)
    b = tl.zeros([J_PAD], tl.float64)  # X g, then this row's column of B
    for begin in range(0, s, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        X = _wide(tl.load(means_ptr + r[:, None] * s + j[None, :], mask=others[:, None] & (j < s)[None, :], other=0.0))
        g = _wide(tl.load(G_ptr + row + j, mask=j < stop, other=0.0))
        b += tl.sum(X * g[None, :], 1)
        for q in range(J):
            x_q = _wide(tl.load(means_ptr + q * s + j, mask=j < tl.where(q == own, 0, s), other=0.0))
            A += tl.where((r == q)[None, :], tl.sum(X * x_q[None, :], 1)[:, None], 0.0)

    # Gauss–Jordan without pivots: A is positive definite. What rounding leaves of a mean that depends on others is no mean.
    least = 1e-15 * tl.sum(tl.where(r[:, None] == r[None, :], A, 0.0), 1)
    for q in range(J):
        pivot_row = tl.sum(tl.where((r == q)[:, None], A, 0.0), 0)
        pivot = tl.sum(tl.where(r == q, pivot_row, 0.0), 0)
        pivot = tl.where(pivot > tl.sum(tl.where(r == q, least, 0.0), 0), pivot, float("inf"))
        column = tl.where(r == q, 0.0, tl.sum(tl.where((r == q)[None, :], A, 0.0), 1))
        pivot_row = pivot_row / pivot
        pivot_b = tl.sum(tl.where(r == q, b, 0.0), 0) / pivot
        A = tl.where((r == q)[:, None], pivot_row[None, :], A - column[:, None] * pivot_row[None, :])
        b = tl.where(r == q, pivot_b, b - column * pivot_b)

    for begin in range(0, s, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        X = _wide(tl.load(means_ptr + r[:, None] * s + j[None, :], mask=others[:, None] & (j < s)[None, :], other=0.0))
        g = _wide(tl.load(G_ptr + row + j, mask=j < stop, other=0.0))
        projected = g - tl.sum(X * b[:, None], 0)
        tl.store(out_ptr + row + j, _narrow(projected, out_ptr.dtype.element_ty), mask=j < stop)

    if REMEMBER:
        keep = c == 0
        if HAS_FOUND_INF:
            keep = keep & (tl.load(found_inf_ptr) == 0)
        if keep:
            for begin in range(0, s, BLOCK):
                j = begin + tl.arange(0, BLOCK)
                x = _narrow(_wide(tl.load(x_ptr + j, mask=j < s)), means_ptr.dtype.element_ty)
                tl.store(means_ptr + own * s + j, x, mask=j < s)


def window_project(means, grad, alpha):
    """G P for means [J, s] and grad [C, s] of any floating dtypes; alpha 0-d float64. Returns [C, s] in grad's dtype."""
    return _launch(means.contiguous(), None, grad, alpha, -1, None)


def window_step_(means, own, x_bar, grad, alpha, found_inf=None):
    """The same without row `own` of means, the modality's own, which then becomes x_bar [s] unless found_inf [1] is set."""
    if not (means.is_contiguous() and 0 <= own < means.shape[0] and x_bar.shape == (means.shape[1],)):
        got = f"{list(means.shape)}, {own} and {list(x_bar.shape)}"
        raise ValueError(f"window_step_: expected contiguous means [K, s], own in 0 … K − 1 and x_bar [s], got {got}")
    return _launch(means, x_bar.contiguous(), grad, alpha, own, found_inf)


def _launch(means, x_bar, grad, alpha, own, found_inf):
    (C, s), J = grad.shape, means.shape[0]
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    if s:
        project = _project(s, C, J, dtypes(means, x_bar, grad, alpha, found_inf), means.get_device())
        project((max(C, 1), 1, 1), means, x_bar, grad, out, alpha, found_inf, s, C, J, own)
    return out


@remembered
def _project(s, C, J, kinds, device):
    """kinds: the dtypes of means, x̄, G, α and found_inf."""
    _, x_bar, _, _, found_inf = kinds
    flags = {"REMEMBER": x_bar is not None, "HAS_FOUND_INF": found_inf is not None}
    return Launch(window_project_kernel, **flags, **window_config(s, J))

"""The RLS step of the head's projection on the GPU (eqs. 3 and 5), in gradient form, with P read once and written at most once:

    k = P x̄        d = x̄ᵀ k        u = k / √(α + d)
    P⁺ = P − u uᵀ                   G P⁺ = G P − (G u) uᵀ

Two launches. ``rls_read_kernel`` streams P: by symmetry a block of columns of P holds all that the same columns of k and of
G P need, so no block waits for another. ``rls_finish_kernel`` has one program for each row of G, knows all of k, and subtracts
(G k) kᵀ / (α + d), where G k = (G P) x̄ needs nothing but the row at hand.

u never enters P at once. It waits in `pending` [R, s], and the true P is P − Σ_r u_r u_rᵀ:

- lazy, R = 1: the next step's reading folds u into each tile of P on its way through, so a step reads and writes P once;
- deferred, R > 1: a step only reads P and corrects k and G P for the waiting rows, with a = U x̄ and b = U Gᵀ:
  k −= Uᵀ a, d −= |a|², G P −= b U, (G P) x̄ −= b a. Every R-th reading folds all of them and writes P.

How many rows wait is known to the device alone (`slot`), so the same two launches replay in a CUDA graph.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launch, dot_precision, dtypes, remembered, rls_finish_config, rls_fold_config, rls_read_config


@triton.jit
def rls_fold_kernel(
    P_ptr, pending_ptr, slot_ptr, s,
    R: tl.constexpr, FULL_ONLY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """P ← P − Σ_r u_r u_rᵀ over the waiting rows, or with FULL_ONLY only once the last place is taken.

    Also says where the step's u goes: slot[0] is written here and read by the finishing kernel, slot[1] the reverse, so that
    no program reads what another of the same launch writes.
    """
    waiting = 1
    if R > 1:
        filled = tl.load(slot_ptr + 1)
        waiting = tl.where(filled == R, R, 0) if FULL_ONLY else filled
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(slot_ptr, tl.where(waiting > 0, 0, filled))
    if waiting > 0:
        i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        j = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        tile = P_ptr + i.to(tl.int64)[:, None] * s + j[None, :]
        inside = (i < s)[:, None] & (j < s)[None, :]
        p = tl.load(tile, mask=inside, other=0.0)
        # Rows and columns get the same products in the same order: P stays symmetric to the last bit.
        for r in range(waiting):
            u = pending_ptr + r * s
            p -= tl.load(u + i, mask=i < s, other=0.0)[:, None] * tl.load(u + j, mask=j < s, other=0.0)[None, :]
        tl.store(tile, p, mask=inside)


@triton.jit
def rls_read_kernel(
    P_ptr, x_ptr, G_ptr, pending_ptr, k_ptr, GP_ptr, bad_ptr, s, C, split_rows,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Columns j of k [splits, s] and of G P [splits, C, s], each split summing over `split_rows` rows of P.

    Grid (column blocks, splits, blocks of C). With FOLD (R = 1 and one block of C, so nobody else reads the tile) the waiting
    row enters P on the way. bad [splits, blocks of C] says whether G holds anything that is not finite there.
    """
    split, c_block = tl.program_id(1), tl.program_id(2)
    j = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = P_ptr.dtype.element_ty
    if FOLD:
        u_j = tl.load(pending_ptr + j, mask=j < s, other=0.0)

    # x̄ ∘ P is summed over its rows once, after the loop: k decides P's accuracy and stays out of the tensor cores.
    xP = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype)
    GP = tl.zeros([BLOCK_C, BLOCK_COLS], dtype)
    end = tl.minimum(s, (split + 1) * split_rows)
    for begin in tl.range(split * split_rows, end, BLOCK_ROWS, num_stages=STAGES):
        i = begin + tl.arange(0, BLOCK_ROWS)
        tile = P_ptr + i.to(tl.int64)[:, None] * s + j[None, :]
        inside = (i < end)[:, None] & (j < s)[None, :]
        p = tl.load(tile, mask=inside, other=0.0)
        if FOLD:
            p -= tl.load(pending_ptr + i, mask=i < end, other=0.0)[:, None] * u_j[None, :]
            tl.store(tile, p, mask=inside)
        xP += tl.load(x_ptr + i, mask=i < end, other=0.0).to(dtype)[:, None] * p
        g_tile = G_ptr + c.to(tl.int64)[:, None] * s + i[None, :]
        g = tl.load(g_tile, mask=(c < C)[:, None] & (i < end)[None, :], other=0.0)
        GP = tl.dot(g.to(dtype), p, GP, input_precision=PRECISION, out_dtype=dtype)

    if c_block == 0:
        tl.store(k_ptr + split * s + j, tl.sum(xP, 0), mask=j < s)
    out = GP_ptr + (split * C + c).to(tl.int64)[:, None] * s + j[None, :]
    tl.store(out, GP, mask=(c < C)[:, None] & (j < s)[None, :])
    if tl.program_id(0) == 0:  # a NaN or Inf in a row of G shows in every column of its product
        finite = (GP - GP == 0) | (j >= s)[None, :]
        tl.store(bad_ptr + split * tl.num_programs(2) + c_block, 1 - tl.min(tl.min(finite.to(tl.int32), 1), 0))


@triton.jit
def _split_sum(ptr, stride, j, s, SPLITS: tl.constexpr):
    total = tl.load(ptr + j, mask=j < s, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptr + split * stride + j, mask=j < s, other=0.0)
    return total


@triton.jit
def _pending_tile(pending_ptr, slot, j, s, R: tl.constexpr):
    """[R, BLOCK] of the waiting rows, zeros for places not taken."""
    r = tl.arange(0, R)
    return tl.load(pending_ptr + r[:, None] * s + j[None, :], mask=(r < slot)[:, None] & (j < s)[None, :], other=0.0)


@triton.jit
def rls_finish_kernel(
    x_ptr, G_ptr, out_ptr, pending_ptr, slot_ptr, k_ptr, GP_ptr, bad_ptr, alpha_ptr, found_inf_ptr, s, C, flags,
    R: tl.constexpr, SPLITS: tl.constexpr, PROJECT_FIRST: tl.constexpr, HAS_FOUND_INF: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row c of G P⁺ (of G P with PROJECT_FIRST); program 0 also leaves u in its place. Where x̄ or G is not finite or found_inf
    is set, G itself and u = 0."""
    c = tl.program_id(0)
    here = c < C  # there is a program even where there is no row
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    row = c.to(tl.int64) * s
    k_row, GP_row = k_ptr, GP_ptr + row
    GP_stride = tl.full((), s, tl.int64) * C
    slot = 0
    if R > 1:
        slot = tl.load(slot_ptr)
        a = tl.zeros([R], dtype)  # U x̄
        b = tl.zeros([R], dtype)  # U g for this row g of G

    xk, xg = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for begin in range(0, s, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + j, mask=j < s, other=0.0).to(dtype)
        xk += x * _split_sum(k_row, s, j, s, SPLITS)
        if here:
            xg += x * _split_sum(GP_row, GP_stride, j, s, SPLITS)
        if R > 1:
            U = _pending_tile(pending_ptr, slot, j, s, R)
            g = tl.load(G_ptr + row + j, mask=j < tl.where(here, s, 0), other=0.0).to(dtype)
            a += tl.sum(U * x[None, :], 1)
            b += tl.sum(U * g[None, :], 1)
    d, gk = tl.sum(xk, 0), tl.sum(xg, 0)
    if R > 1:
        d -= tl.sum(a * a, 0)
        gk -= tl.sum(a * b, 0)

    at = tl.arange(0, FLAGS)
    bad = tl.max(tl.load(bad_ptr + at, mask=at < flags, other=0), 0) != 0
    bad = bad | (d - d != 0)  # so shows a NaN or Inf in x̄
    if HAS_FOUND_INF:
        bad = bad | (tl.load(found_inf_ptr) != 0)
    # P ⪰ 0, so d < 0 is rounding: x̄ is projected away already.
    alpha = tl.load(alpha_ptr)
    bad = bad | ((alpha > 0) == 0)
    wide = tl.where(bad | (d <= 0), 0.0, d).to(tl.float64)
    scale = (1.0 / tl.sqrt(alpha + wide)).to(dtype)
    scale = tl.where(d > 0, scale, 0.0)

    for begin in range(0, s, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        u = _split_sum(k_row, s, j, s, SPLITS)
        if R > 1:
            U = _pending_tile(pending_ptr, slot, j, s, R)
            u -= tl.sum(U * a[:, None], 0)
        u *= scale
        if c == 0:
            tl.store(pending_ptr + slot * s + j, tl.where(bad, 0.0, u), mask=j < s)
        if here:
            projected = _split_sum(GP_row, GP_stride, j, s, SPLITS)
            if R > 1:
                projected -= tl.sum(U * b[:, None], 0)
            if not PROJECT_FIRST:
                projected -= (gk * scale) * u
            g = tl.load(G_ptr + row + j, mask=j < tl.where(bad, s, 0), other=0.0).to(dtype)
            tl.store(out_ptr + row + j, tl.where(bad, g, projected).to(out_ptr.dtype.element_ty), mask=j < s)
    if R > 1:
        if c == 0:
            tl.store(slot_ptr + 1, slot + 1)


class _Step(NamedTuple):
    """The launches of a step and what they need to know of the sizes."""

    read: Launch
    read_grid: tuple[int, int, int]
    split_rows: int
    work: tuple[int, int]  # numbers in k and in G P
    flags: int
    finish: Launch
    folds_on_the_way: bool


@remembered
def _step(s, C, R, waits, project_first, kinds, device):
    """kinds: the dtypes of P, x̄, G, α and found_inf."""
    config, split_rows, splits = rls_read_config(s, C, kinds[0].itemsize)
    c_blocks = max(triton.cdiv(C, config["BLOCK_C"]), 1)
    folds_on_the_way, flags = waits and R == 1 and c_blocks == 1, splits * c_blocks
    read = Launch(rls_read_kernel, FOLD=folds_on_the_way, PRECISION=dot_precision(kinds[0]), **config)
    finish = Launch(
        rls_finish_kernel, R=R, SPLITS=splits, PROJECT_FIRST=project_first, HAS_FOUND_INF=kinds[-1] is not None,
        FLAGS=triton.next_power_of_2(flags), **rls_finish_config(s, R),
    )  # fmt: skip
    grid = triton.cdiv(s, config["BLOCK_COLS"]), splits, c_blocks
    work = triton.cdiv(splits * s, 4) * 4, splits * C * s  # G P begins at a multiple of 16 bytes
    return _Step(read, grid, split_rows, work, flags, finish, folds_on_the_way)


def rls_project_(P, x_bar, grad, alpha, pending=None, slot=None, found_inf=None, project_first=False):
    """One step on tensors of one device; the operator's contract is that of ``mla_fast.rls_project_``.

    P [s, s] float32 or float64, contiguous; x_bar [s] and grad [C, s] of any floating dtype, computed in P's; alpha 0-d float64;
    pending [R, s] in P's dtype, slot int32 [2] (zeros to begin with; needed for R > 1); found_inf float32 [1].
    Returns [C, s] in grad's dtype. Without `pending` the step's u enters P before this returns, by one more launch.
    """
    s, C = P.shape[0], grad.shape[0]
    if not (P.is_contiguous() and P.shape == (s, s) and x_bar.shape == (s,) and grad.shape == (C, s)):
        got = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (P, x_bar, grad))
        raise ValueError(f"rls_project_: expected contiguous P [s, s], x_bar [s] and grad [C, s], got {got}")
    _check_pending(P, pending, slot)
    if P.dtype == torch.float64 and grad.dtype.itemsize == 2:  # a product that Triton 3.6 cannot compile
        return rls_project_(P, x_bar, grad.double(), alpha, pending, slot, found_inf, project_first).to(grad.dtype)
    x_bar, grad = x_bar.contiguous(), grad.contiguous()
    out = torch.empty_like(grad)
    if s == 0:
        return out
    waits = pending is not None
    if not waits:
        pending, slot = torch.zeros(1, s, dtype=P.dtype, device=P.device), None
    kinds = dtypes(P, x_bar, grad, alpha, found_inf)
    step = _step(s, C, pending.shape[0], waits, project_first, kinds, P.get_device())
    if waits and not step.folds_on_the_way:
        _launch_fold(P, pending, slot, full_only=True)
    k, GP = torch.empty(sum(step.work), dtype=P.dtype, device=P.device).split(step.work)
    bad = torch.empty(step.flags, dtype=torch.int32, device=P.device)
    step.read(step.read_grid, P, x_bar, grad, pending, k, GP, bad, s, C, step.split_rows)
    step.finish((max(C, 1), 1, 1), x_bar, grad, out, pending, slot, k, GP, bad, alpha, found_inf, s, C, step.flags)
    if not waits:
        _launch_fold(P, pending, slot, full_only=False)
    return out


def _check_pending(P, pending, slot):
    if pending is None:
        return
    R, s = pending.shape[0], P.shape[0]
    if pending.shape != (R, s) or pending.dtype != P.dtype or not pending.is_contiguous() or R < 1 or R & (R - 1):
        got = f"{pending.dtype} {list(pending.shape)}"
        raise ValueError(f"pending: expected contiguous {P.dtype} [R, {s}], R a power of two, got {got}")
    if R > 1 and (slot is None or slot.shape != (2,) or slot.dtype != torch.int32):
        raise ValueError(f"slot: expected int32 [2] for {R} rows of pending, got {None if slot is None else slot.dtype}")


def rls_fold_(P, pending, slot=None):
    """P ← P − Σ_r u_r u_rᵀ over the waiting rows of pending [R, s], which are none afterwards."""
    _check_pending(P, pending, slot)
    if P.shape[0]:
        _launch_fold(P, pending, slot, full_only=False)
    pending.zero_()
    if slot is not None:
        slot.zero_()


def _launch_fold(P, pending, slot, *, full_only):
    s = P.shape[0]
    fold, grid = _fold(s, pending.shape[0], full_only, P.dtype, P.get_device())
    fold(grid, P, pending, slot, s)


@remembered
def _fold(s, R, full_only, dtype, device):
    config = rls_fold_config(s)
    grid = triton.cdiv(s, config["BLOCK_ROWS"]), triton.cdiv(s, config["BLOCK_COLS"]), 1
    return Launch(rls_fold_kernel, R=R, FULL_ONLY=full_only, **config), grid

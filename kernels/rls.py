"""The RLS step of the head's projection on the GPU (eqs. 3 and 5), in gradient form, with P read once and written at most once:

    k = P x̄        d = x̄ᵀ k        u = k / √(α + d)
    P⁺ = P − u uᵀ                   G P⁺ = G P − (G u) uᵀ

Two launches. ``rls_read_kernel`` streams rows of P, each program a block of them over a share of the columns, and leaves its
share of k and of (G P)ᵀ = P Gᵀ. All else that the step needs is linear in these and leaves the program with them: its share of
d = x̄ᵀ k and of G k = (G P) x̄. So ``rls_finish_kernel`` is a flat grid over G P⁺: each program adds up the few shares that
concern it. It is launched while the reading still runs, and waits for it on the device.

u never enters P at once. It waits in `pending` [R, s], and the true P is P − Σ_r u_r u_rᵀ:

- lazy, R = 1: the next step's reading folds u into each tile of P on its way through, so a step reads and writes P once;
- deferred, R > 1: a step only reads P, and corrects k and G P for the waiting rows with a = U x̄ and b = U Gᵀ:
  k −= Uᵀ a, d −= |a|², G P −= b U, (G P) x̄ −= b a. Every R-th reading folds all of them and writes P.

How many rows wait is known to the device alone (`slot`), so the same launches replay in a CUDA graph.

A head of few classes is computed in plain multiplications, with x̄ as one more row of G; tensor cores would mostly multiply
padding. Measured on an H200 in a graph, s = 4096: C = 6 takes 44 µs so, and 52 on tensor cores, for which it is 16; C = 15 so 73.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import (
    Launch,
    dtypes,
    hopper,
    padded,
    remembered,
    rls_finish_config,
    rls_fold_config,
    rls_read_config,
    splits_tf32,
)


@triton.jit
def rls_fold_kernel(
    P_ptr, pending_ptr, slot_ptr, s, columns, stride,
    R: tl.constexpr, FULL_ONLY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """P ← P − Σ_r u_r u_rᵀ over the waiting rows, or with FULL_ONLY only once the last place is taken. Each program goes over
    every so many tiles, so that a step on which nothing is due starts few programs.

    Also says where the step's u goes: slot[0] is written here and read by the finishing kernel, slot[1] the reverse, so that
    no program reads what another of the same launch writes.
    """
    waiting = 1
    if R > 1:
        filled = tl.load(slot_ptr + 1)
        waiting = tl.where(filled == R, R, 0) if FULL_ONLY else filled
        if tl.program_id(0) == 0:
            tl.store(slot_ptr, tl.where(waiting > 0, 0, filled))
    across = tl.cdiv(s, BLOCK_COLS)
    tiles = tl.where(waiting > 0, tl.cdiv(s, BLOCK_ROWS) * across, 0)
    for at in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = at // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        j = at % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        tile = P_ptr + i.to(tl.int64)[:, None] * stride + j[None, :]
        inside = (i < s)[:, None] & (j < columns)[None, :]
        p = tl.load(tile, mask=inside, other=0.0)
        # Rows and columns get the same products in the same order: P stays symmetric to the last bit.
        for r in range(waiting):
            u = pending_ptr + r * s
            p -= tl.load(u + i, mask=i < s, other=0.0)[:, None] * tl.load(u + j, mask=j < s, other=0.0)[None, :]
        tl.store(tile, p, mask=inside)


@triton.jit
def _split_tf32(x):
    """x as the nearest number that TF32 has, and what that leaves of it.

    Cutting the 13 bits off instead would leave one bit more than TF32 keeps of the rest: a relative error of G P of 3.9e-7 (on an
    H200; 3.7e-7 emulated), where rounding comes to 0.8e-7 (emulated).
    """
    big = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return big, x - big


@triton.jit
def _add_product(GP, p, g, TF32X3: tl.constexpr):
    """GP [J, C] + p gᵀ of p [J, I] and g [C, I]. TF32X3: three products on tensor cores carry float32's accuracy; the block's sum
    is added outside of them, whose own long sums would truncate."""
    dtype: tl.constexpr = p.dtype
    if TF32X3:
        p_big, p_small = _split_tf32(p)
        if g.dtype == tl.float32:
            g_big, g_small = _split_tf32(g)
            block = tl.dot(p_big, g_small.T, input_precision="tf32")
            block = tl.dot(p_small, g_big.T, block, input_precision="tf32")
        else:  # a half-precision number is one that TF32 has
            g_big = g.to(tl.float32)
            block = tl.dot(p_small, g_big.T, input_precision="tf32")
        GP += tl.dot(p_big, g_big.T, block, input_precision="tf32")
    else:
        GP = tl.dot(p, g.to(dtype).T, GP, input_precision="ieee", out_dtype=dtype)
    return GP


@triton.jit
def _sweep(
    P_ptr, x_ptr, G_ptr, pending_ptr, j, c, begin, end, P_end, s, stride, C,
    FOLD: tl.constexpr, FEW: tl.constexpr, TF32X3: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(k [J], (G P)ᵀ [J, C]) of rows j of P, summed over columns begin … end. FOLD: that many waiting rows enter P on the way.

    k decides P's accuracy and stays out of the tensor cores. FEW: C < BLOCK_C, and x̄ stands in row C of G. P_end is end, or where
    zeros that pad P's rows end: a bound that is no multiple of 16 would have numbers loaded one by one.
    """
    dtype: tl.constexpr = P_ptr.dtype.element_ty
    if FEW:
        both = tl.zeros([BLOCK_C, BLOCK_J, BLOCK_I], dtype)
    else:
        xP = tl.zeros([BLOCK_J, BLOCK_I], dtype)
        GP = tl.zeros([BLOCK_J, BLOCK_C], dtype)
    rows = P_ptr + j.to(tl.int64)[:, None] * stride
    for first in tl.range(begin, end, BLOCK_I, num_stages=STAGES):
        i = first + tl.arange(0, BLOCK_I)
        tile, inside = rows + i[None, :], (j < s)[:, None] & (i < P_end)[None, :]
        p = tl.load(tile, mask=inside, other=0.0)
        if FOLD > 0:
            for r in tl.static_range(FOLD):
                u = pending_ptr + r * s
                p -= tl.load(u + j, mask=j < s, other=0.0)[:, None] * tl.load(u + i, mask=i < end, other=0.0)[None, :]
            tl.store(tile, p, mask=inside)
        x = tl.load(x_ptr + i, mask=i < end, other=0.0).to(dtype)
        g_tile = G_ptr + c.to(tl.int64)[:, None] * s + i[None, :]
        g = tl.load(g_tile, mask=(c < C)[:, None] & (i < end)[None, :], other=0.0)
        if FEW:
            both += tl.where((c == C)[:, None], x[None, :], g.to(dtype))[:, None, :] * p[None, :, :]
        else:
            xP += p * x[None, :]
            GP = _add_product(GP, p, g, TF32X3)
    if FEW:
        sums = tl.sum(both, 2)
        k = tl.sum(tl.where((c == C)[:, None], sums, 0.0), 0)
        GP = sums.T
    else:
        k = tl.sum(xP, 1)
    return k, GP


@triton.jit
def _work(work_ptr, s, C, blocks, splits, R: tl.constexpr):
    """Where the shares lie in `work`: (G P [splits, C, s], k [splits, s], G k [C, parts], b [C, R, blocks], d [parts],
    a [R, blocks], whether G is finite [splits, blocks of C]); a part is one program of the reading, blocks those of j."""
    parts = splits * blocks
    k_ptr = work_ptr + tl.full((), s, tl.int64) * splits * C
    Gk_ptr = k_ptr + splits * s
    b_ptr = Gk_ptr + C * parts
    d_ptr = b_ptr + C * R * blocks
    a_ptr = d_ptr + parts
    return work_ptr, k_ptr, Gk_ptr, b_ptr, d_ptr, a_ptr, a_ptr + R * blocks


@triton.jit
def rls_read_kernel(
    P_ptr, x_ptr, G_ptr, pending_ptr, slot_ptr, work_ptr, s, columns, stride, C, split_cols,
    R: tl.constexpr, FOLDS: tl.constexpr, FEW: tl.constexpr, TF32X3: tl.constexpr, DEPENDENT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of rows of P over `split_cols` columns: grid (blocks of rows, splits, blocks of C). FOLDS: there is one block of C,
    so nobody else reads the tiles, and what is due enters P on the way."""
    if DEPENDENT:  # the finishing kernel may be launched now, and waits for this one
        tl.extra.cuda.gdc_launch_dependents()
    block, split, c_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks, splits = tl.num_programs(0), tl.num_programs(1)
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = split * split_cols, tl.minimum(s, (split + 1) * split_cols)
    P_end = tl.minimum(columns, (split + 1) * split_cols)
    waiting = 0
    if R > 1:  # a fold that was a launch of its own has said how many are left
        waiting = tl.load(slot_ptr + 1) if FOLDS else tl.load(slot_ptr)
    due = waiting == R
    if FOLDS and R > 1:
        if (block == 0) & (split == 0):
            tl.store(slot_ptr, tl.where(due, 0, waiting))
        if due:
            k, GP = _sweep(
                P_ptr, x_ptr, G_ptr, pending_ptr, j, c, begin, end, P_end, s, stride, C,
                R, FEW, TF32X3, BLOCK_C, BLOCK_J, BLOCK_I, STAGES,
            )  # fmt: skip
            waiting = 0
        else:
            k, GP = _sweep(
                P_ptr, x_ptr, G_ptr, pending_ptr, j, c, begin, end, P_end, s, stride, C,
                0, FEW, TF32X3, BLOCK_C, BLOCK_J, BLOCK_I, STAGES,
            )  # fmt: skip
    else:
        k, GP = _sweep(
            P_ptr, x_ptr, G_ptr, pending_ptr, j, c, begin, end, P_end, s, stride, C,
            1 if FOLDS else 0, FEW, TF32X3, BLOCK_C, BLOCK_J, BLOCK_I, STAGES,
        )  # fmt: skip

    GP_ptr, k_ptr, Gk_ptr, b_ptr, d_ptr, a_ptr, bad_ptr = _work(work_ptr, s, C, blocks, splits, R)
    dtype: tl.constexpr = P_ptr.dtype.element_ty
    part, here = split * blocks + block, (c < C)[:, None] & (j < s)[None, :]
    x = tl.load(x_ptr + j, mask=j < s, other=0.0).to(dtype)
    tl.store(GP_ptr + (split * C + c).to(tl.int64)[:, None] * s + j[None, :], GP.T, mask=here)
    tl.store(Gk_ptr + c * (splits * blocks) + part, tl.sum(x[:, None] * GP, 0), mask=c < C)
    if c_block == 0:
        tl.store(k_ptr + split * s + j, k, mask=j < s)
        tl.store(d_ptr + part, tl.sum(x * k, 0))
    if R > 1:
        if split == 0:
            g = tl.load(G_ptr + c.to(tl.int64)[:, None] * s + j[None, :], mask=here, other=0.0).to(dtype)
            for r in tl.static_range(R):
                u = tl.load(pending_ptr + r * s + j, mask=j < tl.where(r < waiting, s, 0), other=0.0)
                tl.store(b_ptr + (c * R + r) * blocks + block, tl.sum(g * u[None, :], 1), mask=c < C)
                if c_block == 0:
                    tl.store(a_ptr + r * blocks + block, tl.sum(u * x, 0))
    if block == 0:  # a NaN or Inf in a row of G shows in every row of P Gᵀ
        finite = (GP - GP == 0) | (j >= s)[:, None] | (c >= C)[None, :]
        bad = 1 - tl.min(tl.min(finite.to(tl.int32), 1), 0)
        tl.store(bad_ptr + split * tl.num_programs(2) + c_block, bad.to(dtype))


@triton.jit
def _total(ptr, count, PAD: tl.constexpr):
    at = tl.arange(0, PAD)
    return tl.sum(tl.load(ptr + at, mask=at < count, other=0.0), 0)


@triton.jit
def _row_totals(ptr, c, C, stride, count, PAD: tl.constexpr):
    """For each row c of a matrix the sum of its first `count` numbers."""
    at = tl.arange(0, PAD)
    return tl.sum(tl.load(ptr + c[:, None] * stride + at[None, :], mask=(c < C)[:, None] & (at < count)[None, :], other=0.0), 1)


@triton.jit
def _split_sum(ptrs, stride, mask, SPLITS: tl.constexpr):
    total = tl.load(ptrs, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptrs + split * stride, mask=mask, other=0.0)
    return total


@triton.jit
def rls_finish_kernel(
    G_ptr, out_ptr, pending_ptr, slot_ptr, work_ptr, squares_ptr, alpha_ptr, found_inf_ptr, s, C, blocks, flags,
    R: tl.constexpr, SPLITS: tl.constexpr, PROJECT_FIRST: tl.constexpr, HAS_FOUND_INF: tl.constexpr, IN_PLACE: tl.constexpr,
    DEPENDENT: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of G P⁺ (of G P with PROJECT_FIRST) and the sum of its squares; the first programs also leave u in its place.
    Where x̄ or G is not finite or found_inf is set, G itself and u = 0. IN_PLACE: out is G."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    GP_ptr, k_ptr, Gk_ptr, b_ptr, d_ptr, a_ptr, bad_ptr = _work(work_ptr, s, C, blocks, SPLITS, R)
    dtype: tl.constexpr = work_ptr.dtype.element_ty
    at, here = c.to(tl.int64)[:, None] * s + j[None, :], (c < C)[:, None] & (j < s)[None, :]
    u = _split_sum(k_ptr + j, s, j < s, SPLITS)
    projected = _split_sum(GP_ptr + at, tl.full((), s, tl.int64) * C, here, SPLITS)
    d = _total(d_ptr, SPLITS * blocks, PARTS)
    Gk = _row_totals(Gk_ptr, c, C, SPLITS * blocks, SPLITS * blocks, PARTS)
    slot = 0
    if R > 1:
        slot = tl.load(slot_ptr)
        for r in tl.static_range(R):
            a = _total(a_ptr + r * blocks, blocks, BLOCKS)
            b = _row_totals(b_ptr + r * blocks, c, C, R * blocks, blocks, BLOCKS)
            u_r = tl.load(pending_ptr + r * s + j, mask=j < tl.where(r < slot, s, 0), other=0.0)
            d -= a * a
            Gk -= b * a
            u -= a * u_r
            projected -= b[:, None] * u_r[None, :]

    flag = tl.arange(0, FLAGS)
    bad = tl.max(tl.load(bad_ptr + flag, mask=flag < flags, other=0.0), 0) != 0
    bad = bad | (d - d != 0)  # so shows a NaN or Inf in x̄
    if HAS_FOUND_INF:
        bad = bad | (tl.load(found_inf_ptr) != 0)
    # P ⪰ 0, so d < 0 is rounding: x̄ is projected away already.
    alpha = tl.load(alpha_ptr)
    bad = bad | ((alpha > 0) == 0)
    wide = tl.where(bad | (d <= 0), 0.0, d).to(tl.float64)
    scale = (1.0 / tl.sqrt(alpha + wide)).to(dtype)
    scale = tl.where(d > 0, scale, 0.0)
    u *= scale
    if not PROJECT_FIRST:
        projected -= (Gk * scale)[:, None] * u[None, :]
    if tl.program_id(1) == 0:
        tl.store(pending_ptr + slot * s + j, tl.where(bad, 0.0, u), mask=j < s)
        if R > 1:
            if tl.program_id(0) == 0:
                tl.store(slot_ptr + 1, slot + 1)
    unmoved = tl.load(G_ptr + at, mask=(c < tl.where(bad, C, 0))[:, None] & (j < s)[None, :], other=0.0).to(dtype)
    projected = tl.where(bad, unmoved, projected)
    rows = tl.where(bad, 0, C) if IN_PLACE else C
    tl.store(out_ptr + at, projected.to(out_ptr.dtype.element_ty), mask=(c < rows)[:, None] & (j < s)[None, :])
    squares = tl.sum(tl.sum(projected * projected, 1), 0)
    tl.store(squares_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), squares)


class _Step(NamedTuple):
    """The launches of a step and what they need to know of the sizes."""

    read: Launch
    read_grid: tuple[int, int, int]
    split_cols: int
    finish: Launch
    finish_grid: tuple[int, int, int]
    flags: int
    work: int  # numbers that the reading leaves for the finishing
    folds_on_the_way: bool


@remembered
def _step(s, C, R, waits, project_first, in_place, kinds, device):
    """kinds: the dtypes of P, x̄, G, α and found_inf."""
    config, few, split_cols, splits = rls_read_config(s, C, kinds[0].itemsize)
    c_blocks, blocks = max(triton.cdiv(C, config["BLOCK_C"]), 1), triton.cdiv(s, config["BLOCK_J"])
    folds_on_the_way, flags, parts = waits and c_blocks == 1, splits * c_blocks, splits * blocks
    dependent = {"launch_pdl": True} if hopper() else {}
    read = Launch(
        rls_read_kernel, R=R, FOLDS=folds_on_the_way, FEW=few, TF32X3=splits_tf32(kinds[0]), DEPENDENT=bool(dependent), **config
    )
    own = rls_finish_config(s)
    pads = {name: triton.next_power_of_2(n) for name, n in (("BLOCKS", blocks), ("PARTS", parts), ("FLAGS", flags))}
    finish = Launch(
        rls_finish_kernel, R=R, SPLITS=splits, PROJECT_FIRST=project_first, HAS_FOUND_INF=kinds[-1] is not None,
        IN_PLACE=in_place, DEPENDENT=bool(dependent), **pads, **own, **dependent,
    )  # fmt: skip
    grid = triton.cdiv(s, own["BLOCK"]), max(triton.cdiv(C, own["BLOCK_C"]), 1), 1
    work = splits * (C + 1) * s + (C + 1) * (parts + R * blocks) + flags
    return _Step(read, (blocks, splits, c_blocks), split_cols, finish, grid, flags, work, folds_on_the_way)


def rls_project_(P, x_bar, grad, alpha, pending=None, slot=None, found_inf=None, project_first=False):
    """One step on tensors of one device; the operator's contract is that of ``mla_fast.rls_project_``.

    P [s, s] float32 or float64, its rows contiguous, with zeros between them if there is anything; x_bar [s] and grad [C, s] of
    any floating dtype, computed in P's; alpha 0-d float64; pending [R, s] in P's dtype, slot int32 [2] (zeros to begin with;
    needed for R > 1); found_inf float32 [1].
    Returns [C, s] in grad's dtype. Without `pending` the step's u enters P before this returns, by one more launch.
    """
    if P.dtype == torch.float64 and grad.dtype.itemsize == 2:  # a product that Triton 3.6 cannot compile
        return rls_project_(P, x_bar, grad.double(), alpha, pending, slot, found_inf, project_first).to(grad.dtype)
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    _take_step(P, x_bar, grad, out, alpha, pending, slot, found_inf, project_first)
    return out


def rls_step_(P, x_bar, grad, alpha, pending, slot, found_inf=None, project_first=False):
    """The same with G P⁺ in grad's place, which stays as it is on a step that moves nothing. Returns partial sums [n], in P's
    dtype, of the squares of what grad holds then."""
    if not grad.is_contiguous() or (P.dtype == torch.float64 and grad.dtype.itemsize == 2):
        projected = rls_project_(P, x_bar, grad, alpha, pending, slot, found_inf, project_first)
        grad.copy_(projected)
        return projected.to(P.dtype).square().sum(1)
    return _take_step(P, x_bar, grad, grad, alpha, pending, slot, found_inf, project_first)


def _take_step(P, x_bar, grad, out, alpha, pending, slot, found_inf, project_first):
    """Launches the step; returns the partial sums of squares of `out`."""
    s, C = P.shape[0], grad.shape[0]
    if not (P.stride(1) == 1 and P.shape == (s, s) and x_bar.shape == (s,) and grad.shape == (C, s)):
        got = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (P, x_bar, grad))
        raise ValueError(f"rls_project_: expected P [s, s] with contiguous rows, x_bar [s] and grad [C, s], got {got}")
    _check_pending(P, pending, slot)
    if s == 0:
        return P.new_zeros(0)
    waits = pending is not None
    if not waits:
        pending, slot = torch.zeros(1, s, dtype=P.dtype, device=P.device), None
    kinds = dtypes(P, x_bar, grad, alpha, found_inf)
    step = _step(s, C, pending.shape[0], waits, project_first, out is grad, kinds, P.get_device())
    if waits and not step.folds_on_the_way:
        _launch_fold(P, pending, slot, full_only=True)
    blocks, *_ = step.read_grid
    columns, rows, _ = step.finish_grid
    work, squares = P.new_empty(step.work), P.new_empty(columns * rows)
    step.read(step.read_grid, P, x_bar.contiguous(), grad, pending, slot, work, s, _columns(P), P.stride(0), C, step.split_cols)
    step.finish(step.finish_grid, grad, out, pending, slot, work, squares, alpha, found_inf, s, C, blocks, step.flags)
    if not waits:
        _launch_fold(P, pending, slot, full_only=False)
    return squares


def _columns(P):
    """How far P's rows may be read and written: up to a multiple of 16 where they are padded that far."""
    s = P.shape[0]
    return padded(s) if P.stride(0) >= padded(s) else s


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
    fold(grid, P, pending, slot, s, _columns(P), P.stride(0))


@remembered
def _fold(s, R, full_only, dtype, device):
    config, programs = rls_fold_config(s)
    return Launch(rls_fold_kernel, R=R, FULL_ONLY=full_only, **config), (programs, 1, 1)

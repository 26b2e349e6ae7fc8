"""The kernels of ``rls.py``, which has the mathematics and launches them."""

import triton
import triton.language as tl


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

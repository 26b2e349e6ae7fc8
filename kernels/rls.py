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
from .rls_kernels import rls_finish_kernel, rls_fold_kernel, rls_read_kernel


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

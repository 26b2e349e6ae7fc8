"""The two passes of a softmax's cross-entropy over long rows of logits z [n, C], which stay where they are.

    top = max z        log_S = log Σ_c exp(z_c − top)        z_y        Σ_c w_c z_c        one reading of each row
    z_c ← spread exp(z_c − top − log_S) − rest w_c − own [c = y]                            one reading, one writing

A label that is not among these C has no z_y, and 0 stands for it.
"""

import torch
import triton
import triton.language as tl

from .launch import Launch, dtypes, remembered, softmax_config


@triton.jit
def softmax_sums_kernel(z_ptr, stride, target_ptr, weight_ptr, sums_ptr, N, C, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """A program has one row. sums: top, log_S, z_y and Σ w z of all rows, [4, N]."""
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    n = tl.program_id(0)
    row = z_ptr + n.to(tl.int64) * stride
    top, S, weighted = tl.full([], -float("inf"), dtype), tl.zeros([], dtype), tl.zeros([], dtype)
    for begin in range(0, C, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        z = tl.load(row + c, mask=c < C, other=-float("inf")).to(dtype)
        new = tl.maximum(top, tl.max(z, 0))  # whatever becomes of a NaN here, S is NaN
        base = tl.where(new == -float("inf"), 0.0, new)  # of nothing but −inf so far
        S = S * tl.exp(top - base) + tl.sum(tl.exp(z - base), 0)
        top = new
        if WEIGHTED:
            w = 1.0 if weight_ptr is None else tl.load(weight_ptr + c, mask=c < C, other=0.0).to(dtype)
            weighted += tl.sum(tl.where(c < C, w * z, 0.0), 0)
    y = tl.load(target_ptr + n)
    z_y = tl.load(row + y, mask=(y >= 0) & (y < C), other=0.0).to(dtype)
    tl.store(sums_ptr + n, top)
    tl.store(sums_ptr + N + n, tl.log(S))
    tl.store(sums_ptr + 2 * N + n, z_y)
    tl.store(sums_ptr + 3 * N + n, weighted)


@triton.jit
def softmax_delta_kernel(
    z_ptr,
    stride,
    target_ptr,
    weight_ptr,
    top_ptr,
    log_S_ptr,
    own_ptr,
    spread_ptr,
    rest_ptr,
    C,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has a block of one row."""
    dtype: tl.constexpr = top_ptr.dtype.element_ty
    n, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = z_ptr + n.to(tl.int64) * stride
    t = tl.load(row + c, mask=c < C, other=-float("inf")).to(dtype) - tl.load(top_ptr + n)
    p = tl.exp(t - tl.load(log_S_ptr + n))
    delta = tl.load(spread_ptr + n) * p
    if SMOOTHED:
        w = 1.0 if weight_ptr is None else tl.load(weight_ptr + c, mask=c < C, other=0.0).to(dtype)
        delta -= tl.load(rest_ptr + n) * w
    delta -= tl.where(c == tl.load(target_ptr + n), tl.load(own_ptr + n), 0.0)
    tl.store(row + c, delta.to(z_ptr.dtype.element_ty), mask=c < C)


def softmax_sums(z, target, class_weight, weighted):
    """[4, n]: top, log_S, z_y and, if weighted, Σ w z (w = 1 without class_weight [C]); in float32, of float64 in float64."""
    N, C = z.shape
    sums = z.new_empty(4, N, dtype=torch.promote_types(z.dtype, torch.float32))
    if N:
        launch = _sums(C, weighted, dtypes(z, class_weight), z.get_device())
        launch((N, 1, 1), z, z.stride(0), target, class_weight, sums, N, C)
    return sums


def softmax_delta_(z, target, top, log_S, own, spread, rest, class_weight, smoothed):
    """z [n, C] becomes δ; top, log_S, own, spread and rest are [n], of the dtype of softmax_sums."""
    N, C = z.shape
    if N:
        launch = _delta(C, smoothed, dtypes(z, class_weight), z.get_device())
        blocks = triton.cdiv(C, launch.constants["BLOCK"])
        launch((N, blocks, 1), z, z.stride(0), target, class_weight, top, log_S, own, spread, rest, C)


@remembered
def _sums(C, weighted, kinds, device):
    return Launch(softmax_sums_kernel, WEIGHTED=weighted, **softmax_config("softmax_sums", C))


@remembered
def _delta(C, smoothed, kinds, device):
    return Launch(softmax_delta_kernel, SMOOTHED=smoothed, **softmax_config("softmax_delta_", C))

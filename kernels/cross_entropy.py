"""The head's loss and its gradients on the GPU (eq. 2). Between the products with W and H there is one launch:

    loss_n = (log Σ_c exp z_nc − z_ny) / total        δ_n = (softmax z_n − onehot y_n) / total

in place of the eight by which log_softmax, nll_loss and their backward passes come to the same.
"""

import torch
import triton
import triton.language as tl

from .launch import Launch, alignment, cross_entropy_config, remembered


@triton.jit(do_not_specialize=["N"])
def short_cross_entropy_kernel(
    z_ptr, target_ptr, loss_ptr, N, total, C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``cross_entropy_kernel`` on rows that stay in registers, BLOCK_N to a program: read once, written once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK)[None, :]
    ptrs = tl.multiple_of(z_ptr + n[:, None].to(tl.int64) * C + c, (1, ALIGN))
    inside = (n < N)[:, None] & (c < C)
    z = tl.load(ptrs, mask=inside, other=-float("inf"))
    y = tl.load(target_ptr + n, mask=n < N, other=0)
    at_y = c == y[:, None]
    top = tl.max(z, 1)
    p = tl.exp(z - top[:, None])
    S, z_y = tl.sum(p, 1), tl.sum(tl.where(at_y, z, 0.0), 1)
    share = tl.where((y >= 0) & (y < C), 1.0 / total, float("nan"))
    tl.store(loss_ptr + n, (tl.log(S) + (top - z_y)) * share, mask=n < N)
    tl.store(ptrs, (p / S[:, None] - tl.where(at_y, 1.0, 0.0)) * share[:, None], mask=inside)


@triton.jit
def cross_entropy_kernel(z_ptr, target_ptr, loss_ptr, C, total, BLOCK: tl.constexpr):
    """One program for each row n: of logits [N, C] becomes δ, and loss [N] is written. NaN where no class has the label."""
    n = tl.program_id(0)
    row = z_ptr + n.to(tl.int64) * C
    y = tl.load(target_ptr + n)
    tops, at_y = tl.full([BLOCK], -float("inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, C, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        z = tl.load(row + c, mask=c < C, other=-float("inf"))
        tops = tl.maximum(tops, z)
        at_y += tl.where(c == y, z, 0.0)
    top, z_y = tl.max(tops, 0), tl.sum(at_y, 0)
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, C, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        sums += tl.exp(tl.load(row + c, mask=c < C, other=-float("inf")) - top)
    S = tl.sum(sums, 0)
    share = tl.where((y >= 0) & (y < C), 1.0 / total, float("nan"))
    tl.store(loss_ptr + n, (tl.log(S) + (top - z_y)) * share)
    for begin in range(0, C, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(row + c, mask=c < C, other=-float("inf")) - top) / S
        tl.store(row + c, (p - tl.where(c == y, 1.0, 0.0)) * share, mask=c < C)


def linear_cross_entropy(features, target, weight, bias, total):
    """(loss, ∂L/∂features, ∂L/∂weight, ∂L/∂bias, x̄, [‖∂L/∂weight‖, ‖x̄‖, ‖∂L/∂bias‖]) of features [N, s], target int64 [N],
    weight [C, s] and bias [C] or None, all float32; the loss is these rows' share of a mean over `total`."""
    if not (features.dtype == weight.dtype == torch.float32 and target.dtype == torch.int64):
        got = f"{features.dtype}, {weight.dtype} and {target.dtype}"
        raise ValueError(f"linear_cross_entropy: expected features and weight float32 and target int64, got {got}")
    delta = torch.nn.functional.linear(features, weight, bias)
    N, C = delta.shape
    losses = features.new_empty(N)
    if N:
        launch, BLOCK_N = _to_delta(C, alignment(C, delta), delta.get_device())
        sizes = (N, float(total)) if BLOCK_N else (C, float(total))
        launch((triton.cdiv(N, max(BLOCK_N, 1)), 1, 1), delta, target.contiguous(), losses, *sizes)
    grad, grad_bias, x_bar = delta.T @ features, delta.sum(0), features.mean(0)
    norms = torch.stack(torch._foreach_norm([grad, x_bar, grad_bias]))
    return losses.sum(), delta @ weight, grad, grad_bias, x_bar, norms


@remembered
def _to_delta(C, align, device):
    """(the launch, rows to a program or 0: one, in blocks)."""
    config, BLOCK_N = cross_entropy_config(C)
    if BLOCK_N:
        return Launch(short_cross_entropy_kernel, C=C, ALIGN=align, BLOCK_N=BLOCK_N, **config), BLOCK_N
    return Launch(cross_entropy_kernel, **config), 0

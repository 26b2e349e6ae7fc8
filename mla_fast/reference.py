"""The mathematics of MLA in plain torch: one short function per equation, any floating dtype, any device.

This is the oracle: every fast path is tested against it in float64, and the benchmarks race against it. Shapes throughout:
N samples, s features, C classes, M modalities; features H [N, s], head weight W [C, s], its gradient G = ∂L/∂W [C, s],
x̄ [s] the mean of the rows of H, P [s, s] symmetric with P_0 = I. Equation numbers are those of Zhang, Yoon, Bansal and Yao,
"Multimodal Representation Learning by Alternating Unimodal Adaptation", CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def modality_at(step: int, modalities: Sequence[str]) -> str:
    """Eq. 1: m_t = t mod M."""
    return modalities[step % len(modalities)]


def unimodal_loss(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Eq. 2: mean cross-entropy of the shared head on one modality's features [N, s], target [N]."""
    return F.cross_entropy(F.linear(features, weight, bias), target)


def feature_mean(features: Tensor) -> Tensor:
    """x̄ [s]: the mean over all rows of features [..., s]."""
    return features.flatten(0, -2).mean(0)


def with_constant(x_bar: Tensor) -> Tensor:
    """x̄ with a constant 1 appended [s + 1]: a bias is a column of W whose feature is always 1."""
    return torch.cat([x_bar, x_bar.new_ones(1)])


def rls_gain(P: Tensor, x_bar: Tensor, alpha: float | Tensor) -> Tensor:
    """u = k / √(α + x̄ᵀk) with k = P x̄ (eq. 5), so that P⁺ = P − u uᵀ. [s]

    P ⪰ 0, so x̄ᵀk < 0 is rounding: x̄ is projected away already, and u is 0.
    """
    k = P @ x_bar
    d = x_bar @ k
    return torch.where(d <= 0, 0, k / (alpha + d).sqrt())


def rls_update(P: Tensor, x_bar: Tensor, alpha: float | Tensor) -> Tensor:
    """Eq. 5: P⁺ = P − k kᵀ / (α + x̄ᵀ k). Symmetric to the last bit if P is."""
    u = rls_gain(P, x_bar, alpha)
    return P - torch.outer(u, u)


def rls_closed_form(x_bars: Tensor, alpha: float) -> Tensor:
    """What the recursion of eq. 5 arrives at after the rows of x_bars [T, s]: (I + XᵀX / α)⁻¹."""
    eye = torch.eye(x_bars.shape[1], dtype=x_bars.dtype, device=x_bars.device)
    return torch.linalg.inv(eye + x_bars.T @ x_bars / alpha)


def project(grad: Tensor, P: Tensor) -> Tensor:
    """Eq. 3, the head stored [C, s]: the gradient that the optimizer sees is G P."""
    return grad @ P


def rls_project(
    P: Tensor, x_bar: Tensor, grad: Tensor, alpha: float | Tensor, *, project_first: bool = False
) -> tuple[Tensor, Tensor]:
    """One step of the head's projection: (P⁺, G P⁺), or (P⁺, G P) with ``project_first``."""
    updated = rls_update(P, x_bar, alpha)
    return updated, project(grad, P if project_first else updated)


def window_projection(others: Tensor, alpha: float | Tensor) -> Tensor:
    """P [s, s] from the latest x̄ of every *other* modality, others [M − 1, s]: eq. 5 started anew from I at each step."""
    P = torch.eye(others.shape[1], dtype=others.dtype, device=others.device)
    for x_bar in others:
        P = rls_update(P, x_bar, alpha)
    return P


def algorithm_1(weight: Tensor, steps: Iterable[tuple[Tensor, Tensor]], lr: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 for a head without bias on given features: plain SGD over steps of (features [N, s], target [N]).

    The step t = 0 is neither projected nor enters P. Returns (W, P) after the last step.
    """
    P = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    for t, (features, target) in enumerate(steps):
        weight = weight.detach().requires_grad_()
        (grad,) = torch.autograd.grad(unimodal_loss(features, weight, None, target), weight)
        if t > 0:
            P, grad = rls_project(P, feature_mean(features), grad, alpha)
        weight = weight - lr * grad
    return weight.detach(), P


def entropy(logits: Tensor) -> Tensor:
    """Eq. 7: e = −Σ p log p over the last dimension, p = softmax(logits). [..., C] → [...]"""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def fusion_weights(entropies: Tensor, present: Tensor | None = None) -> Tensor:
    """Eq. 8: λ_m = exp(max e − e_m) / Σ exp(max e − e_v) over the present modalities. [N, M] → [N, M], zeros where absent.

    The maximum cancels: λ = softmax(−e).
    """
    if present is None:
        return (-entropies).softmax(-1)
    weights = (-entropies).masked_fill(~present, -torch.inf).softmax(-1)
    return weights.masked_fill(~present, 0)  # a row with nothing present is NaN until here


def fuse(logits: Tensor, weights: Tensor) -> Tensor:
    """Eq. 6: Σ_m λ_m z_m. logits [M, N, C], weights [N, M] → [N, C]"""
    return torch.einsum("nm,mnc->nc", weights, logits)


def entropy_fusion(logits: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. 6–8: logits [M, N, C], present bool [N, M] → (fused [N, C], weights [N, M], entropies [N, M]).

    What an absent modality's logits hold does not matter, NaN included; its weight and entropy are 0. A sample with nothing
    present gets zeros throughout.
    """
    if present is not None:
        logits = torch.where(present.T[..., None], logits, 0)
    entropies = entropy(logits).T
    if present is not None:
        entropies = entropies.masked_fill(~present, 0)
    weights = fusion_weights(entropies, present)
    return fuse(logits, weights), weights, entropies


def dispatch_plan(present: Tensor, padded: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the rows of each modality go when only those that are present are kept, modality by modality.

    present bool [N, M] → rows [N M], the sample of each packed row, −1 where none is; offsets [M + 1], where each modality's
    rows begin; counts [M]; slot [N, M], the packed row of each (sample, modality), −1 where absent. Padded: every modality has
    room for N rows.
    """
    N, M = present.shape
    counts = present.sum(0)
    rooms = torch.full_like(counts, N) if padded else counts
    offsets = torch.cat([counts.new_zeros(1), rooms.cumsum(0)])
    slot = torch.where(present, present.cumsum(0) - 1 + offsets[:-1], -1)
    return packed_rows(slot, N * M), offsets, counts, slot


def packed_rows(slot: Tensor, K: int) -> Tensor:
    """The sample of each packed row [K], −1 where no slot [N, M] names it."""
    rows = slot.new_full((K + 1,), -1)
    samples = torch.arange(slot.shape[0], device=slot.device)[:, None].expand_as(slot)
    return rows.scatter_(0, torch.where(slot < 0, K, slot).flatten(), samples.flatten())[:K]


def _rows_or_zeros(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], zeros where rows is −1; x may have no rows then."""
    zeros = x.new_zeros(1, *x.shape[1:])
    return torch.cat([zeros, x])[rows + 1]


def pack_rows(inputs: Sequence[Tensor], rows: Tensor, offsets: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The rows of each modality [N, …] that are present: [sizes[m], …]."""
    begins = offsets.tolist()
    return [_rows_or_zeros(x, rows[b : b + n]) for x, b, n in zip(inputs, begins, sizes, strict=False)]


def unpack_rows(packed: Sequence[Tensor], slot: Tensor, offsets: Tensor) -> list[Tensor]:
    """Packed rows back at their samples, zeros where there are none: [N, …] each."""
    return [_rows_or_zeros(x, torch.where(k < 0, -1, k - begin)) for x, k, begin in zip(packed, slot.T, offsets, strict=False)]


def segment_mean(features: Tensor, offsets: Tensor, counts: Tensor | None = None) -> Tensor:
    """x̄ of each modality's packed rows: features [K, s] → [M, s], zeros where there are none."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    begins = offsets.tolist()
    ends = begins[1:] if counts is None else (offsets[:-1] + counts).tolist()
    return torch.stack([wide[b:e].sum(0) / max(e - b, 1) for b, e in zip(begins, ends, strict=False)])


def official_alpha(batch: int, batches: int) -> float:
    """α = 0.1^(1 + i/L) for batch i of the L in an epoch."""
    return 0.1 ** (1 + batch / batches)


def official_update(P: Tensor, x_bar: Tensor, alpha: float) -> Tensor:
    """P ← P − (k kᵀ) / (α + k x̄ᵀ), divided *element by element* by an s × s matrix, then P ← P / ‖P‖_F.

    The paper divides by the scalar α + x̄ᵀk. P loses its symmetry here.
    """
    k = P @ x_bar
    P = P - torch.outer(k, k) / (alpha + torch.outer(k, x_bar))
    return P / P.norm()


def official_project(grad: Tensor, P: Tensor) -> Tensor:
    """G Pᵀ, which differs from eq. 3 once P is not symmetric."""
    return grad @ P.T


def official_fusion(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the *batch* and one scalar entropy per modality per batch: logits [M, N, C] → (fused [N, C], weights [M]).

    A prediction depends on its neighbours in the batch; with eqs. 6–8 it does not.
    """
    p = logits.softmax(1)
    entropies = torch.special.entr(p).sum(-1).mean(-1)
    weights = (-entropies).softmax(0)
    return torch.einsum("m,mnc->nc", weights, logits), weights

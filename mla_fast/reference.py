"""The mathematics of MLA in plain torch: one short function per equation, any floating dtype, any device.

Every fast path is tested against these functions in float64, and the benchmarks compare with them. Shapes throughout:
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
    """Return the modality of training step `step`, m_t = t mod M (eq. 1)."""
    return modalities[step % len(modalities)]


def unimodal_loss(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Return the mean cross-entropy of the shared head on one modality's features [N, s], target [N] (eq. 2)."""
    return F.cross_entropy(F.linear(features, weight, bias), target)


def linear_cross_entropy(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, total: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, ∂L/∂H, G, ∂L/∂b, x̄) of these rows' share of a mean over `total` rows (eq. 2).

    δ = (softmax(H Wᵀ + b) − onehot(y)) / total;   ∂L/∂H = δ W,   G = δᵀ H,   ∂L/∂b = Σ_n δ_n
    """
    log_p = F.linear(features, weight, bias).log_softmax(1)
    loss = F.nll_loss(log_p, target, reduction="sum") / total
    delta = log_p.exp_().scatter_add_(1, target[:, None], log_p.new_full((len(target), 1), -1.0)).div_(total)
    return loss, delta @ weight, delta.T @ features, delta.sum(0), feature_mean(features)


def feature_mean(features: Tensor) -> Tensor:
    """Return x̄ [s], the mean over all rows of features [..., s]."""
    return features.flatten(0, -2).mean(0)


def with_constant(x_bar: Tensor) -> Tensor:
    """Append a constant 1 to x̄ [s] → [s + 1]: a bias is a column of W whose feature is always 1."""
    return torch.cat([x_bar, x_bar.new_ones(1)])


def rls_gain(P: Tensor, x_bar: Tensor, alpha: float | Tensor) -> Tensor:
    """Return u [s] = k / √(α + x̄ᵀk) with k = P x̄, so that eq. 5 is P⁺ = P − u uᵀ.

    P ⪰ 0, so x̄ᵀk < 0 can only be rounding: P maps x̄ to 0 already, and u = 0.
    """
    k = P @ x_bar
    d = x_bar @ k
    return torch.where(d <= 0, 0, k / (alpha + d).sqrt())


def rls_update(P: Tensor, x_bar: Tensor, alpha: float | Tensor) -> Tensor:
    """Return P⁺ = P − k kᵀ / (α + x̄ᵀ k) with k = P x̄ (eq. 5), which is exactly symmetric if P is."""
    u = rls_gain(P, x_bar, alpha)
    return P - torch.outer(u, u)


def rls_closed_form(x_bars: Tensor, alpha: float) -> Tensor:
    """Return (I + XᵀX / α)⁻¹, which is P after the recursion of eq. 5 over the rows of X = x_bars [T, s]."""
    eye = torch.eye(x_bars.shape[1], dtype=x_bars.dtype, device=x_bars.device)
    P: Tensor = torch.linalg.inv(eye + x_bars.T @ x_bars / alpha)
    return P


def project(grad: Tensor, P: Tensor) -> Tensor:
    """Return G P, the gradient that the optimizer sees, for a head stored as [C, s] (eq. 3)."""
    return grad @ P


def rls_project(
    P: Tensor, x_bar: Tensor, grad: Tensor, alpha: float | Tensor, *, project_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Update P by eq. 5 and project by eq. 3: return (P⁺, G P⁺), or (P⁺, G P) with ``project_first``."""
    updated = rls_update(P, x_bar, alpha)
    return updated, project(grad, P if project_first else updated)


def window_projection(others: Tensor, alpha: float | Tensor) -> Tensor:
    """Return P [s, s] from the latest x̄ of every *other* modality, others [M − 1, s], by eq. 5 started from I."""
    P = torch.eye(others.shape[1], dtype=others.dtype, device=others.device)
    for x_bar in others:
        P = rls_update(P, x_bar, alpha)
    return P


def algorithm_1(weight: Tensor, steps: Iterable[tuple[Tensor, Tensor]], lr: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Train a head without bias by algorithm 1 and plain SGD on steps of (features [N, s], target [N]); return the last (W, P).

    The first step, t = 0, is not projected and does not enter P.
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
    """Return e = −Σ p log p over the last dimension, p = softmax(logits), [..., C] → [...] (eq. 7)."""
    e: Tensor = torch.special.entr(logits.softmax(-1)).sum(-1)
    return e


def fusion_weights(entropies: Tensor, present: Tensor | None = None) -> Tensor:
    """Return λ_m = exp(max e − e_m) / Σ exp(max e − e_v) over the present modalities, [N, M] → [N, M], 0 where absent (eq. 8).

    The maximum cancels: λ = softmax(−e).
    """
    if present is None:
        return (-entropies).softmax(-1)
    weights = (-entropies).masked_fill(~present, -torch.inf).softmax(-1)
    return weights.masked_fill(~present, 0)  # a row with nothing present is NaN until here


def fuse(logits: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_m λ_m z_m, logits [M, N, C], weights [N, M] → [N, C] (eq. 6)."""
    return torch.einsum("nm,mnc->nc", weights, logits)


def entropy_fusion(logits: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse logits [M, N, C] with present bool [N, M]: return (fused [N, C], weights [N, M], entropies [N, M]) (eqs. 6–8).

    The logits of an absent modality may be anything, NaN included; its weight and entropy are 0. All results are 0 for a sample
    without any modality.
    """
    if present is not None:
        logits = torch.where(present.T[..., None], logits, 0)
    entropies = entropy(logits).T
    if present is not None:
        entropies = entropies.masked_fill(~present, 0)
    weights = fusion_weights(entropies, present)
    return fuse(logits, weights), weights, entropies


def seen_fusion(logits: Tensor, seen: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse logits [M, N, C] where modality m has seen the classes seen[m] alone, bool [M, C]: return as ``entropy_fusion``.

    For every intersection S of seen sets, from the largest to the smallest, f_S is eqs. 6–8 over the modalities that have seen
    all of S, of their logits in S. What has been found so far keeps its mass on S and takes f_S's shares within it; new classes
    of S get beside the others what f_S gives them beside those. Sets that have nothing in common have masses exp(−e).
    A class that no present modality has seen has logit −∞, a sample without any present modality that has seen something 0.
    weights: those that mixed the logit of the largest class. entropies: of each modality's softmax over what it has seen.
    """
    M, N, C = logits.shape
    sets = [frozenset(row.nonzero().flatten().tolist()) for row in seen]
    fused, weights, entropies = logits.new_zeros(N, C), logits.new_zeros(N, M), logits.new_zeros(N, M)
    for n in range(N):
        here = [m for m in range(M) if sets[m] and (present is None or bool(present[n, m]))]
        found: dict[int, Tensor] = {}  # class → logit
        used: dict[int, tuple[list[int], Tensor]] = {}  # class → who mixed it, and how
        for S in closure([sets[m] for m in here]):
            columns, seers = sorted(S), [m for m in here if sets[m] >= S]
            f, lambdas, e = (part[0] for part in entropy_fusion(logits[seers, n : n + 1][..., columns]))
            common = [i for i, c in enumerate(columns) if c in found]
            shift = f.new_zeros(())
            if common:
                shift = torch.stack([found[columns[i]] for i in common]).logsumexp(0) - f[common].logsumexp(0)
            elif found:
                before = torch.stack(list(found.values()))
                shift = before.logsumexp(0) + entropy(before) - f.logsumexp(0) - entropy(f)
            found |= dict(zip(columns, f + shift, strict=True))
            used |= dict.fromkeys(columns, (seers, lambdas))
            for m, e_m in zip(seers, e, strict=True):
                entropies[n, m] = e_m if sets[m] == S else entropies[n, m]
        if found:
            fused[n] = torch.stack([found.get(c, fused.new_tensor(-torch.inf)) for c in range(C)])
            who, lambdas = used[max(found, key=lambda c: float(found[c]))]
            weights[n, who] = lambdas
    return fused, weights, entropies


def closure(sets: Iterable[frozenset[int]]) -> list[frozenset[int]]:
    """Return all intersections of these sets but the empty one, from the largest to the smallest, then by their elements."""
    found: set[frozenset[int]] = set()
    for new in sets:
        found |= {new} | {new & S for S in found}
    return sorted(found - {frozenset()}, key=lambda S: (-len(S), sorted(S)))


def dispatch_plan(present: Tensor, padded: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plan how present rows, bool [N, M], are packed, modality after modality: return (rows, offsets, counts, slot).

    rows [N M]: the sample of each packed row, −1 where there is none.
    offsets [M + 1]: where each modality's rows begin; with `padded` every modality has room for N rows.
    counts [M]: how many rows each modality has.
    slot [N, M]: the packed row of each (sample, modality), −1 where absent.
    """
    N, M = present.shape
    counts = present.sum(0)
    rooms = torch.full_like(counts, N) if padded else counts
    offsets = torch.cat([counts.new_zeros(1), rooms.cumsum(0)])
    slot = torch.where(present, present.cumsum(0) - 1 + offsets[:-1], -1)
    return packed_rows(slot, N * M), offsets, counts, slot


def packed_rows(slot: Tensor, K: int) -> Tensor:
    """Return the sample of each packed row [K], −1 for rows that no slot [N, M] refers to."""
    rows = slot.new_full((K + 1,), -1)
    samples = torch.arange(slot.shape[0], device=slot.device)[:, None].expand_as(slot)
    return rows.scatter_(0, torch.where(slot < 0, K, slot).flatten(), samples.flatten())[:K]


def _rows_or_zeros(x: Tensor, rows: Tensor) -> Tensor:
    """Return x[rows] with zeros where rows is −1; in that case x may be empty."""
    zeros = x.new_zeros(1, *x.shape[1:])
    return torch.cat([zeros, x])[rows + 1]


def pack_rows(inputs: Sequence[Tensor], rows: Tensor, offsets: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the present rows [sizes[m], …] of each modality [N, …]."""
    begins = offsets.tolist()
    return [_rows_or_zeros(x, rows[b : b + n]) for x, b, n in zip(inputs, begins, sizes, strict=False)]


def unpack_rows(packed: Sequence[Tensor], slot: Tensor, offsets: Tensor) -> list[Tensor]:
    """Return each modality's packed rows at their samples [N, …], zeros where absent."""
    return [_rows_or_zeros(x, torch.where(k < 0, -1, k - begin)) for x, k, begin in zip(packed, slot.T, offsets, strict=False)]


def segment_mean(features: Tensor, offsets: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return x̄ of each modality's packed rows, features [K, s] → [M, s], zeros for a modality without rows."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    begins = offsets.tolist()
    ends = begins[1:] if counts is None else (offsets[:-1] + counts).tolist()
    return torch.stack([wide[b:e].sum(0) / max(e - b, 1) for b, e in zip(begins, ends, strict=False)])


def official_alpha(batch: int, batches: int) -> float:
    """Return α = 0.1^(1 + i/L) for batch i of L in an epoch, as the authors' code has it."""
    alpha: float = 0.1 ** (1 + batch / batches)
    return alpha


def official_update(P: Tensor, x_bar: Tensor, alpha: float | Tensor) -> Tensor:
    """Return P − (k kᵀ) / (α + k x̄ᵀ), normalised to ‖P‖_F = 1, as the authors' code has it.

    The division is element by element, by an s × s matrix, where the paper divides by the scalar α + x̄ᵀk. P loses its symmetry.
    """
    k = P @ x_bar
    P = P - torch.outer(k, k) / (alpha + torch.outer(k, x_bar))
    normalised: Tensor = P / P.norm()
    return normalised


def official_project(grad: Tensor, P: Tensor) -> Tensor:
    """Return G Pᵀ as the authors' code has it, which differs from eq. 3 once P is not symmetric."""
    return grad @ P.T


def official_fusion(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Fuse logits [M, N, C] → (fused [N, C], weights [M]) as the authors' code does, with one entropy per modality and batch.

    The softmax is over the *batch*, so that a prediction depends on the other samples in it; with eqs. 6–8 it does not.
    """
    p = logits.softmax(1)
    entropies = torch.special.entr(p).sum(-1).mean(-1)
    weights = (-entropies).softmax(0)
    return torch.einsum("m,mnc->nc", weights, logits), weights

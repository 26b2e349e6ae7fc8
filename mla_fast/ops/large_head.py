"""Cross-entropy of a linear head with all of its gradients (eq. 2), its logits [N, C] never in memory whole.

    z = H Wᵀ + b      δ = ∂L/∂z, in the place of z      ∂L/∂H = δ W      G = δᵀ H      ∂L/∂b = Σ_n δ_n

Some rows of H at a time: about a third of them at most, and enough that the products are nearly as fast as one of all rows. Each
logit is computed once, forward and backward in one.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mla_fast.inputs import describe
from mla_fast.ops.backend import available, without_autocast
from mla_fast.ops.softmax import softmax_delta_, softmax_sums

LARGE = 1 << 24  # logits from which on they are not in memory whole
CHUNK = 1 << 26  # logits at a time, if these are rows enough
CHUNKS = 3  # at least, whole tiles of 64 rows each
FEWEST = 128  # rows in a product that does not wait for W
BLOCK = 1 << 25  # numbers of G that are added at a time where they were computed in another dtype


class Terms(NamedTuple):
    """What each row counts in L = Σ_n own_n (lse_n − z_y) + rest_n Σ_c w_c (lse_n − z_c), lse = log Σ_c exp z_c.

    own, rest: [N]; class_weight: w [C], None for ones; total_weight: Σ_c w_c; smoothed: whether rest counts at all.
    """

    own: Tensor
    rest: Tensor
    class_weight: Tensor | None
    total_weight: Tensor | float
    smoothed: bool


class OverRanks(Protocol):
    """A softmax over classes of which each rank has some. largest: as many as any of them has."""

    @property
    def largest(self) -> int: ...
    def __call__(self, sums: Tensor) -> Tensor:
        """Return ``softmax_sums`` [4, n] of all classes for those of this rank's."""
        ...


class Gradients(NamedTuple):
    """The loss [], ∂L/∂H [N, s], G [C, s] and ∂L/∂b [C]; None where it was not wanted."""

    loss: Tensor
    features: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def is_large(rows: float, classes: int) -> bool:
    """Whether so many logits are better not in memory whole."""
    return rows * classes >= LARGE


def linear_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, class_weight: Tensor | None = None,
    label_smoothing: float = 0.0, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """Return F.cross_entropy(F.linear(features, weight, bias), target, …), eq. 2, without the logits [N, C] in memory.

    features: [N, s]; weight: [C, s]; bias: [C] or None; target: int64 [N] of labels 0 … C − 1 or `ignore_index`; class_weight:
    [C]. The loss, [] in float32 or wider, is the mean over the rows that are not ignored, weighted where classes are, and NaN
    without any, with gradients of zero. Under
    autocast the products are computed in its dtype (in float32 for float16, whose range is too small for them), sums in float32.

    The gradients are computed along with the loss, for one backward pass: another through the same graph raises RuntimeError, as
    without ``retain_graph``. On a GPU a label outside the classes makes the loss NaN, since nobody waits to look.

    Raises ValueError or TypeError that names the argument, what it was and what it should be.
    """
    check(features, weight, bias, target, class_weight, label_smoothing, ignore_index)
    terms = terms_of(target, len(weight), weight.dtype, class_weight, label_smoothing, ignore_index)
    nothing = ((terms.own == 0) & (terms.rest == 0)).all()  # of which there is no mean, and no gradient
    return loss_of(features, weight, bias, target, terms) + torch.where(nothing, torch.nan, 0.0)


def loss_of(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: Terms) -> Tensor:
    """Return the loss, differentiable once, unchecked."""
    if not torch.is_grad_enabled():
        return gradients(features, target, weight, bias, terms, (False, False, False)).loss
    loss: Tensor = _Loss.apply(features, weight, bias, target, terms)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: Terms) -> Tensor:
        found = gradients(features, target, weight, bias, terms, ctx.needs_input_grad[:3])
        ctx.found, ctx.dtypes = found, (features.dtype, weight.dtype, None if bias is None else bias.dtype)
        return found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError("linear_cross_entropy: expected one backward pass, got another: its gradients were handed over")
        _, *found = ctx.found
        ctx.found = None  # scaled where they are, and nobody else's from here on
        return *(None if g is None else g.mul_(grad).to(d) for g, d in zip(found, ctx.dtypes, strict=True)), None, None


def gradients(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms,
    wanted: tuple[bool, bool, bool] = (True, True, True), backend: str | None = None, over: OverRanks | None = None,
) -> Gradients:  # fmt: skip
    """Return the loss and the gradients that are wanted (of features, weight and bias), unchecked.

    Products are in the dtype of autocast where that is on, but not in float16. The gradients of weight and bias are float32 or
    wider, that of the features is of the products' dtype. With `over` weight and bias are this rank's rows, a label of others is
    outside 0 … C − 1, the loss is of all classes, and the features' gradient is to be added up over the ranks.
    """
    device, wide = weight.device, torch.promote_types(weight.dtype, torch.float32)
    if backend is None:
        backend = "triton" if device.type == "cuda" and available("triton") else "reference"
    dtype = torch.promote_types(features.dtype, weight.dtype)
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    if dtype == torch.float16:  # δ of so many classes is too small for it, before a scaler's factor arrives
        dtype = torch.float32
    own, rest, w, total, smoothed = terms
    (N, _), C, of_features, of_weight, of_bias = features.shape, len(weight), None, None, None
    with torch.no_grad(), without_autocast(device):
        features, weight, bias = features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        own, rest = own.to(wide), rest.to(wide)
        spread, sums = own + rest * total, weight.new_empty(4, N, dtype=wide)
        if wanted[0]:
            of_features = torch.empty_like(features)
        if wanted[1]:
            of_weight = torch.empty(weight.shape, dtype=wide, device=device) if N else weight.new_zeros(weight.shape, dtype=wide)
        if wanted[2] and bias is not None:
            of_bias = torch.zeros(C, dtype=wide, device=device)
        for rows in _chunks(N, C if over is None else over.largest):
            h, y, z = features[rows], target[rows], F.linear(features[rows], weight, bias)
            found = softmax_sums(backend, z, y, w, smoothed)
            sums[:, rows] = found = found if over is None else over(found)
            if any(wanted):
                softmax_delta_(backend, z, y, found[0], found[1], own[rows], spread[rows], rest[rows], w, smoothed)
            if of_features is not None:
                torch.mm(z, weight, out=of_features[rows])
            if of_weight is not None:
                _add_product(of_weight, z, h, first=rows.start == 0)
            if of_bias is not None:
                of_bias += z.sum(0, dtype=wide)
            del z  # before the next of its size is made
        return Gradients(_loss(terms, own, rest, sums), of_features, of_weight, of_bias)


def _chunks(N: int, C: int) -> list[slice]:
    rows = max(min(CHUNK // max(C, 1), -(-N // (64 * CHUNKS)) * 64), min(FEWEST, N), 1)
    return [slice(begin, begin + rows) for begin in range(0, N, rows)]


def _loss(terms: Terms, own: Tensor, rest: Tensor, sums: Tensor) -> Tensor:
    top, log_S, z_y, z_w = sums
    losses = own * (log_S + (top - z_y))
    if terms.smoothed:
        losses += rest * (terms.total_weight * (log_S + top) - z_w)
    return torch.where((own == 0) & (rest == 0), 0, losses).sum()


def _add_product(G: Tensor, delta: Tensor, h: Tensor, first: bool) -> None:
    """G += δᵀ H, or G = δᵀ H."""
    if G.dtype == delta.dtype:
        torch.addmm(G, delta.T, h, beta=0 if first else 1, out=G)
    elif G.device.type == "cuda":  # whose products of narrow numbers are added up in float32 anyway
        torch.addmm(G, delta.T, h, out_dtype=G.dtype, beta=0 if first else 1, out=G)
    else:
        rows = max(BLOCK // max(h.shape[1], 1), 1)
        for part, columns in zip(G.split(rows), delta.split(rows, 1), strict=True):
            part.copy_(columns.T @ h) if first else part.add_(columns.T @ h)


def terms_of(
    target: Tensor, classes: int, dtype: torch.dtype, class_weight: Tensor | None = None, smoothing: float = 0.0,
    ignore_index: int = -100, total: float | None = None, weights: Tensor | None = None,
) -> Terms:  # fmt: skip
    """Return what each row counts in the mean over the rows that are not ignored, or over `total` rows, or by weights [N].

    dtype: of the head's weight; what is returned is of that or wider.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    counted = (target != ignore_index).to(dtype)
    of_label = counted if class_weight is None else counted * class_weight.to(dtype)[target.clamp(0, classes - 1)]
    if weights is None:
        scale = 1 / (of_label.sum() if total is None else of_label.new_full((), total))
        scale = torch.where(counted > 0, scale, 0)  # so that nothing counted is 0, not 0 / 0
    else:
        scale = weights.to(dtype)
    known = (target == ignore_index) | ((target >= 0) & (target < classes))
    own = torch.where(known, of_label * scale * (1 - smoothing), torch.nan)
    whole = float(classes) if class_weight is None else class_weight.sum(dtype=dtype)
    return Terms(own, counted * scale * (smoothing / classes), class_weight, whole, smoothing > 0)


def check(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, smoothing: float,
    ignore_index: int,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError that names what is wrong with the arguments of ``linear_cross_entropy``."""
    for name, t, dims in (("features", features, "[N, s]"), ("weight", weight, "[C, s]")):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() != 2:
            raise TypeError(f"{name}: expected a floating tensor {dims}, got {describe(t)}")
    N, (C, s) = len(features), weight.shape
    if features.shape[1] != s:
        raise ValueError(f"features: expected [N, {s}] to match weight, got {list(features.shape)}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != (N,):
        raise TypeError(f"target: expected int64 [{N}], got {describe(target)}")
    for name, vector in (("bias", bias), ("class_weight", class_weight)):
        if vector is not None and (not vector.is_floating_point() or vector.shape != (C,)):
            raise ValueError(f"{name}: expected a floating tensor [{C}], got {describe(vector)}")
    for name, other in (("weight", weight), ("target", target), ("bias", bias), ("class_weight", class_weight)):
        if other is not None and other.device != features.device:
            raise ValueError(f"{name}: expected on {features.device} like features, got {other.device}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing: expected at least 0 and less than 1, got {smoothing!r}")
    if target.device.type == "cpu" and (wrong := target[(target != ignore_index) & ((target < 0) | (target >= C))]).numel():
        raise ValueError(f"target: expected labels in 0 … {C - 1} or {ignore_index}, got {wrong[0].item()}")

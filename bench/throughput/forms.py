"""The rivals: the released code's arithmetic, and the best that eager torch and torch.compile are given to do.

RLS step on P [s, s], x̄ [s], G [C, s]: P updated in place, G P⁺ returned. Window step on means [M, s]: returns the projected G,
and row `own` becomes x̄. Fusion of logits [M, N, C]: returns (fused [N, C], weights [N, M], entropies [N, M]).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.throughput import roofline
from bench.throughput.roofline import Traffic

ALPHA = 1.0


class Form(NamedTuple):
    """host: a scalar goes through the host, which is free on the CPU and would make a GPU wait."""

    run: Callable[..., object]
    traffic: Callable[..., Traffic]
    host: bool = False


def addr(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """P updated in place and no s × s temporary."""
    k = torch.mv(P, x)
    c = -1 / (ALPHA + torch.dot(x, k).item())
    projected = torch.mm(G, P).addr_(torch.mv(G, k), k, alpha=c)
    P.addr_(k, k, alpha=c)
    return projected


def addr_device(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """The same without the host."""
    k = torch.mv(P, x)
    u = k * torch.rsqrt(ALPHA + torch.dot(x, k))
    projected = torch.mm(G, P).addr_(torch.mv(G, u), u, alpha=-1)
    P.addr_(u, u, alpha=-1)
    return projected


def update_first(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """As Algorithm 1 reads: update P, then multiply."""
    k = torch.mv(P, x)
    P.addr_(k, k, alpha=-1 / (ALPHA + torch.dot(x, k).item()))
    return torch.mm(G, P)


def update_first_device(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """The same without the host: the fewest launches."""
    k = torch.mv(P, x)
    u = k * torch.rsqrt(ALPHA + torch.dot(x, k))
    P.addr_(u, u, alpha=-1)
    return torch.mm(G, P)


def stacked(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """x̄ as one more row of G, and G k = (G P) x̄: P is read once before it is updated, the fewest bytes."""
    product = torch.mm(torch.cat([G, x[None]]), P)  # [C + 1, s]
    projected, k = product[:-1], product[-1]
    scale = torch.rsqrt(ALPHA + torch.dot(x, k))
    u = k * scale
    projected.addr_(torch.mv(projected, x) * scale, u, alpha=-1)
    P.addr_(u, u, alpha=-1)
    return projected


def plain(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """For torch.compile, which makes its own way of the outer products."""
    k = P @ x
    u = k * torch.rsqrt(ALPHA + x @ k)
    projected = G @ P - torch.outer(G @ u, u)
    P.sub_(torch.outer(u, u))
    return projected


def plain_stacked(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """The same with one reading of P for both products."""
    product = torch.cat([G, x[None]]) @ P
    GP, k = product[:-1], product[-1]
    scale = torch.rsqrt(ALPHA + x @ k)
    u = k * scale
    P.sub_(torch.outer(u, u))
    return GP - torch.outer((GP @ x) * scale, u)


RLS = {
    "eager addr": Form(addr, roofline.eager_addr, host=True),
    "eager device": Form(addr_device, roofline.eager_addr),
    "eager update first": Form(update_first, roofline.eager_update_first, host=True),
    "eager update first device": Form(update_first_device, roofline.eager_update_first),
    "eager stacked": Form(stacked, roofline.eager_stacked),
}


def window_sequential(means: Tensor, own: int, x: Tensor, G: Tensor) -> Tensor:
    """One mean after another, with the columns of U in the place of P."""
    U = G.new_empty(means.shape[0] - 1, means.shape[1])
    for i, mean in enumerate(_others(means, own)):
        k = mean if i == 0 else torch.addmv(mean, U[:i].T, torch.mv(U[:i], mean), alpha=-1)
        torch.mul(k, torch.rsqrt(ALPHA + torch.dot(mean, k)), out=U[i])
    projected = torch.addmm(G, torch.mm(G, U.T), U, alpha=-1)
    means[own].copy_(x)
    return projected


def window_woodbury(means: Tensor, own: int, x: Tensor, G: Tensor) -> Tensor:
    """G − Bᵀ X with B = (α I + X Xᵀ)⁻¹ X Gᵀ."""
    X = means[1:] if own == 0 else torch.stack(_others(means, own))
    A = torch.mm(X, X.T)
    A.diagonal().add_(ALPHA)
    B, _ = torch.linalg.solve_ex(A, torch.mm(X, G.T))  # plain solve waits for the device to say that A is regular
    projected = torch.addmm(G, B.T, X, alpha=-1)
    means[own].copy_(x)
    return projected


def window_plain(means: Tensor, own: int, x: Tensor, G: Tensor) -> Tensor:
    """For torch.compile."""
    U = means[:0]
    for mean in _others(means, own):
        k = mean - (U @ mean) @ U
        U = torch.cat([U, (k * torch.rsqrt(ALPHA + mean @ k))[None]])
    projected = G - (G @ U.T) @ U
    means[own].copy_(x)
    return projected


def _others(means: Tensor, own: int) -> list[Tensor]:
    return [mean for j, mean in enumerate(means.unbind()) if j != own]


WINDOW = {
    "eager sequential": Form(window_sequential, roofline.window_eager),
    "eager woodbury": Form(window_woodbury, roofline.window_solved),
}


def fusion_einsum(z: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    z, here = _filled(z, present)
    w, e = _weights(_negative_entropy(z), here)
    return torch.einsum("mn,mnc->nc", w, z), w.T, e.T


def fusion_broadcast(z: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    z, here = _filled(z, present)
    w, e = _weights(_negative_entropy(z), here)
    return (w[..., None] * z).sum(0), w.T, e.T


def fusion_entr(z: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One temporary as large as the logits, and none for w z: the fewest bytes."""
    z, here = _filled(z, present)
    p = z.softmax(-1)
    w, e = _weights(torch.special.entr(p, out=p).sum(-1).neg_(), here)
    fused = w[0, :, None] * z[0]
    for m in range(1, z.shape[0]):
        fused.addcmul_(w[m, :, None], z[m])
    return fused, w.T, e.T


def _filled(z: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What is absent may be NaN, which no weight of 0 undoes. Also which are present, [M, N]."""
    return (z, None) if present is None else (z.masked_fill(~present.T[..., None], 0), present.T)


def _negative_entropy(z: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return log_p.exp().mul_(log_p).sum(-1)


def _weights(negative: Tensor, here: Tensor | None) -> tuple[Tensor, Tensor]:
    """λ and e [M, N] from −e."""
    if here is None:
        return negative.softmax(0), -negative
    return negative.masked_fill(~here, -1e30).softmax(0) * here, -negative * here


FUSION = {
    "eager einsum": Form(fusion_einsum, roofline.fusion_einsum),
    "eager broadcast": Form(fusion_broadcast, roofline.fusion_broadcast),
    "eager entr": Form(fusion_entr, roofline.fusion_entr),
}

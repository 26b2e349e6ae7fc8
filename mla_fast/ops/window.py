"""The projection by the window: away from the latest feature means of the other modalities, without an s × s matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_fast import reference
from mla_fast.ops.backend import alpha_tensor, check_projected, operator, resolve, without_autocast


def _wide(means: Tensor, grad: Tensor) -> torch.dtype:
    """The dtype that the projection is computed in."""
    return torch.promote_types(torch.promote_types(means.dtype, grad.dtype), torch.float32)


@operator("window_project(Tensor means, Tensor grad, Tensor alpha) -> Tensor")
def _project(means: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@operator(
    "window_step_(Tensor(a!) means, Tensor(b!) gram, int own, Tensor x_bar, Tensor(c!) grad, Tensor alpha, "
    "Tensor? found_inf=None) -> Tensor"
)
def _step(means: Tensor, gram: Tensor, own: int, x_bar: Tensor, grad: Tensor, *_: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], dtype=_wide(means, grad))


def window_project(means: Tensor, grad: Tensor, alpha: float | Tensor, *, backend: str = "auto") -> Tensor:
    """Return the gradient projected away from the latest feature means of the *other* modalities.

        P = I;  for each row x̄_j of means:  k = P x̄_j,  P ← P − k kᵀ / (α + x̄_jᵀk);  returns G P        (eq. 5, begun anew)

    means [J, s] (J may be 0: G comes back) and grad [C, s] have any floating dtype. The projection is computed in float32 or
    float64, whichever is wider; the result has grad's dtype. alpha > 0 is a number or a one-element tensor. Not
    differentiable.

    Raises ValueError or TypeError that names the argument, what it was and what it should be.
    """
    check_projected("means", means, grad)
    if means.dim() != 2:
        raise ValueError(f"means: expected [J, s], got {list(means.shape)}")
    name = resolve(backend, grad.device)
    X, G, alpha = means.detach(), grad.detach(), alpha_tensor(alpha, grad.device)
    if name != "triton":  # whose kernel converts what it loads
        X, G = X.to(_wide(means, grad)), G.to(_wide(means, grad))
    if name != "reference":
        return _project.on(name, grad.device)(X, G, alpha).to(grad.dtype)
    with without_autocast(grad.device):
        return reference.project(G, reference.window_projection(X, alpha)).to(grad.dtype)


def window_step_(
    backend: str, means: Tensor, gram: Tensor, own: int, x_bar: Tensor, grad: Tensor, alpha: Tensor,
    found_inf: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Project grad [C, s], contiguous, in place, by all rows of means [K, s] but `own`, which then becomes x_bar [s].

    That is ``window_project`` without its checks; `own` is the row of the modality at hand, and all stay as they are where
    found_inf is set. gram, float64 [K, K], holds the products of the means: the kernels keep it up to date, so that a step need
    not form it, and the other backends leave it alone. Returns [n] numbers whose sum is ‖grad‖² afterwards.
    """
    if backend != "reference":
        return _step.on(backend, means.device)(means, gram, own, x_bar, grad, alpha, found_inf)
    others = torch.cat([means[:own], means[own + 1 :]])
    projected = reference.project(grad, reference.window_projection(others, alpha))
    if found_inf is not None:
        projected, x_bar = torch.where(found_inf == 0, projected, grad), torch.where(found_inf == 0, x_bar, means[own])
    grad.copy_(projected)
    means[own] = x_bar
    return grad.square().sum(1)


def window_gram(backend: str, means: Tensor) -> Tensor:
    """Return the gram that steps would have left with these means [K, s], bit for bit; zeros for backends that do not use it."""
    gram = torch.zeros(len(means), len(means), dtype=torch.float64, device=means.device)
    if backend == "triton":
        means, nothing, alpha = means.clone(), means.new_empty(0, means.shape[1]), alpha_tensor(1.0, means.device)
        for own in range(len(means)):
            window_step_(backend, means, gram, own, means[own].clone(), nothing, alpha)
    return gram

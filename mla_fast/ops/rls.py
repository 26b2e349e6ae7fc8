"""The recursive-least-squares step of the head's projection (eqs. 3 and 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_fast import reference
from mla_fast.ops.backend import alpha_tensor, check_choice, check_projected, operator, resolve, without_autocast

ORDERS = ("update_first", "project_first")


@operator(
    "rls_project_(Tensor(a!) P, Tensor x_bar, Tensor grad, Tensor alpha, Tensor(b!)? pending=None, Tensor(c!)? slot=None, "
    "Tensor? found_inf=None, bool project_first=False) -> Tensor"
)
def _project(P: Tensor, x_bar: Tensor, grad: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@operator(
    "rls_step_(Tensor(a!) P, Tensor x_bar, Tensor(b!) grad, Tensor alpha, Tensor(c!) pending, Tensor(d!)? slot=None, "
    "Tensor? found_inf=None, bool project_first=False) -> Tensor"
)
def _step(P: Tensor, *_: Any) -> Tensor:
    return P.new_empty(torch.library.get_ctx().new_dynamic_size())


@operator("rls_fold_(Tensor(a!) P, Tensor(b!) pending, Tensor(c!)? slot=None) -> ()")
def _fold(*_: Any) -> None:
    return None


def _check_state(P: Tensor, x_bar: Tensor, pending: Tensor | None, found_inf: Tensor | None) -> None:
    if x_bar.dim() != 1:
        raise ValueError(f"x_bar: expected [s], got {list(x_bar.shape)}")
    s = x_bar.shape[0]
    if P.shape != (s, s):
        raise ValueError(f"P: expected [{s}, {s}] to match x_bar, got {list(P.shape)}")
    if P.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"P: expected float32 or float64, got {P.dtype}")
    if P.device != x_bar.device:
        raise ValueError(f"P: expected on {x_bar.device} like grad, got {P.device}")
    if not P.is_contiguous():
        raise ValueError(f"P: expected a contiguous tensor, got strides {P.stride()}")
    if pending is not None and (pending.numel() != s or pending.dtype != P.dtype or not pending.is_contiguous()):
        raise ValueError(f"pending: expected contiguous {P.dtype} [{s}], got {pending.dtype} {list(pending.shape)}")
    for name, t in (("P", P), ("pending", pending)):
        if t is not None and t.requires_grad:
            raise ValueError(f"{name}: expected a tensor that does not require grad: it is state, updated in place")
    if found_inf is not None and found_inf.numel() != 1:
        raise ValueError(f"found_inf: expected one element, got shape {list(found_inf.shape)}")
    for name, t in (("pending", pending), ("found_inf", found_inf)):
        if t is not None and t.device != P.device:
            raise ValueError(f"{name}: expected on {P.device} like P, got {t.device}")


def rls_project_(
    P: Tensor, x_bar: Tensor, grad: Tensor, alpha: float | Tensor, *, order: str = "update_first",
    pending: Tensor | None = None, found_inf: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Take one step of the projection: update P in place and return the projected gradient (eqs. 3 and 5).

        k = P x̄        P⁺ = P − k kᵀ / (α + x̄ᵀk)        returns G P⁺, or G P with order="project_first"

    P [s, s] is float32 or float64, contiguous and symmetric (I to begin with); x_bar [s] and grad [C, s] have any floating
    dtype. The step is computed in P's dtype; the result has grad's. alpha > 0 is a number or a one-element tensor. Not
    differentiable.

    A step whose x̄ or G is not finite, or for which found_inf (one element, as torch.amp uses it) is not 0, leaves P as it is
    and returns G itself.

    With `pending` ([s] or [1, s] in P's dtype, zeros to begin with) P is read and written once a step instead of twice: the
    step's correction u = k / √(α + x̄ᵀk) is left there and enters P in the next step. Until then the true P is
    P − pending pendingᵀ, and neither x_bar nor grad may share memory with P or pending.

    Raises ValueError or TypeError that names the argument, what it was and what it should be.
    """
    check_projected("x_bar", x_bar, grad)
    check_choice("order", order, ORDERS)
    _check_state(P, x_bar, pending, found_inf)
    name = resolve(backend, P.device)
    dtypes = (x_bar.dtype, grad.dtype) if name == "triton" else (P.dtype, P.dtype)  # the kernels convert what they load
    x, G = (t.detach().to(dtype) for t, dtype in zip((x_bar, grad), dtypes, strict=True))
    overflow = None if found_inf is None else found_inf.to(torch.float32)
    waiting = None if pending is None else pending.view(1, len(x))
    projected = rls_step(name, P, x, G, alpha_tensor(alpha, P.device), waiting, None, overflow, order == "project_first")
    if name != "reference":  # operators on the stable ABI do not tell autograd what they change in place
        torch.autograd.graph.increment_version(P if pending is None else (P, pending))
    return projected.to(grad.dtype)


def rls_step(
    backend: str, P: Tensor, x_bar: Tensor, grad: Tensor, alpha: Tensor, pending: Tensor | None = None,
    slot: Tensor | None = None, found_inf: Tensor | None = None, project_first: bool = False,
) -> Tensor:  # fmt: skip
    """Do what ``rls_project_`` does, without its checks: all of one dtype, alpha as ``alpha_tensor`` gives it.

    pending [R, s] holds up to R corrections u_r; the true P is P − Σ_r u_r u_rᵀ. slot, int32 [2] on P's device, zeros to begin
    with, is the backend's account of what else waits; R > 1 needs it. The kernels count the u_r in it, and the CPU operator,
    given one, may leave P's lower triangle behind: only ``rls_fold`` makes P whole then.
    """
    if backend != "reference":
        return _project.on(backend, P.device)(P, x_bar, grad, alpha, pending, slot, found_inf, project_first)
    if pending is not None:
        rls_fold(backend, P, pending, slot)
    with without_autocast(P.device):
        updated, projected = reference.rls_project(P, x_bar, grad, alpha, project_first=project_first)
    good = torch.isfinite(updated.sum() + projected.sum())
    if found_inf is not None:
        good = good & (found_inf == 0).all()
    P.copy_(torch.where(good, updated, P))
    return torch.where(good, projected, grad)


def rls_step_(
    backend: str, P: Tensor, x_bar: Tensor, grad: Tensor, alpha: Tensor, pending: Tensor | None,
    slot: Tensor | None, found_inf: Tensor | None, project_first: bool,
) -> Tensor:  # fmt: skip
    """Take ``rls_step`` with grad [C, s] becoming the projected gradient; return partial sums of its squares."""
    if backend == "triton":
        return _step.on(backend, P.device)(P, x_bar, grad, alpha, pending, slot, found_inf, project_first)
    projected = rls_step(backend, P, x_bar, grad, alpha, pending, slot, found_inf, project_first)
    return square_sum(grad.copy_(projected))


def rls_fold(backend: str, P: Tensor, pending: Tensor, slot: Tensor | None = None) -> None:
    """Bring P up to date after steps of the same backend, P ← P − Σ_r u_r u_rᵀ; nothing waits afterwards."""
    if backend != "reference":
        _fold.on(backend, P.device)(P, pending, slot)
        return
    for u in pending if slot is None else pending[: slot[1]]:
        P.sub_(torch.outer(u, u))
    pending.zero_()
    if slot is not None:
        slot.zero_()


def pending_rows(backend: str, s: int) -> int:
    """Return how many steps' corrections should wait before they enter a P of s columns; 0: P is updated at once.

    One, the lazy form, reads and writes P once a step. More, the deferred form, pays on a GPU where P outgrows the caches.
    """
    if backend == "triton":
        from mla_fast.kernels import launch

        rows: int = launch.pending_rows(s)
        return rows
    return 1 if backend == "cpp" else 0


def identity(backend: str, s: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the P to begin with, laid out as the backend reads it fastest: with zeros between its rows for the kernels."""
    if backend != "triton":
        return torch.eye(s, dtype=dtype, device=device)
    from mla_fast.kernels import launch

    P = torch.zeros(s, launch.padded(s), dtype=dtype, device=device)[:, :s]
    P.diagonal().fill_(1)
    return P


def square_sum(t: Tensor) -> Tensor:
    """Return Σ t², in one operation."""
    flat = t.reshape(-1)
    return torch.dot(flat, flat)

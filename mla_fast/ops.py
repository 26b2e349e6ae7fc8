"""The operators, and the one place that knows which backend runs them. ``backend`` is one of

- ``"auto"``: the fastest that works for the tensors' device; a fallback is announced once, with its reason;
- ``"reference"``: ``mla_fast.reference``, plain torch, any device and floating dtype;
- ``"cpp"``: the compiled CPU operators;
- ``"triton"``: the CUDA kernels; on CPU tensors where TRITON_INTERPRET=1 was set before the import.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mla_fast import reference
from mla_fast.registration import CPP_MISSING, CUDA_MISSING, INTERPRETED, TRITON_MISSING

BACKENDS = ("auto", "reference", "cpp", "triton")
ORDERS = ("update_first", "project_first")
# For each backend why it cannot run here, or None if it can.
MISSING = {"reference": None, "cpp": CPP_MISSING, "triton": TRITON_MISSING}
_SERVES = {"cpu": "cpp", "cuda": "triton"}
_announced: set[str] = set()


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here."""


def resolve(backend: str, device: torch.device) -> str:
    """The backend that runs on `device` when `backend` is asked for.

    Raises ValueError for an unknown name or one that does not serve the device, BackendError for one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    serves = _SERVES.get(device.type, "reference")
    if backend == "auto":
        reason = MISSING[serves]
        if reason is None:
            return serves
        _announce(device.type, reason)
        return "reference"
    if backend in ("cpp", "triton"):
        if (reason := MISSING[backend]) is not None:
            raise BackendError(f"backend: {backend!r} is not available: {reason}")
        if backend != serves and not (backend == "triton" and INTERPRETED):
            raise ValueError(f"backend: {backend!r} does not serve tensors on {device.type!r}")
    return backend


def _announce(what: str, reason: str) -> None:
    """Says once that the reference backend does it, and why."""
    if what not in _announced:
        _announced.add(what)
        warnings.warn(f"mla_fast runs its reference backend for {what}: {reason}", stacklevel=4)


def _operator(name: str, backend: str, device: torch.device) -> Callable:
    interpreted = backend == "triton" and device.type == "cpu"
    return getattr(torch.ops.mla_fast_interpreted if interpreted else torch.ops.mla_fast, name).default


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """For plain torch, which would compute in what autocast prefers."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


def alpha_tensor(alpha: float | Tensor, device: torch.device) -> Tensor:
    """α as the operators take it: 0-d float64 on the tensors' device, so that changing it never waits for the device."""
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1:
            raise ValueError(f"alpha: expected a number or a tensor with one element, got shape {list(alpha.shape)}")
        if alpha.device.type == "cpu":
            check_alpha(alpha.item())
        return alpha.detach().to(device=device, dtype=torch.float64).reshape(())
    return torch.full((), check_alpha(alpha), dtype=torch.float64, device=device)


def check_alpha(alpha: float) -> float:
    """α, or ValueError unless it is a positive finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha: expected a positive finite number, got {alpha!r}")
    return float(alpha)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """`value`, or ValueError unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def _check_projection_inputs(means: Tensor, name: str, grad: Tensor) -> None:
    for label, t in ((name, means), ("grad", grad)):
        if not t.is_floating_point():
            raise TypeError(f"{label}: expected a floating dtype, got {t.dtype}")
    if means.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")
    s = means.shape[-1]
    if grad.dim() != 2 or grad.shape[1] != s:
        raise ValueError(f"grad: expected [C, {s}] to match {name}, got {list(grad.shape)}")
    if grad.device != means.device:
        raise ValueError(f"grad: expected on {means.device} like {name}, got {grad.device}")


def rls_project_(
    P: Tensor,
    x_bar: Tensor,
    grad: Tensor,
    alpha: float | Tensor,
    *,
    order: str = "update_first",
    pending: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One step of the recursive-least-squares projection: P updated in place, the projected gradient returned (eqs. 3, 5).

        k = P x̄        P⁺ = P − k kᵀ / (α + x̄ᵀk)        returns G P⁺, or G P with order="project_first"

    P [s, s] float32 or float64, contiguous, symmetric (I to begin with); x_bar [s]; grad [C, s] of any floating dtype,
    computed in P's dtype and returned in its own; alpha > 0, a number or a one-element tensor. Not differentiable.

    A step whose x̄ or G is not finite, or for which found_inf (one float32, as torch.amp uses it) is not 0, leaves P as it is
    and returns G itself.

    With `pending` ([s] or [1, s], zeros to begin with) P is read and written once a step instead of twice: the step's
    correction u = k / √(α + x̄ᵀk) is left there and enters P in the next one. Until then the true P is P − pending pendingᵀ.
    Neither x_bar nor grad may share memory with P or pending then.
    """
    _check_projection_inputs(x_bar, "x_bar", grad)
    check_choice("order", order, ORDERS)
    s = x_bar.shape[0] if x_bar.dim() == 1 else -1
    if s < 0:
        raise ValueError(f"x_bar: expected [s], got {list(x_bar.shape)}")
    if P.shape != (s, s):
        raise ValueError(f"P: expected [{s}, {s}] to match x_bar, got {list(P.shape)}")
    if P.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"P: expected float32 or float64, got {P.dtype}")
    if P.device != grad.device:
        raise ValueError(f"P: expected on {grad.device} like grad, got {P.device}")
    if not P.is_contiguous():
        raise ValueError(f"P: expected a contiguous tensor, got strides {P.stride()}")
    if P.requires_grad:
        raise ValueError("P: expected a tensor that does not require grad: it is state, updated in place")
    if pending is not None and (pending.numel() != s or pending.dtype != P.dtype or not pending.is_contiguous()):
        raise ValueError(f"pending: expected contiguous {P.dtype} [{s}], got {pending.dtype} {list(pending.shape)}")
    if pending is not None and pending.requires_grad:
        raise ValueError("pending: expected a tensor that does not require grad: it is state, updated in place")
    if found_inf is not None and found_inf.numel() != 1:
        raise ValueError(f"found_inf: expected one element, got shape {list(found_inf.shape)}")
    for label, t in (("pending", pending), ("found_inf", found_inf)):
        if t is not None and t.device != P.device:
            raise ValueError(f"{label}: expected on {P.device} like P, got {t.device}")
    name = resolve(backend, P.device)
    x, G = x_bar.detach(), grad.detach()
    if name != "triton":  # whose kernels convert what they load
        x, G = x.to(P.dtype), G.to(P.dtype)
    overflow = None if found_inf is None else found_inf.to(torch.float32)
    waiting = None if pending is None else pending.view(1, s)
    alpha = alpha_tensor(alpha, P.device)
    projected = rls_step(name, P, x, G, alpha, waiting, None, overflow, order == "project_first")
    if name != "reference":  # operators on the stable ABI do not tell autograd of what they change in place
        torch.autograd.graph.increment_version(P if pending is None else (P, pending))
    return projected.to(grad.dtype)


def pending_rows(backend: str, s: int) -> int:
    """How many steps' corrections should wait before they enter a P of s columns; 0: none, P is updated at once.

    One, the lazy form, reads and writes P once a step. More, the deferred form, pays on a GPU where P outgrows the caches.
    """
    if backend == "triton":
        from mla_fast.kernels.launch import pending_rows

        return pending_rows(s)
    return 1 if backend == "cpp" else 0


def identity(backend: str, s: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """P to begin with, laid out as the backend reads it fastest: with zeros between its rows for the kernels."""
    if backend != "triton":
        return torch.eye(s, dtype=dtype, device=device)
    from mla_fast.kernels.launch import padded

    P = torch.zeros(s, padded(s), dtype=dtype, device=device)[:, :s]
    P.diagonal().fill_(1)
    return P


def rls_step(
    backend: str,
    P: Tensor,
    x_bar: Tensor,
    grad: Tensor,
    alpha: Tensor,
    pending: Tensor | None = None,
    slot: Tensor | None = None,
    found_inf: Tensor | None = None,
    project_first: bool = False,
) -> Tensor:
    """``rls_project_`` without its checks, for callers that made them once: one dtype, alpha as ``alpha_tensor`` gives it.

    pending [R, s] holds up to R corrections u_r; the true P is P − Σ_r u_r u_rᵀ. slot, int32 [2] on P's device, zeros to begin
    with, is the backend's account of what else waits; R > 1 needs it. The kernels count the u_r in it, and the CPU operator,
    given one, may leave P's lower triangle behind: only ``rls_fold`` makes P whole then.
    """
    if backend != "reference":
        op = _operator("rls_project_", backend, P.device)
        return op(P, x_bar, grad, alpha, pending, slot, found_inf, project_first)
    if pending is not None:
        rls_fold(backend, P, pending, slot)
    with _without_autocast(P.device):
        updated, projected = reference.rls_project(P, x_bar, grad, alpha, project_first=project_first)
    good = torch.isfinite(updated.sum() + projected.sum())
    if found_inf is not None:
        good = good & (found_inf == 0).all()
    P.copy_(torch.where(good, updated, P))
    return torch.where(good, projected, grad)


def rls_fold(backend: str, P: Tensor, pending: Tensor, slot: Tensor | None = None) -> None:
    """P ← the P that ``rls_step`` of the same backend has left, P − Σ_r u_r u_rᵀ; nothing waits afterwards."""
    if backend != "reference":
        _operator("rls_fold_", backend, P.device)(P, pending, slot)
        return
    for u in pending if slot is None else pending[: slot[1]]:
        P.sub_(torch.outer(u, u))
    pending.zero_()
    if slot is not None:
        slot.zero_()


def rls_step_(
    backend: str,
    P: Tensor,
    x_bar: Tensor,
    grad: Tensor,
    alpha: Tensor,
    pending: Tensor | None,
    slot: Tensor | None,
    found_inf: Tensor | None,
    project_first: bool,
) -> Tensor:
    """``rls_step`` with grad [C, s] becoming the projected gradient; returns partial sums of its squares."""
    if backend == "triton":
        op = _operator("rls_step_", backend, P.device)
        return op(P, x_bar, grad, alpha, pending, slot, found_inf, project_first)
    projected = rls_step(backend, P, x_bar, grad, alpha, pending, slot, found_inf, project_first)
    return square_sum(grad.copy_(projected))


def square_sum(t: Tensor) -> Tensor:
    """Σ t², in one operation."""
    flat = t.reshape(-1)
    return torch.dot(flat, flat)


def not_finite(
    looked_at: list[Tensor], found_inf: Tensor | None, all_reduce: Callable[[Tensor], Any] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """(float32 [], 1 where a tensor or its norm is not finite or found_inf is not 0; the norms). all_reduce takes the maximum
    over the ranks, in place."""
    norms = list(torch._foreach_norm(looked_at))
    total = torch.stack(norms).sum()
    bad = torch.nan_to_num(total - total, nan=1.0)
    if found_inf is not None:
        bad = bad.logical_or(found_inf.reshape(()))
    bad = bad.to(torch.float32)
    if all_reduce is not None:
        all_reduce(bad)
    return bad, norms


def head_check_(
    backend: str,
    looked_at: list[Tensor],
    layers: int,
    account: Tensor,
    first: list[Tensor],
    found_inf: Tensor | None,
    kept: list[Tensor],
    all_reduce: Callable[[Tensor], Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """What a head's step begins with where nobody waits for the device: (bad float32 [], squares [2 · layers], skip float32
    [layers], copies of kept).

    looked_at: G and x̄ of each layer in turn, then whatever else must be finite; squares are the sums of theirs. bad is
    ``not_finite``'s; account int32 [2] counts it. skip is bad, or with first (float32 [] of each layer, 1 until a step has been
    taken) max(bad, first), and first becomes first · bad.
    """
    copies = [torch.empty_like(t) for t in kept]
    if backend == "triton" and all_reduce is None and _one_launch(kept, copies, len(looked_at)):
        op = _operator("head_check_", backend, account.device)
        return *op(looked_at, layers, account, first, found_inf, kept, copies), copies
    bad, norms = not_finite(looked_at, found_inf, all_reduce)
    account[0].add_(bad.to(torch.int32))
    skip = bad.expand(layers)
    if first:
        skip = torch.stack([torch.maximum(bad, f) for f in first])
        torch._foreach_mul_(first, bad)
    if kept:
        torch._foreach_copy_(copies, kept)
    squares = torch.stack(norms[: 2 * layers]).square() if layers else bad.new_empty(0)
    return bad, squares, skip, copies


def head_restore_(backend: str, tensors: list[Tensor], copies: list[Tensor], bad: Tensor) -> None:
    """Where bad [] is 1, the first of the tensors become their copies again, and the others zeros."""
    old, created = tensors[: len(copies)], tensors[len(copies) :]
    if backend == "triton" and all(t.is_contiguous() for t in created) and _one_launch(old, copies, len(created)):
        _operator("head_restore_", backend, bad.device)(tensors, copies, bad)
        return
    good = bad == 0
    for t, before in itertools.zip_longest(tensors, copies):
        torch.where(good, t, torch.zeros_like(t) if before is None else before.to(t.dtype), out=t)


def _one_launch(tensors: list[Tensor], copies: list[Tensor], more: int = 0) -> bool:
    """The kernels go through them all in one launch, and through each as through a stretch of memory."""
    from mla_fast.kernels.head_step import MAX_TENSORS

    alike = all(t.stride() == c.stride() and t.shape == c.shape for t, c in zip(tensors, copies, strict=True))
    return alike and len(tensors) + more <= MAX_TENSORS


def window_project(means: Tensor, grad: Tensor, alpha: float | Tensor, *, backend: str = "auto") -> Tensor:
    """The gradient projected away from the latest feature means of the *other* modalities, without an s × s matrix.

        P = I;  for each row x̄_j of means:  k = P x̄_j,  P ← P − k kᵀ / (α + x̄_jᵀk);  returns G P

    means [J, s] (J may be 0: G comes back), grad [C, s], both floating; float32 or float64 inside, whichever is wider; the
    result has grad's dtype. alpha > 0, a number or a one-element tensor. Not differentiable.
    """
    _check_projection_inputs(means, "means", grad)
    if means.dim() != 2:
        raise ValueError(f"means: expected [J, s], got {list(means.shape)}")
    name = resolve(backend, grad.device)
    X, G, alpha = means.detach(), grad.detach(), alpha_tensor(alpha, grad.device)
    if name != "triton":  # whose kernel converts what it loads
        dtype = torch.promote_types(torch.promote_types(means.dtype, grad.dtype), torch.float32)
        X, G = X.to(dtype), G.to(dtype)
    if name == "reference":
        with _without_autocast(grad.device):
            projected = reference.project(G, reference.window_projection(X, alpha))
    else:
        projected = _operator("window_project", name, grad.device)(X, G, alpha)
    return projected.to(grad.dtype)


def window_step_(
    backend: str,
    means: Tensor,
    gram: Tensor,
    own: int,
    x_bar: Tensor,
    grad: Tensor,
    alpha: Tensor,
    found_inf: Tensor | None = None,
) -> Tensor:
    """``window_project`` of grad [C, s], contiguous, in place, from all rows of means [K, s] but `own`, the row of the modality
    at hand, which then becomes x_bar; all stay as they are where found_inf is set. Without checks.

    gram, float64 [K, K], holds the products of the means. The kernels keep it up to date, so that a step need not form it; the
    other backends leave it alone. Returns [n] numbers whose sum is ‖grad‖² afterwards.
    """
    if backend != "reference":
        return _operator("window_step_", backend, means.device)(means, gram, own, x_bar, grad, alpha, found_inf)
    others = torch.cat([means[:own], means[own + 1 :]])
    projected = reference.project(grad, reference.window_projection(others, alpha))
    if found_inf is not None:
        projected, x_bar = torch.where(found_inf == 0, projected, grad), torch.where(found_inf == 0, x_bar, means[own])
    grad.copy_(projected)
    means[own] = x_bar
    return grad.square().sum(1)


def window_gram(backend: str, means: Tensor) -> Tensor:
    """The gram that steps would have left with these means [K, s], to the last bit; zeros where the backend has no use for it."""
    gram = torch.zeros(len(means), len(means), dtype=torch.float64, device=means.device)
    if backend == "triton":
        means, nothing, alpha = means.clone(), means.new_empty(0, means.shape[1]), alpha_tensor(1.0, means.device)
        for own in range(len(means)):
            window_step_(backend, means, gram, own, means[own].clone(), nothing, alpha)
    return gram


def _unrolled() -> int:
    from mla_fast.kernels.launch import UNROLLED

    return UNROLLED


def entropy_fusion(
    logits: list[Tensor], present: Tensor | None, backend: str, slot: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(fused [N, C], weights [N, M], entropies [N, M]) of M tensors [N, C] or one [M, N, C], which ``mla_fast.entropy_fusion``
    checks and documents, or of packed rows [K, C] with slot [N, M], the row of each (sample, modality) or −1."""
    M = slot.shape[1] if slot is not None else logits[0].shape[0] if logits[0].dim() == 3 else len(logits)
    if backend == "reference" or (backend == "triton" and M > _unrolled()):
        if slot is not None:
            present = slot >= 0
            stacked = reference.unpack_rows([logits[0]] * M, slot, slot.new_zeros(M + 1))
            stacked = torch.stack(stacked)
        else:
            stacked = logits[0] if logits[0].dim() == 3 else torch.stack(logits)
        wide = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
        with _without_autocast(wide.device):
            fused, weights, entropies = reference.entropy_fusion(wide, present)
        return fused.to(stacked.dtype), weights, entropies
    return _differentiable(_operator("entropy_fusion", backend, logits[0].device), logits, present, slot)


def fuse_at_once(logits: Tensor | Sequence[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """``entropy_fusion`` on the CPU, without a gradient and checked by the operator alone: checks in Python take as long as a
    small batch does. None where that does not serve or is refused; the caller's checks say why."""
    tensors, dims = ([logits], 3) if type(logits) is Tensor else (logits, 2)
    if CPP_MISSING is not None or type(tensors) not in (list, tuple) or torch.compiler.is_compiling():
        return None
    for z in tensors:
        if type(z) is not Tensor or not z.is_cpu or z.dim() != dims or (z.requires_grad and torch.is_grad_enabled()):
            return None
    if _transformed(tensors):
        return None
    if present is not None and (type(present) is not Tensor or not present.is_cpu):
        return None
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.mla_fast.entropy_fusion.default(tensors, present, None)
    except RuntimeError:
        return None


def _differentiable(op: Callable, tensors: Tensor | list[Tensor], *arguments):
    """op(tensors, *arguments). The autograd rules live in Python; where no gradient is wanted, going around them saves more than
    the arithmetic of a small batch costs."""
    if torch.compiler.is_compiling():
        return op(tensors, *arguments)
    listed = [tensors] if isinstance(tensors, Tensor) else tensors
    if _transformed(listed):
        name = op.name().partition("::")[2]
        raise NotImplementedError(f'{name}: torch.func and forward-mode derivatives need backend="reference"')
    if torch.is_grad_enabled() and any(t.requires_grad for t in listed):
        return op(tensors, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(tensors, *arguments)


def _transformed(tensors: Sequence[Tensor]) -> bool:
    """Whether torch.func or forward mode looks at what becomes of them: of that the operators know nothing, and would be taken
    for constants."""
    if torch._C._are_functorch_transforms_active():
        return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def resolve_dispatch(backend: str, device: torch.device) -> str:
    """The backend that dispatches on `device`: "cpp" (compiled for the CPU and for CUDA) or "reference"."""
    check_choice("backend", backend, ("auto", "reference", "cpp"))
    missing = {"cpu": CPP_MISSING, "cuda": CUDA_MISSING}.get(device.type, f"it does not serve {device.type!r}")
    if backend != "reference" and missing is None:
        return "cpp"
    if backend == "cpp":
        raise BackendError(f"backend: 'cpp' is not available for dispatch on {device.type}: {missing}")
    if backend == "auto":
        _announce(f"dispatch on {device.type}", missing)
    return "reference"


def dispatch_plan(backend: str, present: Tensor, padded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows [N M], offsets [M + 1], counts [M], slot [N, M]) of present bool [N, M]; ``mla_fast.dispatch`` documents them."""
    if backend == "reference":
        return reference.dispatch_plan(present, padded)
    return torch.ops.mla_fast.dispatch_plan.default(present, padded)


def pack_rows(backend: str, inputs: list[Tensor], rows: Tensor, offsets: Tensor, slot: Tensor, sizes: list[int]) -> list[Tensor]:
    """Of modality m sizes[m] rows: inputs[m][rows[offsets[m] + i]], zeros where that is −1. Differentiable."""
    if backend == "reference":
        return reference.pack_rows(inputs, rows, offsets, sizes)
    return _differentiable(torch.ops.mla_fast.pack_rows.default, inputs, rows, offsets, slot, sizes)


def pack_features(
    backend: str, features: list[Tensor], rows: Tensor, offsets: Tensor, slot: Tensor, sizes: list[int], counts: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """``pack_rows`` and the mean of each modality's present rows, in float32 or wider; zeros for one without. Differentiable."""
    if backend == "cpp" and slot.device.type == "cpu":  # reads what it packs once
        return _differentiable(torch.ops.mla_fast.pack_features.default, features, rows, offsets, slot, sizes)
    packed = pack_rows(backend, features, rows, offsets, slot, sizes)
    begin, flat = offsets.new_zeros(2), [x.reshape(len(x), x.shape[1:].numel()) for x in packed]
    means = [segment_mean(backend, x, begin, count)[0] for x, count in zip(flat, counts.split(1), strict=True)]
    return packed, [mean.view(x.shape[1:]) for mean, x in zip(means, packed, strict=True)]


def unpack_rows(backend: str, packed: list[Tensor], slot: Tensor, offsets: Tensor) -> list[Tensor]:
    """The reverse: of modality m N rows packed[m][slot[n, m] − offsets[m]], zeros where slot is −1. Differentiable."""
    if backend == "reference":
        return reference.unpack_rows(packed, slot, offsets)
    return _differentiable(torch.ops.mla_fast.unpack_rows.default, packed, slot, offsets)


def segment_mean(backend: str, features: Tensor, offsets: Tensor, counts: Tensor | None) -> Tensor:
    """x̄ of every modality [M, s] from packed features [K, s], zeros for one without rows; float32 or wider. Differentiable."""
    if backend == "reference":
        return reference.segment_mean(features, offsets, counts)
    return _differentiable(torch.ops.mla_fast.segment_mean.default, features, offsets, counts)

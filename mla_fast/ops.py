"""The operators and the one place that knows which backend runs them.

``rls_project_``, ``window_project`` and ``entropy_fusion`` are registered with torch by the compiled extension (schemas and CPU
code in csrc/); fakes for torch.compile and the autograd rule of the fusion are added here. ``backend`` is one of

- ``"auto"``: the fastest that works for the tensors' device; a fallback is announced once, with its reason;
- ``"reference"``: ``mla_fast.reference``, plain torch, any device and floating dtype;
- ``"cpp"``: the compiled CPU operators;
- ``"triton"``: the CUDA kernels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from mla_fast import reference

BACKENDS = ("auto", "reference", "cpp", "triton")
ORDERS = ("update_first", "project_first")

try:
    from mla_fast import _C  # noqa: F401  (loading it registers the operators)

    CPP_MISSING = None
except ImportError as error:
    CPP_MISSING = (
        f"the compiled extension did not load ({error}); "
        'build it with: pip install torch "setuptools>=77" && pip install --no-build-isolation mla_fast'
    )
TRITON_MISSING = "this version has no CUDA kernels yet; CUDA tensors use the reference backend"
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
        if serves not in _announced:
            _announced.add(serves)
            warnings.warn(f"mla_fast runs its reference backend on {device.type}: {reason}", stacklevel=3)
        return "reference"
    if backend in ("cpp", "triton"):
        if (reason := MISSING[backend]) is not None:
            raise BackendError(f"backend: {backend!r} is not available: {reason}")
        if backend != serves:
            raise ValueError(f"backend: {backend!r} does not serve tensors on {device.type!r}")
    return backend


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

    With `pending` ([s], zeros to begin with) P is read and written once a step instead of twice: the step's correction
    u = k / √(α + x̄ᵀk) is left there and enters P in the next one. Until then the true P is P − pending pendingᵀ. Neither x_bar
    nor grad may share memory with P or pending then.
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
    if pending is not None and (pending.shape != (s,) or pending.dtype != P.dtype or not pending.is_contiguous()):
        raise ValueError(f"pending: expected contiguous {P.dtype} [{s}], got {pending.dtype} {list(pending.shape)}")
    if pending is not None and pending.requires_grad:
        raise ValueError("pending: expected a tensor that does not require grad: it is state, updated in place")
    if found_inf is not None and found_inf.numel() != 1:
        raise ValueError(f"found_inf: expected one element, got shape {list(found_inf.shape)}")
    for label, t in (("pending", pending), ("found_inf", found_inf)):
        if t is not None and t.device != P.device:
            raise ValueError(f"{label}: expected on {P.device} like P, got {t.device}")
    x = x_bar.detach().to(P.dtype)
    G = grad.detach().to(P.dtype)
    overflow = None if found_inf is None else found_inf.to(torch.float32)
    name = resolve(backend, P.device)
    projected = rls_step(name, P, x, G, alpha_tensor(alpha, P.device), pending, overflow, order == "project_first")
    if name != "reference":  # operators on the stable ABI do not tell autograd of what they change in place
        torch.autograd.graph.increment_version(P if pending is None else (P, pending))
    return projected.to(grad.dtype)


def rls_step(
    backend: str,
    P: Tensor,
    x_bar: Tensor,
    grad: Tensor,
    alpha: Tensor,
    pending: Tensor | None,
    found_inf: Tensor | None,
    project_first: bool,
) -> Tensor:
    """``rls_project_`` without its checks, for callers that made them once: one dtype, alpha as ``alpha_tensor`` gives it."""
    if backend != "reference":
        return torch.ops.mla_fast.rls_project_.default(P, x_bar, grad, alpha, pending, found_inf, project_first)
    if pending is not None:
        rls_fold(backend, P, pending)
    updated, projected = reference.rls_project(P, x_bar, grad, alpha, project_first=project_first)
    good = torch.isfinite(updated.sum() + projected.sum())
    if found_inf is not None:
        good = good & (found_inf == 0).all()
    P.copy_(torch.where(good, updated, P))
    return torch.where(good, projected, grad)


def rls_fold(backend: str, P: Tensor, pending: Tensor) -> None:
    """P ← P − pending pendingᵀ, pending ← 0: the P that ``rls_project_`` with `pending` stands for, to the last bit."""
    if backend != "reference":
        torch.ops.mla_fast.rls_fold_.default(P, pending)
    else:
        P.sub_(torch.outer(pending, pending))
        pending.zero_()


def window_project(means: Tensor, grad: Tensor, alpha: float | Tensor, *, backend: str = "auto") -> Tensor:
    """The gradient projected away from the latest feature means of the *other* modalities, without an s × s matrix.

        P = I;  for each row x̄_j of means:  k = P x̄_j,  P ← P − k kᵀ / (α + x̄_jᵀk);  returns G P

    means [J, s] (J may be 0: G comes back), grad [C, s], both floating; float32 or float64 inside, whichever is wider; the
    result has grad's dtype. alpha > 0, a number or a one-element tensor. Not differentiable.
    """
    _check_projection_inputs(means, "means", grad)
    if means.dim() != 2:
        raise ValueError(f"means: expected [J, s], got {list(means.shape)}")
    dtype = torch.promote_types(torch.promote_types(means.dtype, grad.dtype), torch.float32)
    a = alpha_tensor(alpha, grad.device)
    return window_step(resolve(backend, grad.device), means.detach().to(dtype), grad.detach().to(dtype), a).to(grad.dtype)


def window_step(backend: str, means: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
    """``window_project`` without its checks."""
    if backend != "reference":
        return torch.ops.mla_fast.window_project.default(means, grad, alpha)
    return reference.project(grad, reference.window_projection(means, alpha))


def entropy_fusion(logits: list[Tensor], present: Tensor | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(fused [N, C], weights [N, M], entropies [N, M]) of M tensors [N, C] or one [M, N, C]; ``mla_fast.entropy_fusion``
    checks its arguments and documents it."""
    if backend == "reference":
        stacked = logits[0] if logits[0].dim() == 3 else torch.stack(logits)
        wide = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
        fused, weights, entropies = reference.entropy_fusion(wide, present)
        return fused.to(stacked.dtype), weights, entropies
    op = torch.ops.mla_fast.entropy_fusion.default
    if (torch.is_grad_enabled() and any(z.requires_grad for z in logits)) or torch.compiler.is_compiling():
        return op(logits, present)
    # The autograd rule lives in Python; where no gradient is wanted, going around it saves more than the arithmetic costs.
    with torch._C._AutoDispatchBelowAutograd():
        return op(logits, present)


def _register() -> None:
    """What torch.compile and autograd need to know about the operators."""

    @torch.library.register_fake("mla_fast::rls_project_")
    def _(P, x_bar, grad, alpha, pending=None, found_inf=None, project_first=False):
        return torch.empty_like(grad, memory_format=torch.contiguous_format)

    @torch.library.register_fake("mla_fast::rls_fold_")
    def _(P, pending):
        return None

    @torch.library.register_fake("mla_fast::window_project")
    def _(means, grad, alpha):
        return torch.empty_like(grad, memory_format=torch.contiguous_format)

    @torch.library.register_fake("mla_fast::entropy_fusion")
    def _(logits, present):
        first = logits[0]
        N, C = first.shape[-2:]
        M = first.shape[0] if first.dim() == 3 else len(logits)
        wide = torch.promote_types(first.dtype, torch.float32)
        return first.new_empty(N, C), first.new_empty(N, M, dtype=wide), first.new_empty(N, M, dtype=wide)

    @torch.library.register_fake("mla_fast::entropy_fusion_backward")
    def _(logits, present, weights, entropy, grad_fused, grad_weights, grad_entropy):
        return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in logits]

    def setup(ctx, inputs, output):
        logits, present = inputs
        _, weights, entropy = output
        ctx.modalities = len(logits)
        ctx.has_present = present is not None
        ctx.save_for_backward(*logits, weights, entropy, *([present] if ctx.has_present else []))

    def backward(ctx, grad_fused, grad_weights, grad_entropy):
        logits, (weights, entropy, *rest) = ctx.saved_tensors[: ctx.modalities], ctx.saved_tensors[ctx.modalities :]
        present = rest[0] if ctx.has_present else None
        grads = torch.ops.mla_fast.entropy_fusion_backward(
            list(logits), present, weights, entropy, grad_fused, grad_weights, grad_entropy
        )
        return grads, None

    def no_second_derivative(ctx, *grads):
        raise NotImplementedError('entropy_fusion: differentiable once; use backend="reference" for higher derivatives')

    torch.library.register_autograd("mla_fast::entropy_fusion", backward, setup_context=setup)
    torch.library.register_autograd("mla_fast::entropy_fusion_backward", no_second_derivative)


if CPP_MISSING is None:
    _register()

"""Choose backends, say why one is missing, and define operators for all of them. ``backend`` is one of

- ``"auto"``: the fastest that works on the tensors' device; a fallback is announced once, with its reason;
- ``"reference"``: ``mla_fast.reference``, plain torch, any device and floating dtype;
- ``"cpp"``: the compiled operators of csrc/, on the CPU and, for dispatch, on CUDA;
- ``"triton"``: the kernels of kernels/, on CUDA; on CPU tensors where TRITON_INTERPRET=1 was set before the import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mla_fast.caller import warn

BACKENDS = ("auto", "reference", "cpp", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SCHEMAS: list[str] = []  # of every operator, as it is defined
_SERVES = {"cpu": "cpp", "cuda": "triton"}
_announced: set[str] = set()
R = TypeVar("R")
# The CPU implementations of mla_fast are the compiled ones, so what the interpreter runs on CPU tensors has a library of its own.
_LIBRARIES = {"CUDA": torch.library.Library("mla_fast", "FRAGMENT")}
if INTERPRETED:
    _LIBRARIES["CPU"] = torch.library.Library("mla_fast_interpreted", "FRAGMENT")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here."""


def _shadowed() -> str:
    """Return what to do where a checkout in the working directory hides an installed mla_fast, which may be whole."""
    here = Path(__file__).parents[1].resolve()
    for distribution in importlib.metadata.distributions(name="mla_fast"):
        installed = Path(str(distribution.locate_file("mla_fast")))
        if (installed / "__init__.py").exists() and installed.resolve() != here:
            cure = "go to another folder, or install the checkout itself: pip install --no-build-isolation -e ."
            return f"the checkout in {here.parent} hides the mla_fast installed in {installed}: {cure}"
    return ""


def _why_not(module: str, reason: str, failures: type[Exception] = ImportError) -> str | None:
    """Import a module of ours, which registers what it implements; return why that failed."""
    try:
        importlib.import_module(f"mla_fast.{module}")
    except failures as error:
        return _shadowed() or reason.format(error)
    return None


# For each backend why it cannot run here, or None if it can.
MISSING: dict[str, str | None] = {
    "reference": None,
    "cpp": _why_not(
        "_C",
        "the compiled extension did not load ({}); "
        'build it, in a checkout, with: pip install torch "setuptools>=77" && pip install --no-build-isolation -e .',
    ),
    "cpp on CUDA": "this torch was built without CUDA",
    "triton": "this torch was built for the CPU alone",
}
if torch.version.cuda is not None:
    MISSING["cpp on CUDA"] = _why_not(
        "_C_cuda", "the compiled CUDA module did not load ({}); build it where nvcc is, with MLA_FAST_BUILD=cuda"
    )
if torch.version.cuda is not None or torch.version.hip is not None or INTERPRETED:  # a foreign triton may fail in any way
    MISSING["triton"] = _why_not("kernels", "the Triton kernels did not load ({}); install triton", Exception)


def available(name: str) -> bool:
    """Return whether a backend, a key of ``MISSING``, can run here."""
    return MISSING[name] is None


def resolve(backend: str, device: torch.device) -> str:
    """Return the backend that runs on `device` when `backend` is asked for.

    Raises ValueError for an unknown name or one that does not serve the device, BackendError for one that cannot run here.
    """
    check_choice("backend", backend, BACKENDS)
    serves = _SERVES.get(device.type, "reference")
    reason = MISSING[serves if backend == "auto" else backend]
    if backend == "auto":
        if reason is None:
            return serves
        announce(device.type, reason)
        return "reference"
    if reason is not None:
        raise BackendError(f"backend: {backend!r} is not available: {reason}")
    if backend not in (serves, "reference") and not (backend == "triton" and INTERPRETED):
        raise ValueError(f"backend: {backend!r} does not serve tensors on {device.type!r}")
    return backend


def announce(what: str, reason: str) -> None:
    """Warn, once, that the reference backend runs `what`, and why."""
    if what not in _announced and not torch.compiler.is_compiling():  # which cannot trace a warning
        _announced.add(what)
        warn(f"mla_fast runs its reference backend for {what}: {reason}")


class Operator(Generic[R]):
    """An operator in torch's registry, made from its schema and a fake: a function of its arguments that returns empty results.

    Compiled implementations have registered themselves; a Triton kernel of its name is registered here.
    """

    def __init__(self, schema: str, fake: Callable[..., R], reference: Callable[..., Any] | None):
        self.name, self.fake, self.reference = schema.partition("(")[0], fake, reference
        self.overloads: dict[str, Callable[..., R]] = {}
        kernel = getattr(importlib.import_module("mla_fast.kernels"), self.name, None) if available("triton") else None
        SCHEMAS.append(schema)
        for device, library in _LIBRARIES.items():
            library.define(schema)
            if kernel is not None:
                library.impl(self.name, _on_its_device(kernel) if device == "CUDA" else kernel, device)
            torch.library.register_fake(f"{library.ns}::{self.name}", fake)
            self.overloads[library.ns] = getattr(getattr(torch.ops, library.ns), self.name).default

    def differentiate(self, backward: Callable[..., Any], save: Callable[..., None] | None = None) -> None:
        """Register an autograd rule: save(ctx, inputs, output), then backward(library, ctx, *grads).

        vmap, which could lose gradients below the rule, is refused; torch itself refuses torch.func's reverse mode.
        """
        for library in self.overloads:
            rule = functools.partial(backward, library)
            torch.library.register_autograd(f"{library}::{self.name}", rule, setup_context=save)
            torch.library.register_vmap(f"{library}::{self.name}", self._refuse)

    def _refuse(self, *_: Any) -> None:
        raise NotImplementedError(f'{self.name}: torch.func and forward-mode derivatives need backend="reference"')

    def on(self, backend: str, device: torch.device) -> Callable[..., R]:
        """Return what runs `backend` on `device`."""
        if backend == "reference" and self.reference is not None:
            return self.reference
        interpreted = backend == "triton" and device.type == "cpu"
        return self.overloads["mla_fast_interpreted" if interpreted else "mla_fast"]

    def apply(self, backend: str, tensors: Tensor | Sequence[Tensor], *arguments: Any) -> R:
        """Call a differentiable operator of `tensors`, around its autograd rule where no gradient is wanted."""
        listed = (tensors,) if isinstance(tensors, Tensor) else tensors
        op, wanted = self.on(backend, listed[0].device), False
        if backend == "reference" or torch.compiler.is_compiling():
            return op(tensors, *arguments)
        for t in listed:
            wanted |= t.requires_grad
            if forward_ad.unpack_dual(t).tangent is not None:  # the operator would take it for a constant
                self._refuse()
        if wanted and torch.is_grad_enabled():
            return op(tensors, *arguments)
        # Torch's private guard, since the rules are Python: through them entropy_fusion takes 1.8 times as long on logits
        # [2, 64, 6] and 1.4 times on [3, 64, 101], and packing three times [64, 512] takes 1.3 times as long (CPU, one thread).
        with torch._C._AutoDispatchBelowAutograd():
            return op(tensors, *arguments)


def operator(schema: str, reference: Callable[..., Any] | None = None) -> Callable[[Callable[..., R]], Operator[R]]:
    """Define an operator, and what ``"reference"`` runs in its place if that takes the same arguments; decorates its fake."""
    return lambda fake: Operator(schema, fake, reference)


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first tensor: Triton launches on the current one, wherever the tensors are."""

    @functools.wraps(kernel)
    def guarded(first: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        device = (first if isinstance(first, Tensor) else first[0]).get_device()
        if device == torch.cuda.current_device():
            return kernel(first, *args, **kwargs)
        with torch.cuda.device(device):
            return kernel(first, *args, **kwargs)

    return guarded


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Keep plain torch from computing in what autocast prefers."""
    served = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if served else contextlib.nullcontext()


def alpha_tensor(alpha: float | Tensor, device: torch.device) -> Tensor:
    """Return α as the operators take it: 0-d float64 on the tensors' device, so that changing it never waits for the device."""
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1:
            raise ValueError(f"alpha: expected a number or a tensor with one element, got shape {list(alpha.shape)}")
        if alpha.device.type == "cpu":
            check_alpha(alpha.item())
        return alpha.detach().to(device=device, dtype=torch.float64).reshape(())
    return torch.full((), check_alpha(alpha), dtype=torch.float64, device=device)


def check_alpha(alpha: float) -> float:
    """Return α; raise ValueError unless it is a positive finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha: expected a positive finite number, got {alpha!r}")
    return float(alpha)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return `value`; raise ValueError unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_projected(name: str, means: Tensor, grad: Tensor) -> None:
    """Raise ValueError or TypeError unless grad [C, s] fits feature means [..., s], which the caller calls `name`."""
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

"""The operators as torch knows them: schemas, implementations, fakes for torch.compile and autograd rules.

csrc/ implements them for the CPU and, for dispatch, for CUDA; kernels/ for CUDA. Whatever of these is absent says why.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from mla_fast import reference

SCHEMAS = (
    "head_check_(Tensor[] looked_at, int layers, Tensor(a!) account, Tensor(b!)[] first, Tensor? found_inf, Tensor[] kept, "
    "Tensor(c!)[] snapshot) -> (Tensor, Tensor, Tensor)",
    "head_restore_(Tensor(a!)[] tensors, Tensor[] snapshot, Tensor bad) -> ()",
    "rls_project_(Tensor(a!) P, Tensor x_bar, Tensor grad, Tensor alpha, Tensor(b!)? pending=None, Tensor(c!)? slot=None, "
    "Tensor? found_inf=None, bool project_first=False) -> Tensor",
    "rls_step_(Tensor(a!) P, Tensor x_bar, Tensor(b!) grad, Tensor alpha, Tensor(c!) pending, Tensor(d!)? slot=None, "
    "Tensor? found_inf=None, bool project_first=False) -> Tensor",
    "rls_fold_(Tensor(a!) P, Tensor(b!) pending, Tensor(c!)? slot=None) -> ()",
    "window_project(Tensor means, Tensor grad, Tensor alpha) -> Tensor",
    "window_step_(Tensor(a!) means, Tensor(b!) gram, int own, Tensor x_bar, Tensor(c!) grad, Tensor alpha, "
    "Tensor? found_inf=None) -> Tensor",
    "entropy_fusion(Tensor[] logits, Tensor? present, Tensor? slot) -> (Tensor, Tensor, Tensor)",
    "entropy_fusion_backward(Tensor[] logits, Tensor? present, Tensor weights, Tensor entropy, Tensor? grad_fused, "
    "Tensor? grad_weights, Tensor? grad_entropy, Tensor? slot) -> Tensor[]",
    "dispatch_plan(Tensor present, bool padded=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "pack_rows(Tensor[] inputs, Tensor rows, Tensor offsets, Tensor slot, int[] sizes) -> Tensor[]",
    "pack_features(Tensor[] features, Tensor rows, Tensor offsets, Tensor slot, int[] sizes) -> (Tensor[], Tensor[])",
    "unpack_rows(Tensor[] packed, Tensor slot, Tensor offsets) -> Tensor[]",
    "segment_mean(Tensor features, Tensor offsets, Tensor? counts=None) -> Tensor",
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The CPU implementations of mla_fast are the compiled ones, so what the interpreter runs on CPU tensors has a library of its own.
_libraries = {
    device: torch.library.Library(name, "FRAGMENT")
    for name, device in (("mla_fast", "CUDA"), ("mla_fast_interpreted", "CPU"))
    if device == "CUDA" or INTERPRETED
}
for _library in _libraries.values():
    for _schema in SCHEMAS:
        _library.define(_schema)

try:
    from mla_fast import _C  # noqa: F401  (loading it registers the CPU implementations)

    CPP_MISSING = None
except ImportError as error:
    CPP_MISSING = (
        f"the compiled extension did not load ({error}); "
        'build it, in a checkout, with: pip install torch "setuptools>=77" && pip install --no-build-isolation .'
    )

CUDA_MISSING = None
if torch.version.cuda is None:
    CUDA_MISSING = "this torch was built without CUDA"
else:
    try:
        from mla_fast import _C_cuda  # noqa: F401
    except ImportError as error:
        CUDA_MISSING = f"the compiled CUDA module did not load ({error}); build it where nvcc is, with MLA_FAST_BUILD=cuda"


def _on_its_device(implementation: Callable) -> Callable:
    """Triton launches on the current device, wherever the tensors are."""

    @functools.wraps(implementation)
    def guarded(first, *args, **kwargs):
        tensor = first if isinstance(first, Tensor) else first[0]
        if tensor.get_device() == torch.cuda.current_device():
            return implementation(first, *args, **kwargs)
        with torch.cuda.device(tensor.get_device()):
            return implementation(first, *args, **kwargs)

    return guarded


TRITON_MISSING = None
if torch.version.cuda is None and torch.version.hip is None and not INTERPRETED:
    TRITON_MISSING = "this torch was built for the CPU alone"
else:
    try:
        from mla_fast import kernels

        for _device, _library in _libraries.items():
            for _schema in SCHEMAS:
                _name = _schema.split("(")[0]
                if (_kernel := getattr(kernels, _name, None)) is not None:
                    _library.impl(_name, _on_its_device(_kernel) if _device == "CUDA" else _kernel, _device)
    except Exception as error:  # whatever a foreign version of triton makes of them, importing this goes on
        TRITON_MISSING = f"the Triton kernels did not load ({error}); install triton"


def segment_mean_backward(grad: Tensor, offsets: Tensor, counts: Tensor | None, K: int) -> Tensor:
    """∂L/∂features [K, s] from that of the means [M, s]: each row of a segment gets its mean's share."""
    begin = offsets[:-1]
    counts = offsets[1:] - begin if counts is None else counts
    k = torch.arange(K, device=grad.device)
    m = torch.searchsorted(offsets[1:].contiguous(), k, right=True).clamp_max(len(begin) - 1)
    inside = (k >= begin[m]) & (k < begin[m] + counts[m])
    return torch.where(inside[:, None], grad[m] / counts[m].clamp_min(1)[:, None], 0)


def _register(library: str) -> None:
    """What torch.compile and autograd need to know about the operators."""

    @torch.library.register_fake(f"{library}::head_check_")
    def _(looked_at, layers, account, first, found_inf, kept, snapshot):
        wide = torch.float64 if any(t.dtype == torch.float64 for t in looked_at) else torch.float32
        sizes = ((), torch.float32), (2 * layers, wide), (layers, torch.float32)
        return tuple(account.new_empty(n, dtype=dtype) for n, dtype in sizes)

    @torch.library.register_fake(f"{library}::head_restore_")
    def _(tensors, snapshot, bad):
        return None

    def like_grad(grad_at):
        return lambda *arguments: torch.empty_like(arguments[grad_at], memory_format=torch.contiguous_format)

    for name, grad_at in (("rls_project_", 2), ("window_project", 1)):
        torch.library.register_fake(f"{library}::{name}", like_grad(grad_at))

    @torch.library.register_fake(f"{library}::rls_step_")
    def _(P, x_bar, grad, alpha, pending, slot=None, found_inf=None, project_first=False):
        return P.new_empty(torch.library.get_ctx().new_dynamic_size())

    @torch.library.register_fake(f"{library}::window_step_")
    def _(means, gram, own, x_bar, grad, alpha, found_inf=None):
        wide = torch.promote_types(torch.promote_types(means.dtype, grad.dtype), torch.float32)
        return grad.new_empty(grad.shape[0], dtype=wide)

    @torch.library.register_fake(f"{library}::rls_fold_")
    def _(P, pending, slot=None):
        return None

    @torch.library.register_fake(f"{library}::entropy_fusion")
    def _(logits, present, slot):
        first = logits[0]
        N, C = first.shape[-2:]
        M = first.shape[0] if first.dim() == 3 else len(logits)
        if slot is not None:
            N, M = slot.shape
        wide = torch.promote_types(first.dtype, torch.float32)
        return first.new_empty(N, C), first.new_empty(N, M, dtype=wide), first.new_empty(N, M, dtype=wide)

    @torch.library.register_fake(f"{library}::entropy_fusion_backward")
    def _(logits, present, weights, entropy, grad_fused, grad_weights, grad_entropy, slot):
        return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in logits]

    @torch.library.register_fake(f"{library}::dispatch_plan")
    def _(present, padded=False):
        N, M = present.shape
        integers = [present.new_empty(shape, dtype=torch.int64) for shape in ((N * M,), (M + 1,), (M,), (N, M))]
        return tuple(integers)

    @torch.library.register_fake(f"{library}::pack_rows")
    def _(inputs, rows, offsets, slot, sizes):
        return [x.new_empty(size, *x.shape[1:]) for x, size in zip(inputs, sizes, strict=True)]

    @torch.library.register_fake(f"{library}::pack_features")
    def _(features, rows, offsets, slot, sizes):
        packed = [x.new_empty(size, *x.shape[1:]) for x, size in zip(features, sizes, strict=True)]
        return packed, [x.new_empty(x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32)) for x in features]

    @torch.library.register_fake(f"{library}::unpack_rows")
    def _(packed, slot, offsets):
        return [x.new_empty(slot.shape[0], *x.shape[1:]) for x in packed]

    @torch.library.register_fake(f"{library}::segment_mean")
    def _(features, offsets, counts=None):
        wide = torch.promote_types(features.dtype, torch.float32)
        return features.new_empty(offsets.shape[0] - 1, features.shape[1], dtype=wide)

    def setup(ctx, inputs, output):
        logits, present, slot = inputs
        _, weights, entropy = output
        ctx.tensors = len(logits)
        ctx.save_for_backward(*logits, weights, entropy, present, slot)

    def backward(ctx, grad_fused, grad_weights, grad_entropy):
        logits, (weights, entropy, present, slot) = ctx.saved_tensors[: ctx.tensors], ctx.saved_tensors[ctx.tensors :]
        grads = getattr(torch.ops, library).entropy_fusion_backward(
            list(logits), present, weights, entropy, grad_fused, grad_weights, grad_entropy, slot
        )
        return grads, None, None

    def no_second_derivative(ctx, *grads):
        raise NotImplementedError('entropy_fusion: differentiable once; use backend="reference" for higher derivatives')

    def setup_pack(ctx, inputs, output):
        _, _, offsets, slot, _ = inputs
        ctx.save_for_backward(offsets, slot)

    def pack_backward(ctx, grads):
        offsets, slot = ctx.saved_tensors
        return getattr(torch.ops, library).unpack_rows(list(grads), slot, offsets), None, None, None, None

    def features_backward(ctx, grads, grad_means):
        offsets, slot = ctx.saved_tensors
        counts = (slot >= 0).sum(0).clamp_min(1)
        grads = [g + (mean / n).to(g.dtype) for g, mean, n in zip(grads, grad_means, counts, strict=True)]
        return pack_backward(ctx, grads)

    def setup_unpack(ctx, inputs, output):
        packed, slot, offsets = inputs
        ctx.save_for_backward(slot, offsets)
        ctx.sizes = [len(x) for x in packed]

    def unpack_backward(ctx, grads):
        slot, offsets = ctx.saved_tensors
        rows = reference.packed_rows(slot, slot.numel())
        return getattr(torch.ops, library).pack_rows(list(grads), rows, offsets, slot, ctx.sizes), None, None

    def setup_mean(ctx, inputs, output):
        features, offsets, counts = inputs
        ctx.save_for_backward(offsets, counts)
        ctx.like = features.shape[0], features.dtype

    def mean_backward(ctx, grad):
        offsets, counts = ctx.saved_tensors
        K, dtype = ctx.like
        return segment_mean_backward(grad, offsets, counts, K).to(dtype), None, None

    torch.library.register_autograd(f"{library}::pack_rows", pack_backward, setup_context=setup_pack)
    torch.library.register_autograd(f"{library}::pack_features", features_backward, setup_context=setup_pack)
    torch.library.register_autograd(f"{library}::unpack_rows", unpack_backward, setup_context=setup_unpack)
    torch.library.register_autograd(f"{library}::segment_mean", mean_backward, setup_context=setup_mean)
    torch.library.register_autograd(f"{library}::entropy_fusion", backward, setup_context=setup)
    torch.library.register_autograd(f"{library}::entropy_fusion_backward", no_second_derivative)


for _library in _libraries.values():
    _register(_library.ns)

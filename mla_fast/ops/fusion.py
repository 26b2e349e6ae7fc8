"""Test-time fusion: logits → entropy → weights → fused logits (eqs. 6–8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla_fast import reference
from mla_fast.inputs import describe
from mla_fast.ops.backend import announce, available, operator, resolve, without_autocast

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


class Fused(NamedTuple):
    """Logits [N, C] in the input's dtype; weights and entropy [N, M] in float32 (float64 for float64 logits)."""

    logits: Tensor
    weights: Tensor
    entropy: Tensor


@operator("entropy_fusion(Tensor[] logits, Tensor? present, Tensor? slot) -> (Tensor, Tensor, Tensor)")
def _fusion(logits: list[Tensor], present: Tensor | None, slot: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    first = logits[0]
    N, C = first.shape[-2:]
    M = first.shape[0] if first.dim() == 3 else len(logits)
    if slot is not None:
        N, M = slot.shape
    wide = torch.promote_types(first.dtype, torch.float32)
    return first.new_empty(N, C), first.new_empty(N, M, dtype=wide), first.new_empty(N, M, dtype=wide)


@operator(
    "entropy_fusion_backward(Tensor[] logits, Tensor? present, Tensor weights, Tensor entropy, Tensor? grad_fused, "
    "Tensor? grad_weights, Tensor? grad_entropy, Tensor? slot) -> Tensor[]"
)
def _fusion_backward(logits: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in logits]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, present, slot = inputs
    _, weights, entropy = output
    ctx.tensors = len(logits)
    ctx.save_for_backward(*logits, present, weights, entropy, slot)


def _backward(library: str, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    logits, (present, weights, entropy, slot) = ctx.saved_tensors[: ctx.tensors], ctx.saved_tensors[ctx.tensors :]
    return _fusion_backward.overloads[library](list(logits), present, weights, entropy, *grads, slot), None, None


def _no_second_derivative(library: str, ctx: Any, *grads: Any) -> None:
    raise NotImplementedError('entropy_fusion: differentiable once; use backend="reference" for higher derivatives')


_fusion.differentiate(_backward, _save)
_fusion_backward.differentiate(_no_second_derivative)


def entropy_fusion(
    logits: Tensor | Sequence[Tensor], present: Tensor | None = None, seen: Tensor | None = None, *, backend: str = "auto"
) -> Fused:
    """Mix the modalities' logits with weights that fall with their entropy, sample by sample (eqs. 6–8).

        e_m = −Σ p log p, p = softmax(z_m)        λ = softmax(−e) over the present modalities        fused = Σ_m λ_m z_m

    logits is one tensor [M, N, C], or M tensors [N, C], in float32, float64, bfloat16 or float16 (float32 inside for the last
    two). present, bool [N, M], says which modality each sample has; without it all are there. The logits of an absent modality
    are not read: they may hold anything, and get weight, entropy and gradient 0. A sample with nothing present gets zeros.

    seen, bool [M, C] (best on the CPU, where nobody waits for it), says on which classes each modality was trained, and lets it
    vote on no others: it re-ranks within what it has seen,

        p(c) = p_others(S) · p_fused(c | S) for c in S, p_others(c) outside,

    the mass of S coming from those that have seen more; ``reference.seen_fusion`` has it for sets of any kind. Classes that
    nobody present has seen have logit −inf. Where all have seen all it is as without `seen`, bit for bit.

    With more than eight modalities CUDA tensors are fused by the reference backend, in plain torch.
    Differentiable once in the logits; higher derivatives, forward mode and torch.func need backend="reference".

    Raises ValueError or TypeError that names the argument, what it was and what it should be.
    """
    if seen is None and backend == "auto" and (fused := _at_once(logits, present)) is not None:
        return fused
    if isinstance(logits, Tensor):
        if logits.dim() != 3:
            raise ValueError(f"logits: expected [M, N, C] or a sequence of [N, C], got a tensor of shape {list(logits.shape)}")
        tensors, first = [logits], logits
        M, N, C = logits.shape
    else:
        tensors = _checked_list(logits)
        first = tensors[0]
        M, (N, C) = len(tensors), first.shape
    if M == 0 or C == 0:
        raise ValueError(f"logits: expected at least one modality and one class, got M = {M} and C = {C}")
    check_dtype(first)
    if present is not None:
        _check_present(present, (N, M), first.device)
    backend = resolve(backend, first.device)
    if seen is None or _everything(seen, (M, C)):
        return _fuse(backend, tensors, present, None, M)
    by_modality = tensors[0].unbind() if tensors[0].dim() == 3 else tensors

    def fuse(seers: list[int], columns: list[int]) -> Fused:
        here = None if present is None else present[:, seers]
        return _fuse(backend, [_columns(by_modality[m], columns) for m in seers], here, None, len(seers))

    return _fuse_seen(fuse, seen, torch.ones(N, M, dtype=torch.bool, device=first.device) if present is None else present, first)


def _at_once(logits: Tensor | Sequence[Tensor], present: Tensor | None) -> Fused | None:
    """Fuse on the CPU what the operator alone checks; return None where it refuses, for the checks in Python to say why.

    With these first, logits [2, 64, 6] take 1.2 times as long, [3, 64, 101] 1.13 times, in a list 1.45 and 1.35 (one thread).
    """
    tensors, dims = ([logits], 3) if isinstance(logits, Tensor) else (logits, 2)
    if type(tensors) not in (list, tuple) or not tensors or not available("cpp") or torch.compiler.is_compiling():
        return None
    for z in tensors:
        if type(z) is not Tensor or not z.is_cpu or z.dim() != dims:
            return None
    if present is not None and (type(present) is not Tensor or not present.is_cpu):
        return None
    try:
        return Fused(*_fusion.apply("cpp", tensors, present, None))
    except RuntimeError:
        return None


def fuse_packed(logits: Tensor, slot: Tensor, seen: Tensor | None, backend: str) -> Fused:
    """Fuse packed rows [K, C], of which slot [N, M] is the row of each (sample, modality) or −1; without checks of these."""
    backend, M = resolve(backend, logits.device), slot.shape[1]
    if seen is None or _everything(seen, (M, logits.shape[1])):
        return _fuse(backend, [logits], None, slot, M)

    def fuse(seers: list[int], columns: list[int]) -> Fused:
        return _fuse(backend, [_columns(logits, columns)], None, slot[:, seers].contiguous(), len(seers))

    return _fuse_seen(fuse, seen, slot >= 0, logits)


def _columns(logits: Tensor, columns: list[int]) -> Tensor:
    return logits if len(columns) == logits.shape[1] else logits[:, columns]


def _fuse_seen(fuse: Callable[[list[int], list[int]], Fused], seen: Tensor, present: Tensor, like: Tensor) -> Fused:
    """Do what ``reference.seen_fusion`` says, one set of classes after another, each by the operator over who has seen it.

    fuse: (modalities, classes) → their fusion; present: bool [N, M]; like: logits, for dtype and device.
    """
    sets = [frozenset(row.nonzero().flatten().tolist()) for row in seen.cpu()]
    wide, (N, M), C = torch.promote_types(like.dtype, torch.float32), present.shape, seen.shape[1]
    unseen = (~seen).to(like.device, torch.float32)
    found, covered = like.new_zeros(N, C, dtype=wide), present.new_zeros(N, C)  # logits, and of which classes there are any
    weights, entropies = like.new_zeros(N, C, M, dtype=wide), like.new_zeros(N, M, dtype=wide)
    for S in reference.closure(sets):
        columns, seers = sorted(S), [m for m in range(M) if sets[m] >= S]
        f, lambdas, e = fuse(seers, columns)
        f = f.to(wide)
        # S counts for a sample if it is what its present seers have in common; of other samples' sets it is none.
        here, inside = present[:, seers], torch.zeros(C, dtype=torch.bool, device=like.device)
        inside[columns] = True
        taken = here.any(1) & ((here.float() @ unseen[seers] > 0) | inside).all(1)
        shifted = f + _shift(found, covered, f, columns)[:, None]
        write = taken[:, None] & inside
        at, who = (torch.tensor(index, device=like.device) for index in (columns, seers))
        found = torch.where(write, found.index_copy(1, at, shifted), found)
        weights = torch.where(write[..., None], torch.zeros_like(entropies).index_copy(1, who, lambdas)[:, None], weights)
        own = torch.tensor([sets[m] == S for m in range(M)], device=like.device)
        entropies = torch.where(own, entropies.index_copy(1, who, e), entropies)
        covered = covered | write
    some = covered.any(1, keepdim=True)
    logits = torch.where(covered, found, torch.where(some, -torch.inf, 0.0)).to(like.dtype)
    answer = logits.argmax(1)[:, None, None].expand(N, 1, M)
    return Fused(logits, weights.gather(1, answer).squeeze(1), entropies)


def _shift(found: Tensor, covered: Tensor, f: Tensor, columns: list[int]) -> Tensor:
    """Return what is added to the logits f [N, S] of classes `columns` to stand beside those found so far [N, C]."""
    common = covered[:, columns]
    mass = [z.masked_fill(~common, -torch.inf).logsumexp(1) for z in (found[:, columns], f)]
    comparable = common.any(1) & mass[0].isfinite() & mass[1].isfinite()
    shift = torch.where(comparable, mass[0] - mass[1], 0)
    some = covered.any(1)
    apart = some & ~common.any(1)
    confidence = [_mass_and_entropy(found, covered | ~some[:, None]), _mass_and_entropy(f, torch.ones_like(common))]
    return torch.where(apart, confidence[0] - confidence[1], shift)


def _mass_and_entropy(z: Tensor, of: Tensor) -> Tensor:
    """Return log Σ exp z − Σ p log p over those that count, [N, C] → [N]; p log p as p z, which has a derivative at p = 0."""
    z, counted = z.masked_fill(~of, 0), z.masked_fill(~of, -torch.inf)
    return 2 * counted.logsumexp(1) - (counted.softmax(1) * z).sum(1)


def _everything(seen: Tensor, shape: tuple[int, int]) -> bool:
    """Check `seen`; returns whether all have seen all."""
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        raise TypeError(f"seen: expected a bool tensor, got {describe(seen)}")
    if seen.shape != shape:
        raise ValueError(f"seen: expected {list(shape)} (modalities, classes) to match logits, got {list(seen.shape)}")
    return bool(seen.all())


def _fuse(backend: str, logits: list[Tensor], present: Tensor | None, slot: Tensor | None, M: int) -> Fused:
    if backend == "triton":
        from mla_fast.kernels.launch import UNROLLED

        if M > UNROLLED:
            announce(f"entropy fusion of {M} modalities", f"the kernel takes at most {UNROLLED}")
            backend = "reference"
    if backend != "reference":
        return Fused(*_fusion.apply(backend, logits, present, slot))
    if slot is not None:
        present, logits = slot >= 0, reference.unpack_rows(logits * M, slot, slot.new_zeros(M + 1))
    stacked = logits[0] if logits[0].dim() == 3 else torch.stack(logits)
    with without_autocast(stacked.device):
        wide = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
        fused, weights, entropies = reference.entropy_fusion(wide, present)
        return Fused(fused.to(stacked.dtype), weights, entropies)


def check_dtype(logits: Tensor) -> None:
    """Raise TypeError unless the logits have a dtype that is fused."""
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits: expected float32, float64, bfloat16 or float16, got {logits.dtype}")


def _check_present(present: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        raise TypeError(f"present: expected a bool tensor, got {describe(present)}")
    if present.shape != shape:
        expected = f"{list(shape)} (samples, modalities)"
        raise ValueError(f"present: expected {expected} to match logits, got {list(present.shape)}")
    if present.device != device:
        raise ValueError(f"present: expected on {device} like logits, got {present.device}")


def _checked_list(logits: Sequence[Tensor]) -> list[Tensor]:
    """The modalities' logits, of one shape [N, C], dtype and device."""
    if not isinstance(logits, Sequence) or not all(isinstance(z, Tensor) for z in logits):
        raise TypeError(f"logits: expected a tensor or a sequence of tensors, got {describe(logits)}")
    if not logits:
        raise ValueError("logits: expected at least one modality, got none")
    first = logits[0]
    for z in logits:
        if z.dim() != 2 or z.shape != first.shape:
            raise ValueError(f"logits: expected tensors of one shape [N, C], got {', '.join(str(list(t.shape)) for t in logits)}")
        if z.dtype != first.dtype or z.device != first.device:
            kinds = ", ".join(f"{t.dtype} on {t.device}" for t in logits)
            raise ValueError(f"logits: expected one dtype and device, got {kinds}")
    return list(logits)

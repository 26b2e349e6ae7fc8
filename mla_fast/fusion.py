"""Test-time fusion: logits → entropy → weights → fused logits (eqs. 6–8)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mla_fast import ops
from mla_fast.inputs import outline


class Fused(NamedTuple):
    """Logits [N, C] in the input's dtype; weights and entropy [N, M] in float32 (float64 for float64 logits)."""

    logits: Tensor
    weights: Tensor
    entropy: Tensor


def entropy_fusion(logits: Tensor | Sequence[Tensor], present: Tensor | None = None, *, backend: str = "auto") -> Fused:
    """Mixes the modalities' logits with weights that fall with their entropy, sample by sample (eqs. 6–8).

        e_m = −Σ p log p, p = softmax(z_m)        λ = softmax(−e) over the present modalities        fused = Σ_m λ_m z_m

    logits [M, N, C], or M tensors [N, C], in float32, float64, bfloat16 or float16 (float32 inside for the last two).
    present bool [N, M] says which modality each sample has; None: all. The logits of an absent modality are not read: they
    may hold anything, and get weight, entropy and gradient 0. A sample with nothing present gets zeros throughout.

    Of more than eight modalities CUDA tensors go the way of the reference backend, in plain torch.
    Differentiable once in the logits; for higher derivatives, forward mode and torch.func use backend="reference".
    Raises ValueError or TypeError that names the argument, what it was and what it should be.
    """
    if backend == "auto" and (at_once := ops.fuse_at_once(logits, present)) is not None:
        return _fused(at_once)
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
    device = first.device
    if present is not None:
        if not isinstance(present, Tensor) or present.dtype != torch.bool:
            raise TypeError(f"present: expected a bool tensor, got {outline(present)}")
        if present.shape != (N, M):
            raise ValueError(f"present: expected [{N}, {M}] (samples, modalities) to match logits, got {list(present.shape)}")
        if present.device != device:
            raise ValueError(f"present: expected on {device} like logits, got {present.device}")
    return _fused(ops.entropy_fusion(tensors, present, ops.resolve(backend, device)))


_fused = functools.partial(tuple.__new__, Fused)
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def check_dtype(logits: Tensor) -> None:
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits: expected float32, float64, bfloat16 or float16, got {logits.dtype}")


def _checked_list(logits: Sequence[Tensor]) -> list[Tensor]:
    """The modalities' logits, of one shape [N, C], dtype and device."""
    if not isinstance(logits, Sequence) or not all(isinstance(z, Tensor) for z in logits):
        raise TypeError(f"logits: expected a tensor or a sequence of tensors, got {outline(logits)}")
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

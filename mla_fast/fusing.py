"""How a model fuses its modalities' logits: by certainty, or as a plain mean."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_fast.ops.dispatch import DispatchPlan
from mla_fast.ops.fusion import Fused, entropy_fusion

FUSIONS = ("entropy", "mean")


def fuse(fusion: str, logits: Tensor, modalities: int, plan: DispatchPlan | None, seen: Tensor | None) -> Fused:
    """Return the fusion of logits [K, C], one modality after another, by ``"entropy"`` (eqs. 6–8) or as the ``"mean"``.

    plan: which samples have which modality, by default all of them all; seen: of ``entropy_fusion``; the mean has no use for it.
    """
    if fusion == "mean":
        return _mean(logits, modalities, plan)
    return entropy_fusion(logits.unflatten(0, (modalities, -1)), seen=seen) if plan is None else plan.fuse(logits, seen)


def _mean(logits: Tensor, modalities: int, plan: DispatchPlan | None) -> Fused:
    """Weigh those that are present alike, which is eq. 8 of equal entropies: they are 0."""
    if plan is None:
        z = logits.unflatten(0, (modalities, -1))
        present = torch.ones(z.shape[1], modalities, dtype=torch.bool, device=z.device)
    else:
        z, present = torch.stack(plan.unpack(list(logits.split(plan.counts)))), plan.present
    wide = torch.promote_types(logits.dtype, torch.float32)
    weights = present.to(wide) / present.sum(1, keepdim=True).clamp(min=1)  # [N, M]
    fused = torch.einsum("mnc,nm->nc", z.to(wide), weights)
    return Fused(fused.to(logits.dtype), weights, torch.zeros_like(weights))

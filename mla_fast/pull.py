"""What an interaction head asks of a batch: its own gradients, and how it pulls at the features of each modality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mla_fast.batch import BatchRows, Rows, Whole
from mla_fast.distributed import rank_and_size
from mla_fast.head import on_host
from mla_fast.interaction import corrected_loss, paired
from mla_fast.model import MultimodalModel, unwrap_ddp
from mla_fast.optimizer import MLAOptimizer

Features = Mapping[str, Tensor]


class Pull:
    """The gradients of L_r: ∂L_r/∂h_m of each modality's packed features in each batch, and the interaction's own.

    They are taken of the features and the head as the batch finds them, before any step; the interaction's own are held back
    until ``restore``, or every modality's step would move it.
    """

    def __init__(self, model: MultimodalModel, optimizer: MLAOptimizer, features: Sequence[Features], wholes: Sequence[Whole]):
        assert model.interaction is not None
        self._parameters = list(model.interaction.parameters())
        detached = unwrap_ddp(model.interaction).gradient == "detached"
        leaves = [{m: h.detach().requires_grad_(not detached) for m, h in of_batch.items()} for of_batch in features]
        total = _total(wholes, optimizer.process_group, optimizer.device)
        losses = [_loss(model, h, whole, total) for h, whole in zip(leaves, wholes, strict=True)]
        torch.autograd.backward(losses)
        found = [{m: x.grad for m, x in h.items() if x.grad is not None} for h in leaves]
        own = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        self.of_features, self._own = self._finite(optimizer, found, own)

    def _finite(
        self, optimizer: MLAOptimizer, found: list[dict[str, Tensor]], own: list[Tensor | None]
    ) -> tuple[list[dict[str, Tensor]], list[Tensor | None]]:
        """Drop all of it where something is not finite; on a device, where nobody waits to see it, it becomes zeros."""
        gradients = [g for of_batch in found for g in of_batch.values()] + [g for g in own if g is not None]
        if not gradients:
            return found, own
        size = torch.stack(torch._foreach_norm(gradients)).sum()
        if size.device.type != "cpu":
            fine = torch.isfinite(size)
            for g in gradients:
                g.copy_(torch.where(fine, g, 0))
        elif not math.isfinite(size):
            optimizer.skip_nonfinite()
            return [{} for _ in found], [None] * len(own)
        return found, own

    def at(self, batch: int, modality: str) -> Tensor | None:
        """Return ∂L_r/∂h [n, s] of a modality's packed features; None where L_r does not move its encoder."""
        return self.of_features[batch].get(modality)

    def restore(self) -> None:
        """Give the interaction's parameters their gradients back, for the step that moves them."""
        for p, g in zip(self._parameters, self._own, strict=True):
            p.grad = g


def pull_of(
    model: MultimodalModel, optimizer: MLAOptimizer, features: Sequence[Features], batches: Sequence[Mapping[str, Rows]]
) -> Pull | None:
    """Return what an interaction asks of these batches; None without one, and where no sample has two modalities."""
    if model.interaction is None:
        return None
    wholes = [rows.whole if isinstance(rows, BatchRows) else None for rows in batches]
    widths = unwrap_ddp(model.interaction).widths
    complete = [_complete(h, rows, whole, widths) for h, rows, whole in zip(features, batches, wholes, strict=True)]
    parts = [(h, whole) for h, whole in zip(complete, wholes, strict=True) if h is not None and whole is not None]
    if len(parts) < len(batches) or (optimizer.process_group is None and all(_nobody_paired(whole) for _, whole in parts)):
        return None
    return Pull(model, optimizer, *zip(*parts, strict=True))


def _complete(features: Features, rows: Mapping[str, Rows], whole: Whole | None, widths: dict[str, int]) -> Features | None:
    """Return features of all the modalities of a batch, [0, s] where one has no rows; None where a lone row was left out."""
    if whole is None or any(len(rows[m].target) and m not in features for m in rows):
        return None
    some = next(iter(features.values()), None)
    return None if some is None else {m: features[m] if m in features else some.new_empty(0, widths[m]) for m in rows}


def _nobody_paired(whole: Whole) -> bool:
    """Whether no sample has two modalities, where the host knows."""
    return whole.present is not None and on_host(whole.present) and not paired(whole.present).any()


def _loss(model: MultimodalModel, features: Features, whole: Whole, total: Tensor) -> Tensor:
    sizes = [len(h) for h in features.values()]
    with torch.no_grad():
        logits = unwrap_ddp(model.head)(torch.cat(list(features.values()))).split(sizes)
        stacked = torch.stack(list(whole.unpack(dict(zip(features, logits, strict=True))).values()))
    assert model.interaction is not None
    with torch.enable_grad():
        r = model.interaction(whole.unpack(dict(features)), whole.present)
        return corrected_loss(stacked, r, whole.target, whole.present, total)


def _total(wholes: Sequence[Whole], group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Return the number of samples that L_r is the mean of, 0-d; over ranks, each of which has its share of the mean."""
    counts = [torch.full((), len(w.target), device=device) if w.present is None else paired(w.present).sum() for w in wholes]
    total = torch.stack(counts).sum().float()
    if group is not None:
        dist.all_reduce(total, group=group)
        total /= rank_and_size(group)[1]
    return total.clamp(min=1e-9 if group is not None else 1)

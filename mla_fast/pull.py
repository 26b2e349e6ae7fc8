"""What an interaction head asks of a batch: its own gradients, and how it pulls at the features of each modality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mla_fast import buffers
from mla_fast.batch import BatchRows, Rows, Whole
from mla_fast.distributed import rank_and_size
from mla_fast.head import on_host
from mla_fast.interaction import Interaction, corrected_loss, paired, present_mean
from mla_fast.loss import Loss, mean_loss
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.parts import unwrap_ddp

Features = Mapping[str, Tensor]


class Pull:
    """The gradients of L_r: ∂L_r/∂h_m of each modality's packed features in each batch, and the interaction's own.

    They are taken of the features and the head as the batch finds them, before any step; the interaction's own are held back
    until ``restore``, or every modality's step would move it.
    """

    def __init__(
        self, model: MultimodalModel, optimizer: MLAOptimizer, parts: Mapping[int, tuple[Features, Whole]], loss: Loss | None
    ):
        self._parameters = list(model.interaction.parameters()) if model.interaction is not None else []
        pairs = list(parts.values())
        wholes = [whole for _, whole in pairs]
        total = _total(wholes, optimizer.process_group, optimizer.device)
        if loss is None and _is_plain(model, wholes):
            found, own = _in_closed_form(model, pairs, total)
            gradients = [own.get(p) for p in self._parameters]
        else:
            found = _by_autograd(model, pairs, total, loss)
            gradients = [p.grad for p in self._parameters]
            for p in self._parameters:
                p.grad = None
        finite, self._own = self._finite(optimizer, found, gradients)
        self.of_features = dict(zip(parts, finite, strict=True))

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
        return self.of_features.get(batch, {}).get(modality)

    def added(self, batch: int, modality: str, gradient: Tensor | None) -> Tensor | None:
        """Return ∂L_m/∂h + ∂L_r/∂h."""
        asked = self.at(batch, modality)
        return gradient if asked is None or gradient is None else gradient + asked

    def restore(self) -> None:
        """Give the interaction's parameters their gradients back, for the step that moves them."""
        for p, g in zip(self._parameters, self._own, strict=True):
            p.grad = g


def pull_of(
    model: MultimodalModel,
    optimizer: MLAOptimizer,
    features: Sequence[Features],
    batches: Sequence[Mapping[str, Rows]],
    loss: Loss | None = None,
) -> Pull | None:
    """Return what an interaction asks of these batches; None without one, and where no sample has two modalities."""
    if model.interaction is None:
        return None
    parts: dict[int, tuple[Features, Whole]] = {}  # by the place of the batch
    widths, nobody = unwrap_ddp(model.interaction).widths, optimizer.process_group is None
    for i, (h, rows) in enumerate(zip(features, batches, strict=True)):
        whole = rows.whole if isinstance(rows, BatchRows) else None
        complete = None if whole is None else _complete(h, rows, widths)
        if whole is not None and complete is not None and not (nobody and _nobody_paired(whole)):
            parts[i] = complete, whole
    if not any(isinstance(rows, BatchRows) and rows.whole is not None for rows in batches):
        optimizer.watch.unpaired()
    trains = any(p.requires_grad for p in model.interaction.parameters())
    trains |= unwrap_ddp(model.interaction).gradient == "encoders"
    return Pull(model, optimizer, parts, loss) if parts and trains else None


def _complete(features: Features, rows: Mapping[str, Rows], widths: dict[str, int]) -> Features | None:
    """Return features of all the modalities of a batch, [0, s] where one has no rows; None where a lone row was left out."""
    if any(len(rows[m].target) and m not in features for m in rows):
        return None
    some = next(iter(features.values()), None)
    return None if some is None else {m: features[m] if m in features else some.new_empty(0, widths[m]) for m in rows}


def _nobody_paired(whole: Whole) -> bool:
    """Whether no sample has two modalities, where the host knows."""
    return whole.present is not None and on_host(whole.present) and not paired(whole.present).any()


def _is_plain(model: MultimodalModel, wholes: Sequence[Whole]) -> bool:
    """Whether closed form serves: all samples have all modalities, and no rank waits for autograd to tell of a gradient."""
    trained = type(model.interaction) is Interaction and all(p.requires_grad for p in model.interaction.parameters())
    return trained and all(whole.present is None for whole in wholes)


def _in_closed_form(
    model: MultimodalModel, pairs: Sequence[tuple[Features, Whole]], total: Tensor
) -> tuple[list[dict[str, Tensor]], dict[Tensor, Tensor]]:
    """Return ∂L_r of the features of each batch, and of the parameters over all of them."""
    assert isinstance(model.interaction, Interaction)
    found: list[dict[str, Tensor]] = []
    own: dict[Tensor, Tensor] = {}
    for features, whole in pairs:
        of_batch, of_features = model.interaction.gradients(features, _logits(model, features, whole), whole.target, total)
        found.append(of_features)
        own = {p: own[p] + g if p in own else g for p, g in of_batch.items()}
    return found, own


def _by_autograd(
    model: MultimodalModel, pairs: Sequence[tuple[Features, Whole]], total: Tensor, loss: Loss | None
) -> list[dict[str, Tensor]]:
    """Return ∂L_r of the features of each batch, and leave those of the parameters in ``.grad``."""
    assert model.interaction is not None
    wanted, leaves, losses = unwrap_ddp(model.interaction).gradient == "encoders", [], []
    for features, whole in pairs:
        h = {m: x.detach().requires_grad_(wanted) for m, x in features.items()}
        with torch.enable_grad():
            r = model.interaction(whole.unpack(h), whole.present)
            losses.append(_loss(_logits(model, h, whole), r, whole, total, loss))
        leaves.append(h)
    torch.autograd.backward(losses)
    return [{m: x.grad for m, x in h.items() if x.grad is not None} for h in leaves]


def _loss(z: Tensor, r: Tensor, whole: Whole, total: Tensor, loss: Loss | None) -> Tensor:
    """Return these samples' share of L_r for logits z [M, N, C]; for a loss that is given, the host waits for who has two."""
    if loss is None:
        return corrected_loss(z, r, whole.target, whole.present, total)
    corrected, target = present_mean(z.to(r.dtype), whole.present) + r, whole.target
    if whole.present is not None:
        both = paired(whole.present)
        corrected, target = corrected[both], target[both]
    return mean_loss(corrected, target, 1, loss=loss) / total


@torch.no_grad()
def _logits(model: MultimodalModel, features: Features, whole: Whole) -> Tensor:
    """Return z [M, N, C] of the head as it is."""
    sizes, head = [len(h) for h in features.values()], unwrap_ddp(model.head)
    kept = buffers.statistics_of(head)
    logits = model.joined_logits(features).split(sizes)
    buffers.restore_unless_finite(kept)
    return torch.stack(list(whole.unpack(dict(zip(features, logits, strict=True))).values()))


def _total(wholes: Sequence[Whole], group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Return the number of samples that L_r is the mean of, 0-d; over ranks, each of which has its share of the mean."""
    counts = [torch.full((), len(w.target), device=device) if w.present is None else paired(w.present).sum() for w in wholes]
    total = torch.stack(counts).sum().float()
    if group is not None:
        dist.all_reduce(total, group=group)
        total /= rank_and_size(group)[1]
    return total.clamp(min=1e-9 if group is not None else 1)

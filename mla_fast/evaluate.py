"""Accuracy and loss of a model, each modality alone and fused, and the running sums that they are the means of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mla_fast.batch import unpack_batch
from mla_fast.distributed import all_reduce_sum
from mla_fast.model import MultimodalModel
from mla_fast.ops.dispatch import dispatch


class Sums(dict[str, list[Any]]):
    """Running [sum, count] by name; what is a tensor stays on its device."""

    def add(self, name: str, value: Tensor | int, count: Tensor | int = 1) -> None:
        total = self.setdefault(name, [0, 0])
        total[0], total[1] = total[0] + value, total[1] + count

    def over_ranks(self, names: Sequence[str], group: dist.ProcessGroup | None, device: torch.device) -> Sums:
        """Return the sums and counts of all ranks together, of which some may have seen none of the names."""
        if group is None:
            return self
        both = [[float(total), float(count)] for total, count in (self.get(name, (0, 0)) for name in names)]
        return Sums(zip(names, all_reduce_sum(torch.tensor(both, dtype=torch.float64), group, device).tolist(), strict=True))

    def means(self) -> dict[str, float]:
        return {name: float(total) / float(count) if count else float("nan") for name, (total, count) in self.items()}


@torch.no_grad()
def evaluate(
    model: MultimodalModel, loader: Iterable[Any], device: torch.device, group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """Do what ``Trainer.evaluate`` documents, on `device`, over the samples of all ranks of `group`."""
    samples, correct, loss = Sums(), Sums(), Sums()
    for batch in loader:
        inputs, target, present = unpack_batch(model, batch, device)
        N = len(target)
        here = target.new_ones(N, len(inputs), dtype=torch.bool) if present is None else model.columns(present, inputs)
        plan = dispatch(here, tuple(inputs))
        logits = model.packed_logits(inputs, None if present is None else plan)
        parts, targets = logits.split(plan.counts), plan.pack([target] * len(inputs))
        some = here.any(1)
        samples.add("all", 0, N)
        for modality, z, y in zip(inputs, parts, targets, strict=True):
            loss.add(modality, F.cross_entropy(z, y, reduction="sum"), len(y))
            correct.add(modality, _right(z, y).sum(), len(y))
        average = torch.stack(plan.unpack(list(parts))).sum(0)  # as good as the mean for the largest class
        for name, z in (("average", average), ("fused", plan.fuse(logits).logits)):
            correct.add(name, (_right(z, target) & some).sum(), some.sum())
    samples = samples.over_ranks(["all"], group, device)
    loss = loss.over_ranks(model.modalities, group, device)
    correct = correct.over_ranks((*model.modalities, "average", "fused"), group, device)
    return {"samples": int(samples["all"][1]) if samples else 0, "loss": loss.means(), "accuracy": correct.means()}


def _right(logits: Tensor, target: Tensor) -> Tensor:
    """bool [N]; a NaN counts as the largest, and is wrong."""
    largest, classes = logits.max(1)
    return (classes == target) & (largest == largest)

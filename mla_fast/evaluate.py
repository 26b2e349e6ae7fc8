"""Accuracy and loss of a model, each modality alone and fused, and the running sums that they are the means of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mla_fast.batch import unpack_batch
from mla_fast.distributed import all_gather_object, all_reduce_sum
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


class Tally:
    """What was right, by class, int64 [3, C]: the samples of each class, how often it was answered, how often rightly."""

    def __init__(self, classes: int):
        self.counts = torch.zeros(3, classes, dtype=torch.int64)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Count the answers of logits [N, C] to target [N]. A NaN counts as the largest logit, and is no answer."""
        largest, answers = logits.max(1)
        sure = largest == largest
        parts = target, answers[sure], target[(answers == target) & sure]
        self.counts += torch.stack([part.bincount(minlength=logits.shape[1]) for part in parts]).cpu()

    def accuracy(self) -> float:
        return _share(self.counts[2].sum(), self.counts[0].sum())

    def by_class(self) -> list[float]:
        return [_share(right, samples) for samples, _, right in self.counts.T]

    def macro_f1(self) -> float:
        """Return the mean of 2 · right / (samples + answers) over the classes that have any."""
        samples, answers, right = self.counts[:, self.counts[:2].sum(0) > 0].double()
        return float((2 * right / (samples + answers)).mean())

    def majority(self) -> float:
        """Return the accuracy of one answer to all: the most frequent class."""
        return _share(self.counts[0].max(), self.counts[0].sum())


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if whole else float("nan")


@torch.no_grad()
def evaluate(
    model: MultimodalModel, loader: Iterable[Any], device: torch.device, group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """Do what ``Trainer.evaluate`` documents, on `device`, over the samples of all ranks of `group`."""
    samples, loss = Sums(), Sums()
    tallies: dict[str, Tally] = {}
    for batch in loader:
        inputs, target, present = unpack_batch(model, batch, device)
        N = len(target)
        here = target.new_ones(N, len(inputs), dtype=torch.bool) if present is None else model.columns(present, inputs)
        plan = dispatch(here, tuple(inputs))
        logits = model.packed_logits(inputs, None if present is None else plan)
        parts, targets = logits.split(plan.counts), plan.pack([target] * len(inputs))
        some = here.any(1)
        samples.add("all", 0, N)
        answers = {modality: (z, y) for modality, z, y in zip(inputs, parts, targets, strict=True)}
        for modality, (z, y) in answers.items():
            loss.add(modality, F.cross_entropy(z, y, reduction="sum"), len(y))
        average = torch.stack(plan.unpack(list(parts))).sum(0)  # as good as the mean for the largest class
        answers |= {name: (z[some], target[some]) for name, z in (("average", average), ("fused", plan.fuse(logits).logits))}
        for name, (z, y) in answers.items():
            tallies.setdefault(name, Tally(z.shape[1])).add(z, y)
    samples = samples.over_ranks(["all"], group, device)
    loss = loss.over_ranks(model.modalities, group, device)
    tallies = _of_all_ranks(tallies, group)
    names = [name for name in (*model.modalities, "average", "fused") if name in tallies]
    fused = tallies.get("fused", Tally(1))
    return {
        "samples": int(samples["all"][1]) if samples else 0,
        "loss": loss.means(),
        "accuracy": {name: tallies[name].accuracy() for name in names},
        "macro_f1": {name: tallies[name].macro_f1() for name in names},
        "majority": fused.majority(),
        "class_accuracy": fused.by_class(),
    }


def _of_all_ranks(tallies: dict[str, Tally], group: dist.ProcessGroup | None) -> dict[str, Tally]:
    """Return what all ranks have counted together, some of which may have seen nothing."""
    together: dict[str, Tally] = {}
    for of_rank in all_gather_object(tallies, group):
        for name, tally in of_rank.items():
            together.setdefault(name, Tally(tally.counts.shape[1])).counts += tally.counts
    return together

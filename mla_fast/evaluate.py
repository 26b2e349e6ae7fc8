"""Accuracy and loss of a model, each modality alone and fused, and the running sums that they are the means of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mla_fast.batch import unpack_batch
from mla_fast.distributed import all_reduce_sum, exchange, rank_and_size
from mla_fast.fusing import fuse
from mla_fast.inputs import Inputs
from mla_fast.loss import Loss, cross_entropy, given_loss, labels_of
from mla_fast.model import MultimodalModel
from mla_fast.ops.dispatch import DispatchPlan, dispatch
from mla_fast.ops.fusion import Fused
from mla_fast.parts import evaluating

OnBatch = Callable[[tuple[str, ...], Fused, Tensor], None]  # (the modalities of a batch, its prediction, its target)


class Sums(dict[str, list[Any]]):
    """Running [sum, count] by name; what is a tensor stays on its device."""

    def add(self, name: str, value: Tensor | float, count: Tensor | int = 1) -> None:
        total = self.setdefault(name, [0, 0])
        total[0], total[1] = total[0] + value, total[1] + count

    def over_ranks(self, names: Sequence[str], group: dist.ProcessGroup | None, device: torch.device) -> Sums:
        """Return the sums and counts of all ranks together, of those names that a rank has."""
        if group is None:
            return self
        own = [[*map(float, self.get(name, (0, 0))), float(name in self)] for name in names]
        of_all = all_reduce_sum(torch.tensor(own, dtype=torch.float64), group, device).tolist()
        return Sums((name, [total, count]) for name, (total, count, there) in zip(names, of_all, strict=True) if there)

    def means(self) -> dict[str, float]:
        return {name: float(total) / float(count) if count else float("nan") for name, (total, count) in self.items()}


class Tally:
    """What was right, by class, int64 [3, C]: the samples of each class, how often it was answered, how often rightly."""

    def __init__(self, classes: int, device: torch.device | None = None):
        self.counts = torch.zeros(3, classes, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, target: Tensor, counted: Tensor | None = None) -> None:
        """Count the answers of logits [N, C] to target [N], of those samples that are counted (bool [N], by default all).

        A NaN counts as the largest logit, and is no answer. Nobody waits for a device.
        """
        largest, answers = logits.max(1)
        counted = torch.ones_like(target, dtype=torch.bool) if counted is None else counted
        sure = counted & (largest == largest)
        for row, classes, here in zip(
            self.counts, (target, answers, target), (counted, sure, sure & (answers == target)), strict=True
        ):
            row.scatter_add_(0, classes, here.long())

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
    model: MultimodalModel,
    loader: Iterable[Any],
    device: torch.device,
    group: dist.ProcessGroup | None,
    use_test: bool = False,
    loss: Loss | None = None,
    on_batch: OnBatch | None = None,
) -> dict[str, Any]:
    """Do what ``Trainer.evaluate`` documents, on `device`, over the samples of all ranks of `group`.

    on_batch: called for each batch of this rank.
    """
    check_evaluated("loader", loader)
    found, failure = _Found(model, use_test, loss, on_batch), None
    rank, size = rank_and_size(group)
    try:
        with evaluating(loss) if isinstance(loss, nn.Module) else contextlib.nullcontext():
            for i, batch in enumerate(loader):
                found.add(i * size + rank, *unpack_batch(model, batch, device, loss))
    except Exception as error:  # for all of them
        failure = error
    samples, tallies = _of_all_ranks(found, group, failure)
    losses = found.loss.over_ranks([*model.modalities, *(() if loss is None else ("fused",))], group, device)
    names = [name for name in (*model.modalities, "average", "fused", "without_interaction") if name in tallies]
    fused = tallies.get("fused", Tally(1))
    report: dict[str, Any] = {"samples": samples, "loss": losses.means()}
    if loss is not None and samples and not tallies:  # targets that name no class
        return report
    report |= {
        "accuracy": {name: tallies[name].accuracy() for name in names},
        "macro_f1": {name: tallies[name].macro_f1() for name in names},
        "majority": fused.majority(),
        "class_accuracy": fused.by_class(),
    }
    if use_test:  # NaN where no batch had two samples to permute
        of = [*(m for m in model.modalities if m in tallies), *(["interaction"] if model.interaction is not None else [])]
        report["use"] = {name: fused.accuracy() - tallies.get(Without(name), Tally(1)).accuracy() for name in of}
    return report


def check_evaluated(name: str, loader: Any) -> None:
    """Raise TypeError for unpaired loaders, whose samples have no modalities to fuse."""
    if isinstance(loader, Mapping):
        raise TypeError(
            f"{name}: expected a loader of batches (inputs: dict, target), for fused accuracy, got a mapping with "
            f"{', '.join(map(str, loader)) or 'nothing'}; for one modality alone [({{modality: x}}, y) for x, y in its loader]"
        )


class Without(NamedTuple):
    """Names the fused answers where the features of a modality, or all that the interaction sees, were permuted."""

    of: str


class _Found:
    """What one rank has counted so far."""

    def __init__(self, model: MultimodalModel, use_test: bool, loss: Loss | None, on_batch: OnBatch | None):
        self.model, self.use_test, self.given, self.on_batch = model, use_test, loss, on_batch
        self.samples, self.loss = 0, Sums()
        self.tallies: dict[str | Without, Tally] = {}

    def add(self, number: int, inputs: dict[str, Inputs], target: Tensor, present: Tensor | None) -> None:
        """Count a batch; `number`: which one of all ranks' together, since it is permuted alike however many ranks there are."""
        model, N = self.model, len(target)
        if not N and self.given is not None:  # it ignores all of them
            return
        here = target.new_ones(N, len(inputs), dtype=torch.bool) if present is None else model.columns(present, inputs)
        plan = dispatch(here, tuple(inputs))
        features = model.packed_features(inputs, None if present is None else plan)
        logits = model.logits_of(features)
        parts, targets = logits.split(plan.counts), plan.pack([target] * len(inputs))
        seen, some = model.seen_by(inputs), here.any(1)
        fused = fuse(model.fusion, logits, len(inputs), plan, seen)
        prediction = model.corrected(fused, features, plan)
        if self.on_batch is not None:
            self.on_batch(tuple(inputs), prediction, target)
        together: dict[str | Without, Tensor] = {
            "average": torch.stack(plan.unpack(list(parts))).sum(0),  # as good as the mean for the largest class
            "fused": prediction.logits,
        }
        if model.interaction is not None:
            together["without_interaction"] = fused.logits
        if self.use_test and N > 1:
            together |= _permuted(model, features, fused, plan, seen, torch.Generator().manual_seed(number))
        self.samples += N
        for i, (modality, z, y) in enumerate(zip(inputs, parts, targets, strict=True)):
            self._add_loss(modality, z, y)
            if seen is not None and seen[i].any():  # its answer is one of those that it has seen, as in ``predict``
                z = z.masked_fill(~seen[i].to(z.device), -torch.inf)
            self._count(modality, z, y)
        for name, z in together.items():
            self._count(name, z, target, some)
        if self.given is not None:
            self._add_loss("fused", together["fused"][some], target[some])

    def _add_loss(self, name: str, logits: Tensor, target: Tensor) -> None:
        if self.given is None:
            self.loss.add(name, cross_entropy(logits, target, "sum").double(), len(target))
        else:
            self.loss.add(name, given_loss(self.given, logits, target).double() * len(target), len(target))

    def _count(self, name: str | Without, logits: Tensor, target: Tensor, counted: Tensor | None = None) -> None:
        labels = labels_of(self.model.fusion, logits.shape[1], target, self.given)
        if labels is None and self.use_test:
            raise ValueError("use_test: expected False where targets name no class, of which it counts the answers, got True")
        if labels is None:
            return
        if self.given is not None:  # which may ignore some
            counted = labels >= 0 if counted is None else counted & (labels >= 0)
            labels = labels.clamp(min=0)
        if name not in self.tallies:
            self.tallies[name] = Tally(logits.shape[1], logits.device)
        self.tallies[name].add(logits, labels, counted)


def _permuted(
    model: MultimodalModel,
    features: dict[str, Tensor],
    fused: Fused,
    plan: DispatchPlan,
    seen: Tensor | None,
    generator: torch.Generator,
) -> dict[str | Without, Tensor]:
    """Return the logits with each modality's features in turn given to other samples, and with the interaction's alone."""
    mixed = {m: h[torch.randperm(len(h), generator=generator).to(h.device)] for m, h in features.items()}
    found: dict[str | Without, Tensor] = {}
    for modality in features:
        some = features | {modality: mixed[modality]}
        found[Without(modality)] = model.corrected(
            fuse(model.fusion, model.logits_of(some), len(features), plan, seen), some, plan
        ).logits
    if model.interaction is not None:
        found[Without("interaction")] = model.corrected(fused, mixed, plan).logits
    return found


def _of_all_ranks(
    found: _Found, group: dist.ProcessGroup | None, failure: Exception | None
) -> tuple[int, dict[str | Without, Tally]]:
    """Return the number of samples and what all ranks have counted together, some of which may have seen nothing."""
    together: dict[str | Without, Tally] = {}
    counts = {name: tally.counts.cpu() for name, tally in found.tallies.items()}
    ranks = exchange((found.samples, counts), group, failure)
    for _, of_rank in ranks:
        for name, part in of_rank.items():
            together.setdefault(name, Tally(part.shape[1])).counts += part
    return sum(samples for samples, _ in ranks), together

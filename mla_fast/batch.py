"""A batch: what it has to look like, and the rows that each modality has in it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla_fast.distributed import all_reduce_sum, exchange, rank_and_size
from mla_fast.inputs import Inputs, describe, leaves, sample_counts, to_device, tree_map
from mla_fast.loss import Loss, check_target, counted_rows
from mla_fast.model import MultimodalModel
from mla_fast.ops.dispatch import DispatchPlan, dispatch
from mla_fast.optimizer import MLAOptimizer


class Rows(NamedTuple):
    """What one modality has in a batch: inputs [n, …] and target [n, …], and where not all rows count alike, weights [n] whose
    sum is 1."""

    inputs: Inputs
    target: Tensor
    weights: Tensor | None = None


class Whole(NamedTuple):
    """The samples of a batch that several modalities show: target [N, …], present bool [N, M'] over its modalities or None for
    all, and the plan that has packed their rows; None where every modality has N."""

    target: Tensor
    present: Tensor | None
    plan: DispatchPlan | None

    def unpack(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return [N, s] of each modality; differentiable."""
        return features if self.plan is None else self.plan.unpack(features)


class BatchRows(dict[str, Rows]):
    """{modality: its rows}; whole: what the rows were before they were taken apart, if samples have several modalities."""

    def __init__(self, rows: dict[str, Rows], whole: Whole | None = None):
        super().__init__(rows)
        self.whole = whole if len(rows) > 1 else None


@dataclass
class Batch:
    """A batch as one value: the inputs of the modalities that some sample has, present bool [N, M] of these or None, target."""

    inputs: dict[str, Inputs]
    present: Tensor | None
    target: Tensor

    def tensors(self) -> list[Tensor]:
        return [*leaves(self.inputs), self.target, *([] if self.present is None else [self.present])]

    def kind(self) -> tuple[Any, ...]:
        """Return what batches must have in common to be trained on by one graph."""
        structure = repr(tree_map(lambda t: (t.shape, t.dtype), self.inputs))
        return structure, self.present is not None, self.target.shape, self.target.dtype

    def to(self, device: torch.device) -> Batch:
        return Batch(*(to_device(part, device) for part in (self.inputs, self.present, self.target)))

    def like(self, device: torch.device) -> Batch:
        """Return room for such a batch."""

        def room(x: Inputs) -> Inputs:
            return tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), x)

        return Batch(room(self.inputs), None if self.present is None else room(self.present), room(self.target))

    def copy_(self, other: Batch) -> None:
        for to, t in zip(self.tensors(), other.tensors(), strict=True):
            to.copy_(t, non_blocking=True)

    def rows(self) -> BatchRows:
        """Return all N rows of each modality; those of samples without it are copies of another sample's, and weigh nothing."""
        whole = Whole(self.target, self.present, None)
        if self.present is None:
            return BatchRows({modality: Rows(x, self.target) for modality, x in self.inputs.items()}, whole)
        rows, every = {}, torch.arange(len(self.target), device=self.target.device)
        for (modality, x), here in zip(self.inputs.items(), self.present.unbind(1), strict=True):
            index = torch.where(here, every, here.to(torch.int32).argmax())
            x = tree_map(functools.partial(torch.index_select, dim=0, index=index), x)
            rows[modality] = Rows(x, self.target, here.double() / here.sum())
        return BatchRows(rows, whole)


def unpack_batch(
    model: MultimodalModel, batch: Any, device: torch.device | None = None, loss: Loss | None = None
) -> tuple[dict[str, Inputs], Tensor, Tensor | None]:
    """Return (inputs, target, present), on `device` if it is given, without the samples that the loss ignores.

    TypeError or ValueError says what is wrong with the batch.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3) or not isinstance(batch[0], Mapping):
        raise TypeError(f"batch: expected (inputs: dict, target) or (inputs, target, present), got {describe(batch)}")
    inputs, target, present = batch if len(batch) == 3 else (*batch, None)
    if not inputs or not set(inputs).issubset(model.modalities):
        raise ValueError(f"inputs: expected modalities among {', '.join(model.modalities)}, got {', '.join(inputs) or 'none'}")
    check_target(model, target, loss)
    for modality, N in sample_counts(inputs).items():
        if N != len(target):
            raise ValueError(f"inputs[{modality!r}]: expected {len(target)} samples to match target, got {N}")
    if present is not None:
        model.columns(present, inputs)
    if (counted := counted_rows(target, loss)) is not None:
        inputs, target, present = _only(counted, dict(inputs), target, present)
    if device is None:
        return dict(inputs), target, present
    there = Batch(dict(inputs), present, target).to(device)
    return there.inputs, there.target, there.present


def _only(
    counted: Tensor, inputs: dict[str, Inputs], target: Tensor, present: Tensor | None
) -> tuple[dict[str, Inputs], Tensor, Tensor | None]:
    index = counted.nonzero()[:, 0]

    def of(x: Inputs) -> Inputs:
        return tree_map(lambda t: t.index_select(0, index.to(t.device)), x)

    return {m: of(x) for m, x in inputs.items()}, target[index], None if present is None else present[index.to(present.device)]


def unpack_unlabelled(
    batch: Mapping[str, Inputs] | tuple[Any, ...], device: torch.device, loss: Loss | None = None
) -> tuple[dict[str, Inputs], Tensor | None]:
    """Return (inputs, present) on `device` of ``inputs``, ``(inputs, present)`` or a batch as in training."""
    inputs, *rest = (batch,) if isinstance(batch, Mapping) else batch
    if not isinstance(inputs, Mapping):
        raise TypeError(f"batch: expected inputs: dict, (inputs, present) or a batch as in training, got {describe(batch)}")
    sample_counts(inputs)
    present = rest[-1] if rest else None
    if len(rest) == 1 and isinstance(present, Tensor):
        unlike = (present.dtype != torch.bool) + (present.dim() == 1)  # of what bool [N, M] is
        if unlike == 2 or (unlike and loss is not None):
            present = None  # it is the target
    there = {modality: to_device(x, device) for modality, x in inputs.items()}
    return there, present.to(device) if isinstance(present, Tensor) else present


def rows_by_modality(model: MultimodalModel, inputs: dict[str, Inputs], target: Tensor, present: Tensor | None) -> BatchRows:
    """Return each modality's rows, in the model's order."""
    inputs = {modality: inputs[modality] for modality in model.modalities if modality in inputs}
    if present is None:
        return Batch(inputs, None, target).rows()
    plan = dispatch(model.columns(present, inputs), tuple(inputs))
    packed, targets = plan.pack(list(inputs.values())), plan.pack([target] * len(inputs))
    rows = {modality: Rows(x, y) for modality, x, y in zip(inputs, packed, targets, strict=True)}
    return BatchRows(rows, Whole(target, plan.present, plan))


@contextlib.contextmanager
def told_to_all(modalities: tuple[str, ...], optimizer: MLAOptimizer) -> Iterator[None]:
    """Make an error inside of it one on every rank: the others, who count their rows, hear of it there."""
    try:
        yield
    except Exception as error:
        if optimizer.process_group is not None:
            row_totals(modalities, optimizer, [], error)
        raise


def row_totals(
    modalities: tuple[str, ...],
    optimizer: MLAOptimizer,
    batches: Sequence[Mapping[str, Rows]],
    failure: Exception | None = None,
) -> dict[str, float]:
    """Return how many rows each modality's mean loss is over, without the modalities that have none.

    With several ranks the rows of all, divided by the ranks, since DistributedDataParallel takes the gradients' mean; a rank that
    has none takes part all the same. So the ranks must have as many batches with each modality: a rank that has ended gives none,
    and one that cannot read its batches the failure, which is then raised on all.
    The host waits for the counts, once a batch: what the ranks do next depends on them.
    """
    rows_of = dict.fromkeys(modalities, 0)
    for rows in batches:
        for modality, part in rows.items():
            rows_of[modality] += len(part.target)
    group = optimizer.process_group
    if group is None:
        return {modality: count for modality, count in rows_of.items() if count}
    M, having = len(rows_of), [sum(m in rows for rows in batches) for m in rows_of]
    own = [*rows_of.values(), *having, *(n * n for n in having), not batches, failure is not None]
    *counts, ended, failed = all_reduce_sum(torch.tensor(own, dtype=torch.float64), group, optimizer.device).tolist()
    totals, having, squares = counts[:M], counts[M : 2 * M], counts[2 * M :]
    if failed:
        exchange(None, group, failure)
    _, size = rank_and_size(group)
    if ended not in (0, size):
        raise ValueError(f"loader: expected as many batches on every rank, but {ended:.0f} of {size} have come to their end")
    for modality, number, square in zip(rows_of, having, squares, strict=True):
        if number * number != size * square:  # they are equal where all ranks have as many
            raise ValueError(
                f"inputs: expected as many batches with {modality!r} on every rank (with no row present where a rank lacks it), "
                f"got {number:.0f} on {size} ranks"
            )
    return {modality: total / size for modality, total in zip(rows_of, totals, strict=True) if total}

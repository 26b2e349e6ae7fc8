"""A multimodal data set, in memory or of rows that are read when they are asked for, and batches of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from mla_fast.data.column import Array, Column, Step

Index = int | slice | Sequence[int] | Tensor | Array
Sample = tuple[dict[str, Tensor], Tensor] | tuple[dict[str, Tensor], Tensor, Tensor]


class MultimodalDataset(Dataset[Sample]):
    """Hold N samples, each with its modalities and its class.

    inputs: {modality: tensor [N, ...]} of any dtype, or a ``Column`` in place of one, whose rows are read from a file.
    target: classes [N] from 0, of any integer dtype; kept as int64.
    fields: {name: array [N, ...]}, anything else known about the samples, such as their speakers; ``split_where`` splits by them.
    present: bool [N, M], which modalities each sample has, in the order of `inputs`; None if every sample has all of them. Absent
        rows of `inputs` may hold anything.
    class_names: of the classes 0, 1, …, if they have any.
    unread: fields that have been left out because they cannot be read, and why; ``split_where`` says so.

    Raises ValueError or TypeError for arguments of the wrong shape, dtype or type.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor | Column],
        target: Tensor,
        fields: Mapping[str, Array] | None = None,
        present: Tensor | None = None,
        class_names: Sequence[str] | None = None,
        unread: Mapping[str, str] | None = None,
    ):
        if not inputs:
            raise ValueError("inputs: expected at least one modality, got none")
        self.target = checked_target(target)
        self.inputs: dict[str, Any] = dict(inputs)  # tensors, or Columns in their place
        self.fields = {name: np.asarray(column) for name, column in (fields or {}).items()}
        N = len(self.target)
        for modality, x in self.inputs.items():
            if not isinstance(x, (Tensor, Column)):
                raise TypeError(f"inputs[{modality!r}]: expected a tensor [{N}, ...], got {type(x).__name__}")
        shapes = {f"inputs[{name!r}]": tuple(x.shape) for name, x in self.inputs.items()}
        shapes |= {f"fields[{name!r}]": column.shape for name, column in self.fields.items()}
        for argument, shape in shapes.items():
            if shape[:1] != (N,):
                raise ValueError(f"{argument}: expected [{N}, ...] to match target, got {list(shape)}")
        if present is not None and (present.dtype != torch.bool or present.shape != (N, len(self.inputs))):
            got = f"{present.dtype} {list(present.shape)}"
            raise ValueError(f"present: expected bool [{N}, {len(self.inputs)}] (samples, modalities), got {got}")
        self.present, self.unread = present, dict(unread or {})
        self.class_names = None if class_names is None else list(class_names)
        if self.class_names is not None and len(self.class_names) <= (highest := int(self.target.max())):
            raise ValueError(f"class_names: expected a name for each class up to {highest}, got {listed(self.class_names)}")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, in the order of the columns of `present`."""
        return tuple(self.inputs)

    @property
    def classes(self) -> int:
        """As many as there are `class_names`, otherwise the highest class plus one. A class may have no samples."""
        return int(self.target.max()) + 1 if self.class_names is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: Index) -> Sample:
        """Return ``({modality: x[index]}, target[index])``, followed by ``present[index]`` if there is a mask.

        An int selects one sample; a slice, indices or a bool mask [N] select a batch.
        """
        index = _as_index(index)
        inputs = {modality: x[index] for modality, x in self.inputs.items()}
        if self.present is None:
            return inputs, self.target[index]
        return inputs, self.target[index], self.present[index]

    def subset(self, mask_or_indices: Index) -> MultimodalDataset:
        """Return the samples that a bool mask [N], indices or a slice select, with their fields.

        Raises ValueError for a mask of another length, or if no sample is selected.
        """
        index = _as_index(mask_or_indices)
        index = index.cpu() if isinstance(index, Tensor) else index
        if isinstance(index, Tensor) and index.dtype == torch.bool and index.shape != (len(self),):
            raise ValueError(f"mask_or_indices: expected a mask [{len(self)}], got {list(index.shape)}")
        rows = torch.arange(len(self))[index].reshape(-1)
        if not len(rows):
            raise ValueError("mask_or_indices: expected to select at least one sample, got none")
        fields = {name: column[rows.numpy()] for name, column in self.fields.items()}
        present = None if self.present is None else self.present[rows]
        inputs = {m: x.subset(rows) if isinstance(x, Column) else x[rows] for m, x in self.inputs.items()}
        return MultimodalDataset(inputs, self.target[rows], fields, present, self.class_names, self.unread)

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return samples, read in one go: what a DataLoader that collates asks for."""
        inputs, *rest = self[indices]
        return [({m: x[i] for m, x in inputs.items()}, *(part[i] for part in rest)) for i in range(len(indices))]  # type: ignore

    def then(self, steps: Mapping[str, Step]) -> MultimodalDataset:
        """Return the same samples after a function of (x, which rows count) for each modality, called now or when it is read."""
        each = self.inputs.items()
        return self.with_inputs({m: x.then(steps[m]) if isinstance(x, Column) else steps[m](x, self.has(m)) for m, x in each})

    def with_inputs(self, inputs: Mapping[str, Tensor | Column]) -> MultimodalDataset:
        """Return the same samples with other inputs of the same modalities."""
        return MultimodalDataset(inputs, self.target, self.fields, self.present, self.class_names, self.unread)

    def with_present(self, present: Tensor) -> MultimodalDataset:
        """Return the same samples without the modalities that `present`, bool [N, M], takes away on top of what they lack; of a
        sample that would lose its last one, none is taken."""
        if self.present is not None:
            both = present & self.present
            present = torch.where(both.any(1, keepdim=True), both, self.present)
        return MultimodalDataset(self.inputs, self.target, self.fields, present, self.class_names, self.unread)

    @property
    def complete(self) -> bool:
        """Whether every sample has all modalities."""
        return self.present is None or bool(self.present.all())

    def has(self, modality: str) -> Tensor | None:
        """Return which samples have `modality`, bool [N], None if all have."""
        return None if self.present is None else self.present[:, self.modalities.index(modality)]

    def chunks(self, modality: str) -> Iterator[Tensor]:
        """Yield the inputs [K, ...] of the samples that have `modality`: all at once, or part by part where they are read."""
        x = self.inputs[modality]
        if isinstance(x, Column):
            yield from x.chunks(self.has(modality))
        else:
            yield self.rows(modality)

    def rows(self, modality: str) -> Tensor:
        """Return the inputs [K, ...] of the K samples that have `modality`, in memory."""
        x, here = self.inputs[modality], self.has(modality)
        rows: Tensor = x[slice(None) if here is None else here]
        return rows

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(x.shape[1:])}" for name, x in self.inputs.items())
        fields = f", fields {', '.join(self.fields)}" if self.fields else ""
        missing = "" if self.present is None else f", {1 - self.present.float().mean():.0%} missing"
        return f"MultimodalDataset({len(self)} samples, {self.classes} classes, {shapes}{fields}{missing})"


def checked_target(target: Tensor, name: str = "target") -> Tensor:
    """Return `target` as int64 [N]; raise TypeError or ValueError, naming it `name`, if it does not hold classes from 0."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expected an integer tensor [N], got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor [N], got {target.dtype}")
    if target.dim() != 1 or not len(target):
        raise ValueError(f"{name}: expected [N] with at least one sample, got {list(target.shape)}")
    target = target.long()
    if (lowest := int(target.min())) < 0:
        raise ValueError(f"{name}: expected classes from 0, got {lowest}")
    return target


def listed(names: Sequence[object], most: int = 20) -> str:
    """Return some of `names`, for a message."""
    return ", ".join(map(str, names[:most])) + (", …" if len(names) > most else "")


def _as_index(index: Index) -> int | slice | Tensor:
    if isinstance(index, (int, slice, Tensor)):
        return index
    # Each tensor would convert a list anew, which is slow, and an empty list to floats, which cannot index.
    return torch.as_tensor(index) if len(index) else torch.empty(0, dtype=torch.long)


def loader(dataset: MultimodalDataset, batch_size: int, *, shuffle: bool = False, workers: int = 0) -> DataLoader[Sample]:
    """Return a DataLoader of batches ``(inputs, target)`` or ``(inputs, target, present)``; the last batch may be smaller.

    With `shuffle` the order is drawn from torch's global generator in every epoch. The data set is indexed once per batch:
    collating sample by sample, as DataLoader does by default, costs more than a training step of a small model. What lies in
    memory is at hand faster than `workers` processes send it. Of what is read from files, the disk looks for the next batch while
    this one is trained on.
    """
    sampler = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    batches = Announced(BatchSampler(sampler, batch_size, drop_last=False), dataset)
    return DataLoader(dataset, sampler=batches, batch_size=None, num_workers=workers)


class Announced(Sampler[list[int]]):
    """Batches of places in a data set, of which each is announced to what is read from files while the one before is used."""

    def __init__(self, sampler: Sampler[list[int]], dataset: MultimodalDataset):
        self.sampler, self.dataset = sampler, dataset

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # it has batches to count

    def __iter__(self) -> Iterator[list[int]]:
        columns = [x for x in self.dataset.inputs.values() if isinstance(x, Column)]
        batches = iter(self.sampler)
        rows = next(batches, None)
        while rows is not None:
            following = next(batches, None)
            for column in columns if following else ():
                column.expect(torch.as_tensor(following))
            yield rows
            rows = following

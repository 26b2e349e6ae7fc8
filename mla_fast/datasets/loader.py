"""Batches of a data set that decodes lazily: workers send what is small, which becomes floats where it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mla_fast.datasets.lazy import LazyDataset
from mla_fast.datasets.readers import CompactReader
from mla_fast.threads import one_thread

Batch = tuple[Any, ...]


class Loader(DataLoader[Any]):
    """Return batches ``({modality: [N, …]}, label int64 [N], present bool [N, M])`` of a ``LazyDataset``.

    They are those of a plain ``DataLoader``, at about half its cost: images go from the workers as bytes, a quarter of the
    memory, and are standardised here. What the workers need, such as a tokenizer, is loaded once before they are forked.

    indexed: whether a batch ends in the samples' places in the data set, int64 [N], which methods that remember samples need.
    device: where images are standardised, by default on the CPU; on a GPU their bytes are sent there from pinned memory.
    """

    def __init__(
        self,
        dataset: LazyDataset,
        batch_size: int = 64,
        *,
        shuffle: bool = False,
        workers: int = 0,
        device: torch.device | str = "cpu",
        indexed: bool = False,
    ):
        self.data, self.device = dataset, torch.device(device)
        pin = self.device.type == "cuda"
        super().__init__(_Compact(dataset, indexed), batch_size, shuffle=shuffle, num_workers=workers, pin_memory=pin)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in self.compact():
            with one_thread():
                expanded = self._expanded(*batch)
            yield expanded

    def compact(self) -> Iterator[Batch]:
        """Return the batches as the workers send them."""
        if self.num_workers and self.data.cache is None:
            for reader in self.data.readers.values():
                load = getattr(reader, "load", None)
                if load is not None:
                    load()
        yield from super().__iter__()

    def _expanded(self, inputs: dict[str, Tensor], target: Tensor, present: Tensor, *index: Tensor) -> Batch:
        expanded = {}
        for (modality, reader), here in zip(self.data.readers.items(), present.T, strict=True):
            x = inputs[modality]
            if isinstance(reader, CompactReader):
                x = reader.expand(x.to(self.device, non_blocking=True))
                if not here.all():
                    x[(~here).to(x.device)] = 0
            expanded[modality] = x
        return expanded, target, present, *index


class _Compact(Dataset[Any]):
    """The samples with the small halves of their modalities, and their places if they are indexed."""

    def __init__(self, dataset: LazyDataset, indexed: bool):
        self.dataset, self.indexed = dataset, indexed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        sample = self.dataset.sample(index, compact=True)
        return (*sample, torch.tensor(index)) if self.indexed else sample

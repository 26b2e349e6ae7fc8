"""Batches in an order that depends on a seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mla_fast.data import MultimodalDataset


class Batches:
    """Shuffle a data set anew in each epoch; from the same seed always the same batches in the same order.

    Batches are (inputs, target, present or None) for the Trainer, with index [N] after them for the joint methods, and after
    that the inputs with nothing masked, of `full`, for those that learn from them.
    """

    def __init__(
        self,
        dataset: MultimodalDataset,
        seed: int,
        *,
        indexed: bool = False,
        batch_size: int = 64,
        full: dict[str, Tensor] | None = None,
    ):
        self.dataset, self.indexed, self.batch_size, self.full = dataset, indexed, batch_size, full
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for index in torch.randperm(len(self.dataset), generator=self.generator).split(self.batch_size):
            batch = (*self.dataset[index], None)[:3]
            batch = (*batch, index) if self.indexed else batch
            yield batch if self.full is None else (*batch, {modality: x[index] for modality, x in self.full.items()})

"""A modality that is not in memory: its rows are read when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Step = Callable[[Tensor, Tensor | None], Tensor]  # (x [N, …], which of its rows count, bool [N] or None for all) → x [N, …]
Convert = Callable[[Array, Tensor | None, Tensor], Tensor]  # (rows as stored, which of them count, their numbers) → x [N, …]
CHUNK = 2**20  # values at once where all rows are gone through: 8 MiB in float64, which malloc keeps


class Source(Protocol):
    """An array [N, …] in a file, whole by ``np.asarray``, of which ``read`` returns some rows int64 [K] as an array [K, …].

    It may have a method ``expect``, to be told of rows int64 [K] that will be asked for soon.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def ndim(self) -> int: ...
    def read(self, rows: NDArray[np.int64]) -> Array: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array: ...


class Column:
    """Stand for a tensor [N, …]: an index reads these rows from a file, and computes of them what the steps say.

    source: where the rows are; convert: what makes numbers of them; here: bool, which rows of the source count, None for all;
    rows: those that this is of, int64 [N], by default all; steps: what is done with what was read, in this order.

    Pickles as the path of its file, so that it can be sent to worker processes.
    """

    def __init__(
        self,
        source: Source,
        convert: Convert,
        here: Tensor | None = None,
        rows: Tensor | None = None,
        steps: tuple[Step, ...] = (),
    ):
        self.source, self.convert, self.here, self.steps = source, convert, here, steps
        self.rows = torch.arange(source.shape[0]) if rows is None else rows
        nothing = torch.zeros(1, dtype=torch.bool)  # an example of which no row counts: only its shape and dtype do
        example = self._finish(np.zeros((1, *source.shape[1:]), source.dtype), nothing, torch.zeros(1, dtype=torch.long))
        self.shape, self.dtype = torch.Size((len(self.rows), *example.shape[1:])), example.dtype

    def dim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of values."""
        return self.shape.numel()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """Read a row [...], or the rows [K, …] that a slice, indices or a bool mask select, in one go."""
        rows = self.rows[index]
        x = self._read(rows.reshape(-1))
        return x if rows.dim() else x[0]

    def expect(self, rows: Tensor) -> None:
        """Say that these rows, int64 [K], will be asked for soon."""
        expect = getattr(self.source, "expect", None)
        if expect is not None:
            expect(self.rows[rows].numpy())

    def subset(self, rows: Tensor) -> Column:
        """Return the same of some rows, int64 [K]; nothing is read."""
        return Column(self.source, self.convert, self.here, self.rows[rows], self.steps)

    def then(self, step: Step) -> Column:
        """Return the same with one more step; nothing is read."""
        return Column(self.source, self.convert, self.here, self.rows, (*self.steps, step))

    def chunks(self, present: Tensor | None = None) -> Iterator[Tensor]:
        """Yield all rows [K, …] in turn, some 2^20 values at once; of rows that are not `present`, bool [N], none is read."""
        rows = self.rows if present is None else self.rows[present]
        for part in rows.split(max(1, CHUNK // max(1, math.prod(self.source.shape[1:])))):
            if len(part):
                yield self._read(part)

    def _read(self, rows: Tensor) -> Tensor:
        return self._finish(self.source.read(rows.numpy()), None if self.here is None else self.here[rows], rows)

    def _finish(self, array: Array, here: Tensor | None, rows: Tensor) -> Tensor:
        x = self.convert(array, here, rows)
        for step in self.steps:
            x = step(x, here)
        return x

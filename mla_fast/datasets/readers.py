"""What a reader is: how the samples of one modality become tensors."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class Reader(Protocol):
    """Decode what a data set has found of a modality.

    Decoding is the same each time, so that ``prepare`` can keep its result; what is random comes afterwards, in ``finish``. The
    ``repr`` names all that decoding depends on: a cache made by another is refused.
    """

    def decode(self, source: Any) -> Tensor:
        """Return the decoded source; raise DecodeError where that fails."""

    def finish(self, decoded: Tensor, augment: bool) -> Tensor:
        """Return the sample, of the same shape and dtype for all."""

    def empty(self) -> Tensor:
        """Return what stands for a sample that is not there."""


@runtime_checkable
class CompactReader(Reader, Protocol):
    """A reader whose ``finish`` has two halves, so that what goes from the workers to the training process is small.

    ``finish(decoded, augment)`` is ``expand(compact(decoded, augment))``: bytes are a quarter of the floats that they become.
    """

    def compact(self, decoded: Tensor | None, augment: bool) -> Tensor:
        """Return the small half, of the same shape and dtype for all; of None what stands for a sample that is not there."""

    def expand(self, compact: Tensor) -> Tensor:
        """Return the sample, or a batch [N, …] of them, on the device where it is."""

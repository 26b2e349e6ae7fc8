"""Missing modalities, by the protocol of the paper (§4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_fast.data.dataset import MultimodalDataset


def missing_mask(N: int, M: int, rate: float, seed: int) -> Tensor:
    """Draw present, bool [N, M]: each modality of each sample is missing with probability `rate`.

    Every sample keeps at least one modality: where all would be missing, one of them, drawn uniformly, is kept. The share that is
    missing is therefore below `rate`: rate − rate^M / M.

    Raises ValueError unless 0 ≤ rate < 1, N ≥ 0 and M ≥ 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a probability in [0, 1), got {rate}")
    if N < 0 or M < 1:
        raise ValueError(f"N, M: expected N ≥ 0 samples and M ≥ 1 modalities, got {N} and {M}")
    return draw_present(N, M, rate, torch.Generator().manual_seed(seed))


def draw_present(N: int, M: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draw bool [N, M], each entry False with probability `rate`; in a row of False alone one entry becomes True."""
    present = torch.rand(N, M, generator=generator) >= rate
    kept = torch.randint(M, (N,), generator=generator)
    present[torch.arange(N), kept] |= ~present.any(1)
    return present


def with_missing(dataset: MultimodalDataset, rate: float, seed: int) -> MultimodalDataset:
    """Return the same samples with modalities removed by ``missing_mask``; raise ValueError if `dataset` has a mask already."""
    if dataset.present is not None:
        raise ValueError("dataset: expected one without missing modalities, got one with a mask")
    present = missing_mask(len(dataset), len(dataset.modalities), rate, seed)
    return MultimodalDataset(dataset.inputs, dataset.target, dataset.fields, present, dataset.class_names)

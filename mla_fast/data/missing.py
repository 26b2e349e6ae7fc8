"""Missing modalities, by two protocols: that of the paper's text (§4.2) and that of its code and of the literature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mla_fast.data.dataset import MultimodalDataset


def missing_mask(N: int, M: int, rate: float, seed: int) -> Tensor:
    """Draw present, bool [N, M]: each modality of each sample is missing with probability `rate`.

    Every sample keeps at least one modality: where all would be missing, one of them, drawn uniformly, is kept. The share that is
    missing is therefore below `rate`: rate − rate^M / M.

    Raises ValueError unless 0 ≤ rate < 1, N ≥ 0 and M ≥ 1.
    """
    _check(N, M, rate)
    return draw_present(N, M, rate, torch.Generator().manual_seed(seed))


def cpm_mask(N: int, M: int, rate: float, seed: int) -> Tensor:
    """Draw present, bool [N, M], as Zhang et al. do (CPM-Nets, NeurIPS 2019), and the paper's code, GCNet and others after them.

    Every sample keeps one modality, drawn uniformly. Of all other entries as many, drawn uniformly, are present as make the share
    that is missing `rate`, rounded to whole entries; the originals draw again until it is within 0.005 of that. Where
    rate ≥ 1 − 1/M every sample has exactly one modality, and 1 − 1/M is missing: with two modalities from 0.5 on.

    Raises ValueError as ``missing_mask``.
    """
    _check(N, M, rate)
    generator = torch.Generator().manual_seed(seed)
    present = torch.zeros(N, M, dtype=torch.bool)
    present[torch.arange(N), torch.randint(M, (N,), generator=generator)] = True
    others = (~present).flatten().nonzero()[:, 0]
    wanted = max(round(N * M * (1 - rate)) - N, 0)
    present.view(-1)[others[torch.randperm(len(others), generator=generator)[:wanted]]] = True
    return present


# By name: (N, M, rate, seed) → present, bool [N, M].
PROTOCOLS: dict[str, Callable[[int, int, float, int], Tensor]] = {"independent": missing_mask, "cpm": cpm_mask}


def draw_present(N: int, M: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draw bool [N, M], each entry False with probability `rate`; in a row of False alone one entry becomes True."""
    present = torch.rand(N, M, generator=generator) >= rate
    kept = torch.randint(M, (N,), generator=generator)
    present[torch.arange(N), kept] |= ~present.any(1)
    return present


def with_missing(dataset: MultimodalDataset, rate: float, seed: int, protocol: str = "independent") -> MultimodalDataset:
    """Return the same samples with modalities removed by one of ``PROTOCOLS``, on top of what they lack; none loses its last one.

    Raises ValueError for an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    return dataset.with_present(PROTOCOLS[protocol](len(dataset), len(dataset.modalities), rate, seed))


def _check(N: int, M: int, rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a probability in [0, 1), got {rate}")
    if N < 0 or M < 1:
        raise ValueError(f"N, M: expected N ≥ 0 samples and M ≥ 1 modalities, got {N} and {M}")

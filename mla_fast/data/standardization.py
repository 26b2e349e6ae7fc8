"""Standardisation of each modality by its mean and standard deviation in the training samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mla_fast.data.dataset import MultimodalDataset

Statistics = dict[str, tuple[float, float]]


def statistics(dataset: MultimodalDataset) -> Statistics:
    """Return {modality: (mean, standard deviation)} over all entries of the samples that have it.

    A constant modality has a deviation of 1, and a modality without samples (0, 1).
    """
    result = {}
    for modality in dataset.modalities:
        x = dataset.rows(modality).double()
        if not x.numel():
            result[modality] = (0.0, 1.0)
            continue
        mean, std = x.mean().item(), x.std(correction=0).item()
        # Rounding gives a constant a deviation of some 1e-17 of its value, which is no scale to divide by.
        result[modality] = (mean, std if std > 1e-12 * abs(mean) else 1.0)
    return result


def apply_statistics(dataset: MultimodalDataset, statistics: Mapping[str, Sequence[float]]) -> MultimodalDataset:
    """Return a new data set with each modality minus its mean, divided by its deviation; float64 stays, all else becomes float32.

    Raises ValueError if a modality has no statistics.
    """
    if any(modality not in statistics for modality in dataset.modalities):
        raise ValueError(f"statistics: expected those of {', '.join(dataset.modalities)}, got {', '.join(statistics) or 'none'}")
    inputs = {}
    for modality, x in dataset.inputs.items():
        mean, std = statistics[modality]
        inputs[modality] = ((x.double() - mean) / std).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return MultimodalDataset(inputs, dataset.target, dataset.fields, dataset.present)


def standardize(train: MultimodalDataset, *others: MultimodalDataset) -> tuple[list[MultimodalDataset], Statistics]:
    """Standardise `train` and the `others` by the statistics of `train`; return ([train, *others], statistics)."""
    of_train = statistics(train)
    return [apply_statistics(dataset, of_train) for dataset in (train, *others)], of_train

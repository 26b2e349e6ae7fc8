"""What is measured on the test part: accuracy, macro-F1, NLL, calibration, each modality alone, use, missing modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mla_fast.compare.learners import Learner
from mla_fast.data import MultimodalDataset, loader, missing_mask

BINS = 15  # of the expected calibration error
PERMUTATIONS = 5


def scores(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Return the accuracy and the mean negative log-likelihood of logits [N, C]."""
    from sklearn.metrics import accuracy_score, log_loss

    p = _probabilities(logits)
    return {
        "accuracy": float(accuracy_score(target.numpy(), p.argmax(1))),
        "nll": float(log_loss(target.numpy(), p, labels=range(p.shape[1]))),
    }


def all_scores(logits: Tensor, target: Tensor) -> dict[str, Any]:
    """Return also macro- and weighted F1 over the classes that occur, the calibration error, the confusion matrix [C, C].

    The rows of the matrix are true classes.

    The expected calibration error is the mean over the samples of |confidence − accuracy| in 15 bins of equal width.
    """
    from sklearn.metrics import confusion_matrix, f1_score
    from torchmetrics.functional.classification import multiclass_calibration_error

    p = _probabilities(logits)
    C, predicted, true = p.shape[1], p.argmax(1), target.numpy()
    ece = multiclass_calibration_error(torch.from_numpy(p), target, num_classes=C, n_bins=BINS, norm="l1")
    return {
        **scores(logits, target),
        "macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0.0)),
        "weighted_f1": float(f1_score(true, predicted, average="weighted", zero_division=0.0)),
        "ece": float(ece),
        "confusion": confusion_matrix(true, predicted, labels=range(C)).tolist(),
    }


def measure(learner: Learner, test: MultimodalDataset, rates: Sequence[float], seed: int) -> dict[str, Any]:
    """Return everything that is measured of a trained method.

    ``alone``: {modality: accuracy on the samples that have it}. ``use``: {modality: how much accuracy falls when this modality is
    exchanged between the samples, mean over permutations}. ``missing``: {rate: accuracy when modalities of the test samples are
    missing at this rate}.
    """
    logits = predict(learner, test)
    found = all_scores(logits, test.target)
    found["alone"] = {modality: _alone(learner, test, modality) for modality in test.modalities}
    found["use"] = {m: found["accuracy"] - _permuted(learner, test, m, seed) for m in test.modalities}
    found["missing"] = {f"{rate:g}": _accuracy(learner, _with_missing(test, rate, seed)) for rate in rates}
    return found


def brief(learner: Learner, test: MultimodalDataset) -> dict[str, Any]:
    """Return ``all_scores`` of a trained method without the confusion matrix: where a prediction is expensive, a single one."""
    found = all_scores(predict(learner, test), test.target)
    del found["confusion"]
    return found


def predict(learner: Learner, dataset: MultimodalDataset) -> Tensor:
    """Return logits [N, C] on the CPU."""
    device = next(learner.model.parameters()).device
    found = []
    for inputs, _, *present in loader(dataset, 1024):
        here = {modality: x.to(device) for modality, x in inputs.items()}
        found.append(learner.logits(here, present[0].to(device) if present else None).cpu())
    return torch.cat(found)


def _probabilities(logits: Tensor) -> np.typing.NDArray[np.float64]:
    """Return softmax [N, C] in float64; what is not finite gives every class the same."""
    p = logits.double().softmax(1)
    uniform = torch.full_like(p, 1 / p.shape[1])
    return np.asarray(torch.where(p.isfinite().all(1, keepdim=True), p, uniform).numpy())


def _accuracy(learner: Learner, dataset: MultimodalDataset) -> float:
    return scores(predict(learner, dataset), dataset.target)["accuracy"]


def _alone(learner: Learner, test: MultimodalDataset, modality: str) -> float | None:
    """Return the accuracy from one modality, None if no sample has it."""
    x = test.rows(modality)
    target = test.target if test.present is None else test.target[test.present[:, test.modalities.index(modality)]]
    return _accuracy(learner, MultimodalDataset({modality: x}, target)) if len(target) else None


def _permuted(learner: Learner, test: MultimodalDataset, modality: str, seed: int) -> float:
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(PERMUTATIONS):
        order = torch.randperm(len(test), generator=generator)
        present = test.present
        if present is not None:
            column = test.modalities.index(modality)
            present = present.index_copy(1, torch.tensor([column]), present[order, column : column + 1])
        inputs = {**test.inputs, modality: test.inputs[modality][order]}
        found.append(_accuracy(learner, MultimodalDataset(inputs, test.target, present=present)))
    return sum(found) / len(found)


def _with_missing(test: MultimodalDataset, rate: float, seed: int) -> MultimodalDataset:
    return test.with_present(missing_mask(len(test), len(test.modalities), rate, seed))

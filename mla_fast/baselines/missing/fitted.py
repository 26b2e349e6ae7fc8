"""Methods that train themselves on the whole training set, not batch by batch with labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mla_fast.baselines.missing.checks import check_labels, check_whole, check_widths
from mla_fast.baselines.missing.parts import Inputs, visible

SVC_C = 0.01
NO_CLASS = -1e9  # the logit of a class that has no sample in training


class FittedModel(nn.Module):
    """Learn from a whole training set: ``begin`` once, then ``train_epoch`` as often as it returned; or ``fit``, which does both.

    widths: {modality: the numbers d_m that a sample has}. Absent entries may hold anything. Inputs may be of any floating-point
        dtype; they are brought into the model's.
    grid: the values of the constructor's options that a search tries, the default first.
    passes: over each modality, of all calls of ``train_epoch``; known after ``begin``.
    """

    grid: ClassVar[Mapping[str, Sequence[Any]]] = {}
    defined_for: ClassVar[int | None] = None
    needs_full: ClassVar[bool] = False
    passes_before = 0.0

    def __init__(self, widths: Mapping[str, int], classes: int):
        super().__init__()
        check_widths(widths)
        check_whole("classes", classes, 2)
        self.widths, self.classes = dict(widths), classes
        self.passes = 0

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, in the order of the columns of ``present``."""
        return tuple(self.widths)

    def begin(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        *,
        epochs: int = 100,
        lr_factor: float = 1.0,
        weight_decay: float = 0.0,
    ) -> int:
        """Take the training set; return how often to call ``train_epoch``.

        inputs, present: as for ``visible``; target: int64 [N]. epochs: one or more; lr_factor, weight_decay: of Adam, if the
        method uses it. Raises ValueError as ``visible``, for labels that are no classes or all the same, and for other options.
        """
        raise NotImplementedError

    def check(self, inputs: Inputs, target: Tensor, present: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return what is visible of a training set, as ``visible``; raises as ``begin``."""
        x, available = visible(self.widths, inputs, present, next(self.parameters()).dtype, cast=True)
        check_labels(target, available.shape[1], self.classes)
        return x, available

    def check_begun(self) -> None:
        """Raise ValueError before ``begin``, which a state that is loaded does not replace."""
        if not self.passes:
            raise ValueError(f"training set: {type(self).__name__} expects begin(…) before train_epoch(…), got none")

    def train_epoch(self, epoch: int) -> None:
        """Go on training with what ``begin`` took; epoch counts from 0. The model is left in evaluation mode."""
        raise NotImplementedError

    def forward(self, inputs: Inputs, present: Tensor | None = None) -> Tensor:
        """Return logits [N, C] from one or more of the modalities; present is bool [N, M] over ``self.modalities``."""
        raise NotImplementedError

    def fit(self, inputs: Inputs, target: Tensor, present: Tensor | None = None, **options: Any) -> None:
        """Train from beginning to end; the arguments are those of ``begin``, and what it raises."""
        for epoch in range(self.begin(inputs, target, present, **options)):
            self.train_epoch(epoch)


class MeanImputation(nn.Module):
    """Fill in, for what is missing, the mean of the training samples that have the modality, zero where none has it."""

    def __init__(self, widths: Mapping[str, int]):
        super().__init__()
        self.widths = dict(widths)
        self.means = nn.ParameterList(nn.Parameter(torch.zeros(d), requires_grad=False) for d in widths.values())

    def learn(self, inputs: Inputs, present: Tensor | None) -> None:
        x, available = visible(self.widths, inputs, present, self.means[0].dtype, cast=True)
        for mean, values, here in zip(self.means, x.values(), available, strict=True):
            mean.data = values.sum(0) / here.sum().clamp_min(1)

    def forward(self, inputs: Inputs, present: Tensor | None) -> list[Tensor]:
        """Return M tensors [N, d_m]."""
        x, available = visible(self.widths, inputs, present, self.means[0].dtype, cast=True)
        each = zip(x.values(), self.means, available, strict=True)
        return [torch.where(here[:, None], values, mean) for values, mean, here in each]


def unfitted(in_features: int, classes: int) -> nn.Linear:
    """Return a linear layer for ``fit_svc``; until then its biases are NaN, by which ``check_fitted`` knows it, loaded or not."""
    layer = nn.Linear(in_features, classes)
    nn.init.constant_(layer.bias, math.nan)
    return layer


def check_fitted(model: nn.Module, layer: nn.Linear) -> None:
    """Raise ValueError for a layer that is as ``unfitted`` made it."""
    if bool(layer.bias[0].isnan()):
        raise ValueError(f"classifier: {type(model).__name__} expects fit(…) before a prediction")


def fit_svc(layer: nn.Linear, features: Tensor, target: Tensor) -> None:
    """Set a linear layer to scikit-learn's ``LinearSVC(C=0.01, dual=False)``, so that it returns the decision function.

    features: [N, s]; target: [N] of the layer's classes. Classes that have no sample get −1e9.
    """
    from sklearn.svm import LinearSVC

    svc = LinearSVC(C=SVC_C, dual=False).fit(features.double().cpu().numpy(), target.cpu().numpy())
    weight, bias = torch.from_numpy(svc.coef_), torch.from_numpy(svc.intercept_)
    if len(weight) == 1:  # of two classes one has the other's, with the opposite sign
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    known = torch.from_numpy(svc.classes_)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(NO_CLASS)
        layer.weight[known], layer.bias[known] = weight.to(layer.weight), bias.to(layer.bias)

"""Methods that train themselves on the whole training set, not batch by batch with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mla_fast.baselines.missing.parts import Inputs, check_widths, visible

SVC_C = 0.01
NO_CLASS = -1e9  # the logit of a class that has no sample in training


class FittedModel(nn.Module):
    """Learn from a whole training set: ``begin`` once, then ``train_epoch`` as often as it returned; or ``fit``, which does both.

    widths: {modality: the numbers d_m that a sample has}. Absent entries may hold anything.
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

        inputs, present: as for ``visible``; target: int64 [N]. lr_factor, weight_decay: of Adam, if the method uses it.
        Raises ValueError as ``visible``, and for labels that are no classes or all the same.
        """
        raise NotImplementedError

    def check(self, inputs: Inputs, target: Tensor, present: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return what is visible of a training set, as ``visible``; raises as ``begin``."""
        x, available = visible(self.widths, inputs, present)
        whole = not target.is_floating_point() and target.dtype != torch.bool and target.shape == available.shape[1:]
        found = target.unique().tolist() if whole else []
        if len(found) < 2 or found[0] < 0 or found[-1] >= self.classes:
            got = f"classes {found}" if whole else f"{target.dtype} {list(target.shape)}"
            expected = f"expected whole numbers [{available.shape[1]}] of two or more of {self.classes} classes from 0"
            raise ValueError(f"target: {expected}, got {got}")
        return x, available

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
        x, available = visible(self.widths, inputs, present)
        for mean, values, here in zip(self.means, x.values(), available, strict=True):
            mean.data = values.sum(0) / here.sum().clamp_min(1)

    def forward(self, inputs: Inputs, present: Tensor | None) -> list[Tensor]:
        """Return M tensors [N, d_m]."""
        x, available = visible(self.widths, inputs, present)
        each = zip(x.values(), self.means, available, strict=True)
        return [torch.where(here[:, None], values, mean) for values, mean, here in each]


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

"""Training loops on ``mla_fast.reference`` alone: the paper's, to check the engine by, and the released code's, to race."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast import MultimodalModel, reference


class PaperLoop:
    """Algorithm 1 on one batch: each modality in turn through its encoder, the head's gradient projected, one step.

    projection: ``"rls"``, ``"window"`` or ``"none"``. The head is an ``nn.Linear``, the optimizer has all parameters.
    """

    def __init__(self, model: MultimodalModel, optimizer: torch.optim.Optimizer, projection: str, alpha: float):
        self.model, self.optimizer, self.projection, self.alpha = model, optimizer, projection, alpha
        self.P, self.steps = _identity(model.head), 0
        self.means: dict[str, Tensor] = {}  # the latest x̄ of each modality

    def __call__(self, inputs: dict[str, Tensor], target: Tensor) -> None:
        for modality, x in inputs.items():
            self.optimizer.zero_grad()
            features = self.model.features(modality, x)
            F.cross_entropy(self.model.head(features), target).backward()
            self._project(self.model.head.weight, reference.feature_mean(features.detach()), modality)
            self.optimizer.step()
            self.steps += 1

    def _project(self, W: Tensor, x_bar: Tensor, modality: str) -> None:
        if self.projection == "rls" and self.steps > 0:
            self.P, W.grad = reference.rls_project(self.P, x_bar, W.grad, self.alpha)
        elif self.projection == "window":
            others = [mean for name, mean in self.means.items() if name != modality]
            if others:
                W.grad = reference.project(W.grad, reference.window_projection(torch.stack(others), self.alpha))
            self.means[modality] = x_bar


class ReleasedLoop:
    """The released code's way with a batch: all encoders run forward first, then each modality has its loss, its backward pass
    and a step of head and encoder, with the arithmetic of ``reference.official_*``.

    The head is an ``nn.Linear``, the optimizer has all parameters; batches: L in an epoch, which α falls over.
    """

    def __init__(self, model: MultimodalModel, optimizer: torch.optim.Optimizer, batches: int):
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.P, self.steps, self.batch = _identity(model.head), 0, 0

    def __call__(self, inputs: dict[str, Tensor], target: Tensor) -> None:
        features = {modality: self.model.features(modality, x) for modality, x in inputs.items()}
        alpha = reference.official_alpha(self.batch % self.batches, self.batches)
        for h in features.values():
            self.optimizer.zero_grad()
            F.cross_entropy(self.model.head(h), target).backward()
            if self.steps > 0:
                W = self.model.head.weight
                self.P = reference.official_update(self.P, reference.feature_mean(h.detach()), alpha)
                W.grad = reference.official_project(W.grad, self.P)
            self.optimizer.step()
            self.steps += 1
        self.batch += 1


def _identity(head: nn.Linear) -> Tensor:
    return torch.eye(head.in_features, dtype=head.weight.dtype, device=head.weight.device)

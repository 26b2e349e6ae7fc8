"""The settings of the head's projection, each explicit; the first value of each is the paper's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mla_fast import ops

PROJECTIONS = ("rls", "window", "none", "official")
TARGETS = ("gradient", "update")
BIASES = ("free", "project")


@dataclass(frozen=True)
class Settings:
    """How the head's step is projected; ``MLAOptimizer`` documents each."""

    projection: str = "rls"
    order: str = "update_first"
    target: str = "gradient"
    bias: str = "free"
    alpha: float | Tensor | Callable[[int], float] = 1.0

    def __post_init__(self) -> None:
        ops.check_choice("projection", self.projection, PROJECTIONS)
        ops.check_choice("order", self.order, ops.ORDERS)
        ops.check_choice("target", self.target, TARGETS)
        ops.check_choice("bias", self.bias, BIASES)
        if isinstance(self.alpha, Tensor) and (self.alpha.dim() or self.alpha.dtype != torch.float64):
            raise TypeError(f"alpha: expected a tensor to be 0-d float64, got {self.alpha.dtype} {list(self.alpha.shape)}")
        self.alpha_at(0)

    def alpha_at(self, step: int) -> float:
        """α of the step, checked; waits for the device if it is a tensor."""
        if isinstance(self.alpha, Tensor):
            return ops.check_alpha(self.alpha.item())
        return ops.check_alpha(self.alpha(step) if callable(self.alpha) else self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; a callable alpha cannot be saved and stands as None."""
        return {**asdict(self), "alpha": None if callable(self.alpha) else self.alpha_at(0)}

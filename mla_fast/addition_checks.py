"""What a model has of modalities and classes, and whether an addition fits it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mla_fast import groups
from mla_fast.caller import warn
from mla_fast.head import has_own_weight
from mla_fast.inputs import Inputs, describe
from mla_fast.modality_dict import ModalityDict
from mla_fast.optimizer import MLAOptimizer
from mla_fast.parts import evaluating, is_sharded, known_width, last_linear, unwrap
from mla_fast.seen import SeenClasses

PROTECTS = 'projection="rls", target="update", bias="project"'


class Parts(nn.Module):
    """What a model has of modalities and classes, and the checks of what is to come."""

    encoders: ModalityDict
    head: nn.Module
    interaction: nn.Module | None
    seen: SeenClasses
    logits_of: Callable[[Mapping[str, Tensor]], Tensor]
    _logits: int | None = None  # C of what the head has last returned
    fusion = "entropy"  # also for models that were pickled without it

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, in the order of the columns of ``present`` and of the training schedule (eq. 1)."""
        return tuple(self.encoders)

    @property
    def classes(self) -> int | None:
        """C: of the head's last ``nn.Linear``, or where it does not end in one of its logits; None before it has been called."""
        return known_width(self.head) or self._logits or self.seen.classes

    def _check_stands_alone(self, what: str) -> None:
        if self.interaction is not None:
            raise ValueError(f"interaction: expected None, to {what}: one is made for the modalities and classes that there are")

    def _check_belongs(self, optimizer: MLAOptimizer | None) -> None:
        if optimizer is None:
            return
        if not isinstance(optimizer, MLAOptimizer):
            raise TypeError(f"optimizer: expected the model's MLAOptimizer, got {type(optimizer).__name__}")
        if not {layer.module for layer in optimizer.layers} & set(self.head.modules()):
            raise ValueError("optimizer: expected the MLAOptimizer of this model's head, got that of another one")

    def _check_addition(self, name: str, encoder: Any, optimizer: MLAOptimizer | None, settings: dict[str, Any]) -> None:
        self._check_stands_alone("add_modality")
        if name in self.encoders:
            raise ValueError(f"name: expected one that no modality has, got {name!r} beside {', '.join(self.modalities)}")
        ModalityDict({name: encoder})
        if name in ("average", "fused"):
            raise ValueError(f"name: expected another than {name!r}, which results use for all modalities together")
        ours = {p for part in (*self.encoders.values(), self.head) for p in part.parameters()}
        if ours & set(encoder.parameters()):
            raise ValueError("encoder: expected parameters of its own, got some that are the model's, which would be frozen")
        head = unwrap(self.head)
        if isinstance(head, nn.Linear) and known_width(encoder) not in (None, head.in_features):
            raise ValueError(
                f"encoder: expected features [N, {head.in_features}] to match head.in_features, got [N, {known_width(encoder)}]"
            )
        self._check_belongs(optimizer)
        if optimizer is None:
            if settings:
                raise ValueError(f"{next(iter(settings))}: expected an optimizer to set it for, got none")
            return
        groups.check_joins(optimizer, encoder, settings)
        learns = any(p.requires_grad for p in self.head.parameters())  # or it forgets nothing
        if (projection := optimizer.settings.projection) in ("window", "none") and learns:
            warn(
                f"projection: {projection!r} does not keep the head from forgetting {', '.join(self.modalities)}, whose data is "
                f"not there; train with {PROTECTS} from the start, to add a modality later"
            )

    @torch.no_grad()
    def _check_example(self, name: str, encoder: nn.Module, example: Inputs) -> None:
        if example is None:
            if self.classes is None and self.fusion != "mean":
                kind = type(self.head).__name__
                raise ValueError(f"example: expected a few inputs of {name!r}, since only a call of the {kind} tells its classes")
            return
        with evaluating(encoder):
            features = encoder(example)
        width = getattr(unwrap(self.head), "in_features", None)
        if not isinstance(features, Tensor) or features.dim() != 2 or width not in (None, features.shape[1]):
            raise ValueError(f"encoder: expected features [N, {width or 's'}] for {name!r}, got {describe(features)}")
        self.logits_of({name: features})

    def _check_growth(self, count: Any, optimizer: MLAOptimizer | None) -> None:
        self._check_stands_alone("add_classes")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"count: expected at least 1 class, got {count!r}")
        self._check_belongs(optimizer)
        last = last_linear(self.head)
        if last is None:
            raise ValueError(f"head: expected an nn.Linear, or one that ends a sequence, got {type(self.head).__name__}")
        whole = has_own_weight(last) and not is_sharded(last.weight)
        if isinstance(self.head, DistributedDataParallel) or not whole:
            raise ValueError("head: expected one that is neither distributed, split nor parametrized, to add classes before that")

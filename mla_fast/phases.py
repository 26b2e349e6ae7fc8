"""A training run that goes on with other modalities: what ``Trainer`` does when one is added, and from where it counts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mla_fast.batch import told_to_all
from mla_fast.distributed import all_gather_object
from mla_fast.inputs import Inputs
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.random_state import Replayable
from mla_fast.resume import Position
from mla_fast.trainer_checks import check_scheduler

MakeScheduler = Callable[[MLAOptimizer], Any]


class Phases:
    """The part of a ``Trainer`` that adds modalities and takes them away.

    additions: {modality: the epochs that were done when it was added}.
    """

    model: MultimodalModel
    optimizer: MLAOptimizer
    device: torch.device
    scheduler: Any
    scheduler_interval: str
    epoch: int
    history: list[dict[str, Any]]
    additions: dict[str, int]
    _position: Position

    def _of_this_phase(self) -> list[dict[str, Any]]:
        """Return the records since a modality was last added."""
        return self.history[max(self.additions.values(), default=0) :]

    def add_modality(
        self,
        name: str,
        encoder: nn.Module,
        *,
        scheduler: MakeScheduler | None = None,
        classes: int = 0,
        example: Inputs = None,
        **settings: Any,
    ) -> None:
        """Add a modality to train by data of its own, as ``model.add_modality`` does; ``fit`` goes on with its data.

        Learning rates go back to where a scheduler has found them, and the scheduler, which was planned for the epochs before,
        makes room for what `scheduler` returns of the optimizer, by default none. Until it has been trained the modality has no
        vote. ``additions`` says after how many epochs each came; ``fit(loader, trainer.epoch + 20)`` trains 20 more.
        """
        self._check_between_epochs("add", name)
        self.model.add_modality(name, encoder, optimizer=self.optimizer, classes=classes, example=example, **settings)
        self.additions[name] = self.epoch
        self._begin_phase(scheduler)

    def remove_modality(self, name: str, *, scheduler: MakeScheduler | None = None) -> nn.Module:
        """Take a modality away and return its encoder, as ``model.remove_modality`` does; scheduler as in ``add_modality``."""
        self._check_between_epochs("remove", name)
        encoder = self.model.remove_modality(name, optimizer=self.optimizer)
        self.additions.pop(name, None)
        self._begin_phase(scheduler)
        return encoder

    def _check_between_epochs(self, what: str, name: str) -> None:
        if batches := self._position.batches:
            raise ValueError(f"name: expected to {what} {name!r} between epochs, got {batches} batches into one")

    def _begin_phase(self, scheduler: MakeScheduler | None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group.pop("initial_lr", group["lr"])
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        check_scheduler(self.scheduler, self.scheduler_interval, self.optimizer)
        self._position = Position()

    def _next(self, batches: Replayable, count: int) -> list[tuple[Any, ...]]:
        with self._told_to_all():
            return list(itertools.islice(batches, count))

    def _told_to_all(self) -> contextlib.AbstractContextManager[None]:
        return told_to_all(self.model.modalities, self.optimizer)

    def _mean_losses(self) -> dict[str, float]:
        losses = self._position.losses.sums()
        if not losses:
            raise ValueError(
                "loader: expected at least one batch with a sample in it in every epoch (generators are exhausted after one "
                f"epoch), got none in epoch {self.epoch + 1}"
            )
        return losses.over_ranks(self.model.modalities, self.optimizer.process_group, self.device).means()

    def _take_additions(self, saved: dict[str, Any]) -> None:
        """Count as a checkpoint does; modalities that were added to it since begin where it ends."""
        before: dict[str, int] = saved.get("additions", {})
        self.additions = {name: before.get(name, self.epoch) for name in self.model.added}
        if list(self.model.added) != saved.get("added", []):
            self._position = Position()
            for group in self.optimizer.param_groups:
                group["lr"] = group.get("initial_lr", group["lr"])

    def _share_seen(self) -> None:
        """Count what the modalities have seen on all ranks."""
        for of_rank in all_gather_object(self.model.seen.recorded(), self.optimizer.process_group):
            for modality, mask in of_rank.items():
                self.model.seen.declare(modality, mask)

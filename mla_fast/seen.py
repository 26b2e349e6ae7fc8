"""Which classes each modality has been trained on: it is to have no vote on others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SeenClasses:
    """The classes S_m of each modality, bool [C] by its name, recorded by what trains on labels.

    One that nobody has recorded is taken to have seen all. Rows stay where they are, so that a captured step finds them.
    counts: whether it makes a difference, from the first addition on.
    """

    counts = False

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}  # [C + 1], the last for what does not count
        self._masks: dict[tuple[str, ...], Tensor | None] = {}  # what ``mask`` has returned since the last change

    def record(self, modality: str, target: Tensor, classes: int, weights: Tensor | None = None) -> None:
        """Count classes target [n] as seen; with weights [n], those of rows that weigh something. Nobody waits for a device."""
        row = self._rows.get(modality)
        if row is None or row.device != target.device:
            row = torch.zeros(classes + 1, dtype=torch.bool) if row is None else row
            row = self._rows[modality] = row.to(target.device)
        if weights is not None:
            target = torch.where(weights > 0, target, classes)
        elif not target.is_cpu:
            target = torch.where(target >= 0, target, classes)  # as F.cross_entropy ignores them
        row.scatter_(0, target, True)
        self._masks.clear()

    def declare(self, modality: str, mask: Tensor) -> None:
        """Count those of mask, bool [C], as seen beside what has been recorded."""
        row = torch.nn.functional.pad(mask.cpu(), (0, 1))
        before = self._rows.get(modality)
        self._rows[modality] = row if before is None else before | row.to(before.device)
        self._masks.clear()

    def changed(self) -> None:
        """Look at the rows anew, which a replayed graph has written to."""
        self._masks.clear()

    def mask(self, modalities: Iterable[str], among: Iterable[str]) -> Tensor | None:
        """Return bool [M, C] of these modalities, on the CPU, or None where all `among` which they are have seen all; waits for a
        device after training there."""
        names, every = tuple(modalities), tuple(among)
        if not self.counts or not any(name in self._rows for name in every):
            return None
        if names not in self._masks:
            self._masks[names] = self._mask(names, every)
        return self._masks[names]

    def _mask(self, names: tuple[str, ...], every: tuple[str, ...]) -> Tensor | None:
        known = {name: self._rows[name][:-1].cpu() for name in every if name in self._rows}
        everything = torch.ones_like(next(iter(known.values())))
        if all(bool(row.all()) for row in known.values()):
            return None
        return torch.stack([known.get(name, everything) for name in names])

    def forget(self, modality: str) -> None:
        """Drop what a modality has seen."""
        self._rows.pop(modality, None)
        self._masks.clear()

    def grow(self, modalities: Iterable[str], classes: int, count: int) -> None:
        """Make room for `count` classes after the first `classes`, which none of these modalities has seen."""
        for name in modalities:
            before = self._rows.get(name)
            before = torch.ones(classes + 1, dtype=torch.bool) if before is None else before
            self._rows[name] = torch.nn.functional.pad(before[:classes], (0, count + 1))
        self.counts = True
        self._masks.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has been recorded: {modality: bool [C]}."""
        return {name: row[:-1].cpu() for name, row in self._rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._rows = {name: torch.nn.functional.pad(row, (0, 1)) for name, row in state.items()}
        self._masks.clear()

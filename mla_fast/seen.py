"""Which classes each modality has been trained on: it is to have no vote on others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.caller import warn
from mla_fast.inputs import describe
from mla_fast.interaction import IGNORED

CURE = "Trainer and alternating_step record what they train on; in a loop of your own call model.saw(modality, target)"


class SeenClasses(nn.Module):
    """The classes S_m of each modality, recorded by what trains on labels.

    Those that nobody had recorded when the first addition came have seen all there were; what comes by an addition, a modality or
    a class, has seen nothing and was seen by nobody until that is recorded.

    counts: whether it makes a difference, from the first addition on.
    names: the modalities.
    rows: [M, C + 1] of these, positive where a class was seen, the last for what does not count; None before the first record.
        They stay where they are, so that a captured step finds them. From the first addition on they are a buffer, so that what
        copies a model's buffers copies them (``AveragedModel``, which may average them, too: they are floating).
    """

    counts = False
    rows: Tensor | None

    def __init__(self, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = tuple(names)
        self.rows = None
        self._start()

    def _start(self) -> None:
        self._said: set[str | None] = set()  # the modalities that were warned of; None: classes were
        self.changed()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_said", "_read", "_masks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_rows" in state:  # of a model that was pickled when this was no module
            SeenClasses.__init__(self)
            self.counts = state.get("counts", False)
            self.take({name: row[:-1] for name, row in state["_rows"].items()})
        else:
            super().__setstate__(state)  # type: ignore[no-untyped-call]
            self._start()

    @property
    def classes(self) -> int | None:
        """C, if anything has been recorded."""
        return None if self.rows is None else self.rows.shape[1] - 1

    def record(self, modality: str, target: Tensor, classes: int, weights: Tensor | None = None) -> None:
        """Count classes target [n] as seen; with weights [n], those of rows that weigh something. Nobody waits for a device."""
        row = self._row(modality, classes, target)
        target = target if target.device == row.device else target.to(row.device)
        if (
            weights is not None or not target.is_cpu
        ):  # on the CPU scatter_ refuses a negative label, on a device it counts nowhere
            counted = target >= 0 if weights is None else (target >= 0) & (weights.to(row.device) > 0)
            target = torch.where(counted, target, classes)
        row.scatter_(0, target, 1.0)

    def declare(self, modality: str, mask: Tensor) -> None:
        """Count those of mask, bool [C], as seen beside what has been recorded."""
        row = self._row(modality, len(mask), mask)
        row.copy_(torch.maximum(row, F.pad(mask.to(row), (0, 1))))

    def _row(self, modality: str, classes: int, like: Tensor) -> Tensor:
        """Return the row of a modality, on the device of `like` unless that is the CPU and the rows have left it."""
        rows = self.rows
        if rows is None or rows.shape[1] != classes + 1 or modality not in self.names:
            names = self.names if modality in self.names else (*self.names, modality)
            fresh = torch.zeros(len(names), classes + 1, device=like.device, dtype=torch.float32)
            if rows is not None and self.classes == classes:  # else the head is another one
                fresh[: len(rows)] = rows
            self._hold(names, rows := fresh)
        if rows.device != like.device and not like.is_cpu:
            rows = self.rows = rows.to(like.device)
        return rows[self.names.index(modality)]

    def changed(self) -> None:
        """Look at the rows anew, which a replayed graph has written to."""
        self._read: tuple[Tensor | None, int, Tensor | None] = (None, 0, None)  # rows, their version, what ``_table`` found
        self._masks: dict[tuple[str, ...], Tensor] = {}

    def _table(self) -> Tensor | None:
        """Return bool [M, C] of ``names``, on the CPU, or None where it makes no difference; waits for a device after changes."""
        if not self.counts or self.rows is None:
            return None
        version = 0 if self.rows.is_inference() else self.rows._version  # which every change in place counts up
        if self._read[0] is not self.rows or self._read[1] != version:
            self.changed()
            table = self.rows[:, :-1].cpu() > 0
            self._read = self.rows, version, None if bool(table.all()) else table
        return self._read[2]

    def of(self, modalities: Iterable[str]) -> Tensor | None:
        """Return bool [M, C] of these modalities, on the CPU, or None before the first addition and where all have seen all."""
        if (table := self._table()) is None:
            return None
        known = dict(zip(self.names, table, strict=True))
        return torch.stack([known.get(name, torch.ones_like(table[0])) for name in modalities])

    def mask(self, modalities: Iterable[str]) -> Tensor | None:
        """Return ``of`` these modalities, for a prediction by them; warns once of each that has seen nothing, and of classes that
        nobody has seen."""
        names, table = tuple(modalities), self._table()
        if table is None:
            return None
        if names not in self._masks:
            mask = self.of(names)
            assert mask is not None
            self._warn([name for name, row in zip(names, mask, strict=True) if not row.any()], table)
            self._masks[names] = mask
        return self._masks[names]

    def _warn(self, idle: list[str], table: Tensor) -> None:
        if new := [name for name in idle if name not in self._said]:
            self._said.update(new)
            warn(f"predict: {', '.join(map(repr, new))} has no vote: nothing has recorded that it was trained. {CURE}")
        nobody = (~table.any(0)).nonzero()[:, 0].tolist()
        if nobody and None not in self._said:
            self._said.add(None)
            listed = ", ".join(map(str, nobody[:4])) + (f" and {len(nobody) - 4} more" if len(nobody) > 4 else "")
            warn(f"predict: no answer can be class {listed}: nothing has recorded that a modality was trained on it. {CURE}")

    def add(self, modality: str, others: Sequence[str], classes: int) -> None:
        """Make room for a modality beside those there are, which has seen nothing."""
        self._hold((*others, modality), F.pad(self._rows_of(others, classes), (0, 0, 0, 1)), counts=True)

    def grow(self, modalities: Sequence[str], classes: int, count: int) -> None:
        """Make room for `count` classes after the first `classes`, which none of these modalities has seen."""
        self._hold(modalities, F.pad(self._rows_of(modalities, classes)[:, :classes], (0, count + 1)), counts=True)
        self._said.discard(None)

    def forget(self, modality: str) -> None:
        """Drop what a modality has seen."""
        left = [name for name in self.names if name != modality]
        self._hold(left, None if self.rows is None else self.rows[[self.names.index(name) for name in left]])

    def recorded(self) -> dict[str, Tensor]:
        """Return {modality: bool [C]}, on the CPU, of those of which something is known: of all once it counts."""
        if self.rows is None:
            return {}
        table = zip(self.names, self.rows[:, :-1].cpu() > 0, strict=True)
        return {name: row.clone() for name, row in table if self.counts or row.any()}

    def take(self, recorded: Mapping[str, Tensor]) -> None:
        """Take over what ``recorded`` returned; nothing is known of modalities that are not among it, or they have seen all."""
        names = tuple(dict.fromkeys((*self.names, *recorded)))
        classes = len(next(iter(recorded.values()))) if recorded else self.classes
        if classes is None:
            return
        rows = torch.full((len(names), classes + 1), float(self.counts), device="cpu")
        for name, mask in recorded.items():
            rows[names.index(name), :-1] = mask.to(rows)
        self._hold(names, rows)

    def _rows_of(self, modalities: Sequence[str], classes: int) -> Tensor:
        """Return the rows of these modalities, [M, C + 1], as an addition finds them: ones where nothing is known."""
        known = {} if self.rows is None or self.classes != classes else dict(zip(self.names, self.rows, strict=True))
        ones = torch.ones(classes + 1, device="cpu" if self.rows is None else self.rows.device)
        rows = torch.stack([known.get(name, ones).to(ones) for name in modalities])
        unknown = ~(rows[:, :-1] > 0).any(1, keepdim=True)
        return rows if self.counts else torch.where(unknown, ones, rows)

    def _hold(self, names: Sequence[str], rows: Tensor | None, counts: bool = False) -> None:
        """Hold these rows, in place of those of the same shape."""
        self.changed()
        self.names, self.counts = tuple(names), self.counts or counts
        if self.counts and "rows" not in self._buffers:
            self.register_buffer("rows", self.__dict__.pop("rows"), persistent=False)
        if self.rows is None or rows is None or self.rows.shape != rows.shape:
            self.rows = rows
        else:
            self.rows.copy_(rows)


def counted_labels(target: Any, classes: int, weights: Any = None) -> Tensor | None:
    """Return bool [n]: which of target [n], labels in 0 … C − 1, count: not −100 nor, with weights [n], those of weight 0.

    None: all, which is looked at on the CPU alone. Raises TypeError or ValueError that names the argument, there for labels, too;
    on a device those that name no class do not count.
    """
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.dim() != 1:
        raise TypeError(f"target: expected int64 [N], got {describe(target)}")
    if weights is not None and (not isinstance(weights, Tensor) or weights.shape != target.shape):
        raise ValueError(f"weights: expected [{len(target)}] to match target, got {describe(weights)}")
    named = (target >= 0) & (target < classes)
    if weights is None and target.is_cpu and bool(named.all()):
        return None
    counted = target != IGNORED if weights is None else (target != IGNORED) & (weights.to(target.device) > 0)
    if target.is_cpu and (bad := target[counted & ~named]).numel():
        raise ValueError(f"target: expected labels in 0 … {classes - 1}, or −100 for what does not count, got {bad[0]}")
    return counted & named

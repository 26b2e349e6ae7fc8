"""The state of a training run as a checkpoint: model, optimizer, scheduler, scaler, and each rank's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_fast.caller import warn
from mla_fast.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from mla_fast.distributed import (
    all_gather_object,
    exchange,
    load_portable_state_dict,
    portable_state_dict,
    rank_and_size,
    without_compile,
)
from mla_fast.growing import SEEN
from mla_fast.loss import Loss, has_state, name_of
from mla_fast.modality_dict import parameter_prefix
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.resume import shared_anew

LOSS_STATE = "loss_state"  # in a checkpoint


class Run:
    """What has a state in a run."""

    def __init__(
        self,
        model: MultimodalModel,
        optimizer: MLAOptimizer,
        scheduler: Any,
        scaler: torch.amp.GradScaler | None,
        loss: Loss | None,
    ):
        self.model, self.optimizer, self.loss = model, optimizer, loss
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.parts: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        if has_state(loss):
            self.parts[LOSS_STATE] = loss

    def _kinds(self) -> dict[str, str]:
        kinds = {name: part for name, part in self.parts.items() if name != LOSS_STATE} | {"optimizer": self.optimizer.optimizer}
        names = {name: "none" if part is None else type(part).__name__ for name, part in kinds.items()}
        return {**names, "fusion": self.model.fusion}

    def save(self, path: str | Path, run: dict[str, Any], own: dict[str, Any]) -> None:
        """Write all of it, with `run` and what each rank has of its `own`. Every rank calls it; the first one writes."""
        group = self.optimizer.process_group
        payload = {
            **run,
            "model": portable_state_dict(self.model),
            "added": list(self.model.added),
            "seen": self.model.seen.recorded(),
            **{name: None if part is None else part.state_dict() for name, part in self.parts.items()},
            "kinds": self._kinds(),
            "loss": name_of(self.loss),
            "ranks": all_gather_object(own, group),
        }
        failure: Exception | None = None
        if rank_and_size(group)[0] == 0:
            try:
                write_checkpoint(path, payload)
            except (OSError, TypeError) as error:
                failure = error
        exchange(None, group, failure)  # it is there for all of them, or for none

    def load(self, path: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Continue from a checkpoint. Returns it, and this rank's own part; CheckpointError, and nothing changes, if it does not
        fit.

        One from before modalities were added leaves what belongs to them, and the scheduler, as they are, and has no own part.
        """
        saved = read_checkpoint(path)
        saved["model"] = {without_compile(name): t for name, t in saved["model"].items()}
        own, later = portable_state_dict(self.model), self._added_since(path, saved)
        prefixes = tuple(map(parameter_prefix, later))
        _check_fits(path, {name: t for name, t in own.items() if not name.startswith(prefixes)}, saved["model"])
        kinds = {name: kind for name, kind in self._kinds().items() if not (later and name == "scheduler")}
        for name, kind in kinds.items():
            if (before := saved["kinds"].get(name, kind)) != kind:
                raise CheckpointError(f"{path}: expected it to be saved with {name} {kind}, got {before}")
        rank, size = rank_and_size(self.optimizer.process_group)
        of_ranks = saved["ranks"]
        try:
            another = bool(saved["batches"]) and len(of_ranks) != size and not later
            of_rank = shared_anew(of_ranks, rank) if another else of_ranks[rank % len(of_ranks)]
        except ValueError as error:
            raise CheckpointError(f"{path}: saved inside of an epoch, {error}, got {size}") from error
        now = name_of(self.loss)
        if (before := saved.get("loss", now)) != now:
            warn(f"resume: the run was saved with loss {before}, and goes on with {now}")
        self._load_parts(path, saved, {*kinds, LOSS_STATE} if LOSS_STATE in saved and before == now else set(kinds))
        load_portable_state_dict(self.model, own | saved["model"])
        kept = {name: mask for name, mask in self.model.seen.recorded().items() if name in later}
        self.model.seen.take(kept | saved.get("seen", {}))
        return saved, None if later else of_rank

    def _added_since(self, path: str | Path, saved: Mapping[str, Any]) -> list[str]:
        """Return the modalities that were added to the model and not yet to the checkpoint's."""
        added, before = list(self.model.added), saved.get("added", [])
        if added[: len(before)] != before:
            raise CheckpointError(
                f"{path}: expected a checkpoint of this model, to which {_listed(added)} was added, or from before that, "
                f"got one to which {_listed(before)} was added; call add_modality for the same before"
            )
        return added[len(before) :]

    def _load_parts(self, path: str | Path, saved: dict[str, Any], names: Set[str]) -> None:
        """Load all, or raise CheckpointError and load none."""
        parts = {name: part for name, part in self.parts.items() if part is not None and name in names}
        before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        except Exception as error:
            for name, part in parts.items():
                part.load_state_dict(before[name])
            raise CheckpointError(f"{path}: its {name} does not fit: {error}") from error


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _check_fits(path: str | Path, model: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless it fits; load_state_dict would copy what fits before it complains about the rest."""
    both = ({name: tuple(getattr(t, "shape", ())) for name, t in state.items() if name != SEEN} for state in (model, saved))
    expected, got = both
    if list(expected) != list(got) and expected == got:
        raise CheckpointError(f"{path}: expected the model's parameters in the same order, which the optimizer counts them in")
    if expected != got:
        names = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        differences = ", ".join(f"{name} {expected.get(name, 'none')} ≠ {got.get(name, 'none')}" for name in names[:4])
        raise CheckpointError(f"{path}: expected a checkpoint of this model, but (model ≠ checkpoint) {differences}")

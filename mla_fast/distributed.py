"""Training in several processes, each with a share of every batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mla_fast.model import MultimodalModel
from mla_fast.parts import is_sharded


class RankError(ValueError):
    """Raised on every rank where another one has failed, or where they disagree."""


def distribute(model: MultimodalModel, **settings: Any) -> MultimodalModel:
    """Wrap every encoder and the head in a ``DistributedDataParallel`` of its own, built with `settings`; return the new model.

    A single wrapper around the whole model would wait in each step for the gradients of the encoders that the step does not
    train, or have to search for them in every backward pass (``find_unused_parameters=True``). Parts without trainable
    parameters stay as they are. Build the optimizers from the model that is returned.

    Raises TypeError unless `model` is a MultimodalModel.
    """
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"model: expected a MultimodalModel, got {type(model).__name__}")

    def wrap(part: nn.Module) -> nn.Module:
        if isinstance(part, DistributedDataParallel) or not any(p.requires_grad for p in part.parameters()):
            return part
        return DistributedDataParallel(part, **settings)

    encoders = {modality: wrap(encoder) for modality, encoder in model.encoders.items()}
    interaction = None if model.interaction is None else wrap(model.interaction)
    how = {"interaction": interaction, "fusion": model.fusion, "streams": model.streams}
    wrapped = MultimodalModel(encoders, wrap(model.head), **how)  # type: ignore[arg-type]
    wrapped.take_growth(model)
    return wrapped


def is_distributed(model: MultimodalModel) -> bool:
    """Return whether the gradients of some part are averaged over ranks, by DistributedDataParallel or ``fully_shard``."""
    return any(isinstance(m, DistributedDataParallel) for m in model.modules()) or any(is_sharded(p) for p in model.parameters())


def portable_state_dict(model: MultimodalModel) -> dict[str, Tensor]:
    """Return the model's state under the names it has without ``distribute`` and ``torch.compile``.

    Raises TypeError if ``fully_shard`` has split it.
    """
    if any(is_sharded(p) for p in model.parameters()):
        raise TypeError("model: expected whole parameters; save what fully_shard has split with torch.distributed.checkpoint")
    state = model.state_dict()
    return {portable: state[name] for portable, name in _portable_names(model).items()}


def load_portable_state_dict(model: MultimodalModel, state: dict[str, Tensor]) -> None:
    """Load what ``portable_state_dict`` returned into a model with or without ``distribute`` and ``torch.compile``."""
    names = _portable_names(model)
    model.load_state_dict({names.get(name, name): t for name, t in state.items()})


def without_compile(name: str) -> str:
    """Return the name that a parameter has in a module that is not compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _portable_names(model: MultimodalModel) -> dict[str, str]:
    """Return {name without ``distribute`` and ``torch.compile``: name in the model's state}."""
    prefixes = [f"{name}." for name, module in model.named_modules() if isinstance(module, DistributedDataParallel)]

    def portable(name: str) -> str:
        for prefix in prefixes:
            if name.startswith(prefix + "module."):
                return without_compile(prefix + name.removeprefix(prefix + "module."))
        return without_compile(name)

    return {portable(name): name for name in model.state_dict()}


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in `group` and the group's size; (0, 1) without a group."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def all_reduce_sum(values: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Return the sum of `values` over the ranks, on `device`, which is where the group communicates; `values` without a group."""
    if group is not None:
        values = values.to(device)
        dist.all_reduce(values, group=group)
    return values


def all_gather_object(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return the `value` of every rank, in the order of the ranks, on every rank; ``[value]`` without a group."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def exchange(value: Any, group: dist.ProcessGroup | None, failure: Exception | None = None) -> list[Any]:
    """Return the `value` of every rank; raise the `failure` of a rank there, and RankError with its rank and text on the others.

    A rank that has failed comes here, too, so that nobody waits for it.
    """
    said = None if failure is None else str(failure) or type(failure).__name__
    found = all_gather_object((value, said), group)
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(found):
        if text is not None:
            raise RankError(f"rank {rank}: {text}")
    return [value for value, _ in found]

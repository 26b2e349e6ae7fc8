"""Several processes, each with a share of every batch: what ``MultimodalModel`` needs for it beside a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mla_fast.head import is_sharded
from mla_fast.model import MultimodalModel


def distribute(model: MultimodalModel, **settings: Any) -> MultimodalModel:
    """The model with every encoder and the head in a ``DistributedDataParallel`` of its own, built with `settings`.

    One around the whole model would wait in each step for the gradients of the encoders whose turn it is not, unless it looks
    for them in every backward pass (``find_unused_parameters=True``). Apart, what a step does not use is not waited for. Parts
    without a trainable parameter stay as they are. Build the optimizers after it.
    """
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"model: expected a MultimodalModel, got {type(model).__name__}")

    def wrapped(part: nn.Module) -> nn.Module:
        if isinstance(part, DistributedDataParallel) or not any(p.requires_grad for p in part.parameters()):
            return part
        return DistributedDataParallel(part, **settings)

    encoders = {modality: wrapped(encoder) for modality, encoder in model.encoders.items()}
    return MultimodalModel(encoders, wrapped(model.head), streams=model.streams)


def is_distributed(model: MultimodalModel) -> bool:
    """Some part's gradients are averaged over ranks, by DistributedDataParallel or ``fully_shard``."""
    return any(isinstance(m, DistributedDataParallel) for m in model.modules()) or any(is_sharded(p) for p in model.parameters())


def portable_state_dict(model: MultimodalModel) -> dict[str, Tensor]:
    """The model's state by the names that it has without ``distribute``; TypeError for one that ``fully_shard`` has split."""
    if any(is_sharded(p) for p in model.parameters()):
        raise TypeError("model: expected whole parameters; save what fully_shard has split with torch.distributed.checkpoint")
    state = model.state_dict()
    return {short: state[name] for short, name in _names(model).items()}


def load_portable_state_dict(model: MultimodalModel, state: dict[str, Tensor]) -> None:
    names = _names(model)
    model.load_state_dict({names[name]: t for name, t in state.items()})


def _names(model: MultimodalModel) -> dict[str, str]:
    """{name without distribute: name in the model's state}."""
    wrapped = [f"{name}." for name, module in model.named_modules() if isinstance(module, DistributedDataParallel)]

    def portable(name: str) -> str:
        for prefix in wrapped:
            if name.startswith(prefix + "module."):
                return prefix + name.removeprefix(prefix + "module.")
        return name

    return {portable(name): name for name in model.state_dict()}


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(this process's rank, how many there are); without a group it is alone."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def added_up(sums: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """The sum over the ranks, on the device where they talk to each other."""
    if group is not None:
        sums = sums.to(device)
        dist.all_reduce(sums, group=group)
    return sums


def of_all_ranks(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What each rank has, on every rank."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values

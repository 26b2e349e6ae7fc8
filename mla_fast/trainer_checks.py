"""What ``Trainer`` is given: errors that name the argument, what it was and what it should be; and when it has enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from mla_fast import graph
from mla_fast.callbacks import flatten
from mla_fast.caller import warn
from mla_fast.distributed import is_distributed
from mla_fast.evaluate import check_evaluated
from mla_fast.head import FROZEN
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.step import why_in_turn
from mla_fast.trained import check_grad_mode


def check_trainer(
    model: MultimodalModel,
    optimizer: MLAOptimizer,
    amp: torch.dtype | None,
    scaler: torch.amp.GradScaler | None,
    accumulate: int,
    clip_norm: float | None,
    backward: Callable[[Tensor], Any] | None,
    callbacks: Sequence[Any],
) -> None:
    """Check the arguments of ``Trainer``."""
    if optimizer.process_group is not None and not is_distributed(model):
        raise ValueError(
            "model: expected mla_fast.distribute(model) where torch.distributed has several processes "
            "(or MLAOptimizer(…, process_group=None), to train a model in each)"
        )
    if not _is_count(accumulate) or accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1 batch, got {accumulate!r}")
    if clip_norm is not None and not (isinstance(clip_norm, Real) and clip_norm > 0):
        raise ValueError(f"clip_norm: expected a positive number or None, got {clip_norm!r}")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks: expected a sequence of functions of an epoch's record, got {callbacks!r}")
    if backward is not None and not callable(backward):
        raise TypeError(f"backward: expected a function of the loss, got {backward!r}")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler: expected a torch.amp.GradScaler or None, got {scaler!r}")
    if amp is torch.float16 and scaler is None:
        raise ValueError("scaler: expected a torch.amp.GradScaler with amp=torch.float16, whose small gradients vanish, got None")
    if scaler is not None and backward is not None:
        raise ValueError("backward: expected None with a scaler, whose scaled loss goes backward, got both")


def check_scheduler(scheduler: Any, interval: str, optimizer: MLAOptimizer) -> None:
    """Check ``Trainer``'s scheduler and scheduler_interval."""
    if scheduler is not None and (isinstance(scheduler, type) or not hasattr(scheduler, "step")):
        raise TypeError(f"scheduler: expected a learning-rate scheduler, got {scheduler!r}")
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", optimizer.param_groups)
    if groups is not optimizer.param_groups:  # which a wrapper of it has, too
        raise ValueError("scheduler: expected one of the MLAOptimizer or of what it wraps, got one of another optimizer")
    if interval not in ("epoch", "batch"):
        raise ValueError(f'scheduler_interval: expected "epoch" or "batch", got {interval!r}')
    if interval == "batch" and isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        raise ValueError('scheduler_interval: expected "epoch" for ReduceLROnPlateau, which sees mean losses, got "batch"')


def warn_of_scheduler(scheduler: Any, interval: str, epochs: float) -> None:
    """Warn where a scheduler that counts batches is stepped once an epoch."""
    total = getattr(scheduler, "total_steps", None) or getattr(scheduler, "total_size", None)  # OneCycleLR's, CyclicLR's
    if interval == "epoch" and total is not None and total > epochs:
        warn(
            f"scheduler: {type(scheduler).__name__} is planned over {total:g} steps but takes one an epoch, {epochs} in all, so "
            'the learning rate hardly moves: Trainer(…, scheduler_interval="batch")?'
        )


def step_decay(optimizer: torch.optim.Optimizer, epochs: int) -> lr_scheduler.MultiStepLR:
    """Return a scheduler by which the learning rate falls to a tenth after 70 % of the epochs."""
    return lr_scheduler.MultiStepLR(optimizer, [max(1, round(0.7 * epochs))])


def step_scheduler(scheduler: Any, loss: dict[str, float]) -> None:
    """Step a scheduler, if there is one, at the end of an epoch of these mean losses."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(sum(loss.values()) / len(loss))
    elif scheduler is not None:
        scheduler.step()


def obstacle_to_graphs(model: MultimodalModel, optimizer: MLAOptimizer, in_turn: dict[str, bool]) -> str | None:
    """Return why no CUDA graph can hold a trainer's steps, or None; ValueError where there is no GPU.

    in_turn: for each setting that makes modalities take turns, by name, whether it was given.
    """
    if optimizer.device.type not in graph.DEVICES:
        raise ValueError(f"cuda_graph: expected False where the model is on {optimizer.device}, got True")
    if (name := next((name for name, given in in_turn.items() if given), None)) is not None:
        return f"{name} was given, for which modalities take their steps one after another"
    if (reason := why_in_turn(model, optimizer)) is not None:
        return reason
    if optimizer.process_group is not None:
        return graph.OVER_RANKS
    return None


def check_fit(
    epochs: float,
    validation: Iterable[Any] | None,
    checkpoint: str | Path | None,
    checkpoint_every: int | None,
    patience: int | None,
    monitor: str,
) -> None:
    """Check the arguments of ``Trainer.fit``, and that there are gradients."""
    check_grad_mode()
    for name, value in (("epochs", epochs), ("checkpoint_every", checkpoint_every), ("patience", patience)):
        if not (value is None or _is_count(value) or (name == "epochs" and value == math.inf)):
            raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if checkpoint_every is not None and (checkpoint is None or checkpoint_every < 1):
        raise ValueError(f"checkpoint_every: expected at least 1 batch, and a checkpoint to write to, got {checkpoint_every}")
    check_evaluated("validation", validation)
    if patience is not None and patience < 1:
        raise ValueError(f"patience: expected at least 1 epoch or None, got {patience}")
    if patience is not None and validation is None and monitor.startswith("validation/"):
        raise ValueError(f"validation: expected a loader, for patience to monitor {monitor!r}, got None")


def stopped(history: list[dict[str, Any]], patience: int | None, monitor: str) -> bool:
    """Tell by the history alone whether to stop, so that a resumed run stops where it would have."""
    return patience is not None and bool(history) and len(history) - 1 - best_epoch(history, monitor) >= patience


def best_epoch(history: Sequence[dict[str, Any]], monitor: str) -> int:
    """Return the place in the history of the best `monitor`: the largest, or smallest for a loss, and the first of equals.

    Raises ValueError if the last record has no such number.
    """
    flat = [flatten(record) for record in history]
    if monitor not in flat[-1]:
        raise ValueError(f"monitor: expected one of {', '.join(flat[-1])}, got {monitor!r}")
    sign = -1 if "loss" in monitor.split("/")[:2] else 1
    values = [sign * record.get(monitor, float("nan")) for record in flat]
    return max(range(len(values)), key=lambda i: values[i] if values[i] == values[i] else -float("inf"))


def said(losses: Mapping[str, float], history: Sequence[dict[str, Any]]) -> str:
    """Return what a progress bar says: the mean loss of the epoch so far, and the accuracy after the last one."""
    known = [loss for loss in losses.values() if loss == loss]
    parts = [f"loss {sum(known) / len(known):.3f}"] if known else []
    if history and "accuracy" in history[-1].get("validation", {}):
        parts.append(f"validation accuracy {100 * history[-1]['validation']['accuracy']['fused']:.1f} %")
    return ", ".join(parts)


def kept(optimizer: MLAOptimizer, history: list[dict[str, Any]]) -> dict[str, float]:
    """Return ‖GP‖/‖G‖ of each layer of the head in its last step; warn, once in a run, if one has frozen."""
    layers = optimizer.diagnostics()["layers"]
    before = history[-1]["projection"] if history else {}
    if not any(share < FROZEN for share in before.values()):
        optimizer.watch.frozen([name for name, layer in layers.items() if layer["frozen"]])
    return {name: layer["gradient_kept"] for name, layer in layers.items()}


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0

"""Whether a step of the head may be taken, and how it is taken back where only the device knows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mla_fast import ops
from mla_fast.caller import warn
from mla_fast.head import Collected, HeadLayer, HeadStep, local, on_host
from mla_fast.settings import Settings
from mla_fast.wrapped import parameters_of

SKIPPED = (
    "step skipped: features or a gradient of the head are not finite (counted in diagnostics()). BatchNorm's running statistics "
    "stay finite where a MultimodalModel calls the encoder, and not where a loop of your own does"
)


class Verdict(NamedTuple):
    """bad: something is not finite, or torch.amp found an overflow; float32 [] on a device, which nobody waits for. snapshot: of
    what the step may change there, where the wrapped optimizer cannot be told to leave it."""

    bad: bool | Tensor
    snapshot: Snapshot | None = None


def look_at(
    steps: list[HeadStep],
    idle: list[Tensor],
    *,
    found_inf: Tensor | None,
    account: Tensor,
    backend: str,
    wrapped: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None,
) -> Verdict:
    """Look whether x̄, G and their norms are finite; the steps learn ‖G‖² and ‖x̄‖², and on a device their `skip`.

    idle: the x̄ of frozen layers. account: int32 [2] on the device, which counts bad steps. wrapped: the optimizer whose step is
    taken back where it was bad; None for a fused one, which reads the verdict itself. group: the ranks; each has seen its own
    rows of a sharded G.
    """
    if not steps and not idle:
        return Verdict(False)
    sharded = any(step.layer.sharded for step in steps)

    def largest_over_ranks(bad: Tensor) -> Tensor:
        dist.all_reduce(bad, dist.ReduceOp.MAX, group=group)
        return bad

    if on_host(steps[0].x_bar if steps else idle[0]):
        finite = [_finite(step) for step in steps] + [math.isfinite(x_bar.norm()) for x_bar in idle]
        bad = not all(finite) or (found_inf is not None and bool(found_inf))
        return Verdict(bool(largest_over_ranks(torch.tensor([float(bad)]))) if sharded else bad)
    looked_at = [t for step in steps for t in (step.grad, step.x_bar)] + [t for step in steps for t in step.free] + idle
    first = [step.layer.projection.first for step in steps if step.layer.projection.first is not None]
    snapshot = None
    if steps and wrapped is not None:
        snapshot = Snapshot(wrapped, [p for step in steps for p in step.layer.module.parameters()])
    kept = [] if snapshot is None else list(snapshot.before.values())
    reduced = largest_over_ranks if sharded else None
    flag, squares, skip, copies = ops.head_check_(backend, looked_at, len(steps), account, first, found_inf, kept, reduced)
    for i, step in enumerate(steps):
        step.squares, step.skip = squares[2 * i : 2 * i + 2], skip[i : i + 1]
    if snapshot is not None:
        snapshot.copies = copies
    return Verdict(flag, snapshot)


def check_modality(found: Collected, named: str | None, before: str | None, settings: Settings) -> None:
    """Check the modality of a step, by its name in ``step`` or as it was set before: warn where nothing of it went through the
    head, and raise ValueError where the window needs a name."""
    if found.unseen and named is not None:
        warn(
            f"step: no row of {named!r} went through the head that this optimizer was built with, only other parameters "
            "move; if the model has got another head, build an MLAOptimizer for that"
        )
    if (found.steps or found.empty) and settings.projection == "window" and named is None and before is None:
        raise ValueError('modality: expected a name, step(modality="…"): projection="window" keeps one mean for each')


def check_stepped(layers: list[HeadLayer], optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError unless the weights that the head uses are those that `optimizer` steps: others would train without a
    projection, or not at all."""
    for layer in layers:
        weight = layer.module.weight
        if weight.requires_grad and not any(p is weight for p in parameters_of(optimizer)):
            raise RuntimeError(
                f"head: expected the weight of {layer.name} among the parameters that the optimizer steps, got another: it was "
                "replaced since (load_state_dict(assign=True), fully_shard, a parameter group set by hand), or an engine steps "
                "copies of it (ZeRO, master weights); build MLAOptimizer last, and over the weight itself"
            )


def _finite(step: HeadStep) -> bool:
    """Whether all of it is, and its norms."""
    norms = [norm.item() for norm in torch._foreach_norm([step.grad, step.x_bar, *step.free])]
    step.squares = norms[0] * norms[0], norms[1] * norms[1]
    return math.isfinite(sum(norms))


class Snapshot:
    """What an optimizer's step may change about some parameters, and copies that take it back where the device says so."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]):
        self.optimizer, self.parameters = optimizer, parameters
        self.before = self._tensors()
        self.copies: list[Tensor] = []  # of these

    def _tensors(self) -> dict[tuple[Tensor, str | None], Tensor]:
        """By parameter and name in its state, since an optimizer may put a new tensor there."""
        device = self.parameters[0].device
        tensors: dict[tuple[Tensor, str | None], Tensor] = {(p, None): local(p) for p in self.parameters}
        for p in self.parameters:
            state = self.optimizer.state.get(p, {})
            tensors |= {(p, name): local(t) for name, t in state.items() if isinstance(t, Tensor) and t.device == device}
        return tensors

    def restore(self, backend: str, bad: Tensor) -> None:
        """Take the step back where bad is 1; state that the step created becomes zero."""
        tensors = self._tensors()
        copies = {key: copy for key, copy in zip(self.before, self.copies, strict=True) if key in tensors}
        created = [t for key, t in tensors.items() if key not in copies]
        ops.head_restore_(backend, [*(tensors[key] for key in copies), *created], list(copies.values()), bad)

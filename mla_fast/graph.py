"""Training steps as CUDA graphs: what a batch makes the host do is recorded once, and the GPU repeats it by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mla_fast.batch import Batch, unpack_batch
from mla_fast.caller import warn
from mla_fast.inputs import Inputs
from mla_fast.loss import Loss
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.recorder import Recorder
from mla_fast.step import alternating_step, can_step_together, check_arguments, steps_together
from mla_fast.trained import check_grad_mode

DEVICES = ("cuda",)
WARM_UP = 3  # eager steps before a capture: what is made by first steps must be there, kernels compiled, algorithms chosen
MAX_GRAPHS = 4  # kinds of batches; each keeps its inputs and its share of a pool of memory
OVER_RANKS = "several processes train together, which agree on every batch"
_MIXES_ROWS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class GraphedStep:
    """Train on batches as ``alternating_step`` does, replaying a CUDA graph where a batch looks like those before it.

        step = mla.GraphedStep(model, optimizer)
        for batch in loader:            # (inputs, target) or (inputs, target, present), on the GPU or in pinned memory
            losses = step(batch)

    A batch's kind is its modalities, shapes and dtypes. The first three of a kind are trained on eagerly, the fourth is captured,
    and from there on a batch is copied to where the graph reads it. There are at most four kinds; batches of others are trained
    on eagerly, as is everything that no graph can hold, with a warning that says once what it is. Every batch is one step.

    The learning rate is read on the device if the wrapped optimizer is fused or capturable; otherwise the step is captured anew
    when it changes, as for any other setting, for layers that are frozen or put in evaluation mode, and after
    ``load_state_dict``. α may be a number, a tensor or a callable. Adam and its kind need ``capturable=True``.

    With `present`, a sample that lacks a modality is encoded as another one that has it and counts for nothing, so that no shape
    depends on the mask. Give `present` on the CPU: which modalities have rows at all decides on the graph. Encoders must treat
    rows one by one; with BatchNorm in training mode such batches are trained on eagerly.

    Modules' Python code runs only when a step is captured. Random numbers (dropout) differ in every replay.

    Args:
        model, optimizer: as for ``alternating_step``, on a GPU.
        amp: dtype for autocast, torch.bfloat16 or None.
        loss: as for ``Trainer``, on the GPU; batches in which samples lack modalities are trained on eagerly with it.

    Raises ValueError that names the argument, what it was and what it should be.
    """

    def __init__(
        self, model: MultimodalModel, optimizer: MLAOptimizer, *, amp: torch.dtype | None = None, loss: Loss | None = None
    ):
        check_arguments(model, optimizer, amp, loss)
        if optimizer.device.type not in DEVICES:
            raise ValueError(f"model: expected on a GPU for CUDA graphs, got on {optimizer.device}")
        if not can_step_together(model):
            raise ValueError(
                "model: expected one that alternating_step takes, got one that shares parameters or has its own forward"
            )
        if any(group.get("capturable") is False for group in optimizer.param_groups):
            kind = type(optimizer.optimizer).__name__
            raise ValueError(f"optimizer: expected {kind}(…, capturable=True) for CUDA graphs, got capturable=False")
        self.model, self.optimizer, self.amp, self.loss = model, optimizer, amp, loss
        self._recorder = Recorder(optimizer.device)
        self._kinds: dict[Any, int | _Captured] = {}  # eager steps so far, or the graph
        self._constants: list[Any] | None = None  # what the graphs take as given
        self._held: tuple[Any, ...] = ()
        self._parts: list[Any] = []  # encoders, head, and the identity of its weights, which grow with the classes
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._rates: list[_Rate | None] = []  # learning rates that the graphs read, by group
        self._refused: str | None = None  # why nothing can be captured at all
        self._said: set[str] = set()

    def __call__(self, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        check_grad_mode()
        inputs, target, present = unpack_batch(self.model, batch, loss=self.loss)
        inputs = {modality: inputs[modality] for modality in self.model.modalities if modality in inputs}
        columns = None if present is None else self.model.columns(present, inputs)
        counts = [len(target)] * len(inputs) if columns is None else columns.sum(0).tolist()
        parts = Batch(*self._of_those(inputs, [n > 0 for n in counts], columns), target)
        if set(counts) <= {0, len(target)}:
            parts.present = None
        if not parts.inputs or len(target) == 1:  # which BatchNorm may refuse
            return self._eager(inputs, target, present)
        if (reason := self._obstacle(parts)) is not None:
            self.say(reason)
            return self._eager(inputs, target, present)
        self._forget_if_changed()
        kind = parts.kind()
        found = self._kinds.get(kind, 0)
        if kind not in self._kinds and len(self._kinds) >= MAX_GRAPHS:
            self.say(
                f"batches come in more than {MAX_GRAPHS} kinds (modalities, shapes, dtypes); pad them to fewer, or leave a "
                "smaller last one out with drop_last=True"
            )
            return self._eager(inputs, target, present)
        if isinstance(found, int) and found < WARM_UP:
            return self._warm_up(kind, found, parts.to(self.optimizer.device))
        if isinstance(found, int):
            try:
                found = self._kinds[kind] = self._capture(parts)
            except _CannotCapture as error:
                self._refused = str(error)
                self.say(self._refused)
                return self._eager(inputs, target, present)
        return self._replay(found, parts)

    def say(self, reason: str) -> None:
        """Warn once that steps are taken eagerly, and why."""
        if reason not in self._said:
            self._said.add(reason)
            warn(f"cuda_graph: steps are taken eagerly: {reason}")

    @staticmethod
    def _of_those(inputs: dict[str, Inputs], here: list[bool], columns: Tensor | None) -> tuple[dict[str, Inputs], Tensor | None]:
        kept = [i for i, there in enumerate(here) if there]
        names = [modality for modality, there in zip(inputs, here, strict=True) if there]
        if columns is not None and len(kept) < len(here):
            columns = columns[:, kept]
        return {modality: inputs[modality] for modality in names}, columns

    def _obstacle(self, parts: Batch) -> str | None:
        """Return why this batch cannot be captured, or None."""
        if self._refused is not None:
            return self._refused
        if self.optimizer.process_group is not None:
            return OVER_RANKS
        if _has_hooks(self.optimizer):
            return "the optimizer has step hooks, which no replay would call; remove them"
        if torch.is_autocast_enabled(self.optimizer.device.type):
            return "autocast is on around the step; give amp= in place of it"
        if parts.present is not None and self.loss is not None:
            return "samples lack modalities, and loss= is a mean over rows, of which a graph would count copies"
        if parts.present is not None:
            for modality in (*parts.inputs, None):
                part = self.model.head if modality is None else self.model.encoders[modality]
                if any(isinstance(m, _MIXES_ROWS) and m.training for m in part.modules()):
                    owner = "the head" if modality is None else f"the encoder of {modality!r}"
                    return f"samples lack modalities, and BatchNorm in {owner} would count rows that are not there"
        return None

    def _eager(self, inputs: dict[str, Inputs], target: Tensor, present: Tensor | None) -> dict[str, Tensor]:
        parts = Batch(inputs, present, target).to(self.optimizer.device)
        batch = parts.inputs, parts.target, parts.present
        return alternating_step(self.model, self.optimizer, batch, amp=self.amp, loss=self.loss)

    def _step(self, parts: Batch) -> Tensor:
        """Return the losses [M] of one step of each modality."""
        rows = parts.rows()
        totals = {modality: len(parts.target) for modality in rows}
        return torch.stack(list(steps_together(self.model, self.optimizer, rows, totals, self.amp, self.loss).values()))

    def _warm_up(self, kind: Any, number: int, parts: Batch) -> dict[str, Tensor]:
        losses, waits = self._recorder.eager(lambda: self._step(parts))
        self._forget_if_changed()  # as by a modality that is new to the window
        self._kinds[kind] = number + 1
        if number + 1 == WARM_UP:
            name = _kept_on_host(self.optimizer)
            if waits:
                self._refused = f"something in the step waits for the device: {waits}"
            elif name is not None:
                self._refused = f"{type(self.optimizer.optimizer).__name__} keeps {name!r} on the host, where no replay counts it"
        return dict(zip(parts.inputs, losses.unbind(), strict=True))

    def _capture(self, parts: Batch) -> _Captured:
        """Record the step; nothing moves. Raises _CannotCapture where that fails."""
        layers, held = self.optimizer.layers, parts.like(self.optimizer.device)
        held.copy_(parts)
        before = [(layer.projection.step, layer.projection.modality, layer.squares) for layer in layers]
        alphas = [layer.projection.schedule(len(parts.inputs)) for layer in layers]
        try:
            with self._rates_on_device():
                graph = self._recorder.capture(lambda: self._step(held))
            after = [(layer.projection.step, layer.projection.modality, layer.squares) for layer in layers]
        except RuntimeError as error:
            self.optimizer.zero_grad()
            raise _CannotCapture(f"the step cannot be captured: {error}") from error
        finally:
            for layer, (step, modality, squares) in zip(layers, before, strict=True):
                layer.projection.scheduled = {}
                layer.projection.step, layer.projection.modality, layer.squares = step, modality, squares
        self.optimizer.zero_grad()  # gradients are where the graph's own are, and no other batch's
        steps = [(end[0] - start[0], *end[1:]) for start, end in zip(before, after, strict=True)]
        return _Captured(held, graph, steps, alphas)

    def _replay(self, captured: _Captured, parts: Batch) -> dict[str, Tensor]:
        layers = self.optimizer.layers
        for layer, alphas in zip(layers, captured.alphas, strict=True):
            layer.projection.fill(alphas)
        captured.held.copy_(parts)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if rate is not None and rate.value != (value := float(group["lr"])):
                rate.on_device.fill_(value)
                rate.value = value
        captured.graph.replay()
        self.model.seen.changed()
        for layer, (count, modality, squares) in zip(layers, captured.steps, strict=True):
            layer.projection.step += count
            layer.projection.modality, layer.squares = modality, squares
        return dict(zip(captured.held.inputs, captured.graph.outputs.clone().unbind(), strict=True))

    @contextlib.contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Put tensors in the place of learning rates while a step is captured; otherwise schedulers and states see numbers."""
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = group["lr"] if rate is None else rate.on_device
        try:
            yield
        finally:
            for group, lr in zip(groups, before, strict=True):
                group["lr"] = lr

    def _forget_if_changed(self) -> None:
        """Drop all graphs where something that they take as given has changed: settings, state, parameters, modes."""
        optimizer, device = self.optimizer, self.optimizer.device
        projections = [layer.projection for layer in optimizer.layers]
        parts = [*self.model.encoders.values(), self.model.head, *(id(layer.module.weight) for layer in optimizer.layers)]
        if parts != self._parts:  # going through the modules takes longer than all else here
            self._parts, self._modules, self._parameters = parts, list(self.model.modules()), list(self.model.parameters())
        now = [optimizer.settings, self.model.streams, *((p.data_ptr(), p.requires_grad) for p in self._parameters)]
        now += [module.training for module in self._modules]
        now += [id(optimizer.state), *map(id, projections), *(p.layout() for p in projections)]
        for group in optimizer.param_groups:
            names = [name for name in group if name != "params" and not (name == "lr" and _reads_rate(group, device))]
            now.append([(name, id(group[name]) if isinstance(group[name], Tensor) else group[name]) for name in names])
        if now == self._constants:
            return
        settings = len(optimizer.param_groups)
        warm = self._constants is not None and self._constants[:-settings] == now[:-settings]
        self._constants, kinds = now, self._kinds if warm else {}
        self._held = optimizer.state, projections  # or new ones might get the old ones' identity
        # Other settings alone need one eager step, which makes what state they want: momentum, where there was none.
        self._kinds = {kind: found if isinstance(found, int) else WARM_UP - 1 for kind, found in kinds.items()}
        self._rates = [_rate(group, device) for group in optimizer.param_groups]


class _CannotCapture(Exception):
    """Says why."""


@dataclass
class _Captured:
    """A recorded step: where it reads its batch, what it did to each layer of the head, and where it reads the layers' α."""

    held: Batch
    graph: Any
    steps: list[tuple[int, str | None, Any]]  # steps that were counted, the last modality, the squares
    alphas: list[Tensor | None]


@dataclass
class _Rate:
    """Where a graph finds a group's learning rate, float32 as fused kernels want it, and what is there."""

    on_device: Tensor
    value: float


def _reads_rate(group: dict[str, Any], device: torch.device) -> bool:
    """Whether the optimizer reads a learning rate that is a tensor where that is; others ask the device for its value."""
    return bool(group.get("fused") or group.get("capturable")) and not _on(group["lr"], device)


def _on(value: Any, device: torch.device) -> bool:
    return isinstance(value, Tensor) and value.device == device


def _rate(group: dict[str, Any], device: torch.device) -> _Rate | None:
    """Return where graphs read the group's rate; None where it is the user's own tensor or a constant of the graph."""
    if not _reads_rate(group, device):
        return None
    return _Rate(torch.tensor(float(group["lr"]), dtype=torch.float32, device=device), float(group["lr"]))


def _has_hooks(optimizer: MLAOptimizer) -> bool:
    """Whether somebody watches its steps, which torch tells in private alone."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def _kept_on_host(optimizer: MLAOptimizer) -> str | None:
    """Return the name of some state that the wrapped optimizer keeps and changes on the host, or None."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if value is not None and not _on(value, optimizer.device):
                return str(name)
    return None

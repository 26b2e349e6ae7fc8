"""``MLAOptimizer``: any torch optimizer, with the shared head's step projected away from what other modalities need."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mla_fast import ops
from mla_fast.head import HeadLayer, HeadStep, local, trainable_linears, unwatch
from mla_fast.projection import Projection, ProjectionSettings

STATE_VERSION = 3


class MLAOptimizer(torch.optim.Optimizer):
    r"""Wraps a ``torch.optim.Optimizer`` and is one: everything steps as before, but the shared head's step is projected.

        optimizer = MLAOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), head=model.head)
        for modality, (inputs, target) in …:                        # one modality per step (eq. 1)
            optimizer.zero_grad()
            F.cross_entropy(model.head(model.encoders[modality](inputs)), target).backward()
            optimizer.step(modality=modality)

    Every ``nn.Linear`` in `head` gets a projection P of its own; x̄ [s] is the mean of the features that went through it in the
    backward passes since the last step (so gradient accumulation just works). What else the head has (convolutions, attention)
    steps freely. Encoders without a gradient in a step are left alone: no momentum, no weight decay.

    Args:
        optimizer: any optimizer whose ``step`` does not require a closure; it holds the head's parameters among others.
        head: the shared head, a module with at least one ``nn.Linear`` that is trainable now; it has one MLAOptimizer, the last.
        alpha: α > 0 of eq. 5, or a callable of the step number. Large: the head stays free longer. A 0-d float64 tensor on
            the head's device is read there at each step: change it in place, between replays of a CUDA graph too.
        projection: ``"rls"`` (the paper's P, eq. 5; the head's steps shrink like 1/t) · ``"window"`` (P from the other
            modalities' latest x̄ alone; never shrinks, no s × s matrix, needs the name of the modality in ``step``) ·
            ``"none"`` (alternation alone) · ``"official"`` (the released code's arithmetic, for comparison).
        order: ``"update_first"`` (Algorithm 1: P includes the current batch; the first step is free and enters nothing) ·
            ``"project_first"`` (the gradient is projected, then x̄ enters P). No difference for ``"window"`` and ``"none"``.
        target: ``"gradient"`` (eq. 3) · ``"update"``: the wrapped optimizer steps first, then W ← W_old + (W_new − W_old) P, so
            that momentum, weight decay and Adam's scaling are projected too.
        bias: ``"free"`` (the paper projects the weight alone) · ``"project"`` (the bias is one more column of W, with feature 1).
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``; see ``mla_fast.ops``.
        process_group: whose ranks' features x̄ is the mean of, so that P is the same on all of them: ``"auto"`` (all processes,
            where torch.distributed has several) · a ``ProcessGroup`` · None (every process trains a model of its own).

    A step in which x̄ or the head's gradient is not finite, or a batch of no rows went through the head, changes nothing: no
    parameter, no momentum, no P (what the forward pass changes, as BatchNorm does, is changed). ``diagnostics()`` counts such
    steps. One in which the head has no gradient at all moves what else has one, and warns if a modality is named. On CUDA
    nothing here waits for the device, and a step that is not finite is undone for the head alone unless the wrapped optimizer is
    fused: the encoders' gradients are then the caller's to guard, and a count of steps that it keeps on the CPU (Adam's) goes on.

    ``GraphedStep`` captures whole batches in CUDA graphs. Who captures a step by hand takes one with every modality before, gives
    learning rate and alpha as tensors if they are to change between replays, and captures anew after ``load_state_dict``;
    ``steps`` in diagnostics does not count such replays.

    Drop gradients with this optimizer's ``zero_grad``, which drops the features collected with them; the model's own leaves
    those of a step that was never taken to be counted in the next x̄. ``torch.autograd.grad`` through the head counts features as
    ``backward`` does: call ``zero_grad`` after it. Under torch.compile features are counted in the forward
    pass: call ``zero_grad`` before it, and evaluate under ``no_grad``.

    Clip gradients between ``backward`` and ``step``, as ever: P makes no gradient longer. In distributed training every rank
    makes the same backward passes through the head, with no row if it has none; the encoders' and the head's gradients are
    DistributedDataParallel's to average (``mla_fast.distribute``). A head that ``fully_shard`` has split by rows is projected
    row by row where the rows are; one that is split in another way is refused.

    Raises TypeError or ValueError that names the argument, what it was and what it should be.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        head: nn.Module,
        *,
        alpha: float | Tensor | Callable[[int], float] = 1.0,
        projection: str = "rls",
        order: str = "update_first",
        target: str = "gradient",
        bias: str = "free",
        backend: str = "auto",
        process_group: dist.ProcessGroup | str | None = "auto",
    ):
        _check_optimizer(optimizer)
        self.settings = ProjectionSettings(projection, order, target, bias, alpha)
        layers = trainable_linears(head, optimizer)
        if process_group not in ("auto", None) and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f'process_group: expected "auto", a ProcessGroup or None, got {process_group!r}')
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self.layers = [HeadLayer(*layer, self.settings, backend, process_group) for layer in layers]
        self.modality: str | None = None  # of a step that is not told; for wrappers that do not pass it on
        self.skipped = {"nonfinite": 0, "empty": 0}
        self._measured: Measured | None = None
        # Steps that only the device knows it skipped, and a counter of the kernel's; a captured step finds it where it was.
        self._account = torch.zeros(2, dtype=torch.int32, device=self.layers[0].module.weight.device)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    @property
    def device(self) -> torch.device:
        """The head's."""
        return self._account.device

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Whose ranks' features x̄ is the mean of; None: this process's alone."""
        return self.layers[0].features.group

    def __repr__(self) -> str:
        layers = ", ".join(f"{layer.name} [{layer.module.out_features}, {layer.module.in_features}]" for layer in self.layers)
        return f"MLAOptimizer({self.settings}, head=({layers}), optimizer={self.optimizer!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds the group to the wrapped optimizer."""
        if "optimizer" in self.__dict__:  # not while the base class goes through the groups that are there already
            self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients and the features that came with them.

        Zeros in place of no gradient would move idle encoders by momentum and weight decay: set_to_none=False is refused.
        """
        if not set_to_none:
            raise ValueError("set_to_none: expected True: a gradient of zeros is still stepped on, None is left alone")
        self._measured = None
        for layer in self.layers:
            layer.features.take()
        zero_grad = self.optimizer.zero_grad
        if getattr(zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:  # it may have more to drop
            return zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:  # torch's own does this in 30 µs more
            for p in group["params"]:
                p.grad = None

    def step(self, closure: Callable[[], Any] | None = None, *, modality: str | None = None) -> Any:
        """One step on one modality, whose name ``projection="window"`` needs; closure as for any optimizer.

        Where a wrapper's ``step`` takes no modality (Fabric's, Accelerate's), set ``optimizer.modality`` before.
        """
        step = self._watched_step if _is_watched(self) else self._unwatched_step
        return step(closure, modality=modality)

    step.hooked = True  # or torch puts around it what is around _watched_step: 20 µs of a step when nobody watches

    @torch.no_grad()
    def _unwatched_step(self, closure: Callable[[], Any] | None, *, modality: str | None) -> Any:
        loss = None
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure: expected a callable, got {closure!r}; the modality goes by name, step(modality={closure!r})"
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.take_step(modality)
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_unwatched_step)

    def take_step(self, modality: str | None) -> None:
        """``step`` without the hooks around it; under ``no_grad``.

        What it does is what ``measure`` found, if that was called before.
        """
        device = self.device.type
        if not torch.is_autocast_enabled(device):
            return self._take_step(modality)
        with torch.autocast(device, enabled=False):  # P and the means are float32 or wider whatever autocast does
            self._take_step(modality)
        torch.clear_autocast_cache()  # which holds the weights as they were, for as long as the caller's autocast goes on

    def _take_step(self, modality: str | None) -> None:
        modality, steps, empty, bad, snapshot = self._measured or self.measure(modality)
        self._measured = None
        if empty:
            self.skipped["empty"] += 1
        elif bad is True:
            self._skip_nonfinite()
        else:
            self._step_projected(steps, modality, None if bad is False else bad, snapshot)

    def measure(self, modality: str | None, step: HeadStep | None = None) -> Measured:
        """What the next step is to do, which is settled now: x̄ and the gradients of the head, and whether they are finite.

        step: of a head of one layer whose features were not collected.
        """
        named, modality = modality, self.modality if modality is None else modality
        means, idle = self._means() if step is None else ({}, [])
        if not (means or idle or step) and named is not None:
            warnings.warn(
                f"step: no row of {modality!r} went through the head that this optimizer was built with, only other parameters "
                "move; if the model has got another head, build an MLAOptimizer for that",
                stacklevel=7,
            )
        if means and self.settings.projection == "window" and modality is None:
            raise ValueError('modality: expected a name, step(modality="…"): projection="window" keeps one mean for each')
        steps = [layer.measured(x_bar) for layer, x_bar in means.items() if x_bar is not None] if step is None else [step]
        bad, snapshot = self._bad(steps, idle) if steps or idle else (False, None)
        self._measured = Measured(modality, steps, bool(means) and not steps, bad, snapshot)
        return self._measured

    def _means(self) -> tuple[dict[HeadLayer, Tensor | None], list[Tensor]]:
        """x̄ [s] of the layers that have a gradient, None where the batch had no rows; and of those that have none, being
        frozen."""
        means, idle = {}, []
        for layer in self.layers:
            x_bar, rows = layer.features.take()
            grad = layer.module.weight.grad
            if grad is None:
                if x_bar is not None:
                    layer.check_own_weight()
                    idle.append(x_bar)
                continue
            if x_bar is None:
                if not grad.any():  # zeros made by hand, as torch.distributed.checkpoint does to create the state
                    continue
                raise RuntimeError(
                    f"head: {layer.name} has a gradient but no features were seen; call the module itself (not its weight) "
                    "in the forward pass, build MLAOptimizer before it (no other one for this head later), and if the head is "
                    "compiled call zero_grad before it too"
                )
            known = isinstance(rows, int) or self._on_host(rows)  # elsewhere the mean over no row is 0/0 and not finite
            means[layer] = None if known and rows == 0 else x_bar
        return means, idle

    def _bad(self, steps: list[HeadStep], idle: list[Tensor]) -> tuple[bool | Tensor, Snapshot | None]:
        """Whether x̄ or G is not finite (or their norms are not) or torch.amp found an overflow; float32 [] on a device, which
        nobody waits for, and what takes the step back there. idle: the x̄ of frozen layers."""
        found_inf, sharded = getattr(self, "found_inf", None), any(step.layer.sharded for step in steps)
        if self._on_host(steps[0].x_bar if steps else idle[0]):
            finite = [step.finite() for step in steps] + [math.isfinite(x_bar.norm()) for x_bar in idle]
            bad = not all(finite) or (found_inf is not None and bool(found_inf))
            return bool(self._largest_over_ranks(torch.tensor([float(bad)]))) if sharded else bad, None
        looked_at = [t for step in steps for t in (step.grad, step.x_bar)] + [t for step in steps for t in step.free] + idle
        first = [step.layer.projection.first for step in steps if step.layer.projection.first is not None]
        snapshot = None
        if steps and not self._step_supports_amp_scaling:  # a fused optimizer takes no step where found_inf is set
            snapshot = Snapshot(self.optimizer, [p for step in steps for p in step.layer.module.parameters()])
        bad, squares, skip, copies = ops.head_check_(
            self.layers[0].projection.backend,
            looked_at,
            len(steps),
            self._account,
            first,
            found_inf,
            [] if snapshot is None else list(snapshot.before.values()),
            self._largest_over_ranks if sharded else None,  # each rank has seen its own rows of G
        )
        for i, step in enumerate(steps):
            step.squares, step.skip = squares[2 * i : 2 * i + 2], skip[i : i + 1]
        if snapshot is not None:
            snapshot.copies = copies
        return bad, snapshot

    def _largest_over_ranks(self, bad: Tensor) -> Tensor:
        dist.all_reduce(bad, dist.ReduceOp.MAX, group=self.process_group)
        return bad

    @staticmethod
    def _on_host(t: Tensor) -> bool:
        return t.device.type == "cpu"

    def _skip_nonfinite(self) -> None:
        overflow = hasattr(self, "found_inf")  # under torch.amp a step now and then is skipped as a matter of course
        if not overflow and not self.skipped["nonfinite"]:
            warnings.warn("step skipped: the head's features or gradient are not finite (counted in diagnostics())", stacklevel=7)
        self.skipped["nonfinite"] += 1

    def _step_projected(self, steps: list[HeadStep], modality: str | None, bad: Tensor | None, snapshot: Snapshot | None) -> None:
        for step in steps:
            step.layer.projection.alpha()  # a callable's bad value is refused before anything moves
        if self._projects_gradients:
            self._project_gradients(steps, modality)
            self._step_wrapped(bad, snapshot)
        else:
            before = [step.layer.values(copy=True) for step in steps]
            self._step_wrapped(bad, snapshot)
            for step, old in zip(steps, before, strict=True):
                layer = step.layer
                change = layer.values() - old
                layer.project(step, change, modality)
                layer.write(old.add_(change), gradient=False)

    @property
    def _projects_gradients(self) -> bool:
        return self.settings.target == "gradient" or self.settings.projection == "none"

    @staticmethod
    def _project_gradients(steps: list[HeadStep], modality: str | None) -> None:
        for step in steps:
            if step.layer.project(step, step.grad, modality):
                step.layer.write(step.grad, gradient=True)

    def project_measured(self) -> None:
        """Projects the gradient of the step that ``measure`` found now, while it is in the caches, if that is what the step would
        begin with; a hook before the step may want it as it is, and autocast is for the step to keep away."""
        modality, steps, _, bad, _ = self._measured
        undisturbed = not _is_watched(self) and not torch.is_autocast_enabled(self.device.type)
        if bad is False and self._projects_gradients and undisturbed:
            self._project_gradients(steps, modality)
            self._measured = self._measured._replace(steps=[])

    def _step_wrapped(self, bad: Tensor | None, snapshot: Snapshot | None) -> None:
        """The wrapped optimizer's step. `bad`, if given, is read on the device: nothing of the head moves where it is 1."""
        inner = self.optimizer
        _start_momentum(inner)
        amp = {name: getattr(self, name) for name in _AMP if hasattr(self, name)}
        if bad is not None and self._step_supports_amp_scaling:
            amp["found_inf"] = bad
        _set_amp(inner, amp)  # which also removes what a step that raised has left
        _bare_step(inner)()
        _set_amp(inner, {})
        if snapshot is not None:
            snapshot.restore(self.layers[0].projection.backend, bad)

    def detach(self) -> None:
        """Takes this optimizer's hooks off the head, for what cannot go with them: torch.jit.script, quantization, training with
        another optimizer. It can take no step afterwards; its state can be saved."""
        for layer in self.layers:
            unwatch(layer.module, layer.features)

    def diagnostics(self) -> dict[str, Any]:
        """How the head's learning is doing. Plain numbers; waits for the device.

        ``skipped_nonfinite`` and ``skipped_empty`` count steps that changed nothing. ``layers`` has for each ``nn.Linear`` of
        the head: ``steps``; of the last step ``gradient_kept`` ‖G P‖ / ‖G‖ (of the update, for ``target="update"``) and
        ``x_bar_alpha`` ‖x̄‖² / α (float32 is safe up to about 1e5); now ``P_norm`` ‖P‖_F and ``P_trace``; and ``frozen``: less
        than a thousandth of the gradient is left, so the head has stopped learning. Raise alpha then, or use the window.
        """
        report = {f"skipped_{reason}": count for reason, count in self._counted().items()}
        return report | {"layers": {layer.name: layer.diagnostics() for layer in self.layers}}

    def _counted(self) -> dict[str, int]:
        """`skipped`, with what the device has counted since the last time."""
        self.skipped["nonfinite"] += int(self._account[0].item())
        self._account.zero_()
        return dict(self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and under ``"mla"`` the settings, every P (or window) and the counts."""
        return {**self.optimizer.state_dict(), "mla": self.projections.state_dict()}

    @property
    def projections(self) -> Projections:
        """The ``"mla"`` part of the state by itself, for torch.distributed.checkpoint, whose ``get_optimizer_state_dict`` is for
        the wrapped optimizer (``optimizer.optimizer``) alone."""
        return Projections(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from ``state_dict()``, settings included. Raises ValueError and changes nothing if it does not fit."""
        if "mla" not in state_dict:
            got = ", ".join(map(str, state_dict))
            raise ValueError(f'state_dict: expected one that MLAOptimizer saved, with its part "mla", got keys {got}')
        settings, restored = self._restored(state_dict["mla"])
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "mla"})
        self._adopt(settings, restored, state_dict["mla"])

    def _restored(self, mla: dict[str, Any]) -> tuple[ProjectionSettings, list[Projection]]:
        """What a saved ``"mla"`` part says, nothing of it in use yet; ValueError if it does not fit."""
        if not isinstance(mla, dict) or mla.get("version") != STATE_VERSION:
            got = f"version {mla.get('version')}" if isinstance(mla, dict) else type(mla).__name__
            raise ValueError(f"state_dict: expected one that MLAOptimizer saved (version {STATE_VERSION}), got {got}")
        settings = self._restored_settings(mla["settings"])
        kinds = [kind.__name__ for kind in type(self.optimizer).__mro__]  # AdamW takes Adam's
        if mla["optimizer"] not in kinds:
            raise ValueError(f"state_dict: expected one of {kinds[0]}, got one of {mla['optimizer']}")
        if len(mla["layers"]) != len(self.layers):
            raise ValueError(f"state_dict: expected {len(self.layers)} head layers, got {len(mla['layers'])}")
        return settings, [layer.restored(settings, saved) for layer, saved in zip(self.layers, mla["layers"], strict=True)]

    def _adopt(self, settings: ProjectionSettings, restored: list[Projection], mla: dict[str, Any]) -> None:
        self.settings = settings
        if isinstance(settings.alpha, Tensor):
            settings.alpha.fill_(mla["settings"]["alpha"])
        self.skipped = dict(mla["skipped"])
        self._account.zero_()
        for layer, projection, saved in zip(self.layers, restored, mla["layers"], strict=True):
            layer.adopt(projection, saved)

    def _restored_settings(self, saved: dict[str, Any]) -> ProjectionSettings:
        if saved["alpha"] is not None and isinstance(self.settings.alpha, Tensor):
            return ProjectionSettings(**{**saved, "alpha": self.settings.alpha})
        if saved["alpha"] is not None:
            return ProjectionSettings(**saved)
        if not callable(self.settings.alpha):
            raise ValueError("state_dict: saved with a callable alpha; build MLAOptimizer with the same callable to load it")
        return ProjectionSettings(**{**saved, "alpha": self.settings.alpha})

    def __getstate__(self) -> dict[str, Any]:
        kept = ("optimizer", "settings", "layers", "modality", "skipped", "_account")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _measured=None)
        super().__setstate__({})


def _of_the_wrapped(name: str) -> property:
    """Schedulers, scalers and the user see and change the wrapped optimizer's own."""

    def write(self: MLAOptimizer, value: Any) -> None:
        if "optimizer" in self.__dict__:  # not while the base class prepares its own
            setattr(self.optimizer, name, value)

    return property(lambda self: getattr(self.optimizer, name), write)


for _name in (
    "param_groups",
    "state",
    "defaults",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
):
    setattr(MLAOptimizer, _name, _of_the_wrapped(_name))


class Measured(NamedTuple):
    """What a step is to do, before anything moves. empty: the head has gradients, but no row went through it."""

    modality: str | None
    steps: list[HeadStep]
    empty: bool
    bad: bool | Tensor  # not finite; float32 [] on a device, which nobody waits for
    snapshot: Snapshot | None  # of what a step may change, where only the device knows whether it is bad


class Projections:
    """What an ``MLAOptimizer`` keeps beside the wrapped optimizer: settings, every P (or window) and the counts."""

    def __init__(self, optimizer: MLAOptimizer):
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        optimizer = self._optimizer
        return {
            "version": STATE_VERSION,
            "optimizer": type(optimizer.optimizer).__name__,
            "settings": optimizer.settings.state_dict(),
            "layers": [layer.state_dict() for layer in optimizer.layers],
            "skipped": optimizer._counted(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError and changes nothing if it does not fit."""
        self._optimizer._adopt(*self._optimizer._restored(state_dict), state_dict)


class Snapshot:
    """What an optimizer step may change about some parameters, whose copies take it back where the device says so."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]):
        self.optimizer, self.parameters = optimizer, parameters
        self.before = self._tensors()
        self.copies: list[Tensor] = []  # of these

    def _tensors(self) -> dict[tuple[Tensor, str | None], Tensor]:
        """By parameter and name in its state, since an optimizer may put a new tensor there."""
        device = self.parameters[0].device
        tensors = {(p, None): local(p) for p in self.parameters}
        for p in self.parameters:
            state = self.optimizer.state.get(p, {})
            tensors |= {(p, name): local(t) for name, t in state.items() if isinstance(t, Tensor) and t.device == device}
        return tensors

    def restore(self, backend: str, bad: Tensor) -> None:
        """Takes the step back where bad is 1; state that the step created becomes zero."""
        tensors = self._tensors()
        copies = {key: copy for key, copy in zip(self.before, self.copies, strict=True) if key in tensors}
        created = [t for key, t in tensors.items() if key not in copies]
        ops.head_restore_(backend, [*(tensors[key] for key in copies), *created], list(copies.values()), bad)


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """By step hooks, its own or every optimizer's, by a profiler, or by torch.compile, which need not look into this."""
    return bool(torch.compiler.is_compiling() or has_hooks(optimizer) or torch.autograd._profiler_enabled())


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Around its step, its own or every optimizer's."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


_HOOKED = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__


def _bare_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Its ``step``, without what torch puts around it for hooks and profilers where there are none: 20 µs."""
    step = type(optimizer).step
    if torch.compiler.is_compiling() or getattr(step, "__code__", None) is not _HOOKED:
        return optimizer.step
    if "step" in vars(optimizer) or _is_watched(optimizer):
        return optimizer.step
    return functools.partial(step.__wrapped__, optimizer)


_AMP = ("grad_scale", "found_inf")  # the attributes by which torch.amp reaches a fused optimizer


def _set_amp(optimizer: torch.optim.Optimizer, values: dict[str, Tensor]) -> None:
    """Those of _AMP that `values` has and no other; no try … finally around the step, which torch.compile cannot resume in."""
    for name in _AMP:
        if name in values:
            setattr(optimizer, name, values[name])
        elif hasattr(optimizer, name):
            delattr(optimizer, name)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros where fused SGD has no momentum yet, from where its first step is the same.

    Left to itself it fails once some parameters have momentum and others have none (an encoder's first step), and keeps
    uninitialised memory for momentum where found_inf takes back the very first step. With dampening the first step differs.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not group["fused"] or group["momentum"] == 0 or group["dampening"] != 0:
            continue
        for p in group["params"]:
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, MLAOptimizer):
        raise TypeError("optimizer: expected the optimizer to wrap, got an MLAOptimizer")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"optimizer: {type(optimizer).__name__} needs a closure that it calls several times a step; not supported"
        )

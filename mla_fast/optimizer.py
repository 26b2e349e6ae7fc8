"""``MLAOptimizer``: any torch optimizer, with the shared head's step projected away from what other modalities need."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mla_fast.projection import Projection, ProjectionSettings, make_projection

STATE_VERSION = 1


class FeatureMean:
    """Forward hooks that collect x̄ of one ``nn.Linear``: the mean of its input rows over every backward pass since ``take``.

    The rows count when the gradient comes back, not when the features go in: a forward pass that is never differentiated
    (evaluation, another modality's loss still to come) leaves no trace.
    """

    def __init__(self, name: str, in_features: int, dtype: torch.dtype):
        self.name, self.in_features, self.dtype = name, in_features, dtype
        self.total: Tensor | None = None
        self.rows = 0

    def check(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        features = args[0] if args else kwargs["input"]
        if features.shape[-1] != self.in_features:
            raise ValueError(
                f"features: expected [..., {self.in_features}] to match {self.name}.in_features, got {list(features.shape)}"
            )
        if not features.is_floating_point():
            raise TypeError(f"features: expected a floating dtype for {self.name}, got {features.dtype}")

    def observe(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if not output.requires_grad:
            return
        features = (args[0] if args else kwargs["input"]).detach()
        if torch.compiler.is_compiling():  # tensor hooks do not survive compilation
            self._add(features)
        else:
            output.register_hook(lambda _: self._add(features))

    def _add(self, features: Tensor) -> None:
        rows = features.reshape(-1, self.in_features)
        total = rows.sum(0, dtype=self.dtype)
        self.total = total if self.total is None else self.total + total
        self.rows += rows.shape[0]

    def take(self) -> tuple[Tensor | None, int]:
        """(sum of the rows [s] or None if no gradient came by, number of rows), and starts anew."""
        collected = self.total, self.rows
        self.total, self.rows = None, 0
        return collected


class HeadLayer:
    """One ``nn.Linear`` of the head: its features' mean, its projection, and its weight with or without the bias."""

    def __init__(self, name: str, module: nn.Linear, settings: ProjectionSettings, backend: str):
        self.name, self.module, self.backend = name, module, backend
        self.dtype = torch.promote_types(module.weight.dtype, torch.float32)
        self.features = FeatureMean(name, module.in_features, self.dtype)
        module.register_forward_pre_hook(self.features.check, with_kwargs=True)
        module.register_forward_hook(self.features.observe, with_kwargs=True)
        self.norms: tuple[Tensor, Tensor, Tensor] | None = None  # of G, G P and x̄ in the last step
        self.projection = self.new_projection(settings)

    @property
    def with_bias(self) -> bool:
        """The bias is projected as one more column of the weight."""
        return self.projection.size > self.module.in_features

    def new_projection(self, settings: ProjectionSettings) -> Projection:
        bias = self.module.bias
        with_bias = settings.bias == "project" and bias is not None and bias.requires_grad
        size = self.module.in_features + with_bias
        return make_projection(settings, size, self.dtype, self.module.weight.device, self.backend)

    def state_dict(self) -> dict[str, Any]:
        projection = self.projection
        state = {"step": projection.step, "modality": projection.modality, "tensors": projection.tensors()}
        return {"name": self.name, **state}

    def restored(self, settings: ProjectionSettings, saved: dict[str, Any]) -> Projection:
        """A projection that continues from a saved state; ValueError if it does not fit this layer."""
        projection = self.new_projection(settings)
        projection.check(saved["tensors"])
        projection.load(saved["tensors"], saved["step"], saved.get("modality"))
        return projection

    def joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[C, s], or [C, s + 1] where the bias is projected too."""
        if not self.with_bias:
            return weight.to(self.dtype)
        return torch.cat([weight, bias[:, None]], 1).to(self.dtype)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in (self.module.weight, self.module.bias) if p is not None and p.grad is not None]

    def gradient(self) -> Tensor:
        return self.joined(self.module.weight.grad, self.module.bias.grad if self.with_bias else None)

    def values(self) -> Tensor:
        """A copy of the parameters, for the update to be measured against."""
        joined = self.joined(self.module.weight, self.module.bias)
        return joined.clone() if joined is self.module.weight else joined.detach()

    def project(self, grad: Tensor, x_bar: Tensor, modality: str | None, found_inf: Tensor | None) -> Tensor:
        if self.with_bias:
            x_bar = torch.cat([x_bar, x_bar.new_ones(1)])
        projected = self.projection(grad, x_bar, modality, found_inf)
        self.norms = tuple(torch.linalg.vector_norm(t) for t in (grad, projected, x_bar))
        return projected

    def diagnostics(self) -> dict[str, Any]:
        grad, kept, x_bar = (t.item() for t in self.norms) if self.norms else (float("nan"),) * 3
        P_norm, P_trace = self.projection.norm_and_trace()
        return {
            "steps": self.projection.step,
            "gradient_kept": kept / grad if grad else float("nan"),
            "x_bar_alpha": x_bar**2 / self.projection.settings.alpha_at(max(self.projection.step - 1, 0)),
            "P_norm": P_norm,
            "P_trace": P_trace,
            "frozen": kept < 1e-3 * grad,
        }

    def write(self, joined: Tensor, *, gradient: bool) -> None:
        """`joined` into the parameters, or into their gradients."""
        weight, bias = self.module.weight, self.module.bias
        s = self.module.in_features
        (weight.grad if gradient else weight).copy_(joined[:, :s])
        if self.with_bias:
            (bias.grad if gradient else bias).copy_(joined[:, s])


class MLAOptimizer(torch.optim.Optimizer):
    r"""Wraps a ``torch.optim.Optimizer`` and is one: everything steps as before, but the shared head's step is projected.

        optimizer = MLAOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), head=model.head)
        for modality, (inputs, target) in …:                        # one modality per step (eq. 1)
            optimizer.zero_grad()
            F.cross_entropy(model.head(model.encoders[modality](inputs)), target).backward()
            optimizer.step(modality=modality)

    Every ``nn.Linear`` in `head` gets a projection P of its own; x̄ [s] is the mean of the features that went through it in the
    backward passes since the last step (so gradient accumulation just works). Encoders without a gradient in a step are left
    alone: no momentum, no weight decay.

    Args:
        optimizer: any optimizer whose ``step`` does not require a closure; it holds the head's parameters among others.
        head: the shared head, a module with at least one trainable ``nn.Linear``.
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

    A step in which x̄ or the head's gradient is not finite, or no row went through the head, changes nothing: no parameter, no
    momentum, no P (what the forward pass changes, as BatchNorm does, is changed). ``diagnostics()`` counts such steps. On CUDA
    nothing here waits for the device, and a step that is not finite is undone for the head alone unless the wrapped optimizer is
    fused: the encoders' gradients are then the caller's to guard, and a count of steps that it keeps on the CPU (Adam's) goes on.

    A step can be captured in a CUDA graph: take one with every modality before, give learning rate and alpha as tensors if they
    are to change between replays, and capture anew after ``load_state_dict``. ``steps`` in diagnostics does not count replays.

    Drop gradients with this optimizer's ``zero_grad``, which drops the features collected with them; the model's own leaves
    those of a step that was never taken to be counted in the next x̄. Under torch.compile features are counted in the forward
    pass: call ``zero_grad`` before it, and evaluate under ``no_grad``.

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
    ):
        _check_optimizer(optimizer)
        self.settings = ProjectionSettings(projection, order, target, bias, alpha)
        layers = _trainable_linears(head, optimizer)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share(optimizer)
        self.layers = [HeadLayer(name, module, self.settings, backend) for name, module in layers]
        self.skipped = {"nonfinite": 0, "empty": 0}
        # Steps that only the device knows it skipped; changed in place, for a captured step finds it where it was.
        self._bad_on_device = torch.zeros((), dtype=torch.float32, device=self.layers[0].module.weight.device)

    def _share(self, optimizer: torch.optim.Optimizer) -> None:
        """Schedulers, scalers and the user see and change the wrapped optimizer's own groups, state and hooks."""
        self.optimizer = optimizer
        for name in ("param_groups", "state", "defaults", *_STATE_HOOKS):
            setattr(self, name, getattr(optimizer, name))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

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
        for layer in self.layers:
            layer.features.take()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, modality: str | None = None) -> Any:
        """One step on one modality. `modality` is needed by ``projection="window"``; closure as for any optimizer."""
        loss = None
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure: expected a callable, got {closure!r}; the modality goes by name, step(modality={closure!r})"
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = self._active_layers()
        if active and self.settings.projection == "window" and modality is None:
            raise ValueError('modality: expected a name, step(modality="…"): projection="window" keeps one mean for each')
        if active and all(x_bar is None for _, x_bar in active):
            self.skipped["empty"] += 1
            return loss
        active = [(layer, x_bar) for layer, x_bar in active if x_bar is not None]
        bad = self._bad(active)
        if bad is not None and self._on_host(bad):
            if bad.item():
                self._skip_nonfinite()
                return loss
            bad = None
        self._step_projected(active, modality, bad)
        return loss

    def _active_layers(self) -> list[tuple[HeadLayer, Tensor | None]]:
        """The layers with a gradient, each with its x̄ [s], or None where the batch had no rows."""
        active = []
        for layer in self.layers:
            total, rows = layer.features.take()
            grad = layer.module.weight.grad
            if grad is None:
                continue
            if total is None:
                if not grad.any():  # zeros made by hand, as torch.distributed.checkpoint does to create the state
                    continue
                raise RuntimeError(
                    f"head: {layer.name} has a gradient but no features were seen; call the module itself (not its weight) "
                    "in the forward pass, build MLAOptimizer before it, and if the head is compiled call zero_grad before it too"
                )
            active.append((layer, total / rows if rows else None))
        return active

    def _bad(self, active: list[tuple[HeadLayer, Tensor]]) -> Tensor | None:
        """0-d float32 on the device, 1 where x̄ or G is not finite or torch.amp found an overflow; None without a head step."""
        if not active:
            return None
        sums = [t.sum(dtype=layer.dtype) for layer, x_bar in active for t in (x_bar, *layer.gradients())]
        bad = ~torch.isfinite(sum(sums[1:], sums[0]))
        found_inf = getattr(self, "found_inf", None)
        return (bad if found_inf is None else bad | (found_inf != 0).all()).to(torch.float32)

    @staticmethod
    def _on_host(bad: Tensor) -> bool:
        return bad.device.type == "cpu"

    def _skip_nonfinite(self) -> None:
        overflow = hasattr(self, "found_inf")  # under torch.amp a step now and then is skipped as a matter of course
        if not overflow and not self.skipped["nonfinite"]:
            warnings.warn("step skipped: the head's features or gradient are not finite (counted in diagnostics())", stacklevel=5)
        self.skipped["nonfinite"] += 1

    def _step_projected(self, active: list[tuple[HeadLayer, Tensor]], modality: str | None, bad: Tensor | None) -> None:
        for layer, _ in active:
            layer.projection.alpha()  # a callable's bad value is refused before anything moves
        if self.settings.target == "gradient":
            for layer, x_bar in active:
                layer.write(layer.project(layer.gradient(), x_bar, modality, bad), gradient=True)
            self._step_wrapped(active, bad)
        else:
            before = [layer.values() for layer, _ in active]
            self._step_wrapped(active, bad)
            for (layer, x_bar), old in zip(active, before, strict=True):
                layer.write(old + layer.project(layer.values() - old, x_bar, modality, bad), gradient=False)

    def _step_wrapped(self, active: list[tuple[HeadLayer, Tensor]], bad: Tensor | None) -> None:
        """The wrapped optimizer's step. `bad`, if given, is read on the device: nothing of the head moves where it is 1."""
        inner = self.optimizer
        _start_momentum(inner)
        amp = {name: getattr(self, name) for name in _AMP if hasattr(self, name)}
        restore = None
        if bad is not None:
            self._bad_on_device.add_(bad)
            if self._step_supports_amp_scaling:
                amp["found_inf"] = bad
            else:
                restore = _Snapshot(inner, [p for layer, _ in active for p in layer.module.parameters()])
        _set_amp(inner, amp)  # which also removes what a step that raised has left
        inner.step()
        _set_amp(inner, {})
        if restore is not None:
            restore.where(bad)

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
        self.skipped["nonfinite"] += int(self._bad_on_device.item())
        self._bad_on_device.zero_()
        return dict(self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and under ``"mla"`` the settings, every P (or window) and the counts."""
        layers = [layer.state_dict() for layer in self.layers]
        mla = {"version": STATE_VERSION, "settings": self.settings.state_dict(), "layers": layers, "skipped": self._counted()}
        return {**self.optimizer.state_dict(), "mla": mla}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from ``state_dict()``, settings included. Raises ValueError and changes nothing if it does not fit."""
        mla = state_dict.get("mla")
        if not isinstance(mla, dict) or mla.get("version") != STATE_VERSION:
            got = f"version {mla.get('version')}" if isinstance(mla, dict) else f"keys {', '.join(map(str, state_dict))}"
            raise ValueError(f"state_dict: expected one that MLAOptimizer saved (version {STATE_VERSION}), got {got}")
        settings = self._restored_settings(mla["settings"])
        if len(mla["layers"]) != len(self.layers):
            raise ValueError(f"state_dict: expected {len(self.layers)} head layers, got {len(mla['layers'])}")
        restored = [layer.restored(settings, saved) for layer, saved in zip(self.layers, mla["layers"], strict=True)]
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "mla"})
        self._share(self.optimizer)
        self.settings = settings
        if isinstance(settings.alpha, Tensor):
            settings.alpha.fill_(mla["settings"]["alpha"])
        self.skipped = dict(mla["skipped"])
        self._bad_on_device.zero_()
        for layer, projection in zip(self.layers, restored, strict=True):
            layer.projection = projection

    def _restored_settings(self, saved: dict[str, Any]) -> ProjectionSettings:
        if saved["alpha"] is not None and isinstance(self.settings.alpha, Tensor):
            return ProjectionSettings(**{**saved, "alpha": self.settings.alpha})
        if saved["alpha"] is not None:
            return ProjectionSettings(**saved)
        if not callable(self.settings.alpha):
            raise ValueError("state_dict: saved with a callable alpha; build MLAOptimizer with the same callable to load it")
        return ProjectionSettings(**{**saved, "alpha": self.settings.alpha})

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", "settings", "layers", "skipped", "_bad_on_device")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer = state["optimizer"]
        super().__setstate__({"param_groups": optimizer.param_groups, "state": optimizer.state, "defaults": optimizer.defaults})
        self.__dict__.update(state)
        self._share(optimizer)


class _Snapshot:
    """What an optimizer step may change about some parameters, kept so that the device can take it back."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]):
        self.optimizer, self.parameters = optimizer, parameters
        self.before = {key: t.clone() for key, t in self._tensors().items()}

    def _tensors(self) -> dict[tuple[Tensor, str | None], Tensor]:
        """By parameter and name in its state, since an optimizer may put a new tensor there."""
        device = self.parameters[0].device
        tensors = {(p, None): p for p in self.parameters}
        for p in self.parameters:
            state = self.optimizer.state.get(p, {})
            tensors |= {(p, name): t for name, t in state.items() if isinstance(t, Tensor) and t.device == device}
        return tensors

    def where(self, bad: Tensor) -> None:
        """Takes the step back where bad is 1; state that the step created becomes zero."""
        for key, t in self._tensors().items():
            before = self.before.get(key)
            t.copy_(torch.where(bad == 0, t, torch.zeros_like(t) if before is None else before))


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


_STATE_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


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


def _trainable_linears(head: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Linear]]:
    """(name, module) of every trainable ``nn.Linear`` in `head`, or an error that says what is wrong with it."""
    if not isinstance(head, nn.Module):
        raise TypeError(f"head: expected an nn.Module, got {type(head).__name__}")
    linears = [(name or "head", m) for name, m in head.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError(f"head: expected a module with an nn.Linear in it, got {type(head).__name__} without")
    for name, module in linears:
        if isinstance(module.weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"head: {name} is lazy and has no shape yet; run one batch through the model first")
    trainable = [(name, m) for name, m in linears if m.weight.requires_grad]
    if not trainable:
        raise ValueError("head: expected a trainable nn.Linear, but the weight of each is frozen (requires_grad=False)")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, module in trainable:
        if id(module.weight) not in held:
            raise ValueError(f"head: the weight of {name} is not among the optimizer's parameters")
    return trainable

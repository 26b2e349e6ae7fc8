"""``MLAOptimizer``: any torch optimizer, with the shared head's step projected away from what other modalities need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mla_fast import wrapped
from mla_fast.caller import warn
from mla_fast.features import remove_hooks
from mla_fast.guard import SKIPPED, Verdict, check_modality, check_stepped, look_at
from mla_fast.head import HeadLayer, HeadStep, collect, trainable_linears
from mla_fast.head_loss import checked_loss
from mla_fast.head_state import Stateful
from mla_fast.settings import Settings
from mla_fast.watch import Watch


class MLAOptimizer(Stateful):
    r"""Wrap a ``torch.optim.Optimizer`` and be one: everything steps as before, but the shared head's step is projected.

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
        head: the shared head, a module with at least one ``nn.Linear`` that is trainable now. A new MLAOptimizer replaces the
            head's previous one.
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
    parameter, no momentum, no P. What the forward pass changes, as BatchNorm does, is changed; where the model is called, and not
    an encoder by itself, running statistics that would no longer be finite are put back. ``diagnostics()`` counts such steps. If
    the head has no gradient at all, the step moves the other parameters, and warns if a modality was named. On CUDA nothing here
    waits for the device, and a step that is not finite is undone for the head alone unless the wrapped optimizer is fused: the
    encoders' gradients are then the caller's to guard, and a count of steps that it keeps on the CPU (Adam's) goes on.

    ``GraphedStep`` captures whole batches in CUDA graphs. To capture a step yourself, first take an eager step with every
    modality, and capture anew after ``load_state_dict``; ``steps`` in diagnostics does not count such replays.

    Drop gradients with this optimizer's ``zero_grad``, which drops the features collected with them; after
    ``torch.autograd.grad`` through the head too, which counts them as ``backward`` does. Under torch.compile they are counted in
    the forward pass: call ``zero_grad`` before it, and evaluate under ``no_grad``.

    Clip gradients between ``backward`` and ``step``, as ever: P makes no gradient longer. In distributed training every rank
    makes the same backward passes through the head, with no row if it has none; gradients are DistributedDataParallel's to
    average (``mla_fast.distribute``). A head that ``fully_shard`` has split by rows is projected row by row where the rows are;
    one that is split in another way is refused.

    Raises TypeError or ValueError that names the argument, what it was and what it should be.
    """

    found_inf: Tensor  # where torch.amp leaves its verdict, if it has one
    _keeps_features = False

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
        wrapped.check(optimizer)
        if isinstance(optimizer, MLAOptimizer):
            raise TypeError("optimizer: expected the optimizer to wrap, got an MLAOptimizer")
        self.settings = Settings(projection, order, target, bias, alpha)
        layers = trainable_linears(head, optimizer)
        if process_group not in ("auto", None) and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f'process_group: expected "auto", a ProcessGroup or None, got {process_group!r}')
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self.layers = [HeadLayer(*layer, self.settings, backend, process_group) for layer in layers]
        self.modality: str | None = None  # of a step that is not told; for wrappers that do not pass it on
        self.skipped = {"nonfinite": 0, "empty": 0, "lone": 0}
        self.watch = Watch(head, self.layers, bias)
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
        """The ranks whose features x̄ is the mean of; None: this process alone."""
        return self.layers[0].features.group

    def __repr__(self) -> str:
        layers = ", ".join(f"{layer.name} [{layer.module.out_features}, {layer.module.in_features}]" for layer in self.layers)
        return f"MLAOptimizer({self.settings}, head=({layers}), optimizer={self.optimizer!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the group to the wrapped optimizer."""
        if "optimizer" in self.__dict__:  # not while the base class goes through the groups that are there already
            self.optimizer.add_param_group(param_group)

    def head_loss(
        self, features: Tensor, target: Tensor, *, class_weight: Tensor | None = None, label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> Tensor:  # fmt: skip
        """Return F.cross_entropy(head(features), target, …), eq. 2, without the logits [N, C] in memory, of one ``nn.Linear``.

        features [N, s] count in x̄ as if the head were called; the rest and errors are those of ``mla_fast.linear_cross_entropy``,
        and RuntimeError for another head, or over ranks."""
        options = {"class_weight": class_weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
        return checked_loss(self.watch.head, self.layers[0], self.process_group, features, target, **options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients and the features that came with them.

        Zeros in place of no gradient would move idle encoders by momentum and weight decay: set_to_none=False is refused.
        """
        if not set_to_none:
            raise ValueError("set_to_none: expected True: a gradient of zeros is still stepped on, None is left alone")
        for layer in [] if self._keeps_features else self.layers:
            layer.features.take()
        self.watch.forget()
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def keep_features(self) -> Iterator[None]:
        """Let ``zero_grad`` drop gradients alone, for a step that is made of several backward passes with one between each
        (PCGrad, MGDA and their kind, which put gradients back by hand): x̄ is then the mean over the rows of all of them.

            with optimizer.keep_features():
                for loss in losses: optimizer.zero_grad(); loss.backward(retain_graph=True); …
                optimizer.step(modality=modality)
        """
        before, self._keeps_features = self._keeps_features, True
        try:
            yield
        finally:
            self._keeps_features = before

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, modality: str | None = None) -> Any:
        """Take one step on one modality, whose name ``projection="window"`` needs; closure as for any optimizer.

        Where a wrapper's ``step`` takes no modality (Fabric's, Accelerate's), set ``optimizer.modality`` before.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure: expected a callable, got {closure!r}; the modality is step(modality={closure!r})")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.take_step(modality)
        return loss

    def take_step(self, modality: str | None) -> bool | Tensor:
        """Take ``step`` without the hooks around it, under ``no_grad``.

        Returns whether nothing moves, because no row went through the head or something was not finite; on a device float32 [],
        which nobody waits for.
        """
        device = self.device.type
        if not torch.is_autocast_enabled(device):
            return self._take_step(modality)
        with torch.autocast(device, enabled=False):  # P and the means are float32 or wider whatever autocast does
            bad = self._take_step(modality)
        torch.clear_autocast_cache()  # it holds the weights as they were, for as long as the caller's autocast goes on
        return bad

    def _take_step(self, modality: str | None) -> bool | Tensor:
        found = collect(self.layers)
        check_modality(found, modality, self.modality, self.settings)
        check_stepped([] if found.unseen else self.layers, self.optimizer)
        named = self.modality if modality is None else modality
        self.watch.before(named, self.optimizer, self.settings.projection == "window")
        if found.empty:
            self.skipped["empty"] += 1
            return True
        verdict = look_at(
            found.steps, found.idle, found_inf=getattr(self, "found_inf", None), account=self._account, group=self.process_group,
            backend=self.layers[0].projection.backend, wrapped=None if self._step_supports_amp_scaling else self.optimizer,
        )  # fmt: skip
        if verdict.bad is True:
            self.skip_nonfinite()
        else:
            self._project_and_step(found.steps, named, verdict)
            self.watch.after(found.steps)
        return verdict.bad

    def skip_nonfinite(self) -> None:
        """Count a step that something not finite has kept from being taken, and say so the first time."""
        if not hasattr(self, "found_inf") and not self.skipped["nonfinite"]:  # torch.amp skips some as a matter of course
            warn(SKIPPED)
        self.skipped["nonfinite"] += 1

    def _project_and_step(self, steps: list[HeadStep], modality: str | None, verdict: Verdict) -> None:
        for step in steps:
            step.layer.projection.alpha()  # a callable's bad value is refused before anything moves
        if self.settings.target == "gradient" or self.settings.projection == "none":
            for step in steps:
                if step.layer.project(step, step.grad, modality):
                    step.layer.write(step.grad, gradient=True)
            self._step_wrapped(verdict)
            return
        before = [step.layer.values().clone() for step in steps]
        self._step_wrapped(verdict)
        for step, old in zip(steps, before, strict=True):
            change = step.layer.values() - old
            step.layer.project(step, change, modality)
            step.layer.write(old.add_(change), gradient=False)

    def _step_wrapped(self, verdict: Verdict) -> None:
        """Take the wrapped optimizer's step. A verdict on the device is read there: nothing of the head moves where it is 1."""
        fused = self._step_supports_amp_scaling
        amp = {name: getattr(self, name) for name in wrapped.AMP if fused and hasattr(self, name)}
        if fused and isinstance(verdict.bad, Tensor):
            amp["found_inf"] = verdict.bad
        wrapped.step(self.optimizer, amp)
        if verdict.snapshot is not None and isinstance(verdict.bad, Tensor):
            verdict.snapshot.restore(self.layers[0].projection.backend, verdict.bad)

    def detach(self) -> None:
        """Take this optimizer's hooks off the head, for what cannot go with them: torch.jit.script, quantization, training with
        another optimizer. It can take no step afterwards; its state can be saved."""
        for layer in self.layers:
            remove_hooks(layer.module, layer.features)

    def diagnostics(self) -> dict[str, Any]:
        """Return how the head's learning is doing, in plain numbers; waits for the device.

        ``skipped_nonfinite`` and ``skipped_empty`` count steps that changed nothing, ``skipped_lone`` single rows that were left
        out because an encoder's BatchNorm cannot train on one. ``layers`` has for each ``nn.Linear`` of the head: ``steps``; of
        the last step ``gradient_kept`` ‖G P‖ / ‖G‖ (of the update, for ``target="update"``) and ``x_bar_alpha`` ‖x̄‖² / α
        (float32 is safe up to about 1e5); now ``P_norm`` ‖P‖_F and ``P_trace``; and ``frozen``: less than a thousandth of the
        gradient is left, so the head has stopped learning. Raise alpha then, or use the window.
        """
        skipped = {f"skipped_{reason}": count for reason, count in self.counted().items()}
        return {**skipped, "layers": {layer.name: layer.diagnostics() for layer in self.layers}}

    def counted(self) -> dict[str, int]:
        """Return the numbers of skipped steps, those included that the device has counted; waits for it."""
        self.skipped["nonfinite"] += int(self._account[0].item())
        self._account.zero_()
        return dict(self.skipped)


for _name in wrapped.SHARED:
    setattr(MLAOptimizer, _name, wrapped.shared(_name))

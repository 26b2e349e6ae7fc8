"""The shared head as the optimizer sees it: for each ``nn.Linear`` the mean x̄ of its features, its projection, its weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mla_fast import ops
from mla_fast.projection import Projection, ProjectionSettings, make_projection

FROZEN = 1e-3  # the share ‖GP‖ / ‖G‖ below which a layer has stopped learning


class FeatureMean:
    """Forward hooks that collect x̄ of one ``nn.Linear``: the mean of its input rows over every backward pass since ``take``.

    The rows count when the gradient comes back, not when the features go in: a forward pass that is never differentiated
    (evaluation, another modality's loss still to come) leaves no trace.

    With a process group the mean is over the rows of all ranks: the sums are on their way while the backward pass goes on to the
    encoder, and are waited for in ``take``. So every rank makes the same backward passes through the head, with no row if it has
    none.
    """

    def __init__(self, name: str, in_features: int, dtype: torch.dtype, process_group: dist.ProcessGroup | str | None):
        self.name, self.in_features, self.dtype, self.process_group = name, in_features, dtype, process_group
        self.mean: Tensor | None = None
        self.rows = 0
        self.weights: Tensor | None = None  # [N] of the rows of features [N, …], with sum 1; None: all count alike
        self.travelling: list[tuple[dist.Work, Tensor]] = []  # sums [s + 1] over the ranks, the number of rows last

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Whose rows the mean is over; looked up anew, for torch.distributed may begin after the optimizer was built."""
        return world() if self.process_group == "auto" else self.process_group

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
        if isinstance(features, FakeTensor):  # torch.export looks on
            return
        if torch.compiler.is_compiling():  # tensor hooks do not survive compilation
            self._count(features)
        else:
            output.register_hook(lambda _: self.add(features))

    def add(self, features: Tensor) -> None:
        """Counts features [..., s] whose gradient is there."""
        self._count(features)
        if self.group is not None:
            self._send()

    def _count(self, features: Tensor) -> None:
        rows = features.reshape(-1, self.in_features)
        if self.weights is not None:
            by_sample = features.reshape(len(self.weights), -1, self.in_features).mean(1, dtype=self.dtype)
            mean = self.weights.to(self.dtype) @ by_sample
        else:
            mean = rows.mean(0, dtype=self.dtype) if len(rows) else rows.sum(0, dtype=self.dtype)
        self.rows += len(rows)
        self.mean = mean if self.mean is None else torch.lerp(self.mean, mean, len(rows) / max(self.rows, 1))

    def _send(self) -> None:
        sums = torch.cat([self.mean * self.rows, self.mean.new_full((1,), self.rows)])
        self.travelling.append((dist.all_reduce(sums, group=self.group, async_op=True), sums))
        self.mean, self.rows = None, 0

    def take(self) -> tuple[Tensor | None, int | Tensor]:
        """(x̄ [s], the number of rows, over ranks a 0-d tensor), or (None, 0) if no gradient came by, and starts anew."""
        if self.group is not None and self.mean is not None:  # counted in the forward pass of a compiled head
            self._send()
        if self.travelling:
            for work, _ in self.travelling:
                work.wait()
            sums = torch.stack([sums for _, sums in self.travelling]).sum(0)
            self.travelling = []
            return sums[:-1] / sums[-1], sums[-1]
        collected = self.mean, self.rows
        self.mean, self.rows = None, 0
        return collected

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group not in ("auto", None):
            raise TypeError("process_group: an MLAOptimizer with a group of its own cannot be copied or pickled")
        # Without what has been collected: copies of parameters have no gradients either.
        return {**self.__dict__, "mean": None, "rows": 0, "weights": None, "travelling": []}


def world() -> dist.ProcessGroup | None:
    """All processes, if there is more than one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


class HeadLayer:
    """One ``nn.Linear`` of the head: its features' mean, its projection, and its weight with or without the bias.

    Of a weight that ``fully_shard`` has split by rows, this rank's rows: each row of G P needs that row of G alone. has_bias: the
    optimizer holds a bias of it that is trained.
    """

    def __init__(
        self,
        name: str,
        module: nn.Linear,
        has_bias: bool,
        settings: ProjectionSettings,
        backend: str,
        process_group: dist.ProcessGroup | str | None,
    ):
        self.name, self.module, self.has_bias, self.backend = name, module, has_bias, backend
        self.dtype = torch.promote_types(module.weight.dtype, torch.float32)
        # Of the last step, nothing of it added up before somebody asks: ‖G‖² and ‖x̄‖² as they were measured, ‖ΔW‖² where that is
        # what was projected, and parts of ‖G P‖² if there was a projection.
        self.squares: tuple[Tensor | tuple[float, float], Tensor | None, Tensor | None] | None = None
        self.saved_norms = (math.nan,) * 3  # the norms until the first step
        self.projection = self.new_projection(settings)
        self.features = FeatureMean(name, module.in_features, self.dtype, process_group)
        unwatch(module)  # by an optimizer that this one replaces
        module.register_forward_pre_hook(self.features.check, with_kwargs=True)
        module.register_forward_hook(self.features.observe, with_kwargs=True)

    def check_own_weight(self) -> None:
        """Raises RuntimeError where the weight has become a computed one since."""
        if "weight" not in self.module._parameters:
            raise RuntimeError(
                f"head: expected {self.name} with a weight of its own, got one that is computed since, as by pruning"
            )

    @property
    def sharded(self) -> bool:
        return is_sharded(self.module.weight)

    @property
    def with_bias(self) -> bool:
        """The bias is projected as one more column of the weight."""
        return self.projection.size > self.module.in_features

    def new_projection(self, settings: ProjectionSettings) -> Projection:
        size = self.module.in_features + (settings.bias == "project" and self.has_bias)
        return make_projection(settings, size, self.dtype, self.module.weight.device, self.backend)

    def state_dict(self) -> dict[str, Any]:
        norms = torch.tensor(self.norms(), dtype=self.dtype, device=self.module.weight.device)
        return {"name": self.name, "weight": list(self.module.weight.shape), "norms": norms, **self.projection.state_dict()}

    def adopt(self, projection: Projection, saved: dict[str, Any]) -> None:
        self.projection = projection
        self.squares, self.saved_norms = None, tuple(saved["norms"].to(self.dtype).tolist())

    def restored(self, settings: ProjectionSettings, saved: dict[str, Any]) -> Projection:
        """A projection that continues from a saved state; ValueError if it does not fit this layer."""
        projection = self.new_projection(settings)
        projection.load_state_dict(saved)
        expected = list(self.module.weight.shape)
        if saved["weight"] != expected:  # of another number of classes, which P does not show
            raise ValueError(f"state_dict: expected one of a {self.name} with weight {expected}, got {saved['weight']}")
        return projection

    def joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[C, s], or [C, s + 1] where the bias is projected too."""
        if not self.with_bias:
            return local(weight).to(self.dtype)
        return torch.cat([local(weight), local(bias)[:, None]], 1).to(self.dtype)

    def gradient(self) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        if self.with_bias and bias.grad is None:  # it has been frozen since
            return self.joined(weight.grad, torch.zeros_like(bias))
        return self.joined(weight.grad, bias.grad if self.with_bias else None)

    def values(self, *, copy: bool = False) -> Tensor:
        """The parameters, [C, s] or [C, s + 1]; with `copy` not a view of them, for the update to be measured against."""
        weight = local(self.module.weight)
        joined = self.joined(weight, self.module.bias)
        return joined.clone() if copy and joined is weight else joined.detach()

    def measured(self, x_bar: Tensor) -> HeadStep:
        """The step to be taken."""
        grad, bias = self.gradient(), self.module.bias
        if self.with_bias:
            x_bar = torch.cat([x_bar, x_bar.new_ones(1)])
        free = [local(bias.grad)] if self.has_bias and not self.with_bias and bias.grad is not None else []
        return HeadStep(self, x_bar, grad, free)

    def backward(self, features: Tensor, target: Tensor, total: float) -> tuple[Tensor, Tensor, HeadStep]:
        """(loss, ∂L/∂features, the step to be taken) of the layer by itself as the head, as autograd would have it; the gradients
        are in ``.grad``. features [n, s] of the weight's dtype, target [n], the loss a share of the mean over `total` rows; under
        ``no_grad``."""
        weight, bias = self.module.weight, self.module.bias
        loss, gradient, weight.grad, grad_bias, x_bar, norms = ops.linear_cross_entropy(features, target, weight, bias, total)
        if bias is not None:
            bias.grad = grad_bias
        step = self.measured(x_bar)
        if not self.with_bias:
            step.norms = norms
        return loss, gradient, step

    def project(self, step: HeadStep, change: Tensor, modality: str | None) -> bool:
        """Projects `change`, the step's G or the update that came of it, in place; P moves. False where it is left as it was."""
        before = None if change is step.grad else ops.square_sum(change)
        dense = change.contiguous()
        kept = self.projection(dense, step.x_bar, modality, step.skip)
        if dense is not change:
            change.copy_(dense)
        self.squares = step.squares, before, kept
        return kept is not None

    def norms(self) -> tuple[float, float, float]:
        """‖G‖, ‖G P‖ and ‖x̄‖ in the last step, rounded as they are saved; waits for the device."""
        if self.squares is None:
            return self.saved_norms
        measured, before, kept = self.squares
        grad, x_bar = map(float, measured)
        grad = grad if before is None else float(before)
        squares = torch.tensor([grad, grad if kept is None else float(kept.sum()), x_bar], dtype=torch.float64)
        return tuple(squares.sqrt().to(self.dtype).tolist())

    def diagnostics(self) -> dict[str, Any]:
        grad, kept, x_bar = self.norms()
        P_norm, P_trace = self.projection.norm_and_trace()
        return {
            "steps": self.projection.step,
            "gradient_kept": kept / grad if grad else float("nan"),
            "x_bar_alpha": x_bar**2 / self.projection.settings.alpha_at(max(self.projection.step - 1, 0)),
            "P_norm": P_norm,
            "P_trace": P_trace,
            "frozen": kept < FROZEN * grad,
        }

    def write(self, joined: Tensor, *, gradient: bool) -> None:
        """`joined` into the parameters, or into their gradients."""
        weight, bias = self.module.weight, self.module.bias
        s = self.module.in_features
        part, target = joined[:, :s] if self.with_bias else joined, local(weight.grad if gradient else weight)
        if part is not target:  # it was projected where it is
            target.copy_(part)
        if self.with_bias and bias.grad is not None:  # it may have been frozen since
            local(bias.grad if gradient else bias).copy_(joined[:, s])


@dataclass(slots=True, eq=False)
class HeadStep:
    """A step of one layer: x̄ [s] and G [C, s] (with the bias's column where it is projected too), the bias's gradient where it is
    not, and what is found out about them before anything moves."""

    layer: HeadLayer
    x_bar: Tensor
    grad: Tensor
    free: list[Tensor]
    norms: Tensor | None = None  # of G, x̄ and the free bias's gradient, if these are known already
    squares: Tensor | tuple[float, float] = (math.nan, math.nan)  # ‖G‖² and ‖x̄‖²
    skip: Tensor | None = None  # float32 [1] on a device, not 0 where this layer takes no projected step

    def finite(self) -> bool:
        """Whether all of it is, and its norms; on the host, which knows ‖G‖² and ‖x̄‖² afterwards."""
        if self.norms is None:
            norms = [norm.item() for norm in torch._foreach_norm([self.grad, self.x_bar, *self.free])]
        else:
            norms = self.norms.tolist()
        self.squares = norms[0] * norms[0], norms[1] * norms[1]
        return math.isfinite(sum(norms))


def unwatch(module: nn.Module, features: FeatureMean | None = None) -> None:
    """Removes the hooks of `features`, or of every FeatureMean."""
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
        for key, owner in owners.items():
            if isinstance(owner, FeatureMean) and features in (None, owner):
                del hooks[key], with_kwargs[key]


def local(t: Tensor) -> Tensor:
    """What of t is on this rank."""
    return t.to_local() if is_sharded(t) else t


def is_sharded(t: Tensor) -> bool:
    """A DTensor, the module of which takes a second to import."""
    return hasattr(t, "device_mesh")


def trainable_linears(head: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Linear, bool]]:
    """(name, module, whether its bias is trained) of every trainable ``nn.Linear`` in `head`, or an error that says what is wrong
    with it."""
    if not isinstance(head, nn.Module):
        raise TypeError(f"head: expected an nn.Module, got {type(head).__name__}")
    found = [(name, m) for name, m in head.named_modules() if isinstance(m, nn.Linear)]
    # nn.MultiheadAttention takes the weight of its own kind of Linear and never calls it.
    linears = [(name, m) for name, m in found if not isinstance(m, NonDynamicallyQuantizableLinear)]
    if len(linears) == 1:  # whatever it is wrapped in
        linears = [("head", linears[0][1])]
    if not linears:
        raise ValueError(f"head: expected a module with an nn.Linear in it, got {type(head).__name__} without")
    for name, module in linears:
        if isinstance(module.weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"head: {name} is lazy and has no shape yet; run one batch through the model first")
        if "weight" not in module._parameters and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"head: expected {name} with a weight of its own, got one that is computed by a parametrization, weight_norm, "
                "spectral_norm or FullyShardedDataParallel"
            )
    trainable = [(name, m) for name, m in linears if m.weight.requires_grad]
    if not trainable:
        raise ValueError("head: expected a trainable nn.Linear, but the weight of each is frozen (requires_grad=False)")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    first_with: dict[nn.Parameter, str] = {}
    for name, module in trainable:
        _check_weight(name, module)
        if (other := first_with.setdefault(module.weight, name)) != name:
            raise ValueError(f"head: expected a weight of its own in each nn.Linear, but {other} and {name} share one")
        if id(module.weight) not in held:
            raise ValueError(f"head: the weight of {name} is not among the optimizer's parameters")
    return [(name, m, id(m.bias) in held and m.bias.requires_grad) for name, m in trainable]


def _check_weight(name: str, module: nn.Linear) -> None:
    """A row of G is projected by itself; a weight that is split in another way is refused."""
    weight = module.weight
    if is_sharded(weight):
        placement, *others = weight.placements
        if others or not (placement.is_shard(0) or placement.is_replicate()):
            raise ValueError(
                f"head: expected the weight of {name} whole or split by rows, [Shard(0)] over a 1-D mesh as fully_shard does, "
                f"got {list(weight.placements)} over {tuple(weight.device_mesh.shape)}"
            )
    elif weight.shape != (module.out_features, module.in_features):
        raise ValueError(
            f"head: expected the weight of {name} as [{module.out_features}, {module.in_features}], got {list(weight.shape)}; "
            "FullyShardedDataParallel flattens it: use fully_shard, or leave the head out of it"
        )

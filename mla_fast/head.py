"""The shared head as the optimizer sees it: for each ``nn.Linear`` the mean x̄ of its features, its projection, its weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mla_fast import ops
from mla_fast.features import FeatureMean
from mla_fast.parts import is_sharded
from mla_fast.projection import Projection, make_projection
from mla_fast.settings import Settings
from mla_fast.wrapped import parameters_of

FROZEN = 1e-3  # the share ‖GP‖ / ‖G‖ below which a layer has stopped learning


@dataclass(slots=True, eq=False)
class HeadStep:
    """One layer's step, before it is taken: x̄ [s] and G [C, s], with the bias's column where the bias is projected too.

    free: the bias's gradient where it is not projected, to be looked at. The guard adds ‖G‖² and ‖x̄‖², and on a device `skip`,
    float32 [1], not 0 where this layer takes no projected step.
    """

    layer: HeadLayer
    x_bar: Tensor
    grad: Tensor
    free: list[Tensor]
    squares: Tensor | tuple[float, float] = (math.nan, math.nan)
    skip: Tensor | None = None


class HeadLayer:
    """One ``nn.Linear`` of the head: the mean of its features, its projection, and its weight with or without the bias.

    Of a weight that ``fully_shard`` has split by rows it holds this rank's rows: each row of G P needs that row of G alone.
    has_bias: the optimizer holds the layer's bias, and trains it.
    free: how many rows at the end are of classes that came later, and have nothing to forget; they are not projected.
    """

    free = 0

    def __init__(
        self,
        name: str,
        module: nn.Linear,
        has_bias: bool,
        settings: Settings,
        backend: str,
        process_group: dist.ProcessGroup | str | None,
    ):
        self.name, self.module, self.has_bias, self.backend = name, module, has_bias, backend
        self.dtype = torch.promote_types(module.weight.dtype, torch.float32)
        # Of the last step, added up only when somebody asks: ‖G‖² and ‖x̄‖² as they were measured, ‖ΔW‖² where that is what was
        # projected, and parts of ‖G P‖² if there was a projection.
        self.squares: tuple[Tensor | tuple[float, float], Tensor | None, Tensor | None] | None = None
        self.saved_norms = (math.nan,) * 3  # the norms until the first step
        self.projection = self.new_projection(settings)
        self.features = FeatureMean(name, module.in_features, self.dtype, process_group)
        self.features.watch(module)

    @property
    def sharded(self) -> bool:
        return is_sharded(self.module.weight)

    @property
    def with_bias(self) -> bool:
        """Whether the bias is projected as one more column of the weight."""
        return self.projection.size > self.module.in_features

    def new_projection(self, settings: Settings) -> Projection:
        size = self.module.in_features + (settings.bias == "project" and self.has_bias)
        return make_projection(settings, size, self.dtype, self.module.weight.device, self.backend)

    def collect(self) -> tuple[HeadStep | None, Tensor | None, int | Tensor]:
        """Return (the step to take, x̄, its number of rows) from what went through the layer since ``zero_grad``. The step is None
        where the layer has no gradient, x̄ None where no features were seen."""
        x_bar, rows = self.features.take()
        weight, bias = self.module.weight, self.module.bias
        if x_bar is not None and not has_own_weight(self.module):
            raise RuntimeError(
                f"head: expected {self.name} with a weight of its own, got one that is computed since, as by pruning"
            )
        if weight.dtype == torch.float64 != self.dtype:
            raise RuntimeError(
                f"head: expected {self.name} in {self.dtype} as P is, got {weight.dtype}; convert it before MLAOptimizer is built"
            )
        if weight.grad is None or (x_bar is None and not weight.grad.any()):
            return None, x_bar, rows  # gradients of zeros are made by torch.distributed.checkpoint, to create the state
        if x_bar is None:
            raise RuntimeError(
                f"head: {self.name} has a gradient but no features were seen; call the module itself (not its weight) "
                "in the forward pass, build MLAOptimizer before it (no other one for this head later), and if the head is "
                "compiled call zero_grad before it too"
            )
        bias_grad = None if bias is None else bias.grad
        if self.with_bias:
            grad = self._joined(weight.grad, torch.zeros_like(bias) if bias_grad is None else bias_grad)  # it may be frozen since
            return HeadStep(self, torch.cat([x_bar, x_bar.new_ones(1)]), grad, []), x_bar, rows
        free = [local(bias_grad)] if self.has_bias and bias_grad is not None else []
        return HeadStep(self, x_bar, self._joined(weight.grad, None), free), x_bar, rows

    def _joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[C, s], or [C, s + 1] with a bias."""
        joined = local(weight) if bias is None else torch.cat([local(weight), local(bias)[:, None]], 1)
        return joined.to(self.dtype)

    def values(self) -> Tensor:
        """Return the parameters, [C, s] or [C, s + 1]; not necessarily a copy."""
        return self._joined(self.module.weight, self.module.bias if self.with_bias else None).detach()

    def project(self, step: HeadStep, change: Tensor, modality: str | None) -> bool:
        """Project `change`, the step's G or the update that came of it, in place; P moves. False where `change` is as it was."""
        rows = len(change) - self.free
        before = None if change is step.grad and not self.free else ops.square_sum(change[:rows])
        dense = change.contiguous()
        kept = self.projection(dense[:rows] if self.free else dense, step.x_bar, modality, step.skip)
        if dense is not change:
            change.copy_(dense)
        self.squares = step.squares, before, kept
        return kept is not None

    def write(self, joined: Tensor, *, gradient: bool) -> None:
        """Write `joined` into the parameters, or into their gradients."""
        weight, bias, s = self.module.weight, self.module.bias, self.module.in_features
        into = weight.grad if gradient else weight
        assert into is not None  # the step was collected from it
        part, target = joined[:, :s] if self.with_bias else joined, local(into)
        if part is not target:  # it was projected where it is
            target.copy_(part)
        if self.with_bias and bias.grad is not None:  # it may have been frozen since
            local(bias.grad if gradient else bias).copy_(joined[:, s])

    def norms(self) -> tuple[float, ...]:
        """Return ‖G‖, ‖G P‖ and ‖x̄‖ of the last step, rounded as they are saved; waits for the device."""
        if self.squares is None:
            return self.saved_norms
        measured, before, kept = self.squares
        grad, x_bar = map(float, measured)
        grad = grad if before is None else float(before)
        squares = torch.tensor([grad, grad if kept is None else float(kept.sum()), x_bar], dtype=torch.float64)
        return tuple(squares.sqrt().to(self.dtype).tolist())

    def frozen(self) -> bool:
        """Whether the projection left next to nothing of the last step; waits for the device."""
        grad, kept, _ = self.norms()
        return kept < FROZEN * grad

    def diagnostics(self) -> dict[str, Any]:
        grad, kept, x_bar = self.norms()
        P_norm, P_trace = self.projection.norm_and_trace()
        return {
            "steps": self.projection.step,
            "gradient_kept": kept / grad if grad else float("nan"),
            "x_bar_alpha": x_bar**2 / self.projection.settings.alpha_at(max(self.projection.step - 1, 0)),
            "P_norm": P_norm,
            "P_trace": P_trace,
            "frozen": self.frozen(),
        }

    def state_dict(self) -> dict[str, Any]:
        norms = torch.tensor(self.norms(), dtype=self.dtype, device=self.module.weight.device)
        shape = {"name": self.name, "weight": list(self.module.weight.shape), "free": self.free}
        return {**shape, "norms": norms, **self.projection.state_dict()}

    def restored(self, settings: Settings, saved: dict[str, Any]) -> Projection:
        """Return a projection that continues from a saved state; ValueError if it does not fit this layer."""
        projection = self.new_projection(settings)
        projection.load_state_dict(saved)
        expected = list(self.module.weight.shape)
        if saved["weight"] != expected:  # of another number of classes, which P does not show
            raise ValueError(f"state_dict: expected one of a {self.name} with weight {expected}, got {saved['weight']}")
        return projection

    def adopt(self, projection: Projection, saved: dict[str, Any]) -> None:
        self.projection, self.free = projection, saved.get("free", 0)
        self.squares, self.saved_norms = None, tuple(saved["norms"].to(self.dtype).tolist())


class Collected(NamedTuple):
    """What went through the head since ``zero_grad``: the steps of the layers that have a gradient, and x̄ of those that have
    none, being frozen. empty: there are gradients, but of no rows."""

    steps: list[HeadStep]
    idle: list[Tensor]
    empty: bool

    @property
    def unseen(self) -> bool:
        """Nothing went through it at all."""
        return not (self.steps or self.idle or self.empty)


def collect(layers: list[HeadLayer]) -> Collected:
    found = [layer.collect() for layer in layers]
    steps = [(step, rows) for step, _, rows in found if step is not None]
    # On a device the mean over no row is 0/0, and not finite.
    taken = [step for step, rows in steps if not ((isinstance(rows, int) or on_host(rows)) and rows == 0)]
    idle = [x_bar for step, x_bar, _ in found if step is None and x_bar is not None]
    return Collected(taken, idle, bool(steps) and not taken)


def on_host(t: Tensor) -> bool:
    """Whether the host can look at t without waiting for a device."""
    return t.device.type == "cpu"


def local(t: Tensor) -> Tensor:
    """What of t is on this rank."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]  # a DTensor's own method


def has_own_weight(module: nn.Module) -> bool:
    """False where the weight is computed, by a parametrization or by pruning."""
    return any(name == "weight" for name, _ in module.named_parameters(recurse=False, remove_duplicate=False))


def trainable_linears(head: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Linear, bool]]:
    """Return (name, module, whether its bias is trained) of every trainable ``nn.Linear`` in `head`; TypeError or ValueError says
    what is wrong with it."""
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
        if not has_own_weight(module) and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"head: expected {name} with a weight of its own, got one that is computed by a parametrization, weight_norm, "
                "spectral_norm or FullyShardedDataParallel"
            )
    trainable = [(name, m) for name, m in linears if m.weight.requires_grad]
    if not trainable:
        raise ValueError(
            "head: expected a trainable nn.Linear, but the weight of each is frozen (requires_grad=False); freeze the head after "
            "MLAOptimizer was built"
        )
    held = set(map(id, parameters_of(optimizer)))
    first_with: dict[Tensor, str] = {}
    for name, module in trainable:
        _check_weight(name, module)
        if (other := first_with.setdefault(module.weight, name)) != name:
            raise ValueError(f"head: expected a weight of its own in each nn.Linear, but {other} and {name} share one")
        if id(module.weight) not in held:
            raise ValueError(f"head: the weight of {name} is not among the optimizer's parameters")
    return [(name, m, id(m.bias) in held and m.bias.requires_grad) for name, m in trainable]


def _check_weight(name: str, module: nn.Linear) -> None:
    """A row of G is projected by itself; a weight that is split in another way is refused."""
    weight: Any = module.weight
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

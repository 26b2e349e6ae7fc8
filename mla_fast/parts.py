"""Parts of a model as they are inside of their wrappers, how wide what they return is, and their mode."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

P = TypeVar("P", bound=nn.Module)
# What may come after the last linear layer and leaves its width alone.
_KEEPS_WIDTH = (
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softmax, nn.LogSoftmax),
    *(nn.Identity, nn.Dropout, nn.LayerNorm, nn.BatchNorm1d),
)


def unwrap_ddp(part: P) -> P:
    """Return the module inside a DistributedDataParallel, whose own forward pass may wait for other ranks; others unchanged."""
    return cast(P, part.module) if isinstance(part, DistributedDataParallel) else part


def unwrap(part: nn.Module) -> nn.Module:
    """Return the module inside a DistributedDataParallel and ``torch.compile``, for a look at what it is; what is called is the
    wrapper."""
    while not isinstance(part, nn.Linear):
        inner = part.module if isinstance(part, DistributedDataParallel) else getattr(part, "_orig_mod", None)
        if inner is None:
            break
        part = inner
    return part


def modules_in(part: nn.Module) -> Iterator[nn.Module]:
    """Yield every module of a part, in half the time of ``modules()``, for what is looked at in each step; one that is there
    twice comes twice."""
    stack: list[nn.Module | None] = [part]
    while stack:
        module = stack.pop()
        if module is not None:
            yield module
            stack += module._modules.values()


def parameters_in(part: nn.Module) -> list[nn.Parameter]:
    """Return every parameter of a part, in a quarter of the time of ``parameters()``; one that is there twice comes twice."""
    return [p for module in modules_in(part) for p in module._parameters.values() if p is not None]


def is_sharded(t: Tensor) -> bool:
    """Whether t is a DTensor, whose module takes a second to import."""
    return hasattr(t, "device_mesh")


@contextlib.contextmanager
def evaluating(part: nn.Module) -> Iterator[None]:
    """Put a part into evaluation mode, and afterwards those of its modules into training mode that were."""
    training = [module for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:  # and no others: an encoder may be in evaluation mode on purpose
            module.training = True


def begin_training(part: nn.Module) -> None:
    """Put a part into training mode, but for what is frozen: what is in evaluation mode and has parameters or buffers, none of
    which requires gradients."""
    frozen = [m for m in part.modules() if not m.training and _has_state(m) and not any(p.requires_grad for p in m.parameters())]
    stay = [module for m in frozen for module in m.modules() if not module.training]
    part.train()
    for module in stay:
        module.training = False


def _has_state(part: nn.Module) -> bool:
    return any(True for _ in itertools.chain(part.parameters(), part.buffers()))


def last_linear(part: nn.Module) -> nn.Linear | None:
    """Return the ``nn.Linear`` that a part is or ends in, otherwise None."""
    last = unwrap(part)
    while isinstance(last, nn.Sequential) and len(last):
        last = unwrap(last[-1])
    return last if isinstance(last, nn.Linear) else None


def known_width(part: nn.Module) -> int | None:
    """Return how wide what an encoder or a head returns is where its layers in sequence tell; None where only its inputs can."""
    part = unwrap(part)
    if not isinstance(part, nn.Sequential):
        return part.out_features if isinstance(part, nn.Linear) else None
    last = next((layer for layer in reversed(part) if not isinstance(layer, _KEEPS_WIDTH)), None)
    return None if last is None else known_width(last)

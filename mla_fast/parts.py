"""Parts of a model as they are inside of their wrappers, how wide what they return is, and their mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

P = TypeVar("P", bound=nn.Module)
# What may come after an encoder's last linear layer and leaves its width alone.
_KEEPS_WIDTH = (nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Dropout, nn.LayerNorm)


def unwrap_ddp(part: P) -> P:
    """Return the module inside a DistributedDataParallel, whose own forward pass may wait for other ranks; others unchanged."""
    return cast(P, part.module) if isinstance(part, DistributedDataParallel) else part


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


def last_linear(part: nn.Module) -> nn.Linear | None:
    """Return the ``nn.Linear`` that a part is or ends in, otherwise None."""
    last = unwrap_ddp(part)
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    return last if isinstance(last, nn.Linear) else None


def known_width(encoder: nn.Module) -> int | None:
    """Return how wide an encoder's features are where its layers in sequence tell; None where only its inputs can."""
    encoder = unwrap_ddp(encoder)
    if not isinstance(encoder, nn.Sequential):
        return encoder.out_features if isinstance(encoder, nn.Linear) else None
    last = next((layer for layer in reversed(encoder) if not isinstance(layer, (*_KEEPS_WIDTH, nn.BatchNorm1d))), None)
    return None if last is None else known_width(last)

"""Parts of a model as they are inside of their wrappers, and how wide what they return is."""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

P = TypeVar("P", bound=nn.Module)
# What may come after an encoder's last linear layer and leaves its width alone.
_KEEPS_WIDTH = (nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Dropout, nn.LayerNorm)


def unwrap_ddp(part: P) -> P:
    """Return the module inside a DistributedDataParallel, whose own forward pass may wait for other ranks; others unchanged."""
    return cast(P, part.module) if isinstance(part, DistributedDataParallel) else part


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

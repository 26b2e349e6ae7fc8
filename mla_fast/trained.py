"""Whether encoders are trained as they seem to be, looked at now and then: nothing else would show it."""

from __future__ import annotations

import torch

from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.parts import modules_in, parameters_in
from mla_fast.wrapped import parameters_of


def check_grad_mode() -> None:
    """Raise RuntimeError where autograd is off: the head's gradients are had without it, so the head alone would move."""
    if not torch.is_grad_enabled():
        raise RuntimeError("grad mode: expected gradients enabled in training, got torch.no_grad() or inference_mode() around it")


def look_at_encoder(model: MultimodalModel, optimizer: MLAOptimizer, modality: str, differentiable: bool | None = None) -> None:
    """Warn, once each, of an encoder that does not learn and of one that should not.

    It looks before a modality's steps 1, 2, 4, 8, … and every 64th, since parameters may be frozen, replaced or given to the
    optimizer at any time. differentiable: whether the features require gradients; None: whether the parameters have some tells.
    """
    if not optimizer.watch.due(modality):
        return
    trainable = [p for p in parameters_in(model.encoders[modality]) if p.requires_grad]
    held = set(map(id, parameters_of(optimizer)))
    gathered = any(hasattr(module, "reshard") for module in modules_in(model.encoders[modality]))  # by fully_shard, for now
    if not gathered and (missing := sum(id(p) not in held for p in trainable)):
        optimizer.watch.say(
            f"held {modality}",
            f"optimizer: expected the parameters of the encoder of {modality!r} among its groups, got "
            f"{missing} of {len(trainable)} that it does not hold: they are never trained, unless by another optimizer. Use "
            "add_param_group or build it anew, or requires_grad_(False) if that is meant",
        )
    if trainable and modality in model.frozen:
        optimizer.watch.say(
            f"thawed {modality}",
            f"model: expected the encoder of {modality!r} to be frozen since another modality was added, got {len(trainable)} "
            f"parameters that require gradients: it moves. Use model.encoders[{modality!r}].requires_grad_(False)",
        )
    if differentiable is None:
        differentiable = any(p.grad is not None for p in trainable)
    if trainable and not differentiable:
        optimizer.watch.say(
            f"detached {modality}",
            f"features: expected those of {modality!r} to require gradients, as parameters of its encoder do, got some that do "
            "not: it is never trained. Is its forward pass under torch.no_grad(), or are they detached?",
        )

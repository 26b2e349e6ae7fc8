"""The loss of a head that is one linear layer, with gradients in closed form, and of many classes without logits in memory."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mla_fast import ops, split_head
from mla_fast.head import HeadLayer


def is_bare(layer: HeadLayer) -> bool:
    """Whether a call of it is a product and nothing else: an ``nn.Linear`` that nobody watches but this layer."""
    module = layer.module
    kind = split_head.kind_before(module) if layer.sharded else type(module)
    return kind is nn.Linear and "forward" not in vars(module) and len(hooks_of(module)) == 2


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks of its forward pass, but for those of ``fully_shard``."""
    return [h for h in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()) if not split_head.gathers(h)]


def is_unobserved(layer: HeadLayer) -> bool:
    """Whether its loss can be had without a call: an ``nn.Linear`` that nobody watches but this layer, trained as a whole."""
    module, parameters = layer.module, list(layer.module.parameters())
    backward = module._backward_hooks or module._backward_pre_hooks or any(map(_has_hooks, parameters))
    whole = module.weight.is_contiguous() and all(p.requires_grad and p.dtype == layer.dtype for p in parameters)
    return is_bare(layer) and whole and not backward


def _has_hooks(p: Tensor) -> bool:
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)


def is_large(layer: HeadLayer, rows: float) -> bool:
    """Whether the logits of so many rows are better not in memory whole."""
    return ops.is_large(rows, layer.module.out_features)


def backward(
    layer: HeadLayer, features: Tensor, target: Tensor, total: float, weights: Tensor | None = None, most: int = 0
) -> tuple[Tensor, Tensor]:
    """Leave the head's gradients of eq. 2 in ``.grad``, count the features, and return (loss, ∂L/∂features), under ``no_grad``.

    Of a head that is split by rows the loss is the mean of the ranks', and `most` the largest n of any of them.

    features: [n, s] of the weight's dtype, if the logits are few; target: [n]; the loss is a share of the mean over `total` rows,
    or with weights [n] their weighted sum.
    """
    weight, bias = layer.module.weight, layer.module.bias
    if layer.sharded or is_large(layer, len(target)):
        terms = ops.terms_of(target, len(weight), weight.dtype, total=total, weights=weights)
        if layer.sharded:
            layer.features.add(features)
            return split_head.backward(layer.module, features, target, terms, most)
        loss, grad_features, weight.grad, grad_bias = ops.gradients(features, target, weight, bias, terms)
        layer.features.add(features)
        assert grad_features is not None
    else:
        loss, grad_features, weight.grad, grad_bias, x_bar = ops.head_gradients(features, target, weight, bias, total)
        layer.features.add_mean(x_bar, len(target))
    if bias is not None:
        bias.grad = grad_bias
    return loss, grad_features.to(features.dtype)


def loss(layer: HeadLayer, features: Tensor, target: Tensor, total: float) -> Tensor:
    """Return eq. 2's share of a mean over `total` rows without the logits; the features count when its gradient comes back."""
    weight = layer.module.weight
    terms = ops.terms_of(target, len(weight), weight.dtype, total=total)
    found = ops.loss_of(features, weight, layer.module.bias, target, terms)
    layer.features.observe(layer.module, (features,), {}, found)
    return found


def checked_loss(
    head: nn.Module, layer: HeadLayer, group: dist.ProcessGroup | None, features: Tensor, target: Tensor, **options: Any
) -> Tensor:
    """Do what ``MLAOptimizer.head_loss`` documents."""
    if head is not layer.module or not is_bare(layer) or layer.sharded or group is not None:
        raise RuntimeError(
            "head_loss: expected a head that is one nn.Linear, without hooks, whole and in one process; call the head itself"
        )
    layer.features.check(layer.module, (features,), {})
    found = ops.linear_cross_entropy(features, layer.module.weight, layer.module.bias, target, **options)
    layer.features.observe(layer.module, (features,), {}, found)
    return found

"""From features to predictions: the model's one product with the head and its fusion, beside plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mla_fast as mla
from bench import forms
from bench.providers import Provider, Step, captured, check, compilations, compile_step, random
from mla_fast import reference


class Infer:
    """Features [N, s] of M modalities to fused predictions over C classes; what is absent is NaN, and ours does not read it."""

    def __init__(self, M: int, N: int, s: int, C: int, masked: bool, device: torch.device):
        self.on_gpu, source = device.type == "cuda", {"device": device, "generator": random(device)}
        self.features = [torch.randn(N, s, **source) for _ in range(M)]
        self.present = None
        if masked:
            self.present = torch.rand(N, M, **source) > 0.3
            for h, here in zip(self.features, self.present.unbind(1), strict=True):
                h[~here] = torch.nan
        self.model = mla.MultimodalModel({str(m): nn.Identity() for m in range(M)}, nn.Linear(s, C)).to(device).eval()
        self.head = self.model.head.weight.detach(), self.model.head.bias.detach()

    @functools.cached_property
    def expected(self) -> tuple[Tensor, ...]:
        weight, bias = (t.double() for t in self.head)
        return reference.entropy_fusion(torch.stack([F.linear(h.double(), weight, bias) for h in self.features]), self.present)

    def start(self, make: Callable[[], Step]) -> tuple[Step, Callable[[], None]]:
        step = make()

        def gate():
            for _ in range(3):
                for name, got, right in zip(("fused logits", "weights", "entropies"), step(), self.expected, strict=True):
                    check(name, got, right, 5e-6)

        return step, gate

    def ours(self) -> Step:
        """One product over all rows; what is absent is left to the fusion's mask."""
        head, M = self.model.head, len(self.features)
        return lambda: mla.entropy_fusion(head(torch.cat(self.features)).unflatten(0, (M, -1)), self.present)

    def dispatched(self) -> Step:
        """One product over the rows that are there."""
        head = self.model.head

        def step():
            plan = mla.dispatch(self.present)
            return plan.fuse(head(torch.cat(plan.pack(self.features))))

        return step

    def predict(self) -> Step:
        """By the model, checks and evaluation mode included; its encoders do nothing."""
        inputs = dict(zip(self.model.modalities, self.features, strict=True))
        return lambda: self.model.predict(inputs, self.present)

    def rival(self, run: Callable) -> Step:
        return lambda: run(self.present, *self.head, *self.features)

    def compiled(self, function: Callable, mode: str | None) -> Step:
        return compile_step(function, mode, self.present, *self.head, *self.features)

    def providers(self, compiled: bool) -> Iterator[Provider]:
        def provider(name, make):
            return Provider(name, functools.partial(self.start, make))

        yield provider("ours", self.ours)
        yield provider("ours predict", self.predict)
        if self.present is not None:
            yield provider("ours dispatched", self.dispatched)
        if self.on_gpu:
            yield provider("ours graph", captured(self.ours))
        for way in (head_calls, one_product):
            for name, form in forms.FUSION.items():
                make = functools.partial(self.rival, functools.partial(way, form.run))
                yield provider(f"{name}, {way.__name__.replace('_', ' ')}", make)
                if self.on_gpu:
                    yield provider(f"graph {name}, {way.__name__.replace('_', ' ')}", captured(make))
        usual = functools.partial(head_calls, forms.fusion_broadcast)
        for name, function, mode in compilations(compiled, self.on_gpu, usual):
            yield provider(name, functools.partial(self.compiled, function, mode))


def head_calls(fuse: Callable, present: Tensor | None, weight: Tensor, bias: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
    """The usual way: a call of the head for each modality, and their logits stacked."""
    return fuse(torch.stack([F.linear(h, weight, bias) for h in features]), present)


def one_product(fuse: Callable, present: Tensor | None, weight: Tensor, bias: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
    """One product for all modalities, which have one head."""
    return fuse(F.linear(torch.cat(features), weight, bias).unflatten(0, (len(features), -1)), present)

"""Inference: from features to predictions, and with half of everything missing dispatch and the model's prediction; their float64
answers, and every provider of each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mla_fast as mla
from bench.throughput import forms, roofline
from bench.throughput.providers import (
    GateError,
    Provider,
    Step,
    captured,
    check,
    compilations,
    compile_step,
    random,
)
from mla_fast import reference
from mla_fast.encoders import MLP

WIDTHS = (512, 1024, 1024)
SHAPES = {"audio": (512,), "image": (1, 28, 28), "video": (3, 64, 64)}


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


def half(N: int, M: int, device: torch.device) -> Tensor:
    """A mask [N, M] in which each modality is missing in just half of the samples."""
    return torch.rand(N, M, device=device, generator=random(device)).argsort(0) < (N + 1) // 2


def convolutions(channels: int, s: int) -> nn.Module:
    """The beginning of a residual network in depth and width, for small pictures."""
    layers = []
    for before, after in ((channels, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, s))


class Dispatch:
    """Present rows of three modalities packed and, with `means`, their mean; absent ones are NaN. A step returns both lists."""

    def __init__(self, N: int, means: bool, device: torch.device):
        self.N, self.means, self.on_gpu = N, means, device.type == "cuda"
        self.present, source = half(N, len(WIDTHS), device), {"device": device, "generator": random(device)}
        columns = self.present.unbind(1)
        self.inputs = [
            torch.randn(N, s, **source).masked_fill_(~here[:, None], torch.nan) for s, here in zip(WIDTHS, columns, strict=True)
        ]
        self.indices = [here.nonzero()[:, 0] for here in columns]

    @functools.cached_property
    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        packed = [x[self.present[:, m]].double() for m, x in enumerate(self.inputs)]
        return packed, [rows.mean(0) for rows in packed] if self.means else []

    def start(self, make: Callable[[], Step]) -> tuple[Step, Callable[[], None]]:
        step = make()

        def gate():
            for _ in range(2):
                for name, got, right, bound in zip(("rows", "means"), step(), self.expected, (0, 1e-6), strict=True):
                    if len(got) != len(right):
                        raise GateError(f"{name}: {len(got)} instead of {len(right)} modalities; not timed")
                    for part, want in zip(got, right, strict=True):
                        check(name, part, want, bound)

        return step, gate

    def ours(self) -> Step:
        def step():
            plan = mla.dispatch(self.present)
            return plan.pack_features(self.inputs) if self.means else (plan.pack(self.inputs), [])

        return step

    def padded(self) -> Step:
        """Without asking the device how many there are, which is for the gate alone to know."""
        counts = [len(index) for index in self.indices]

        def step():
            plan = mla.dispatch(self.present, padded=True)
            packed, means = plan.pack_features(self.inputs) if self.means else (plan.pack(self.inputs), [])
            return [x[:count] for x, count in zip(packed, counts, strict=True)], means

        return step

    def mask_loop(self) -> Step:
        def step():
            packed = [x[self.present[:, m]] for m, x in enumerate(self.inputs)]
            return packed, [rows.mean(0) for rows in packed] if self.means else []

        return step

    def index_select(self) -> Step:
        def step():
            packed = [x.index_select(0, index) for x, index in zip(self.inputs, self.indices, strict=True)]
            return packed, [rows.mean(0) for rows in packed] if self.means else []

        return step

    def providers(self, compiled: bool) -> Iterator[Provider]:
        M, packed = len(WIDTHS), sum(4 * s * len(index) for s, index in zip(WIDTHS, self.indices, strict=True))
        ours = roofline.dispatch(self.N, M, packed, self.means and self.on_gpu)
        yield Provider("ours", functools.partial(self.start, self.ours), ours)
        if self.on_gpu:
            yield Provider("ours padded graph", functools.partial(self.start, captured(self.padded)))
        yield Provider("eager mask loop", functools.partial(self.start, self.mask_loop))
        yield Provider("index_select, given indices", functools.partial(self.start, self.index_select))


class Predict:
    """Fused predictions of a model with an MLP and two small convolutional networks; "eager zeros": of the same model on zeros
    where a modality is missing."""

    def __init__(self, N: int, C: int, device: torch.device):
        self.present, source = half(N, len(SHAPES), device), {"device": device, "generator": random(device)}
        encoders = {"audio": MLP(512, 256, (1024, 1024)), "image": convolutions(1, 256), "video": convolutions(3, 256)}
        self.model = mla.MultimodalModel(encoders, nn.Linear(256, C)).to(device).eval()
        self.inputs = {name: torch.randn(N, *shape, **source) for name, shape in SHAPES.items()}
        for m, x in enumerate(self.inputs.values()):
            x[~self.present[:, m]] = 0

    def start(self, present: Tensor | None, streams: bool = False) -> tuple[Step, Callable[[], None]]:
        model = copy.copy(self.model)
        model.streams = streams

        def step():
            return model.predict(self.inputs, present)

        def gate():
            exact = copy.deepcopy(self.model).double()
            logits = exact({name: x.double() for name, x in self.inputs.items()})
            expected = reference.entropy_fusion(torch.stack(list(logits.values())), present)
            with torch.backends.cudnn.flags(enabled=False):  # which has TF32 for float32 unless told otherwise
                fused = step()
            for name, got, right in zip(("fused logits", "weights", "entropies"), fused, expected, strict=True):
                check(name, got, right, 1e-5)

        return step, gate

    def providers(self, compiled: bool) -> Iterator[Provider]:
        yield Provider("ours", functools.partial(self.start, self.present))
        if self.present.is_cuda:
            yield Provider("ours streams", functools.partial(self.start, self.present, streams=True))
        yield Provider("eager zeros", functools.partial(self.start, None))

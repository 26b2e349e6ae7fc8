"""Half of everything missing: dispatch and prediction, their float64 answers, and every provider of each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import mla_fast as mla
from bench import roofline
from bench.providers import GateError, Provider, Step, captured, check, random
from mla_fast import reference
from mla_fast.encoders import MLP

WIDTHS = (512, 1024, 1024)
SHAPES = {"audio": (512,), "image": (1, 28, 28), "video": (3, 64, 64)}


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

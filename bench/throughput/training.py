"""Whole training steps: the models and batches, and every way to train on them, with its gate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mla_fast as mla
from bench.throughput.providers import Provider, capture, check
from bench.throughput.reference_loop import PaperLoop, ReleasedLoop
from mla_fast.baselines import Concat
from mla_fast.encoders import MLP, ResNet18

ALPHA = 1.0
BATCHES = 100  # in an epoch of the released loop
DIGITS = {"pixels": 64, "fourier": 40, "profile": 46}  # the views of data.digits and their widths
Train = Callable[[dict[str, Tensor], Tensor], Any]  # trains on (inputs, target)


class Workload(NamedTuple):
    """Encoders and what goes through them: a sample's shape by modality, to measure and (smaller) for the gate.

    bounds: of the relative error of what a step changes, by part of the model. One ReLU that rounds to the other side of zero
    shows in all the layers before it.
    """

    kind: str
    encoders: Callable[[], dict[str, nn.Module]]
    shapes: dict[str, tuple[int, ...]]
    gate_shapes: dict[str, tuple[int, ...]]
    s: int
    C: int
    N: int
    bounds: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.kind} N={self.N}"


def workloads(device: torch.device) -> tuple[Workload, Workload]:
    """MLPs for the views of the digits; ResNets for audio spectrograms and three frames of a video."""
    widths = {name: (width,) for name, width in DIGITS.items()}
    mlps = Workload("mlps", digit_encoders, widths, widths, 128, 10, 64, {"head": 1e-4, "encoders": 1e-3})
    large, small = {"audio": (1, 129, 129), "video": (3, 3, 128, 128)}, {"audio": (1, 33, 33), "video": (3, 3, 32, 32)}
    N = 64 if device.type == "cuda" else 16
    bounds = {"head": 1e-3, "encoders": 5e-2}
    return mlps, Workload("resnets", resnets, large, small, ResNet18.out_features, 6, N, bounds)


def digit_encoders() -> dict[str, nn.Module]:
    return {name: MLP(width, 128, (128, 128)) for name, width in DIGITS.items()}


def resnets() -> dict[str, nn.Module]:
    return {"audio": ResNet18(1), "video": ResNet18(3)}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def wrapped(model: mla.MultimodalModel, projection: str | None, **settings: Any) -> torch.optim.Optimizer:
    """In MLAOptimizer, or bare with None."""
    settings = {"alpha": ALPHA, "projection": projection, **settings}
    return sgd(model) if projection is None else mla.MLAOptimizer(sgd(model), model.head, **settings)


def take_step(optimizer: torch.optim.Optimizer, modality: str) -> None:
    if isinstance(optimizer, mla.MLAOptimizer):
        optimizer.step(modality=modality)
    else:
        optimizer.step()


def in_turn(projection: str | None, model: mla.MultimodalModel, **settings: Any) -> Train:
    """The README's loop, one modality after another."""
    optimizer = wrapped(model, projection, **settings)

    def train(inputs, target):
        for modality, x in inputs.items():
            optimizer.zero_grad()
            F.cross_entropy(model.head(model.encoders[modality](x)), target).backward()
            take_step(optimizer, modality)

    return train


def together(projection: str, model: mla.MultimodalModel, streams: bool = False) -> Train:
    optimizer, model.streams = wrapped(model, projection), streams
    return lambda inputs, target: mla.alternating_step(model, optimizer, (inputs, target))


def graphed(projection: str, model: mla.MultimodalModel) -> Train:
    """As a user asks for it: the first steps eager, then a CUDA graph that a batch is copied to."""
    step = mla.GraphedStep(model, wrapped(model, projection))
    return lambda inputs, target: step((inputs, target))


def joint(model: Concat) -> Train:
    optimizer = sgd(model)

    def train(inputs, target):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        optimizer.step()

    return train


def without_encoders(projection: str | None, model: mla.MultimodalModel) -> Train:
    """What is left of ``in_turn`` with features given and the encoders' gradients zero: the head forward and backward, and a
    step of all parameters, which leaves nothing of P in the caches."""
    optimizer = wrapped(model, projection)
    zeros = {modality: [(p, torch.zeros_like(p)) for p in part.parameters()] for modality, part in model.encoders.items()}

    def train(features, target):
        for modality, h in features.items():
            optimizer.zero_grad()
            F.cross_entropy(model.head(h.detach().requires_grad_()), target).backward()
            for p, zero in zeros[modality]:
                p.grad = zero
            take_step(optimizer, modality)

    return train


def paper(projection: str, model: mla.MultimodalModel) -> Train:
    return PaperLoop(model, sgd(model), projection, ALPHA)


def paper_on_features(projection: str, model: mla.MultimodalModel) -> Train:
    """The same where the inputs are features already."""
    return paper(projection, mla.MultimodalModel({modality: nn.Identity() for modality in model.modalities}, model.head))


def interacting(projection: str, model: mla.MultimodalModel) -> Train:
    """``together`` of a model with an interaction head, by autograd and in turn."""
    optimizer = wrapped(model, projection, backend="reference")
    own = list(model.interaction.parameters())

    def train(inputs, target):
        features = {modality: model.encoders[modality](x) for modality, x in inputs.items()}
        loss = model.interaction.loss(features, {modality: model.head(h) for modality, h in features.items()}, target)
        parameters = [*(p for modality in inputs for p in model.encoders[modality].parameters()), *own]
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
        for modality in inputs:
            optimizer.zero_grad()
            F.cross_entropy(model.head(features[modality]), target).backward(retain_graph=True)
            for p in model.encoders[modality].parameters():
                p.grad += gradients[p]
            take_step(optimizer, modality)
        optimizer.zero_grad()
        for p in own:
            p.grad = gradients[p]
        optimizer.step()

    return train


def released(model: mla.MultimodalModel) -> Train:
    return ReleasedLoop(model, sgd(model), BATCHES)


def official(model: mla.MultimodalModel) -> Train:
    """The released arithmetic by way of the optimizer, one modality after another."""
    M = len(model.modalities)
    return in_turn("official", model, alpha=lambda t: mla.reference.official_alpha(t // M % BATCHES, BATCHES))


class Training:
    """A workload's model and batches, and the ways to train: "ours" is alternating_step, "ours in turn" the README's loop."""

    suffix = ""  # of the providers' names

    def __init__(self, workload: Workload, device: torch.device):
        torch.manual_seed(0)
        self.workload, self.device = workload, device
        self.model = mla.MultimodalModel(workload.encoders(), nn.Linear(workload.s, workload.C)).to(device)
        self.batch = self.draw(workload.N, workload.shapes)
        self.gate_batches = [self.draw(4, workload.gate_shapes) for _ in range(2)]  # in the second there is momentum

    def draw(self, N: int, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], Tensor]:
        inputs = {modality: torch.rand(N, *shape, device=self.device) for modality, shape in shapes.items()}
        return inputs, torch.randint(self.workload.C, (N,), device=self.device)

    def start(self, model: nn.Module, make: Callable[[nn.Module], Train], exact: Callable[[nn.Module], Train], **gate: Any):
        """The step on the batch, and its gate: two smaller ones train a copy of the model as `exact` does in float64."""
        train = make(copy.deepcopy(model))
        return lambda: train(*self.batch), partial(self.gate, model, make, exact, **gate)

    def gate(
        self,
        model: nn.Module,
        make: Callable[[nn.Module], Train],
        exact: Callable[[nn.Module], Train],
        rounds: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        got, right = copy.deepcopy(model), copy.deepcopy(model).to(dtype)
        train, train_exactly = make(got), exact(right)
        with torch.backends.cudnn.flags(enabled=False):  # TF32 and its other algorithms flip more ReLUs than the bounds allow for
            for inputs, target in rounds * self.gate_batches:
                train(inputs, target)
                train_exactly({modality: x.to(dtype) for modality, x in inputs.items()}, target)
        for part, bound in self.workload.bounds.items():
            check(f"the change of the {part}", change(got, model, part), change(right, model, part), bound)

    def start_captured(self, model: nn.Module, make: Callable[[nn.Module], Train]):
        """A rival's step as one CUDA graph over this batch, with no batch to copy: its best."""
        train = make(copy.deepcopy(model))
        return capture(lambda: train(*self.batch)), lambda: None

    def providers(self) -> Iterator[Provider]:
        yield self.provider("plain loop", partial(in_turn, None), partial(paper, "none"))
        for projection in ("rls", "window"):
            yield self.provider(f"ours in turn {projection}", partial(in_turn, projection), partial(paper, projection))
            yield self.provider(f"ours {projection}", partial(together, projection), partial(paper, projection))
        if self.device.type == "cuda":
            yield self.provider("ours streams rls", partial(together, "rls", streams=True), partial(paper, "rls"))
            # Until steps are replayed; what they come to is what eager steps do, whose own gate is in float64.
            gate = {"rounds": 3, "dtype": torch.float32}
            for projection in ("rls", "window"):
                ways = partial(graphed, projection), partial(together, projection)
                yield Provider(f"ours graph {projection}", partial(self.start, self.model, *ways, **gate))
        beside = mla.Interaction(self.workload.s, self.workload.C, self.model.modalities)
        nn.init.normal_(beside.out.weight, std=0.1)
        model = mla.MultimodalModel(self.model.encoders, self.model.head, interaction=beside).to(self.device)
        ways = partial(together, "window"), partial(interacting, "window")
        yield Provider("ours interaction window", partial(self.start, model, *ways))
        if self.device.type == "cuda":
            captured = partial(graphed, "window"), partial(together, "window")
            yield Provider("ours graph interaction window", partial(self.start, model, *captured, **gate))
        yield self.provider("released", released, official)
        model = Concat(self.model.encoders, self.workload.s, self.workload.C).to(self.device)
        yield Provider("joint concat", partial(self.start, model, joint, joint))
        if self.device.type == "cuda":
            yield Provider("graph joint concat", partial(self.start_captured, model, joint))
            yield Provider("graph plain loop", partial(self.start_captured, self.model, partial(in_turn, None)))

    def provider(self, name: str, make: Callable[[nn.Module], Train], exact: Callable[[nn.Module], Train]) -> Provider:
        return Provider(name + self.suffix, partial(self.start, self.model, make, exact))


class WithoutEncoders(Training):
    """What of a batch is left when features are given and the encoders' gradients zero."""

    suffix = " without encoders"

    def __init__(self, workload: Workload, device: torch.device):
        features = {modality: (workload.s,) for modality in workload.shapes}
        bounds = {"head": workload.bounds["head"]}
        super().__init__(workload._replace(shapes=features, gate_shapes=features, bounds=bounds), device)

    def providers(self) -> Iterator[Provider]:
        yield self.provider("plain loop", partial(without_encoders, None), partial(paper_on_features, "none"))
        for p in ("rls", "window"):
            yield self.provider(f"ours in turn {p}", partial(without_encoders, p), partial(paper_on_features, p))


def change(trained: nn.Module, before: nn.Module, part: str) -> Tensor:
    """Of all parameters of `part`, in one row."""
    pairs = zip(trained.get_submodule(part).parameters(), before.get_submodule(part).parameters(), strict=True)
    return torch.cat([(p.detach().double() - q.detach().double()).flatten() for p, q in pairs])

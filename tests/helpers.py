"""Small problems to train on, and what to ask of a model and its optimizer afterwards."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mla_fast as mla
from mla_fast import buffers, guard, head, reference

WIDTHS = {"audio": 4, "image": 6, "text": 3}
CLASSES = 3
PROJECTIONS = ("rls", "window", "none", "official")
ORDERS, TARGETS, BIASES = ("update_first", "project_first"), ("gradient", "update"), ("free", "project")
ALTERNATION = tuple(WIDTHS)


def exhaustive(*cases, where=None):
    """Parameters that `make test` leaves out; where: ``"triton"`` if only where that is interpreted."""
    mark = pytest.mark.exhaustive(*filter(None, [where]))
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark) for case in cases]


def here():
    """The device that tensors are made on where none is named."""
    return torch.empty(0).device


def normal(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(here(), dtype)


def labels(generator, N):
    return torch.randint(CLASSES, (N,), generator=generator, device="cpu").to(here())


def make_model(dtype=torch.float32, s=5, head=None, seed=0):
    """Three tiny encoders and a shared head."""
    torch.manual_seed(seed)
    encoders = {name: nn.Sequential(nn.Linear(width, s), nn.Tanh()) for name, width in WIDTHS.items()}
    return mla.MultimodalModel(encoders, nn.Linear(s, CLASSES) if head is None else head).to(dtype)


def noisy_model(s=5, seed=0):
    """A model that shows which mode it is in: BatchNorm and dropout in each encoder."""
    torch.manual_seed(seed)
    encoders = {m: nn.Sequential(nn.Linear(w, s), nn.BatchNorm1d(s), nn.Dropout(0.5)) for m, w in WIDTHS.items()}
    return mla.MultimodalModel(encoders, nn.Linear(s, CLASSES))


def make_head(s=5, dtype=torch.float32, bias=True, seed=0, C=CLASSES):
    torch.manual_seed(seed)
    return nn.Linear(s, C, bias=bias, dtype=dtype)


def make_inputs(N=6, modalities=ALTERNATION, seed=1):
    """Samples {modality: [N, …]}."""
    generator = torch.Generator().manual_seed(seed)
    return {modality: normal(generator, N, WIDTHS[modality]) for modality in modalities}


def make_steps(count, dtype=torch.float32, N=7, seed=1, start=0):
    """`count` steps (modality, inputs [N, …], target [N]), the modalities in turn (eq. 1)."""
    generator = torch.Generator().manual_seed(seed)
    names = [reference.modality_at(t, ALTERNATION) for t in range(start, start + count)]
    return [(m, normal(generator, N, WIDTHS[m], dtype=dtype), labels(generator, N)) for m in names]


def head_steps(count, s=5, dtype=torch.float32, N=7, seed=2):
    """The same with features [N, s] for a head alone, their mean away from zero."""
    generator = torch.Generator().manual_seed(seed)
    return [(ALTERNATION[t % 3], 0.5 + normal(generator, N, s, dtype=dtype), labels(generator, N)) for t in range(count)]


def momentum_sgd(parameters, **settings):
    return torch.optim.SGD(parameters, **({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | settings))


def wrap(model, make=momentum_sgd, **settings):
    """An MLAOptimizer over a MultimodalModel, or over a head alone."""
    return mla.MLAOptimizer(make(model.parameters()), head=getattr(model, "head", model), **settings)


def adam(parameters):
    """With its count of steps on the parameters' device, which can take it back."""
    return torch.optim.Adam(parameters, lr=0.01, capturable=here().type == "cuda")


def fused_sgd(parameters):
    return momentum_sgd(parameters, fused=True)


def fused_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


INNER = [momentum_sgd, fused_sgd, fused_adam, *exhaustive(adam)]


def backward(model, optimizer, modality, x, y):
    """zero_grad, forward, backward; `model` is a MultimodalModel or a head on features."""
    optimizer.zero_grad()
    logits = model({modality: x})[modality] if isinstance(model, mla.MultimodalModel) else model(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for modality, x, y in steps:
        backward(model, optimizer, modality, x, y)
        optimizer.step(modality=modality)


def spoil(head, optimizer, where, value, step):
    """forward and backward of a step with one number in it that is not finite."""
    modality, x, y = step
    x = x.clone()
    if where == "features":
        x[1, 2] = value
    backward(head, optimizer, modality, x, y)
    if where != "features":
        getattr(head, where).grad.view(-1)[1] = value


def everything(model, optimizer):
    """A copy of all that training moves: parameters, the wrapped optimizer's state, every P and mean, the step counts."""
    saved = optimizer.state_dict()
    layers = {layer["name"]: {"step": layer["step"], **layer["tensors"]} for layer in saved["mla"]["layers"]}
    return copy.deepcopy({"model": dict(model.state_dict()), "state": saved["state"], "layers": layers})


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_bitwise(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def assert_rounding(got, expected):
    """The same in float32 but for the order of additions."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300)).item()


def on_device(monkeypatch):
    """The path of CUDA tensors: what is not finite is read on the device, never by the host."""
    for module in (buffers, guard, head):
        monkeypatch.setattr(module, "on_host", lambda t: False)

"""Steps that are not taken: overflows, what is not finite, empty batches; on the host and as a device would."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BIASES,
    CLASSES,
    INNER,
    ORDERS,
    PROJECTIONS,
    TARGETS,
    assert_bitwise,
    backward,
    everything,
    exhaustive,
    fused_adam,
    fused_sgd,
    head_steps,
    make_head,
    make_model,
    make_steps,
    on_device,
    spoil,
    train,
    wrap,
)
from torch import nn

pytestmark = pytest.mark.many_launches  # test_kernels.py has what is short enough for the interpreter


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("make", INNER)
def test_grad_scaler_does_not_change_the_trajectory(make, projection, target, backend):
    models = [make_model() for _ in range(2)]
    optimizers = [wrap(model, make, projection=projection, target=target, backend=backend) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    train(models[0], optimizers[0], make_steps(15))
    for number, (modality, x, y) in enumerate(make_steps(15)):
        optimizers[1].zero_grad()
        scaler.scale(F.cross_entropy(models[1]({modality: x})[modality], y)).backward()
        if number % 2:  # as for clipping
            scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1], modality=modality)
        scaler.update()
    assert not hasattr(optimizers[1].optimizer, "found_inf") and not hasattr(optimizers[1].optimizer, "grad_scale")
    torch.testing.assert_close(everything(models[1], optimizers[1]), everything(models[0], optimizers[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.host_path
@pytest.mark.parametrize("overflow", ["head", "encoder"])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("warm", [0, 4])
@pytest.mark.filterwarnings("ignore:step skipped")
def test_an_overflow_moves_nothing(make, projection, overflow, warm, backend):
    models = [make_model() for _ in range(2)]
    optimizers = [wrap(model, make, projection=projection, backend=backend) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, make_steps(warm))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = everything(models[0], optimizers[0])
    for modality, x, y in make_steps(2, seed=9):
        optimizers[0].zero_grad()
        scaler.scale(F.cross_entropy(models[0]({modality: x})[modality], y)).backward()
        part = models[0].head if overflow == "head" else models[0].encoders[modality][0]
        part.weight.grad[0, 0] = torch.inf
        scaler.step(optimizers[0], modality=modality)
        scaler.update()
    assert scaler.get_scale() == 1.0
    assert_bitwise(everything(models[0], optimizers[0]), before)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, make_steps(6, seed=10))
    assert_bitwise(everything(models[0], optimizers[0]), everything(models[1], optimizers[1]))


@pytest.mark.host_path
@pytest.mark.parametrize("where", ["features", "weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, *exhaustive(torch.inf, -torch.inf)])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("warm", [0, 4])
def test_a_step_that_is_not_finite_changes_nothing(projection, where, value, warm, backend):
    heads = [make_head() for _ in range(2)]
    optimizers = [wrap(head, projection=projection, backend=backend) for head in heads]
    for head, optimizer in zip(heads, optimizers, strict=True):
        train(head, optimizer, head_steps(warm))
    before = everything(heads[0], optimizers[0])
    with pytest.warns(UserWarning, match="step skipped") as warned:
        for step in head_steps(2, seed=14):
            spoil(heads[0], optimizers[0], where, value, step)
            optimizers[0].step(modality=step[0])
    assert len(warned) == 1 and warned[0].filename == __file__
    assert_bitwise(everything(heads[0], optimizers[0]), before)
    assert optimizers[0].diagnostics()["skipped_nonfinite"] == 2
    for head, optimizer in zip(heads, optimizers, strict=True):
        train(head, optimizer, head_steps(4, seed=15))
    assert_bitwise(everything(heads[0], optimizers[0]), everything(heads[1], optimizers[1]))


@pytest.mark.host_path
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_mean_that_overflows_changes_nothing(projection, backend):
    """Finite features and a finite gradient, but no finite x̄."""
    head = nn.Linear(5, CLASSES)
    optimizer = wrap(head, projection=projection, backend=backend)
    nn.init.zeros_(head.weight)
    (1e-38 * head(torch.full((4, 5), 3e38))).sum().backward()
    assert torch.isfinite(head.weight.grad).all()
    before = everything(head, optimizer)
    with pytest.warns(UserWarning, match="step skipped"):
        optimizer.step(modality="audio")
    assert_bitwise(everything(head, optimizer), before)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_an_empty_batch_changes_nothing(projection, backend):
    model = make_model()
    optimizer = wrap(model, projection=projection, backend=backend)
    train(model, optimizer, make_steps(4))
    before = everything(model, optimizer)
    train(model, optimizer, make_steps(3, N=0))
    assert_bitwise(everything(model, optimizer), before)
    report = optimizer.diagnostics()
    assert (report["skipped_empty"], report["skipped_nonfinite"]) == (3, 0)


def poison_freed_memory():
    """What the allocator hands out next holds large numbers, so that state that was never written shows."""
    blocks = [torch.full((n,), 1e30) for n in (3, 4, 15, 16) for _ in range(50)]
    del blocks


def on_device_the_same(saved):
    """The device can take back neither the count of the step nor that a modality was named: its mean is then zero."""
    layers = {name: {key: t for key, t in layer.items() if key != "step" and t.any()} for name, layer in saved["layers"].items()}
    return saved | {"layers": layers}


class Reassigning(torch.optim.Optimizer):
    """Momentum SGD that puts new tensors in its state at every step instead of changing those that are there."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for p in self.param_groups[0]["params"]:
            velocity = self.state[p].get("velocity", torch.zeros_like(p))
            self.state[p] = {"velocity": 0.9 * velocity + p.grad}
            p.sub_(0.1 * self.state[p]["velocity"])


@pytest.mark.parametrize("projection,target,bias", [*product(PROJECTIONS, TARGETS, BIASES)])
@pytest.mark.parametrize("make", [*INNER, Reassigning])
def test_device_path_takes_a_bad_step_back(monkeypatch, make, projection, target, bias, backend):
    """Also where the optimizer creates its state in that very step."""
    on_device(monkeypatch)
    heads = [make_head() for _ in range(2)]
    settings = {"order": "project_first", "projection": projection, "target": target, "bias": bias, "backend": backend}
    optimizers = [wrap(head, make, **settings) for head in heads]
    places = ["features", "weight", "bias", "features", "weight"]
    for step, bad, where in zip(head_steps(5), head_steps(5, seed=16), places, strict=True):
        before = everything(heads[0], optimizers[0])
        spoil(heads[0], optimizers[0], where, torch.nan, bad)
        poison_freed_memory()
        optimizers[0].step(modality=step[0])
        if before["state"]:  # where there was none, its zeros count as none: the trajectories agree below
            assert_bitwise(on_device_the_same(everything(heads[0], optimizers[0])), on_device_the_same(before))
        for head, optimizer in zip(heads, optimizers, strict=True):
            train(head, optimizer, [step])
        assert_bitwise(*(on_device_the_same(everything(h, o)) for h, o in zip(heads, optimizers, strict=True)))
    assert [o.diagnostics()["skipped_nonfinite"] for o in optimizers] == [5, 0]


@pytest.mark.parametrize("projection", ["rls", "official"])
def test_device_path_leaves_the_step_after_a_bad_first_one_unprojected(monkeypatch, projection, backend):
    """Afterwards all is as on the host, which would not have taken it."""
    on_device(monkeypatch)
    heads = [make_head() for _ in range(2)]
    optimizers = [wrap(head, projection=projection, backend=backend) for head in heads]
    spoil(heads[0], optimizers[0], "features", torch.nan, head_steps(1, seed=16)[0])
    optimizers[0].step(modality="audio")
    for step in head_steps(4):
        for head, optimizer in zip(heads, optimizers, strict=True):
            train(head, optimizer, [step])
        assert_bitwise(*(on_device_the_same(everything(h, o)) for h, o in zip(heads, optimizers, strict=True)))
        kept = optimizers[0].diagnostics()["layers"]["head"]["gradient_kept"]
        assert (abs(kept - 1) < 1e-6) == (optimizers[1].layers[0].projection.step == 1)


@pytest.mark.parametrize("projection,order,target", [*product(PROJECTIONS, ORDERS, TARGETS)])
@pytest.mark.parametrize("make", INNER)
def test_device_path_is_the_host_path_to_the_last_bit(monkeypatch, make, projection, order, target, backend):
    models = [make_model() for _ in range(2)]
    optimizers = [wrap(model, make, projection=projection, order=order, target=target, backend=backend) for model in models]
    train(models[0], optimizers[0], make_steps(9))
    on_device(monkeypatch)
    train(models[1], optimizers[1], make_steps(9))
    assert_bitwise(everything(models[1], optimizers[1]), everything(models[0], optimizers[0]))


@pytest.mark.parametrize("make", [fused_sgd, fused_adam])
@pytest.mark.parametrize("overflow", ["head", "encoder"])
def test_device_path_with_a_scaler(monkeypatch, make, overflow, backend):
    """A fused optimizer leaves everything where found_inf is set: the encoder too."""
    on_device(monkeypatch)
    model, clean = make_model(), make_model()
    optimizer, plain = (wrap(m, make, order="project_first", backend=backend) for m in (model, clean))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, (modality, x, y) in enumerate(make_steps(12)):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model({modality: x})[modality], y)).backward()
        if number % 2 == 0:
            (model.head if overflow == "head" else model.encoders[modality][0]).weight.grad[0, 0] = torch.inf
            poison_freed_memory()
        else:
            train(clean, plain, [(modality, x, y)])
        scaler.step(optimizer, modality=modality)
        scaler.update()
    assert optimizer.diagnostics()["skipped_nonfinite"] == 6
    got, expected = (on_device_the_same(everything(m, o)) for m, o in ((model, optimizer), (clean, plain)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.host_path
def test_a_frozen_head_does_not_let_bad_features_by(backend):
    model = make_model()
    optimizer = wrap(model, backend=backend)
    train(model, optimizer, make_steps(3))
    model.head.requires_grad_(False)
    before = everything(model, optimizer)
    (modality, x, y), *_ = make_steps(1)
    with pytest.warns(UserWarning, match="step skipped"):
        train(model, optimizer, [(modality, x * torch.nan, y)])
    assert_bitwise(everything(model, optimizer), before)
    train(model, optimizer, [(modality, x, y)])
    assert not torch.equal(model.encoders[modality][0].weight, before["model"][f"encoders.{modality}.0.weight"])


@pytest.mark.host_path
def test_a_step_that_the_head_has_no_part_in_is_noticed(backend):
    model = make_model()
    optimizer = wrap(model, backend=backend)
    model.head = nn.Linear(5, 4)
    (step,) = make_steps(1)
    backward(model, optimizer, *step)
    with pytest.warns(UserWarning, match="^step: no row of 'audio' went through the head that this optimizer was built") as said:
        optimizer.step(modality="audio")
    assert said[0].filename == __file__

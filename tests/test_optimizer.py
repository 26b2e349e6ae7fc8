"""``MLAOptimizer`` against a loop written by hand over the reference, and against everything that drives an optimizer."""

import copy
import io
import math
import pickle
import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    PROJECTIONS,
    assert_bitwise,
    backward,
    everything,
    head_steps,
    here,
    make_model,
    make_steps,
    momentum_sgd,
    normal,
    relative,
    train,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import mla_fast as mla
from mla_fast import reference

pytestmark = pytest.mark.many_launches  # test_kernels.py has what is short enough for the interpreter

ORDERS, TARGETS, BIASES = ("update_first", "project_first"), ("gradient", "update"), ("free", "project")
f64 = torch.float64


def wrap(model, make=momentum_sgd, **settings):
    """An MLAOptimizer over a MultimodalModel, or over a head alone."""
    return mla.MLAOptimizer(make(model.parameters()), head=getattr(model, "head", model), **settings)


def adam(parameters):
    """With its count of steps on the parameters' device, which can take it back."""
    return torch.optim.Adam(parameters, lr=0.01, capturable=here().type == "cuda")


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def fused_sgd(parameters):
    return momentum_sgd(parameters, fused=True)


def fused_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


INNER = [momentum_sgd, adam, fused_sgd, fused_adam]


def make_head(s=5, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(s, CLASSES, bias=bias, dtype=dtype)


class HandLoop:
    """MLA around SGD with momentum and weight decay, from the reference's functions and nothing of the optimizer's."""

    # α is above any k_i x̄_j of tanh features, where the official division has poles that magnify rounding without bound.
    LR, MOMENTUM, DECAY, ALPHA = 0.1, 0.9, 0.01, 4.0

    def __init__(self, model, projection, order, target, bias):
        self.kind, self.first, self.target, self.bias = projection, order == "project_first", target, bias == "project"
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.velocity, self.means, self.t = {}, {}, 0
        self.P = torch.eye(self.values["head.weight"].shape[1] + self.bias, dtype=f64)

    def project(self, G, x_bar, modality):
        if self.kind == "none":
            return G
        if self.kind == "window":
            others = [mean for name, mean in self.means.items() if name != modality]
            self.means[modality] = x_bar
            P = reference.window_projection(torch.stack(others), self.ALPHA) if others else torch.eye(len(x_bar), dtype=f64)
            return reference.project(G, P)
        if self.t == 0 and not self.first:
            return G
        if self.kind == "rls":
            self.P, projected = reference.rls_project(self.P, x_bar, G, self.ALPHA, project_first=self.first)
            return projected
        before, self.P = self.P, reference.official_update(self.P, x_bar, self.ALPHA)
        return reference.official_project(G, before if self.first else self.P)

    def project_head(self, weight, bias, x_bar, modality):
        if not self.bias:
            return self.project(weight, x_bar, modality), bias
        joined = self.project(torch.cat([weight, bias[:, None]], 1), reference.with_constant(x_bar), modality)
        return joined[:, :-1], joined[:, -1]

    def sgd(self, grads):
        for name, grad in grads.items():
            grad = grad + self.DECAY * self.values[name]
            self.velocity[name] = self.MOMENTUM * self.velocity[name] + grad if name in self.velocity else grad
            self.values[name] = self.values[name] - self.LR * self.velocity[name]

    def step(self, modality, x, y):
        encoder = [f"encoders.{modality}.0.weight", f"encoders.{modality}.0.bias"]
        names = [*encoder, "head.weight", "head.bias"]
        leaves = [self.values[name].requires_grad_() for name in names]
        features = torch.tanh(F.linear(x, *leaves[:2]))
        grads = torch.autograd.grad(reference.unimodal_loss(features, *leaves[2:], y), leaves)
        self.values |= {name: leaf.detach() for name, leaf in zip(names, leaves, strict=True)}
        grads, x_bar = dict(zip(names, grads, strict=True)), reference.feature_mean(features.detach())
        head = names[2:]
        if self.target == "gradient":
            projected = self.project_head(*(grads[name] for name in head), x_bar, modality)
            self.sgd(grads | dict(zip(head, projected, strict=True)))
        else:
            old = [self.values[name] for name in head]
            self.sgd(grads)
            moved = [self.values[name] - before for name, before in zip(head, old, strict=True)]
            for name, before, part in zip(head, old, self.project_head(*moved, x_bar, modality), strict=True):
                self.values[name] = before + part
        self.t += 1


@pytest.mark.parametrize("projection,order,target,bias", [*product(PROJECTIONS, ORDERS, TARGETS, BIASES)])
def test_trajectory_is_that_of_the_reference(projection, order, target, bias, backend):
    model = make_model(f64)
    optimizer = wrap(model, projection=projection, order=order, target=target, bias=bias, alpha=HandLoop.ALPHA, backend=backend)
    loop = HandLoop(model, projection, order, target, bias)
    for modality, x, y in make_steps(200, f64):
        backward(model, optimizer, modality, x, y)
        optimizer.step(modality=modality)
        loop.step(modality, x, y)
    for name, p in model.named_parameters():
        assert relative(p.detach(), loop.values[name]) < 1e-12, name
    if projection != "window":
        assert relative(optimizer.layers[0].projection.matrix(), loop.P) < 1e-12


def test_none_is_the_wrapped_optimizer_alone():
    model, plain = make_model(), make_model()
    wrapped, bare = wrap(model, adamw, projection="none"), adamw(plain.parameters())
    train(model, wrapped, make_steps(20))
    for modality, x, y in make_steps(20):
        backward(plain, bare, modality, x, y)
        bare.step()
    assert_bitwise(dict(model.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("s,N", [(1, 1), (63, 4), (130, 1)])
def test_float32_P_is_as_good_as_eager_float32(s, N, backend):
    head = make_head(s)
    optimizer = wrap(head, backend=backend)
    exact = torch.eye(s, dtype=f64)
    eager = exact.float()
    for t, (modality, x, y) in enumerate(head_steps(1000, s, N=N)):
        train(head, optimizer, [(modality, x, y)])
        if t:
            exact = reference.rls_update(exact, reference.feature_mean(x.double()), 1.0)
            eager = reference.rls_update(eager, reference.feature_mean(x), 1.0)
    assert relative(optimizer.layers[0].projection.matrix(), exact) <= 2 * relative(eager, exact)


def test_P_is_the_closed_form(backend):
    head = make_head(13, f64)
    optimizer, steps = wrap(head, alpha=0.3, backend=backend), head_steps(500, 13, f64)
    train(head, optimizer, steps)
    P = optimizer.layers[0].projection.matrix()
    assert (P - reference.rls_closed_form(torch.stack([x.mean(0) for _, x, _ in steps[1:]]), 0.3)).abs().max() < 1e-9
    assert torch.equal(P, P.T)


@pytest.mark.parametrize("make", [*INNER, adamw])
@pytest.mark.parametrize("target", TARGETS)
def test_idle_encoders_are_untouched(make, target):
    model = make_model()
    optimizer = wrap(model, make, target=target)
    train(model, optimizer, make_steps(3))
    for modality, x, y in make_steps(6, seed=5):
        before = everything(model, optimizer)
        train(model, optimizer, [(modality, x, y)])
        after = everything(model, optimizer)
        for number, name in enumerate(after["model"]):
            if name.startswith("encoders.") and modality not in name:
                assert_bitwise((after["model"][name], after["state"][number]), (before["model"][name], before["state"][number]))
            else:
                assert not torch.equal(after["model"][name], before["model"][name])


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_every_linear_of_the_head_has_its_own_P(projection, inplace, backend):
    head = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=inplace), nn.Linear(8, CLASSES))
    model = make_model(f64, head=head)
    optimizer = wrap(model, projection=projection, alpha=0.5, backend=backend)
    assert [layer.name for layer in optimizer.layers] == ["0", "2"]
    seen = {"0": [], "2": []}
    for modality, x, y in make_steps(12, f64):
        with torch.no_grad():
            features = model.features(modality, x)
            seen["0"].append(features.mean(0))
            seen["2"].append(head[:2](features).mean(0))
        train(model, optimizer, [(modality, x, y)])
    if projection == "rls":
        for layer in optimizer.layers:
            expected = reference.rls_closed_form(torch.stack(seen[layer.name][1:]), 0.5)
            torch.testing.assert_close(layer.projection.matrix(), expected, rtol=1e-10, atol=1e-10)
    report = optimizer.diagnostics()["layers"]
    assert [report[name]["steps"] for name in ("0", "2")] == [12, 12]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_without_a_bias_there_is_none_to_project(projection, target, backend):
    heads = [make_head(dtype=f64, bias=False) for _ in BIASES]
    for head, bias in zip(heads, BIASES, strict=True):
        train(head, wrap(head, projection=projection, target=target, bias=bias, backend=backend), head_steps(10, dtype=f64))
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_a_frozen_bias_is_not_projected():
    head = make_head()
    head.bias.requires_grad_(False)
    before = head.bias.clone()
    optimizer = wrap(head, lambda p: momentum_sgd([q for q in p if q.requires_grad]), bias="project")
    train(head, optimizer, head_steps(4))
    assert torch.equal(head.bias, before) and optimizer.layers[0].projection.size == 5


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_bfloat16_head_keeps_P_in_float32(projection, target, bias, backend):
    head = make_head(dtype=torch.bfloat16)
    optimizer = wrap(head, projection=projection, target=target, bias=bias, backend=backend)
    before = head.weight.detach().clone()
    train(head, optimizer, head_steps(6, dtype=torch.bfloat16))
    assert all(t.dtype == torch.float32 for t in optimizer.layers[0].projection.tensors().values())
    assert head.weight.dtype == torch.bfloat16 and not torch.equal(head.weight, before)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("first", [1, 3, 6])
def test_accumulated_gradients_equal_one_large_batch(projection, first, backend):
    """Unequal halves: the losses weighted by their rows, and x̄ of its own accord."""
    whole, parts = make_model(f64), make_model(f64)
    optimizers = [wrap(model, projection=projection, backend=backend) for model in (whole, parts)]
    for modality, x, y in make_steps(12, f64):
        train(whole, optimizers[0], [(modality, x, y)])
        optimizers[1].zero_grad()
        for rows in (slice(first), slice(first, None)):
            loss = F.cross_entropy(parts({modality: x[rows]})[modality], y[rows], reduction="sum") / len(y)
            loss.backward()
        optimizers[1].step(modality=modality)
    torch.testing.assert_close(everything(parts, optimizers[1]), everything(whole, optimizers[0]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_features_count_when_the_gradient_comes_back(projection, backend):
    """All forward passes first and then backward and step for each modality, against one modality after the other.

    The encoders are frozen and the loss is linear in the logits, so that nothing else depends on the order.
    """
    models = [make_model(f64) for _ in range(2)]
    optimizers = []
    for model in models:
        model.encoders.requires_grad_(False)
        optimizers.append(wrap(model, projection=projection, backend=backend))
    weights = normal(torch.Generator().manual_seed(6), 7, CLASSES, dtype=f64)
    for turn in range(5):
        inputs = {modality: x for modality, x, _ in make_steps(3, f64, seed=turn)}
        losses = {m: (weights * z).sum() for m, z in models[0](inputs).items()}
        for modality in inputs:
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses[modality].backward()
            (weights * models[1]({modality: inputs[modality]})[modality]).sum().backward()
            for optimizer in optimizers:
                optimizer.step(modality=modality)
    assert_bitwise(everything(models[0], optimizers[0]), everything(models[1], optimizers[1]))


def test_a_forward_pass_that_is_not_differentiated_leaves_no_trace(backend):
    models = [make_model() for _ in range(2)]
    optimizers = [wrap(model, backend=backend) for model in models]
    steps, others = make_steps(9), make_steps(9, seed=7)
    train(models[0], optimizers[0], steps)
    for (modality, x, y), (other, z, _) in zip(steps, others, strict=True):
        models[1]({other: z})
        backward(models[1], optimizers[1], modality, x, y)
        models[1]({other: z})
        with torch.no_grad():
            models[1]({other: 100 * z})
        models[1].predict({other: z})
        optimizers[1].step(modality=modality)
    assert_bitwise(everything(models[1], optimizers[1]), everything(models[0], optimizers[0]))


def test_zero_grad_drops_the_features(backend):
    heads = [make_head() for _ in range(2)]
    optimizers = [wrap(head, backend=backend) for head in heads]
    for step, dropped in zip(head_steps(6), head_steps(6, seed=8), strict=True):
        train(heads[0], optimizers[0], [step])
        backward(heads[1], optimizers[1], *dropped)
        train(heads[1], optimizers[1], [step])
    assert_bitwise(everything(heads[1], optimizers[1]), everything(heads[0], optimizers[0]))


def test_a_wrapped_optimizer_drops_gradients_its_own_way():
    class Counting(torch.optim.SGD):
        def zero_grad(self, set_to_none):
            self.dropped = getattr(self, "dropped", 0) + set_to_none
            super().zero_grad(set_to_none)

    head = make_head()
    inner = Counting(head.parameters(), lr=0.1)
    train(head, mla.MLAOptimizer(inner, head), head_steps(2))
    assert inner.dropped == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_features_count_once(use_reentrant):
    heads = [make_head() for _ in range(2)]
    optimizers = [wrap(head) for head in heads]
    for modality, x, y in head_steps(6):
        train(heads[0], optimizers[0], [(modality, x, y)])
        optimizers[1].zero_grad()
        x = x.clone().requires_grad_()
        F.cross_entropy(checkpoint(heads[1], x, use_reentrant=use_reentrant), y).backward()
        assert optimizers[1].layers[0].features.rows == len(y)
        optimizers[1].step()
    assert_bitwise(everything(heads[1], optimizers[1]), everything(heads[0], optimizers[0]))


LAYOUTS = {
    "transposed": lambda head, x: head(x.T.contiguous().T),
    "strided": lambda head, x: head(torch.stack([x, x], 2)[..., 0]),
    "expanded": lambda head, x: head(x[:1].expand_as(x)),
    "keyword": lambda head, x: head(input=x),
    "more dimensions": lambda head, x: head(x.view(2, 3, 5)).flatten(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_of_any_layout(layout):
    heads = [make_head(dtype=f64) for _ in range(2)]
    optimizers = [wrap(head) for head in heads]
    for modality, x, y in head_steps(5, dtype=f64, N=6):
        train(heads[0], optimizers[0], [(modality, x[:1].repeat(6, 1) if layout == "expanded" else x, y)])
        optimizers[1].zero_grad()
        F.cross_entropy(LAYOUTS[layout](heads[1], x), y).backward()
        optimizers[1].step()
    torch.testing.assert_close(everything(heads[1], optimizers[1]), everything(heads[0], optimizers[0]), rtol=1e-12, atol=1e-13)


SCHEDULERS = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=20),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_wrapped_optimizer(name):
    models, rates = [make_model() for _ in range(2)], []
    optimizers = [wrap(models[0], projection="none"), momentum_sgd(models[1].parameters())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
        for modality, x, y in make_steps(12):
            for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
                loss = backward(model, optimizer, modality, x, y)
                optimizer.step()
                scheduler.step(*[loss.item()] if name == "plateau" else [])
            rates.append(optimizers[0].optimizer.param_groups[0]["lr"])
            assert rates[-1] == optimizers[1].param_groups[0]["lr"]
    assert len(set(rates)) > 4
    assert_bitwise(dict(models[0].state_dict()), dict(models[1].state_dict()))


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


def copied(model, optimizer, how):
    if how == "deepcopy":
        return copy.deepcopy((model, optimizer))
    return pickle.loads(pickle.dumps((model, optimizer)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_copy_continues_by_itself(projection, how, backend):
    model, bystander = make_model(), make_model()
    optimizer = wrap(model, projection=projection, backend=backend)
    undisturbed = wrap(bystander, projection=projection, backend=backend)
    lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)  # it patches optimizer.step, which must not end up in the copy
    for m, o in ((model, optimizer), (bystander, undisturbed)):
        train(m, o, make_steps(7))
    twin, twin_optimizer = copied(model, optimizer, how)
    assert twin_optimizer.layers[0].module is twin.head and twin_optimizer.state is twin_optimizer.optimizer.state
    for m, o in ((model, optimizer), (twin, twin_optimizer), (bystander, undisturbed)):
        train(m, o, make_steps(7, seed=11))
    assert_bitwise(everything(model, optimizer), everything(bystander, undisturbed))
    assert_bitwise(everything(twin, twin_optimizer), everything(bystander, undisturbed))


def test_a_copy_of_the_optimizer_alone_has_its_own_head(backend):
    head = make_head()
    optimizer = wrap(head, backend=backend)
    train(head, optimizer, head_steps(5))
    twin = copy.deepcopy(optimizer)
    before = everything(twin.layers[0].module, twin)
    train(head, optimizer, head_steps(5, seed=12))
    assert_bitwise(everything(twin.layers[0].module, twin), before)
    train(twin.layers[0].module, twin, head_steps(5, seed=12))
    assert_bitwise(everything(twin.layers[0].module, twin), everything(head, optimizer))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_saved_state_continues_to_the_last_bit(projection, bias, target, backend):
    """Saving in the middle of a run changes no bit of it; a fresh optimizer with other settings takes them from the state."""
    settings = {"projection": projection, "order": "project_first", "target": target, "bias": bias, "alpha": 0.4}
    model, bystander, fresh = make_model(), make_model(), make_model(seed=1)
    optimizer = wrap(model, backend=backend, **settings)
    undisturbed = wrap(bystander, backend=backend, **settings)
    restored = wrap(fresh, lambda p: momentum_sgd(p, lr=9.0), backend=backend)
    for m, o in ((model, optimizer), (bystander, undisturbed)):
        train(m, o, make_steps(7))
    fresh.load_state_dict(through_a_file(model.state_dict()))
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    assert restored.settings == optimizer.settings
    for m, o in ((model, optimizer), (bystander, undisturbed), (fresh, restored)):
        train(m, o, make_steps(7, seed=13, start=1))
    assert_bitwise(everything(model, optimizer), everything(bystander, undisturbed))
    assert_bitwise(everything(fresh, restored), everything(bystander, undisturbed))


def test_a_callable_alpha(backend):
    def alpha(step):
        return 1.0 + 0.5 * step

    head, exact = make_head(dtype=f64), torch.eye(5, dtype=f64)
    optimizer = wrap(head, alpha=alpha, backend=backend)
    for t, step in enumerate(head_steps(9, dtype=f64)):
        train(head, optimizer, [step])
        exact = exact if t == 0 else reference.rls_update(exact, step[1].mean(0), alpha(t))
        expected = step[1].mean(0).norm().item() ** 2 / alpha(t)
        assert optimizer.diagnostics()["layers"]["head"]["x_bar_alpha"] == pytest.approx(expected)
    torch.testing.assert_close(optimizer.layers[0].projection.matrix(), exact, rtol=1e-12, atol=1e-12)
    state = through_a_file(optimizer.state_dict())
    with pytest.raises(ValueError, match="^state_dict: saved with a callable alpha"):
        wrap(make_head(dtype=f64)).load_state_dict(state)
    restored = wrap(make_head(dtype=f64), alpha=alpha)
    restored.load_state_dict(state)
    assert restored.layers[0].projection.alpha().item() == alpha(9)


@pytest.mark.parametrize("target", TARGETS)
def test_a_callable_alpha_that_goes_bad_moves_nothing(target, backend):
    head = make_head()
    optimizer = wrap(head, target=target, alpha=lambda t: 1.0 if t < 3 else 0, backend=backend)
    train(head, optimizer, head_steps(3))
    before = everything(head, optimizer)
    backward(head, optimizer, *head_steps(1)[0])
    with pytest.raises(ValueError, match="^alpha: expected a positive finite number, got 0"):
        optimizer.step()
    assert_bitwise(everything(head, optimizer), before)


def test_a_group_added_later_is_trained():
    model = make_model()
    late = list(model.encoders["text"].parameters())
    optimizer = wrap(model, lambda p: momentum_sgd([q for q in p if all(q is not r for r in late)]))
    train(model, optimizer, make_steps(2))
    optimizer.add_param_group({"params": late, "lr": 0.5})
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups is optimizer.optimizer.param_groups
    before = [p.detach().clone() for p in late]
    train(model, optimizer, make_steps(1, start=2))
    assert not any(torch.equal(p, q) for p, q in zip(late, before, strict=True))
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": late})


def test_a_closure_is_called_once_and_its_loss_returned():
    heads = [make_head() for _ in range(2)]
    optimizers, calls = [wrap(head) for head in heads], []
    for step in head_steps(4):
        train(heads[0], optimizers[0], [step])

        def closure(step=step):
            calls.append(backward(heads[1], optimizers[1], *step))
            return calls[-1]

        assert optimizers[1].step(closure) is calls[-1]
    assert len(calls) == 4
    assert_bitwise(everything(heads[1], optimizers[1]), everything(heads[0], optimizers[0]))


def test_step_hooks_of_both_optimizers_run_once():
    head, calls = make_head(), []
    optimizer = wrap(head)
    for name, target in (("outer", optimizer), ("inner", optimizer.optimizer)):
        target.register_step_pre_hook(lambda o, args, kwargs, name=name: calls.append(f"{name} before"))
        target.register_step_post_hook(lambda o, args, kwargs, name=name: calls.append(f"{name} after"))
    train(head, optimizer, head_steps(1))
    assert calls == ["outer before", "inner before", "inner after", "outer after"]


def test_state_dict_hooks_run():
    head, calls = make_head(), []
    optimizer = wrap(head)
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    state = optimizer.state_dict()
    assert state["note"] == 1 and "mla" in state
    optimizer.load_state_dict(state)
    assert calls == ["save", "load", "loaded"]


def test_repr_says_what_it_is():
    text = repr(wrap(make_model(), projection="window", alpha=2.0))
    for part in ("projection='window'", "alpha=2.0", "head [3, 5]", "SGD", "lr: 0.1"):
        assert part in text


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_diagnostics_are_what_they_say(projection, bias, backend):
    head = make_head(dtype=f64)
    optimizer = wrap(head, projection=projection, bias=bias, alpha=0.5, backend=backend)
    assert math.isnan(optimizer.diagnostics()["layers"]["head"]["gradient_kept"])
    for modality, x, y in head_steps(7, dtype=f64):
        backward(head, optimizer, modality, x, y)
        joined = torch.cat([head.weight.grad, head.bias.grad[:, None]], 1) if bias == "project" else head.weight.grad.clone()
        optimizer.step(modality=modality)
    report = optimizer.diagnostics()
    assert report.keys() == {"skipped_nonfinite", "skipped_empty", "layers"} and report["layers"].keys() == {"head"}
    P = optimizer.layers[0].projection.matrix()
    projected = reference.official_project(joined, P)  # G Pᵀ, the same as G P for all the others
    x_bar = reference.with_constant(x.mean(0)) if bias == "project" else x.mean(0)
    expected = {
        "steps": 7,
        "gradient_kept": (projected.norm() / joined.norm()).item(),
        "x_bar_alpha": x_bar.square().sum().item() / 0.5,
        "P_norm": P.norm().item(),
        "P_trace": P.trace().item(),
        "frozen": False,
    }
    assert report["layers"]["head"] == pytest.approx(expected, rel=1e-12)


def test_a_head_that_has_stopped_learning_is_called_frozen(backend):
    heads = [make_head() for _ in range(2)]
    for head, alpha, frozen in zip(heads, (1e-6, 1.0), (True, False), strict=True):
        optimizer = wrap(head, alpha=alpha, backend=backend)
        train(head, optimizer, head_steps(30))
        assert optimizer.diagnostics()["layers"]["head"]["frozen"] is frozen


def spoil(head, optimizer, where, value, step):
    """forward and backward of a step with one number in it that is not finite."""
    modality, x, y = step
    x = x.clone()
    if where == "features":
        x[1, 2] = value
    backward(head, optimizer, modality, x, y)
    if where != "features":
        getattr(head, where).grad.view(-1)[1] = value


@pytest.mark.host_path
@pytest.mark.parametrize("where", ["features", "weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
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


def on_device(monkeypatch):
    """The path of CUDA tensors: what is not finite is read on the device, never by the host."""
    monkeypatch.setattr(mla.MLAOptimizer, "_on_host", staticmethod(lambda bad: False))


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


def test_counts_of_the_device_are_saved(monkeypatch):
    on_device(monkeypatch)
    head = make_head()
    optimizer = wrap(head)
    for step in head_steps(3):
        spoil(head, optimizer, "weight", torch.nan, step)
        optimizer.step()
    restored = wrap(make_head())
    spoil(restored.layers[0].module, restored, "weight", torch.nan, head_steps(1)[0])
    restored.step()
    restored.load_state_dict(optimizer.state_dict())
    for o in (optimizer, restored, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert o.diagnostics()["skipped_nonfinite"] == 3


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf, "1", lambda t: 0])
def test_bad_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match="^alpha: expected a positive finite number, got"):
        wrap(make_head(), alpha=alpha)


@pytest.mark.parametrize("name", ["projection", "order", "target", "bias", "backend"])
def test_unknown_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: expected one of .*, got 'other'"):
        wrap(make_head(), **{name: "other"})


def frozen(module):
    return module.requires_grad_(False)


@pytest.mark.parametrize(
    "head,error",
    [
        (nn.ReLU(), "^head: expected a module with an nn.Linear in it, got ReLU"),
        (nn.Parameter(torch.ones(3, 5)), "^head: expected an nn.Module, got Parameter"),
        (frozen(nn.Linear(5, 3)), "^head: expected a trainable nn.Linear"),
        (nn.Linear(5, 3), "^head: the weight of head is not among the optimizer's parameters"),
        (nn.LazyLinear(3), "^head: head is lazy"),
    ],
    ids=["no linear", "no module", "frozen", "elsewhere", "lazy"],
)
def test_a_head_that_does_not_fit_is_refused(head, error):
    optimizer = momentum_sgd(nn.Linear(2, 2).parameters())
    with pytest.raises((ValueError, TypeError), match=error):
        mla.MLAOptimizer(optimizer, head)


@pytest.mark.parametrize(
    "make,error",
    [
        (lambda p: list(p), "^optimizer: expected a torch.optim.Optimizer, got list"),
        (lambda p: None, "^optimizer: expected a torch.optim.Optimizer, got NoneType"),
        (torch.optim.LBFGS, "^optimizer: LBFGS needs a closure"),
    ],
    ids=["list", "None", "LBFGS"],
)
def test_an_optimizer_that_does_not_fit_is_refused(make, error):
    with pytest.raises(TypeError, match=error):
        wrap(make_head(), make)


def test_nesting_is_refused():
    head = make_head()
    with pytest.raises(TypeError, match="^optimizer: expected the optimizer to wrap, got an MLAOptimizer"):
        mla.MLAOptimizer(wrap(head), head)


def test_features_that_do_not_fit_are_refused():
    head = make_head()
    wrap(head)
    with pytest.raises(ValueError, match=r"^features: expected \[\.\.\., 5\] to match head.in_features, got \[7, 6\]"):
        head(torch.randn(7, 6))
    with pytest.raises(TypeError, match="^features: expected a floating dtype for head, got torch.int64"):
        head(torch.ones(7, 5, dtype=torch.int64))


@pytest.mark.parametrize("empty", [False, True])
def test_window_needs_the_name_of_the_modality(empty, backend):
    head = make_head()
    optimizer = wrap(head, projection="window", backend=backend)
    before = everything(head, optimizer)
    backward(head, optimizer, *head_steps(1, N=0 if empty else 7)[0])
    with pytest.raises(ValueError, match="^modality: expected a name"):
        optimizer.step()
    assert_bitwise(everything(head, optimizer), before)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_gradient_without_features_is_refused(projection):
    head = make_head()
    optimizer = wrap(head, projection=projection)
    before = everything(head, optimizer)
    F.linear(torch.ones(2, 5), head.weight).sum().backward()
    with pytest.raises(RuntimeError, match="^head: head has a gradient but no features were seen"):
        optimizer.step(modality="audio")
    assert_bitwise(everything(head, optimizer), before)


def test_zeros_in_place_of_no_gradient_are_refused():
    with pytest.raises(ValueError, match="^set_to_none: expected True"):
        wrap(make_head()).zero_grad(set_to_none=False)


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


FOREIGN = {
    "of a plain optimizer": (lambda state: without(state, "mla"), "^state_dict: expected one that MLAOptimizer saved"),
    "of another version": (lambda state: state | {"mla": state["mla"] | {"version": 0}}, "^state_dict: .*got version 0"),
    "with more layers": (
        lambda state: state | {"mla": state["mla"] | {"layers": 2 * state["mla"]["layers"]}},
        "^state_dict: .* 1 head layers, got 2",
    ),
    "with other groups": (lambda state: state | {"param_groups": 2 * state["param_groups"]}, "parameter groups"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_state_is_refused(name):
    change, error = FOREIGN[name]
    head = make_head()
    optimizer = wrap(head)
    train(head, optimizer, head_steps(3))
    state = optimizer.state_dict()
    train(head, optimizer, head_steps(3))
    before, settings = everything(head, optimizer), optimizer.settings
    with pytest.raises(ValueError, match=error):
        optimizer.load_state_dict(change(state))
    assert_bitwise(everything(head, optimizer), before)
    assert optimizer.settings is settings


@pytest.mark.parametrize("projection", ["rls", "window", "official"])
@pytest.mark.parametrize("dtype,s", [(torch.float32, 6), (f64, 5)])
def test_a_state_of_another_size_is_refused(projection, dtype, s):
    source, head = make_head(s, dtype), make_head()
    other, optimizer = wrap(source, projection=projection), wrap(head, projection="none")
    train(source, other, head_steps(3, s, dtype))
    train(head, optimizer, head_steps(3))
    before, settings = everything(head, optimizer), optimizer.settings
    with pytest.raises(ValueError, match=r"^state_dict: expected .* torch.float32 \[(rows, )?5"):
        optimizer.load_state_dict(other.state_dict())
    assert_bitwise(everything(head, optimizer), before)
    assert optimizer.settings is settings


@pytest.mark.parametrize("projection", ["rls", "window"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_compiled_step_breaks_where_torch_optim_does(projection, target, monkeypatch):
    """As on CUDA, where nothing is read back. torch.optim breaks the graph on purpose around every ``step``, the wrapped one's
    included."""
    monkeypatch.setattr(mla.MLAOptimizer, "_on_host", staticmethod(lambda bad: False))
    head = make_head(8)
    optimizer, (*warm_up, last) = wrap(head, projection=projection, target=target), head_steps(4, 8)
    train(head, optimizer, warm_up)
    backward(head, optimizer, *last)
    explained = torch._dynamo.explain(lambda: optimizer.step(modality=last[0]))()
    assert explained.graph_count > 1
    for reason in explained.break_reasons:
        frame = reason.user_stack[-1]
        assert "torch/optim" in frame.filename or frame.line == "inner.step()", reason
    torch._dynamo.reset()


def test_alpha_may_be_a_tensor_that_changes_in_place():
    alpha, head, twin = torch.tensor(0.5, dtype=f64), make_head(8), make_head(8)
    optimizer = wrap(head, alpha=alpha)
    by_call = wrap(twin, alpha=lambda step: 0.5 if step < 3 else 4.0)
    for t, step in enumerate(head_steps(6, 8)):
        alpha.fill_(0.5 if t < 3 else 4.0)
        train(head, optimizer, [step])
        train(twin, by_call, [step])
    assert_bitwise(dict(head.state_dict()), dict(twin.state_dict()))
    restored = wrap(make_head(8), alpha=torch.tensor(1.0, dtype=f64))
    restored.load_state_dict(optimizer.state_dict())
    assert restored.settings.alpha.item() == 4.0
    for bad in (torch.tensor(1.0), torch.ones(1, dtype=f64)):
        with pytest.raises(TypeError, match="^alpha: expected a tensor to be 0-d float64"):
            wrap(make_head(8), alpha=bad)
    for bad in (torch.tensor(-1.0, dtype=f64), torch.ones((), dtype=f64, device="meta")):
        with pytest.raises((ValueError, RuntimeError)):
            wrap(make_head(8), alpha=bad)


def test_a_copy_has_neither_gradients_nor_the_features_that_came_with_them():
    head = make_head()
    optimizer, (first, *rest) = wrap(head), head_steps(4)
    backward(head, optimizer, *first)
    other, copied = copy.deepcopy((head, optimizer))
    fresh = make_head()
    expected = wrap(fresh)
    for h, o in ((other, copied), (fresh, expected)):
        for _, x, y in rest:
            F.cross_entropy(h(x), y).backward()
        o.step()
    assert_bitwise(everything(other, copied), everything(fresh, expected))


def test_the_last_optimizer_of_a_head_takes_over():
    head = make_head()
    first = wrap(head)
    second = wrap(head)
    assert len(head._forward_hooks) == len(head._forward_pre_hooks) == 1
    train(head, second, head_steps(3))
    (step,) = head_steps(1)
    backward(head, second, *step)
    with pytest.raises(RuntimeError, match="no features were seen; .*no other one for this head later"):
        first.step()


@pytest.mark.parametrize("bias", ["free", "project"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_bias_that_the_optimizer_does_not_hold_is_nobodys(bias, target):
    head = make_head()
    optimizer = mla.MLAOptimizer(momentum_sgd([head.weight]), head, bias=bias, target=target)
    before, steps = head.bias.clone(), head_steps(5)
    _, x, y = steps[0]
    backward(head, optimizer, "audio", x * torch.nan, y)
    with pytest.warns(UserWarning, match="step skipped"):
        optimizer.step()
    train(head, optimizer, steps)
    assert torch.equal(head.bias, before)
    assert optimizer.diagnostics()["layers"]["head"]["steps"] == 5


@pytest.mark.parametrize("target", TARGETS)
def test_a_projected_bias_may_be_frozen_later(target):
    head = make_head()
    optimizer = wrap(head, bias="project", target=target)
    train(head, optimizer, head_steps(3))
    head.bias.requires_grad_(False)
    before = head.bias.clone()
    train(head, optimizer, head_steps(3))
    assert torch.equal(head.bias, before)


def test_a_computed_weight_is_refused():
    head = torch.nn.utils.parametrizations.weight_norm(make_head())
    with pytest.raises(ValueError, match="^head: expected head with a weight of its own, got one that is computed by a param"):
        wrap(head)

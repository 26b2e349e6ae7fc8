"""``MLAOptimizer`` against a loop written by hand over the reference, and against everything that drives an optimizer."""

import functools
import math
import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BIASES,
    INNER,
    ORDERS,
    PROJECTIONS,
    TARGETS,
    assert_bitwise,
    backward,
    everything,
    exhaustive,
    fused_sgd,
    head_steps,
    make_head,
    make_model,
    make_steps,
    momentum_sgd,
    on_device,
    relative,
    through_a_file,
    train,
    wrap,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import mla_fast as mla
from mla_fast import ops, reference

pytestmark = pytest.mark.many_launches  # test_kernels.py has what is short enough for the interpreter

f64 = torch.float64


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


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


@pytest.mark.parametrize("count", [30, *exhaustive(200)])
@pytest.mark.parametrize("projection,order,target,bias", [*product(PROJECTIONS, ORDERS, TARGETS, BIASES)])
def test_trajectory_is_that_of_the_reference(projection, order, target, bias, count, backend):
    model = make_model(f64)
    optimizer = wrap(model, projection=projection, order=order, target=target, bias=bias, alpha=HandLoop.ALPHA, backend=backend)
    loop = HandLoop(model, projection, order, target, bias)
    for modality, x, y in make_steps(count, f64):
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


@pytest.mark.parametrize("s,N", [(63, 4), *exhaustive((1, 1), (130, 1))])
def test_float32_P_is_as_good_as_eager_float32(s, N, backend):
    head = make_head(s)
    optimizer = wrap(head, backend=backend)
    exact = torch.eye(s, dtype=f64)
    eager = exact.float()
    for t, (modality, x, y) in enumerate(head_steps(300, s, N=N)):
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


def test_a_wrapped_optimizer_drops_gradients_its_own_way():
    class Counting(torch.optim.SGD):
        def zero_grad(self, set_to_none):
            self.dropped = getattr(self, "dropped", 0) + set_to_none
            super().zero_grad(set_to_none)

    head = make_head()
    inner = Counting(head.parameters(), lr=0.1)
    train(head, mla.MLAOptimizer(inner, head), head_steps(2))
    assert inner.dropped == 2


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


def test_hooks_of_every_optimizer_and_profilers_see_the_step():
    head, calls = make_head(), []
    optimizer = wrap(head)
    handle = register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append(type(o)))
    try:
        train(head, optimizer, head_steps(1))
    finally:
        handle.remove()
    assert calls == [type(optimizer.optimizer), mla.MLAOptimizer]
    with torch.profiler.profile() as profiler:
        train(head, optimizer, head_steps(1))
    seen = {event.key for event in profiler.key_averages()}
    assert {"Optimizer.step#MLAOptimizer.step", "Optimizer.step#SGD.step"} <= seen


def test_the_wrapped_step_is_the_one_that_is_there():
    """torch's wrapper is gone around where nobody looks on, and nothing else is."""
    calls = []

    class Counting(torch.optim.SGD):
        @functools.wraps(torch.optim.SGD.step)  # which copies the marks of torch's wrapper
        def step(self, closure=None):
            calls.append("class")
            return super().step(closure)

    head = make_head()
    optimizer = wrap(head, lambda parameters: Counting(parameters, lr=0.1))
    train(head, optimizer, head_steps(1))
    assert calls == ["class"]
    step = optimizer.optimizer.step
    optimizer.optimizer.step = lambda: calls.append("instance") or step()
    train(head, optimizer, head_steps(1))
    assert calls == ["class", "instance", "class"]


def test_an_optimizer_that_only_passes_on_can_be_wrapped():
    """As libraries have them: torch's base class never prepared it, so it has no hooks of its own."""

    class PassingOn(torch.optim.Optimizer):
        param_groups = property(lambda self: self.optimizer.param_groups)
        state = property(lambda self: self.optimizer.state)
        defaults = property(lambda self: self.optimizer.defaults)

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            return self.optimizer.step(closure)

        def zero_grad(self, set_to_none=True):
            self.optimizer.zero_grad(set_to_none)

    heads = [make_head(), make_head()]
    heads[1].load_state_dict(heads[0].state_dict())
    steps = head_steps(3)
    train(heads[0], wrap(heads[0]), steps)
    train(heads[1], wrap(heads[1], lambda parameters: PassingOn(momentum_sgd(parameters))), steps)
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_repr_says_what_it_is():
    text = repr(wrap(make_model(), projection="window", alpha=2.0))
    for part in ("projection='window'", "alpha=2.0", "head [3, 5]", "SGD", "lr: 0.1"):
        assert part in text


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf, "1", lambda t: 0])
def test_bad_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match="^alpha: expected a positive finite number, got"):
        wrap(make_head(), alpha=alpha)


@pytest.mark.parametrize("name", ["projection", "order", "target", "bias", "backend"])
def test_unknown_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: expected one of .*, got 'other'"):
        wrap(make_head(), **{name: "other"})


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


@pytest.mark.parametrize("empty", [False, True])
def test_window_needs_the_name_of_the_modality(empty, backend):
    head = make_head()
    optimizer = wrap(head, projection="window", backend=backend)
    before = everything(head, optimizer)
    backward(head, optimizer, *head_steps(1, N=0 if empty else 7)[0])
    with pytest.raises(ValueError, match="^modality: expected a name"):
        optimizer.step()
    assert_bitwise(everything(head, optimizer), before)


def test_zeros_in_place_of_no_gradient_are_refused():
    with pytest.raises(ValueError, match="^set_to_none: expected True"):
        wrap(make_head()).zero_grad(set_to_none=False)


def test_a_compiled_step_is_the_step():
    """``torch.compile`` breaks the graph around every ``step`` of torch.optim, and so around ours."""
    heads = [make_head(8) for _ in range(2)]
    optimizers, (*warm_up, last) = [wrap(head, target="update") for head in heads], head_steps(4, 8)
    for head, optimizer in zip(heads, optimizers, strict=True):
        train(head, optimizer, warm_up)
        backward(head, optimizer, *last)
    optimizers[0].step(modality=last[0])
    torch.compile(lambda: optimizers[1].step(modality=last[0]), backend="eager")()
    torch._dynamo.reset()
    assert_bitwise(everything(heads[1], optimizers[1]), everything(heads[0], optimizers[0]))


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: every operation but views and allocations, and Triton's kernels for operators."""

    FREE = {"alias", "detach", "empty", "empty_like", "expand", "new_empty", "reshape", "select", "slice", "t", "unbind", "view"}

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        from mla_fast.kernels import launch

        run = launch.Launch.__call__
        monkeypatch.setattr(launch.Launch, "__call__", lambda own, *args: (self.note(own.kernel.fn.__name__), run(own, *args)))

    def note(self, name):
        self.names.append(name)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if not (name in self.FREE or name.startswith("_record_function") or op.namespace.startswith("mla_fast")):
            self.note(name)
        return op(*args, **(kwargs or {}))


@pytest.mark.skipif(not ops.INTERPRETED, reason="counts what a GPU would launch, where there is none")
@pytest.mark.parametrize("target,extra", [("gradient", 0), *exhaustive(("update", 5))])  # W_old, ΔW, ‖ΔW‖², their sum, and back
@pytest.mark.parametrize("make,restore", [(fused_sgd, 0), (momentum_sgd, 1)])
@pytest.mark.parametrize("projection,launches", [("none", 2), ("window", 3), ("rls", 4)])
def test_what_a_step_launches_on_a_gpu(projection, launches, make, restore, target, extra, monkeypatch):
    """Beyond what the wrapped optimizer by itself does: x̄, the check, the projection, and what undoes a step that is bad."""
    on_device(monkeypatch)
    counted = []
    for wrapped in (False, True):
        head = make_head(8)
        settings = {"projection": projection, "target": target, "backend": "triton"}
        optimizer = wrap(head, make, **settings) if wrapped else make(head.parameters())
        counter = Launches(monkeypatch)
        for modality, x, y in head_steps(3, 8):
            counter.names.clear()
            with counter:
                backward(head, optimizer, modality, x, y)
                optimizer.step(**({"modality": modality} if wrapped else {}))
        counted.append(counter.names)
        monkeypatch.undo()
        on_device(monkeypatch)
    assert len(counted[1]) - len(counted[0]) == launches + restore + (projection != "none") * extra, counted


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

"""The head's layers as ``MLAOptimizer`` sees them: whose features count, what is projected, what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BIASES,
    CLASSES,
    PROJECTIONS,
    TARGETS,
    assert_bitwise,
    backward,
    everything,
    head_steps,
    make_head,
    make_model,
    make_steps,
    momentum_sgd,
    normal,
    train,
    wrap,
)
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import mla_fast as mla
from mla_fast import reference

pytestmark = pytest.mark.many_launches  # test_kernels.py has what is short enough for the interpreter

f64 = torch.float64


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
    assert report.keys() == {"skipped_nonfinite", "skipped_empty", "skipped_lone", "layers"}
    assert report["layers"].keys() == {"head"}
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


def test_features_that_do_not_fit_are_refused():
    head = make_head()
    wrap(head)
    with pytest.raises(ValueError, match=r"^features: expected \[\.\.\., 5\] to match head.in_features, got \[7, 6\]"):
        head(torch.randn(7, 6))
    with pytest.raises(TypeError, match="^features: expected a floating dtype for head, got torch.int64"):
        head(torch.ones(7, 5, dtype=torch.int64))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_gradient_without_features_is_refused(projection):
    head = make_head()
    optimizer = wrap(head, projection=projection)
    before = everything(head, optimizer)
    F.linear(torch.ones(2, 5), head.weight).sum().backward()
    with pytest.raises(RuntimeError, match="^head: head has a gradient but no features were seen"):
        optimizer.step(modality="audio")
    assert_bitwise(everything(head, optimizer), before)


def test_the_last_optimizer_of_a_head_takes_over():
    head = make_head()
    first = wrap(head)
    second = wrap(head)
    assert len(head._forward_hooks) == len(head._forward_pre_hooks) == len(head._forward_hooks_with_kwargs) == 1
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


def test_a_weight_that_old_style_hooks_compute_is_refused():
    head = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(5, 5)), nn.Linear(5, CLASSES))
    with pytest.raises(ValueError, match="^head: expected 0 with a weight of its own, got one that is computed"):
        wrap(head)


def stepped_copies(model, optimizer):
    """As engines with master weights do: what is stepped are copies, which are given the gradients."""
    for group in optimizer.param_groups:
        group["params"] = [p.detach().clone() for p in group["params"]]


def assigned(model, optimizer):
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


def replaced(model, optimizer):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def left_out(model, optimizer):
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not model.head.weight]


@pytest.mark.parametrize("swap", [stepped_copies, assigned, replaced, left_out])
@pytest.mark.parametrize("projection", ["rls", "none"])
def test_a_weight_that_is_not_the_one_that_is_stepped_is_refused(swap, projection):
    model = make_model()
    optimizer = wrap(model, projection=projection)
    (first, *others) = make_steps(3)
    train(model, optimizer, [first])
    swap(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="^head: expected the weight of head among the parameters that the optimizer steps"):
        train(model, optimizer, others)
    assert all(map(torch.equal, before, model.parameters()))
    inputs = {"audio": others[0][1]} if others[0][0] == "audio" else {others[0][0]: others[0][1]}
    with pytest.raises(RuntimeError, match="^head: expected the weight of head among"):
        mla.Trainer(model, optimizer, progress=False).fit([(inputs, others[0][2])], 1)


def test_a_weight_that_is_computed_since_is_refused():
    head = make_head()
    optimizer = wrap(head)
    train(head, optimizer, head_steps(2))
    prune.l1_unstructured(head, "weight", 0.3)
    with pytest.raises(RuntimeError, match="^head: expected head with a weight of its own, got one that is computed since"):
        train(head, optimizer, head_steps(1))


def test_two_layers_with_one_weight_are_refused():
    head = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    head[2].weight = head[0].weight
    with pytest.raises(ValueError, match="^head: expected a weight of its own in each nn.Linear, but 0 and 2 share one"):
        wrap(head)


def test_attention_steps_freely():
    """Its projections take their weights without being called; what comes behind it is projected."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.linear = nn.TransformerEncoderLayer(5, 1, 8, dropout=0.0, batch_first=True), nn.Linear(5, CLASSES)

        def forward(self, x):
            return self.linear(self.block(x[:, None])[:, 0])

    torch.manual_seed(0)
    heads = [Attending(), Attending()]
    heads[1].load_state_dict(heads[0].state_dict())
    optimizer, plain = wrap(heads[0], alpha=0.1), momentum_sgd(heads[1].parameters())
    assert [layer.name for layer in optimizer.layers] == ["block.linear1", "block.linear2", "linear"]
    first, second = head_steps(2)
    train(heads[0], optimizer, [first])  # the first step of Algorithm 1 is free
    F.cross_entropy(heads[1](first[1]), first[2]).backward()
    plain.step()
    backward(heads[0], optimizer, *second)
    plain.zero_grad()
    F.cross_entropy(heads[1](second[1]), second[2]).backward()
    gradients = {name: p.grad.clone() for name, p in heads[1].named_parameters()}
    optimizer.step()
    for name, p in heads[0].named_parameters():
        projected = name in {"block.linear1.weight", "block.linear2.weight", "linear.weight"}
        assert torch.allclose(p.grad, gradients[name], atol=1e-6) != projected, name


def test_a_detached_head_is_a_head_like_any_other():
    head = make_head()
    optimizer = wrap(head)
    train(head, optimizer, head_steps(3))
    saved = optimizer.state_dict()
    optimizer.detach()
    assert not head._forward_hooks and not head._forward_pre_hooks
    assert not head._forward_hooks_with_kwargs and not head._forward_pre_hooks_with_kwargs
    x = torch.randn(4, 5)
    assert torch.equal(torch.jit.script(head)(x), head(x))
    head(x).sum().backward()
    assert optimizer.layers[0].features.take() == (None, 0)
    again = make_head()
    wrap(again).load_state_dict(saved)


def test_exporting_leaves_no_trace():
    head = make_head()
    optimizer = wrap(head)
    torch.export.export(head, (torch.randn(4, 5),), strict=False)
    assert optimizer.layers[0].features.take() == (None, 0)


def test_a_successor_keeps_its_hooks():
    head = make_head()
    first = wrap(head)
    second = wrap(head)
    first.detach()
    train(head, second, head_steps(2))
    assert second.diagnostics()["layers"]["head"]["steps"] == 2


def test_a_head_that_becomes_wider_than_p_is_refused():
    model = make_head()
    optimizer = wrap(model)
    (step,) = head_steps(1)
    model.double()
    backward(model, optimizer, step[0], step[1].double(), step[2])
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="^head: expected head in torch.float32 as P is, got torch.float64; convert it before"):
        optimizer.step(modality=step[0])
    assert torch.equal(model.weight, before)

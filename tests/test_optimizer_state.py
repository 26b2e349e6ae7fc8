"""Copies of an ``MLAOptimizer`` and its state: what is kept goes on to the last bit, what does not fit is refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BIASES,
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
    on_device,
    spoil,
    through_a_file,
    train,
    wrap,
)
from torch.optim import lr_scheduler

pytestmark = pytest.mark.many_launches  # test_kernels.py has what is short enough for the interpreter

f64 = torch.float64


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


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_saved_state_continues_on_a_device(monkeypatch, projection):
    """Where only the device knows that the first step has been taken."""
    on_device(monkeypatch)
    heads = [make_head(), make_head()]
    optimizers = [wrap(head, projection=projection) for head in heads]
    train(heads[0], optimizers[0], head_steps(4))
    heads[1].load_state_dict(heads[0].state_dict())
    optimizers[1].load_state_dict(through_a_file(optimizers[0].state_dict()))
    for head, optimizer in zip(heads, optimizers, strict=True):
        train(head, optimizer, head_steps(4, seed=3))
    assert_bitwise(everything(heads[1], optimizers[1]), everything(heads[0], optimizers[0]))


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


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


FOREIGN = {
    "of a plain optimizer": (lambda state: without(state, "mla"), "^state_dict: expected one that MLAOptimizer saved"),
    "of another version": (lambda state: state | {"mla": state["mla"] | {"version": 0}}, "^state_dict: .*got version 0"),
    "with more layers": (
        lambda state: state | {"mla": state["mla"] | {"layers": 2 * state["mla"]["layers"]}},
        "^state_dict: .* 1 head layers, got 2",
    ),
    "of another kind": (
        lambda state: state | {"mla": state["mla"] | {"optimizer": "AdamW"}},
        "^state_dict: expected one of SGD, got one of AdamW",
    ),
    "with other groups": (lambda state: state | {"param_groups": 2 * state["param_groups"]}, "parameter groups"),
}


def test_adamw_takes_the_state_of_adam():
    for make, other in ((torch.optim.Adam, torch.optim.AdamW), (torch.optim.Adam, torch.optim.Adam)):
        source, head = make_head(), make_head()
        saved, optimizer = wrap(source, make), wrap(head, other)
        train(source, saved, head_steps(3))
        optimizer.load_state_dict(saved.state_dict())
        train(head, optimizer, head_steps(1))


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


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_state_of_another_number_of_classes_is_refused(projection):
    other, optimizer = wrap(make_head(C=4), projection=projection), wrap(make_head(), projection=projection)
    with pytest.raises(ValueError, match=r"^state_dict: expected one of a head with weight \[3, 5\], got \[4, 5\]"):
        optimizer.load_state_dict(other.state_dict())


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


def test_what_diagnostics_say_is_saved_to_the_last_bit():
    head = make_head(8)
    optimizer, other = wrap(head), wrap(make_head(8))
    for step in head_steps(12, 8):
        train(head, optimizer, [step])
        other.load_state_dict(optimizer.state_dict())
        assert other.diagnostics() == optimizer.diagnostics()

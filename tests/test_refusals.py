"""Arguments that used to fail late, elsewhere, or not at all are refused by name, before anything moves."""

import warnings

import numpy as np
import pytest
import torch
from helpers import CLASSES, WIDTHS, assert_bitwise, everything, make_inputs, make_model, momentum_sgd, wrap
from torch import nn
from torch.optim import lr_scheduler

import mla_fast as mla


def batch(N=6):
    return make_inputs(N), torch.arange(N) % CLASSES


def trainer(**settings):
    model = make_model()
    return mla.Trainer(model, wrap(model), progress=False, **settings)


@pytest.mark.parametrize("amp", ["bf16", torch.int64, True])
def test_amp(monkeypatch, amp):
    monkeypatch.setattr(mla.graph, "DEVICES", ("cuda", "cpu"))
    model = make_model()
    optimizer = wrap(model)
    for call in (
        lambda: mla.alternating_step(model, optimizer, batch(), amp=amp),
        lambda: mla.Trainer(model, optimizer, amp=amp),
        lambda: mla.GraphedStep(model, optimizer, amp=amp),
    ):
        with pytest.raises(ValueError, match=f"^amp: expected torch.bfloat16, torch.float16 or None, got {amp!r}"):
            call()


def test_a_mask_that_is_no_tensor():
    inputs, _ = batch()
    for present in (np.ones((6, 3), bool), [[True] * 3] * 6):
        with pytest.raises(ValueError, match=r"^present: expected bool \[6, 3\] \(samples, audio, image, text\), got"):
            trainer().predict((inputs, present))


def test_unpaired_loaders_cannot_be_validated_on():
    ours, (inputs, target) = trainer(), batch()
    loaders = {m: [(x, target)] for m, x in inputs.items()}
    before = everything(ours.model, ours.optimizer)
    with pytest.raises(TypeError, match="^validation: expected a loader of batches .*, got a mapping with audio, image, text"):
        ours.fit(loaders, epochs=1, validation=loaders)
    assert_bitwise(everything(ours.model, ours.optimizer), before)
    with pytest.raises(
        TypeError, match="^loader: expected a loader of batches .*, got a mapping with audio, image, text; for one"
    ):
        ours.evaluate(loaders)
    alone = ours.evaluate([({"audio": x}, y) for x, y in loaders["audio"]])  # as the message says
    assert "audio" in alone["accuracy"] and "image" not in alone["accuracy"]


def schedulers():
    def sequence(optimizer):
        parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 4)]
        return lr_scheduler.SequentialLR(optimizer, parts, [2])

    def chain(optimizer):
        return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)])

    return [sequence, chain, lr_scheduler.ReduceLROnPlateau, lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's, around an optimizer and in its place."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize("make", schedulers())
def test_a_scheduler_of_another_optimizer(make):
    model, other = make_model(), make_model()
    optimizer = wrap(model)
    for own in (optimizer, optimizer.optimizer):
        mla.Trainer(model, optimizer, scheduler=make(own), progress=False).fit([batch()], epochs=1)
    for foreign in (wrap(other), momentum_sgd(model.parameters())):
        with pytest.raises(
            ValueError, match="^scheduler: expected one of the MLAOptimizer or of what it wraps, got one of another"
        ):
            mla.Trainer(model, optimizer, scheduler=make(foreign))


def test_a_scheduler_of_a_wrapper_of_the_optimizer():
    model = make_model()
    optimizer = wrap(model)
    wrapper = Wrapper(optimizer)
    mla.Trainer(model, optimizer, scheduler=lr_scheduler.ExponentialLR(wrapper, 0.5))
    ours = trainer()
    with pytest.raises(ValueError, match="^scheduler: expected one of the MLAOptimizer"):
        ours.add_modality("more", nn.Linear(4, 5), scheduler=lambda _: lr_scheduler.ExponentialLR(optimizer, 0.5))


class Unscheduled:
    def step(self):
        pass


def test_what_merely_steps_is_a_scheduler():
    trainer(scheduler=Unscheduled())


BAD_SETTINGS = {
    "lr": ["x", None, True, (0.1,)],
    "betas": [0.9, (0.9,), ("a", "b")],
    "amsgrad": [1, "yes"],
}


@pytest.mark.parametrize("name,value", [(name, value) for name, values in BAD_SETTINGS.items() for value in values])
def test_a_setting_of_another_type_changes_nothing(name, value):
    model = make_model()
    ours = mla.Trainer(model, wrap(model, torch.optim.AdamW, projection="rls", target="update", bias="project"), progress=False)
    before = everything(ours.model, ours.optimizer)
    with pytest.raises(TypeError, match=f"^{name}: expected a value like the optimizer's, .*, got "):
        ours.add_modality("more", nn.Linear(4, 5), **{name: value})
    assert_bitwise(everything(ours.model, ours.optimizer), before)
    assert ours.model.modalities == tuple(WIDTHS) and len(ours.optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "settings", [{"lr": 1}, {"lr": torch.tensor(0.1), "foreach": False}, {"betas": [0.5, 0.9], "fused": None}]
)
def test_settings_that_fit(settings):
    model = make_model()
    optimizer = wrap(model, torch.optim.AdamW, bias="project", target="update")
    model.add_modality("more", nn.Linear(4, 5), optimizer=optimizer, **settings)
    assert all(optimizer.param_groups[1][name] is value for name, value in settings.items())


TARGETS = {
    "one-hot": (torch.eye(3).repeat(2, 1), TypeError, r"got torch.float32 \[6, 3\]; .*loss=nn.CrossEntropyLoss\(\)"),
    "numbers": (torch.zeros(6), TypeError, r"got torch.float32 \[6\]; labels as target.long\(\)"),
    "ignored": (torch.full((6,), -100), ValueError, r"got -100; loss=nn.CrossEntropyLoss\(ignore_index=…\) leaves rows out"),
    "too large": (torch.full((6,), 3), ValueError, "got 3$"),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_for_a_loss_that_was_not_given(kind):
    target, error, message = TARGETS[kind]
    model = make_model()
    with pytest.raises(error, match=f"^target: expected .*, {message}"):
        mla.alternating_step(model, wrap(model), (batch()[0], target))


def test_no_inputs():
    model = make_model()
    with pytest.raises(ValueError, match="^inputs: expected modalities among audio, image, text, got none"):
        mla.alternating_step(model, wrap(model), ({}, batch()[1]))


def test_head_loss_names_its_own_options():
    head = nn.Linear(5, CLASSES)
    with pytest.raises(TypeError, match=r"head_loss\(\) got an unexpected keyword argument 'weight'"):
        wrap(head).head_loss(torch.ones(2, 5), torch.zeros(2).long(), weight=torch.ones(CLASSES))


def test_a_head_that_is_frozen_before():
    model = make_model()
    model.head.requires_grad_(False)
    with pytest.raises(ValueError, match="^head: expected a trainable nn.Linear.*; freeze the head after MLAOptimizer was built"):
        wrap(model)


def test_a_head_that_is_frozen_after_does_not_forget():
    model = make_model()
    optimizer = wrap(model, projection="window", target="update")
    model.head.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_modality("more", nn.Linear(4, 5), optimizer=optimizer)


@pytest.mark.parametrize("settings,calls", [({}, 2), ({"clip_norm": 1.0}, 6), ({"in_turn": True}, 6)])
def test_hooks_of_a_step_are_called_as_often_as_is_said(settings, calls):
    ours, seen = trainer(**settings), []
    ours.optimizer.register_step_post_hook(lambda *_: seen.append(1))
    ours.fit([batch()] * 2, epochs=1)
    assert len(seen) == calls


def test_weights_that_are_tied_later_are_shared():
    """Both were trained as if the tie was not there."""
    encoders = {m: nn.Linear(4, 5) for m in ("left", "right")}
    model = mla.MultimodalModel(encoders, nn.Linear(5, CLASSES))
    optimizer = wrap(model)
    both = {m: torch.randn(6, 4) for m in encoders}, batch()[1]
    mla.alternating_step(model, optimizer, both)
    model.encoders["right"].weight = model.encoders["left"].weight
    assert model.shared_parameters
    with pytest.raises(ValueError, match="^model: expected encoders and a head that share no parameter"):
        mla.alternating_step(model, optimizer, both)
    model.encoders["right"].weight = nn.Parameter(torch.zeros(5, 4))
    assert not model.shared_parameters
    one = nn.Linear(5, 5)
    model.encoders["left"] = nn.Sequential(nn.Linear(4, 5), one, one)  # twice in one encoder is its own affair
    assert not model.shared_parameters

"""Encoders that no step trains, or that one trains which should not, are said by name, once; without gradients nothing trains."""

import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, WIDTHS, assert_bitwise, everything, make_inputs, make_model, momentum_sgd, wrap
from torch import nn

import mla_fast as mla

NOT_HELD = "^optimizer: expected the parameters of the encoder of '{}' among its groups, got {} that it does not hold"
DETACHED = "^features: expected those of '{}' to require gradients"
THAWED = "^model: expected the encoder of '{}' to be frozen since another modality was added, got 2 parameters"


def batch(modalities=tuple(WIDTHS), N=6):
    return make_inputs(N, modalities), torch.arange(N) % CLASSES


def together(model, optimizer, b=None):
    mla.alternating_step(model, optimizer, b or batch())


def in_turn(model, optimizer, b=None):
    mla.Trainer(model, optimizer, in_turn=True, progress=False).fit([b or batch()], epochs=1)


@pytest.fixture(params=[together, in_turn])
def step(request):
    return request.param


def assert_said(call, *patterns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    messages = [str(w.message) for w in caught]
    assert len(messages) == len(patterns) and all(map(re.search, patterns, messages)), messages
    assert all(w.filename == __file__ for w in caught)


def test_an_optimizer_of_the_head_alone(step):
    model = make_model()
    optimizer = mla.MLAOptimizer(momentum_sgd(model.head.parameters()), model.head)
    assert_said(lambda: [step(model, optimizer) for _ in range(5)], *(NOT_HELD.format(m, "2 of 2") for m in WIDTHS))


def test_an_encoder_that_came_later(step):
    model = make_model()
    optimizer = wrap(model)
    step(model, optimizer)
    model.encoders["audio"][0] = nn.Linear(4, 5)
    model.encoders["image"].load_state_dict(model.encoders["image"].state_dict(), assign=True)
    both = NOT_HELD.format("audio", "2 of 2"), NOT_HELD.format("image", "2 of 2")
    assert_said(lambda: [step(model, optimizer) for _ in range(70)], *both)


def test_a_modality_that_was_added_without_the_optimizer(step):
    model = make_model()
    optimizer = wrap(model)
    model.add_modality("more", nn.Linear(4, 5))
    more = {"more": torch.randn(6, 4)}, batch()[1]
    assert_said(lambda: step(model, optimizer, more), NOT_HELD.format("more", "2 of 2"))


@pytest.mark.parametrize("after", [1, 100])
def test_unfreezing_that_the_optimizer_does_not_know_of(step, after):
    model = make_model()
    model.encoders.requires_grad_(False)
    model.encoders["audio"][0].weight.requires_grad_(True)
    optimizer = mla.MLAOptimizer(momentum_sgd([p for p in model.parameters() if p.requires_grad]), model.head)
    assert_said(lambda: [step(model, optimizer, batch(["audio"])) for _ in range(after)])
    model.encoders.requires_grad_(True)
    held = NOT_HELD.format("audio", "1 of 2")
    assert_said(lambda: [step(model, optimizer, batch(["audio"])) for _ in range(64)], held)


def test_each_modality_has_a_count_of_its_own():
    """Loaders of one modality each, by turns: no modality hides from looks at every other batch."""
    model = make_model()
    model.encoders.requires_grad_(False)
    optimizer = mla.MLAOptimizer(momentum_sgd(model.head.parameters()), model.head)
    names = ["audio", "image"] * 4
    assert_said(lambda: [together(model, optimizer, batch([m])) for m in names])
    model.encoders.requires_grad_(True)
    said = [NOT_HELD.format(m, "2 of 2") for m in ("audio", "image")]
    assert_said(lambda: [together(model, optimizer, batch([m])) for m in names], *said)


def test_what_is_as_it_should_be_is_not_said(step):
    """Frozen encoders, parameters given later, and encoders that are shared."""
    model = make_model()
    model.encoders["audio"].requires_grad_(False)
    optimizer = mla.MLAOptimizer(momentum_sgd([p for p in model.parameters() if p.requires_grad]), model.head)
    assert_said(lambda: step(model, optimizer))
    model.encoders["audio"].requires_grad_(True)
    optimizer.add_param_group({"params": model.encoders["audio"].parameters()})
    assert_said(lambda: [step(model, optimizer) for _ in range(8)])
    one = nn.Linear(4, 5)
    shared = mla.MultimodalModel({"a": one, "b": one}, nn.Linear(5, CLASSES))
    x = torch.randn(6, 4)
    assert_said(lambda: in_turn(shared, wrap(shared), ({"a": x, "b": x}, batch()[1])))


@pytest.mark.filterwarnings("ignore:optimizer")
def test_an_optimizer_of_ones_own_for_the_encoders_goes_on():
    """Its warning is no error: hooks may step encoders."""
    model = make_model()
    optimizer = mla.MLAOptimizer(momentum_sgd(model.head.parameters()), model.head)
    own = torch.optim.SGD(model.encoders.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: (own.step(), own.zero_grad()))
    before = model.encoders["audio"][0].weight.clone()
    together(model, optimizer)
    assert not torch.equal(model.encoders["audio"][0].weight, before)


class Detached(nn.Linear):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def test_features_that_are_detached(step):
    torch.manual_seed(0)
    encoders = {"audio": Detached(4, 5), "image": nn.Linear(6, 5), "text": Detached(3, 5).requires_grad_(False)}
    model = mla.MultimodalModel(encoders, nn.Linear(5, CLASSES))
    optimizer = wrap(model)
    assert_said(lambda: [step(model, optimizer) for _ in range(5)], DETACHED.format("audio"))


def test_frozen_encoders_that_are_trained_after_all(step):
    model = make_model()
    optimizer = wrap(model, bias="project", target="update")
    model.add_modality("more", nn.Linear(4, 5), optimizer=optimizer)
    replay = batch()
    replay[0]["more"] = torch.randn(6, 4)
    assert_said(lambda: step(model, optimizer, replay))
    model.requires_grad_(True)
    assert_said(lambda: [step(model, optimizer, replay) for _ in range(5)], *map(THAWED.format, WIDTHS))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_nothing_is_trained_without_gradients(off):
    model = make_model()
    optimizer = wrap(model)
    trainers = [mla.Trainer(model, optimizer, in_turn=in_turn, progress=False) for in_turn in (False, True)]
    before = everything(model, optimizer)
    for train in (lambda: together(model, optimizer), *(lambda t=t: t.fit([batch()], epochs=1) for t in trainers)):
        with (
            off(),
            pytest.raises(RuntimeError, match=r"^grad mode: expected gradients enabled in training, got torch.no_grad\(\)"),
        ):
            train()
    assert_bitwise(everything(model, optimizer), before)


def own_loop(model, optimizer, names, times=1):
    """The names of the modalities are `names`."""
    inputs, target = batch()
    for _ in range(times):
        for (modality, x), name in zip(inputs.items(), names, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model({modality: x})[modality], target).backward()
            optimizer.step(modality=name)


@pytest.mark.parametrize("names", [("audio", "audio", "audio"), ("audio", "image", "image")])
def test_one_name_for_several_encoders_switches_the_window_off(names):
    model = make_model()
    optimizer = wrap(model, projection="window", target="update")
    said = f"^step: those of '{names[-1]}' move encoders that share no parameter, so that the window has one mean for all of them"
    assert_said(lambda: own_loop(model, optimizer, names, times=10), said)


@pytest.mark.parametrize("projection,names", [("rls", ("all",) * 3), ("window", tuple(WIDTHS)), ("rls", (None,) * 3)])
def test_names_that_do_no_harm(projection, names):
    """P of the paper has no names to tell apart."""
    model = make_model()
    optimizer = wrap(model, projection=projection, target="update")
    assert_said(lambda: own_loop(model, optimizer, names, times=10))


def test_an_encoder_may_freeze_in_part_under_its_name():
    model = make_model()
    optimizer = wrap(model, projection="window", target="update")
    own_loop(model, optimizer, tuple(WIDTHS))
    for encoder in model.encoders.values():
        encoder[0].bias.requires_grad_(False)
    assert_said(lambda: own_loop(model, optimizer, tuple(WIDTHS)))


def test_what_was_said_is_not_said_again_by_a_copy():
    model = make_model()
    optimizer = mla.MLAOptimizer(momentum_sgd(model.head.parameters()), model.head)
    with pytest.warns(UserWarning, match=NOT_HELD.format("audio", "2 of 2")):
        together(model, optimizer)
    again = pickle.loads(pickle.dumps((model, optimizer)))
    assert_said(lambda: together(*again))
    state = {name: value for name, value in vars(optimizer.watch).items() if name not in ("_said", "_steps")}
    optimizer.watch.__setstate__(state)  # pickled before it said anything once
    with pytest.warns(UserWarning, match=NOT_HELD.format("audio", "2 of 2")):
        together(model, optimizer)

"""One row that is not finite does not spoil running statistics for ever."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, WIDTHS, assert_bitwise, everything, make_inputs, noisy_model, on_device, wrap
from torch import nn

import mla_fast as mla
from mla_fast import buffers

BAD = [torch.nan, torch.inf, 1e30]  # of which the last is finite, as are the features; its variance is not


def normalized(head=None):
    torch.manual_seed(0)
    encoders = {m: nn.Sequential(nn.Linear(w, 5), nn.BatchNorm1d(5), nn.ReLU()) for m, w in WIDTHS.items()}
    return mla.MultimodalModel(encoders, head or nn.Linear(5, CLASSES))


def batch(seed=0, bad=None, N=8):
    generator = torch.Generator().manual_seed(seed)
    inputs, target = make_inputs(N, seed=seed), torch.randint(CLASSES, (N,), generator=generator)
    if bad is not None:
        inputs["audio"][2, 1] = bad
    return inputs, target


def together(model, optimizer, batches):
    for b in batches:
        mla.alternating_step(model, optimizer, b)


def in_turn(model, optimizer, batches):
    mla.Trainer(model, optimizer, in_turn=True, progress=False).fit(batches, epochs=1)


def by_calls_of_the_model(model, optimizer, batches):
    for inputs, target in batches:
        for modality, x in inputs.items():
            optimizer.zero_grad()
            F.cross_entropy(model({modality: x})[modality], target).backward()
            optimizer.step(modality=modality)


def floating(model):
    return {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}


@pytest.mark.filterwarnings("ignore:step skipped")
@pytest.mark.parametrize("train", [together, in_turn, by_calls_of_the_model])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("device", [False, True])
def test_running_statistics_stay_as_they_were(monkeypatch, device, bad, train):
    if device:
        on_device(monkeypatch)
    model = normalized()
    optimizer = wrap(model, lambda p: torch.optim.SGD(p, lr=0.1, fused=device), projection="window", target="update")
    train(model, optimizer, [batch(0)])
    before = floating(model)
    train(model, optimizer, [batch(1, bad)])
    after = floating(model)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == ("audio" in name), name
    train(model, optimizer, [batch(2)])
    assert not torch.equal(model.encoders["audio"][1].running_mean, before["encoders.audio.1.running_mean"])
    assert all(t.isfinite().all() for t in floating(model).values())


@pytest.mark.filterwarnings("ignore:step skipped")
@pytest.mark.parametrize("train", [together, in_turn, by_calls_of_the_model])
def test_those_of_the_head_too(train):
    model = normalized(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, CLASSES)))
    train(model, wrap(model), [batch(0), batch(1, torch.nan)])
    assert all(t.isfinite().all() for t in floating(model).values())


@pytest.mark.filterwarnings("ignore:step skipped")
@pytest.mark.parametrize("train", [together, in_turn])
@pytest.mark.parametrize("gradient", ["encoders", "detached"])
def test_those_of_a_head_beside_an_interaction(gradient, train):
    model = normalized(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, CLASSES)))
    model.interaction = mla.Interaction(5, CLASSES, tuple(WIDTHS), rank=2, gradient=gradient)
    train(model, wrap(model), [batch(0), batch(1, torch.nan)])
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_good_batches_leave_them_to_the_encoder():
    """Bit for bit, also on the path of a device."""
    models = [noisy_model() for _ in range(3)]
    for model in models[:2]:
        torch.manual_seed(1)
        model.train()
        with pytest.MonkeyPatch.context() as patch:
            if model is models[1]:
                on_device(patch)
            together(model, wrap(model), [batch(i) for i in range(3)])
    assert_bitwise(floating(models[1]), floating(models[0]))
    torch.manual_seed(1)
    optimizer = wrap(models[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "kept", lambda part: [])
        together(models[2], optimizer, [batch(i) for i in range(3)])
    assert_bitwise(floating(models[2]), floating(models[0]))


class Centered(nn.Module):
    """A buffer in the place of another at each step, and a mask whose −∞ are there for good."""

    grows = False

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.register_buffer("center", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("nothing", None)

    def forward(self, x):
        h = self.linear(x)
        self.center = 0.9 * self.center + 0.1 * h.mean(0).double()  # not detached, as it should be
        if self.grows:
            self.center = torch.cat([self.center, self.center])
        return h - self.center[:5].detach().float()


@pytest.mark.filterwarnings("ignore:step skipped")
@pytest.mark.parametrize("device", [False, True])
def test_buffers_of_ones_own(monkeypatch, device):
    if device:
        on_device(monkeypatch)
    model = mla.MultimodalModel({"audio": Centered()}, nn.Linear(5, CLASSES))
    optimizer, encoder = wrap(model, lambda p: torch.optim.SGD(p, lr=0.1, fused=device)), model.encoders["audio"]

    def step(seed, bad=None):
        inputs, target = batch(seed, bad)
        mla.alternating_step(model, optimizer, ({"audio": inputs["audio"]}, target))
        encoder.center = encoder.center.detach()
        return encoder.center.clone()

    first, second = step(0), step(1)
    assert not torch.equal(first, second) and torch.equal(step(2, torch.nan), second)
    assert not torch.equal(step(3), second) and encoder.mask.isinf().sum() == 3
    encoder.grows = True
    assert len(step(4)) == 10


def test_what_is_not_trained_costs_nothing():
    encoder = nn.Sequential(nn.LazyBatchNorm1d(), nn.BatchNorm1d(5), nn.BatchNorm1d(5, device="meta"))
    encoder[0].eval()
    assert [[name for _, name in places] for places, _ in buffers.kept(encoder)] == [["running_mean", "running_var"]] * 2
    encoder[0].train()  # and has no values yet
    assert len(buffers.kept(encoder)) == 2
    taken = buffers.kept(encoder)
    encoder[1].running_var[2] = torch.inf
    buffers.put_back_unless_finite(taken)
    assert torch.equal(encoder[1].running_var, torch.ones(5))
    assert buffers.kept(encoder.eval()) == []
    model = noisy_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "kept", lambda part: pytest.fail("in a prediction"))
        model.predict(make_inputs())


def test_a_graph_of_another_batch_may_have_saved_them():
    """Eval-mode BatchNorm saves its statistics, which are written to while its own backward pass is still to come."""
    model, x = normalized(), make_inputs()["audio"]
    model.eval()
    held = model({"audio": x})["audio"].sum()
    model.train()
    bad = x.clone()
    bad[0] = torch.nan
    model({"audio": bad})
    held.backward()


def test_a_loop_that_calls_encoders_by_themselves_is_told():
    model = normalized()
    optimizer, (inputs, target) = wrap(model), batch(0, torch.nan)
    F.cross_entropy(model.head(model.encoders["audio"](inputs["audio"])), target).backward()
    with pytest.warns(UserWarning, match="^step skipped: .*BatchNorm's running statistics stay finite where a MultimodalModel"):
        optimizer.step(modality="audio")


def test_everything_is_as_without_the_bad_modality():
    """Parameters, momentum, P and running statistics; BatchNorm's count of batches alone has moved."""
    (model, optimizer), (other, plain) = [(m, wrap(m)) for m in (normalized(), normalized())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together(model, optimizer, [batch(0), batch(1, torch.nan), batch(2)])
    without = batch(1)
    del without[0]["audio"]
    together(other, plain, [batch(0), without, batch(2)])
    counts = [m.encoders["audio"][1].num_batches_tracked for m in (model, other)]
    assert counts[0] == counts[1] + 1
    counts[0].copy_(counts[1])
    torch.testing.assert_close(everything(model, optimizer), everything(other, plain), rtol=1e-6, atol=1e-7)

"""One row that is not finite does not spoil running statistics for ever."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, WIDTHS, assert_bitwise, everything, make_inputs, noisy_model, on_device, wrap
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

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
        patch.setattr(buffers, "statistics_of", lambda part: [])
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
    assert [[name for _, name in of.places] for of in buffers.statistics_of(encoder)] == [["running_mean", "running_var"]] * 2
    encoder[0].train()  # and has no values yet
    assert len(buffers.statistics_of(encoder)) == 2
    taken = buffers.statistics_of(encoder)
    encoder[1].running_var[2] = torch.inf
    buffers.restore_unless_finite(taken)
    assert torch.equal(encoder[1].running_var, torch.ones(5))
    assert buffers.statistics_of(encoder.eval()) == []
    model = noisy_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "_flat", lambda places: pytest.fail("in a prediction"))
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


class Recomputed(nn.Module):
    """Activation checkpointing: the backward pass computes the block again. reentrant: None for none of it."""

    def __init__(self, width, reentrant):
        super().__init__()
        self.linear, self.block = nn.Linear(width, 5), nn.Sequential(nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5))
        self.reentrant = reentrant

    def forward(self, x):
        h = self.linear(x)
        return self.block(h) if self.reentrant is None else checkpoint(self.block, h, use_reentrant=self.reentrant)


def two_passes_at_once(model, optimizer, batches):
    for inputs, target in batches:
        for modality, x in inputs.items():
            optimizer.zero_grad()
            sum(F.cross_entropy(model({modality: scale * x})[modality], target) for scale in (1, 2)).backward()
            optimizer.step(modality=modality)


@pytest.mark.filterwarnings("ignore:step")
@pytest.mark.parametrize("train", [together, in_turn, by_calls_of_the_model, two_passes_at_once])
@pytest.mark.parametrize("bad", [None, 1, 2])
@pytest.mark.parametrize("device", [False, True])
def test_activation_checkpointing_counts_a_batch_once(monkeypatch, device, bad, train):
    if device:
        on_device(monkeypatch)
    trained = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = mla.MultimodalModel({m: Recomputed(w, reentrant) for m, w in WIDTHS.items()}, nn.Linear(5, CLASSES))
        optimizer = wrap(model, lambda p: torch.optim.SGD(p, lr=0.1, fused=device))
        train(model, optimizer, [batch(i, torch.nan if i == bad else None) for i in range(3)])
        trained.append(floating(model))
    assert all(t.isfinite().all() for t in trained[0].values())
    assert_bitwise(trained[1], trained[0])
    assert_bitwise(trained[2], trained[0])


@pytest.mark.filterwarnings("ignore:step skipped")
def test_a_compiled_model():
    trained = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = normalized(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, CLASSES)))
        called, optimizer = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model, wrap(model)
        for inputs, target in [batch(0), batch(1, torch.nan), batch(2)]:
            optimizer.zero_grad()
            F.cross_entropy(called({"audio": inputs["audio"]})["audio"], target).backward()
            optimizer.step(modality="audio")
        trained.append(floating(model))
    torch.testing.assert_close(trained[1], trained[0])


def test_statistics_that_are_computed_anew():
    model = normalized()
    update_bn([batch(i, torch.nan if i == 1 else None)[0] for i in range(3)], model)
    means = [encoder[1].running_mean for encoder in model.encoders.values()]
    assert all(mean.isfinite().all() and mean.abs().sum() > 0 for mean in means)


class Unusual(nn.Module):
    """Buffers that are no statistics, or none any more: none of them is copied, and training is as it was without them."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.register_buffer("adjacency", torch.eye(3).to_sparse())
        self.register_buffer("rows", torch.eye(3).to_sparse_csr())
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("table", torch.randn(100, 100))
        self.register_buffer("state", torch.zeros(5))
        self.register_buffer("mask", torch.zeros(8))

    def forward(self, x):
        self.mask = torch.zeros(len(x)).masked_fill(x[:, 0] < 0, -torch.inf)
        self.state = None
        return self.norm(self.linear(x))


@pytest.mark.filterwarnings("ignore:step skipped")
@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("train", [together, in_turn])
def test_other_buffers_are_left_alone(monkeypatch, train, device):
    if device:
        on_device(monkeypatch)
    model = mla.MultimodalModel({"audio": Unusual()}, nn.Linear(5, CLASSES))
    encoder, optimizer = model.encoders["audio"], wrap(model, lambda p: torch.optim.SGD(p, lr=0.1, fused=device))
    last = torch.zeros(5)
    for i in range(4):
        inputs, target = batch(i, torch.nan if i == 2 else None)
        with torch.no_grad():
            inputs["audio"][0, 0] = -1.0
        train(model, optimizer, [({"audio": inputs["audio"]}, target)])
        mean = encoder.norm.running_mean.clone()
        assert mean.isfinite().all() and encoder.mask[0] == -torch.inf
        assert torch.equal(mean, last) == (i == 2)
        last = mean
    assert {name for of in buffers.statistics_of(model) for _, name in of.places} == {"running_mean", "running_var", "mask"}

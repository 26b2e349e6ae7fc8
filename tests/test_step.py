"""``alternating_step`` against the steps one after another, which is what it must be."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALTERNATION,
    CLASSES,
    PROJECTIONS,
    WIDTHS,
    assert_bitwise,
    everything,
    make_inputs,
    make_model,
    momentum_sgd,
    noisy_model,
    on_device,
)
from torch import nn

import mla_fast as mla

f64 = torch.float64
OPTIMIZERS = {"sgd": momentum_sgd, "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05)}


def batches(count=5, N=7, dtype=f64, missing=False):
    generator = torch.Generator().manual_seed(3)
    made = []
    for seed in range(count):
        inputs = {m: x.to(dtype) for m, x in make_inputs(N, seed=seed).items()}
        batch = (inputs, torch.randint(CLASSES, (N,), generator=generator))
        made.append((*batch, torch.rand(N, 3, generator=generator) < 0.5) if missing else batch)
    return made


def one_after_another(model, optimizer, batch, autocast=None):
    """The loop of the README; the losses."""
    inputs, target, present = batch if len(batch) == 3 else (*batch, None)
    losses = {}
    for i, modality in enumerate(model.modalities):
        here = slice(None) if present is None else present[:, i]
        if modality not in inputs or not len(target[here]):
            continue
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model({modality: inputs[modality][here]})[modality], target[here])
        loss.backward()
        optimizer.step(modality=modality)
        losses[modality] = loss.detach()
    return losses


def pair(make=make_model, inner="sgd", dtype=f64, **settings):
    """Two models with their optimizers, equal."""
    models = [make().to(dtype) for _ in range(2)]
    return [(m, mla.MLAOptimizer(OPTIMIZERS[inner](m.parameters()), m.head, **settings)) for m in models]


def assert_the_same(ours, in_turn, steps):
    """`ours` by ``alternating_step`` and `in_turn` by the loop end alike, to rounding in float64."""
    for batch in steps:
        mla.alternating_step(*ours, batch)
        one_after_another(*in_turn, batch)
    torch.testing.assert_close(everything(*ours), everything(*in_turn), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("inner", OPTIMIZERS)
@pytest.mark.parametrize("target", ["gradient", "update"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_it_is_the_steps_one_after_another(projection, target, inner, missing):
    (model, optimizer), (other, loop) = pair(inner=inner, projection=projection, target=target)
    for batch in batches(missing=missing):
        losses = mla.alternating_step(model, optimizer, batch)
        torch.testing.assert_close(losses, one_after_another(other, loop, batch), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(everything(model, optimizer), everything(other, loop), rtol=1e-12, atol=1e-12)


def test_it_is_them_under_autocast():
    (model, optimizer), (other, loop) = pair(dtype=torch.float32, projection="rls")
    for batch in batches(dtype=torch.float32):
        mla.alternating_step(model, optimizer, batch, amp=torch.bfloat16)
        one_after_another(other, loop, batch, autocast=torch.bfloat16)
    torch.testing.assert_close(everything(model, optimizer), everything(other, loop), rtol=1e-5, atol=1e-6)
    plain, unlike = pair(dtype=torch.float32, projection="rls")
    for batch in batches(dtype=torch.float32):
        mla.alternating_step(*plain, batch)
    assert (plain[0].head.weight - model.head.weight).abs().max() > 1e-4  # so bfloat16 did take part


def in_a_sequence():
    torch.manual_seed(3)
    return make_model(head=nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, CLASSES)))


def with_a_watched_head():
    model = make_model()
    model.head.weight.register_hook(lambda grad: 2 * grad)
    return model


@pytest.mark.parametrize("make,own", [(noisy_model, False), (in_a_sequence, True), (with_a_watched_head, True)])
def test_one_backward_pass_and_one_step_for_all_encoders(monkeypatch, make, own):
    """`own`: the head has backward passes of its own, since it is more than an nn.Linear."""
    (model, optimizer), _ = pair(make=make)
    backward, calls, stepped = torch.autograd.backward, [], []
    monkeypatch.setattr(torch.autograd, "backward", lambda t, *a, **k: (calls.append(t), backward(t, *a, **k))[1])
    inner, encoders = optimizer.optimizer, list(model.encoders.parameters())
    step = inner.step
    inner.step = lambda: (stepped.append(sum(p.grad is not None for p in encoders)), step())[1]
    mla.alternating_step(model, optimizer, batches(1)[0])
    assert [len(t) if isinstance(t, list) else t.dim() for t in calls] == 3 * [0] * own + [3]
    assert stepped == [0, 0, 0, len(encoders)]


def without_a_bias():
    torch.manual_seed(3)
    return make_model(head=nn.Linear(5, CLASSES, bias=False))


@pytest.mark.parametrize("make", [in_a_sequence, with_a_watched_head, without_a_bias])
def test_heads_of_other_kinds(make):
    assert_the_same(*pair(make=make), batches(missing=True))


def test_a_transposed_weight_under_a_fused_optimizer():
    models = [make_model(dtype=f64) for _ in range(2)]
    for model in models:
        model.head.weight = nn.Parameter(model.head.weight.detach().T.contiguous().T)
    optimizer, loop = (mla.MLAOptimizer(momentum_sgd(m.parameters(), fused=True), m.head) for m in models)
    assert_the_same((models[0], optimizer), (models[1], loop), batches(3))


@pytest.mark.parametrize("spoiled", ALTERNATION)
def test_a_modality_that_is_not_finite_takes_no_step(spoiled):
    (model, optimizer), (other, loop) = pair()
    for i, (inputs, target) in enumerate(batches()):
        if i == 3:
            inputs = {**inputs, spoiled: torch.full_like(inputs[spoiled], torch.nan)}
            with pytest.warns(UserWarning, match="step skipped"):
                mla.alternating_step(model, optimizer, (inputs, target))
            inputs = {m: x for m, x in inputs.items() if m != spoiled}
        else:
            mla.alternating_step(model, optimizer, (inputs, target))
        one_after_another(other, loop, (inputs, target))
    assert optimizer.diagnostics()["skipped_nonfinite"] == 1
    torch.testing.assert_close(everything(model, optimizer), everything(other, loop), rtol=1e-12, atol=1e-12)


class Routed(nn.Module):
    """A head whose nn.Linear sees some of the rows."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(5, CLASSES), nn.Parameter(torch.ones(CLASSES))

    def forward(self, features):
        here = features[:, 0] > -1
        return (features[:, :CLASSES] * self.scale).index_put((here,), self.linear(features[here]))


@pytest.mark.parametrize("modality", ALTERNATION)
def test_a_modality_with_no_row_for_the_head_takes_no_step(modality):
    def make():
        model = make_model(head=Routed())
        model.encoders[modality][0].bias.data[0] = -100  # and after the tanh −1
        return model

    (model, optimizer), (other, loop) = pair(make=make)
    other.load_state_dict(model.state_dict())
    assert_the_same((model, optimizer), (other, loop), batches(2))
    assert optimizer.diagnostics()["skipped_empty"] == loop.diagnostics()["skipped_empty"] == 2


def test_a_batch_that_fails_leaves_nothing_to_step_on():
    def fail(grad):
        raise RuntimeError("out of memory")

    model, optimizer = pair()[0]
    broken = model.encoders["audio"].register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="out of memory"):
        mla.alternating_step(model, optimizer, batches(1)[0])
    broken.remove()
    before = everything(model, optimizer)
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert_bitwise(everything(model, optimizer), before)


def test_a_hook_before_the_step_sees_the_gradients_of_all_encoders_once():
    (model, optimizer), (twin, plain) = pair(alpha=0.1)
    seen = []
    encoders = list(model.encoders.parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad is not None for p in (model.head.weight, *encoders)]))
    for batch in batches():
        mla.alternating_step(model, optimizer, batch)
        mla.alternating_step(twin, plain, batch)
    assert seen and all(step == [False] + [True] * len(encoders) for step in seen)
    assert len(seen) == len(list(batches()))
    assert_bitwise(everything(twin, plain), everything(model, optimizer))


def test_frozen_encoders_and_empty_batches():
    (model, optimizer), (other, loop) = pair()
    for m in (model, other):
        m.encoders["audio"].requires_grad_(False)
    assert_the_same((model, optimizer), (other, loop), batches(2))
    before = everything(model, optimizer)
    inputs, target = batches(1)[0]
    assert mla.alternating_step(model, optimizer, (inputs, target, torch.zeros(7, 3, dtype=torch.bool))) == {}
    assert mla.alternating_step(model, optimizer, ({m: x[:0] for m, x in inputs.items()}, target[:0])) == {}
    assert_bitwise(everything(model, optimizer), before)


def test_what_it_cannot_do_is_refused():
    encoder = nn.Linear(4, 5)
    model = mla.MultimodalModel({"left": encoder, "right": nn.Sequential(encoder)}, nn.Linear(5, CLASSES))
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head)
    batch = ({"left": torch.ones(2, 4), "right": torch.ones(2, 4)}, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="^model: expected encoders and a head that share no parameter"):
        mla.alternating_step(model, optimizer, batch)
    with pytest.raises(TypeError, match="^model: expected a MultimodalModel .*, got Linear"):
        mla.alternating_step(encoder, optimizer, batch)
    other = make_model()
    with pytest.raises(ValueError, match="^optimizer: expected an MLAOptimizer whose head is in the model"):
        mla.alternating_step(other, optimizer, batch)
    with pytest.raises(TypeError, match="^optimizer: expected an MLAOptimizer, got SGD"):
        mla.alternating_step(other, optimizer.optimizer, batch)
    with pytest.raises(ValueError, match=r"inputs\['audio'\]: expected 2 samples"):
        mla.alternating_step(
            other, mla.MLAOptimizer(momentum_sgd(other.parameters()), other.head), ({"audio": torch.ones(3, 4)}, batch[1])
        )
    mine = mla.MLAOptimizer(momentum_sgd(other.parameters()), other.head)
    with pytest.raises(ValueError, match="^target: expected on cpu like the head, got meta"):
        mla.alternating_step(other, mine, ({"audio": torch.ones(2, 4)}, batch[1].to("meta")))
    other.forward = lambda inputs: {}
    with pytest.raises(ValueError, match="MultimodalModel's own forward"):
        mla.alternating_step(other, mla.MLAOptimizer(momentum_sgd(other.parameters()), other.head), ({}, batch[1]))


def with_a_forward_of_its_own():
    model = make_model()
    linear = model.head.forward
    model.head.forward = lambda features: 2 * linear(features)
    return model


def changing_its_inputs():
    torch.manual_seed(3)
    encoders = {m: nn.Linear(w, 5) for m, w in WIDTHS.items()}
    return mla.MultimodalModel(encoders, nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, CLASSES)))


@pytest.mark.parametrize("make", [with_a_forward_of_its_own, changing_its_inputs])
def test_heads_that_do_as_they_like(make):
    assert_the_same(*pair(make=make), batches(3))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_callers_autocast_is_amps(backend):
    """Its cache of weights in bfloat16 does not outlive a step, and P is not computed in bfloat16."""
    (model, optimizer), (other, asked) = pair(dtype=torch.float32, backend=backend)
    seen = []
    model.encoders["audio"].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in batches(3, dtype=torch.float32):
            mla.alternating_step(model, optimizer, batch)
    assert seen == 3 * [torch.bfloat16]
    for batch in batches(3, dtype=torch.float32):
        mla.alternating_step(other, asked, batch, amp=torch.bfloat16)
    torch.testing.assert_close(everything(model, optimizer), everything(other, asked), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_device_path_keeps_what_is_not_finite_from_the_encoders(monkeypatch, fused):
    """Where nobody waits to see it a fused optimizer moves no encoder of the batch; another one's are the caller's to guard."""
    on_device(monkeypatch)
    model = make_model()
    optimizer = mla.MLAOptimizer(torch.optim.Adam(model.parameters(), fused=fused), model.head)
    good, bad = batches(2, dtype=torch.float32)
    mla.alternating_step(model, optimizer, good)
    before = everything(model, optimizer)
    bad[0]["image"][2, 1] = torch.nan
    mla.alternating_step(model, optimizer, bad)
    after = everything(model, optimizer)["model"]
    assert all(t.isfinite().all() for name, t in after.items() if fused or "image" not in name)
    assert not fused or all(torch.equal(t, before["model"][name]) for name, t in after.items() if "encoders" in name)
    assert (after["head.weight"] != before["model"]["head.weight"]).any()
    assert optimizer.diagnostics()["skipped_nonfinite"] == 1 and not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("compiled", ["encoders", "model"])
def test_compiled_models(compiled):
    """The whole model in the loop, whose features are then counted in the forward pass; or the encoders alone."""
    (model, optimizer), (other, loop) = pair(projection="window", target="update")
    if compiled == "model":
        whole = torch.compile(model, backend="aot_eager")
    else:
        for modality in ALTERNATION:
            other.encoders[modality].compile(backend="aot_eager")
    for batch in batches(3):
        if compiled == "model":
            one_after_another(whole, optimizer, batch)
            mla.alternating_step(other, loop, batch)
        else:
            one_after_another(model, optimizer, batch)
            mla.alternating_step(other, loop, batch)
    torch.testing.assert_close(everything(model, optimizer), everything(other, loop), rtol=1e-11, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("projection,streams", [("rls", False), ("window", False), ("rls", True)])
def test_on_a_gpu(projection, streams, missing):
    (model, _), (other, loop) = pair(projection=projection)
    model = model.float().cuda()
    model.streams = streams
    for encoder in model.encoders.values():  # the slower the work, the surer a missing wait shows
        encoder.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10**6))
    fused = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
    optimizer = mla.MLAOptimizer(fused, model.head, projection=projection)
    for inputs, *rest in batches(missing=missing):
        mla.alternating_step(model, optimizer, ({m: x.float().cuda() for m, x in inputs.items()}, *(t.cuda() for t in rest)))
        one_after_another(other, loop, (inputs, *rest))
    for name, expected in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name].cpu().double(), expected, rtol=1e-4, atol=1e-5)

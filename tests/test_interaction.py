"""The interaction head: MLA exactly where it is nothing, and never in the way of what MLA protects."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, WIDTHS, assert_bitwise, everything, make_inputs, wrap
from ranks import run_ranks
from torch import nn

import mla_fast as mla
from mla_fast.data import loader, sparse_coding
from mla_fast.distributed import portable_state_dict

f64 = torch.float64
S, R = 5, 7


def make(names=tuple(WIDTHS), gradient="encoders", trained=False, interaction=True, dtype=f64, **settings):
    """A model and its optimizer; trained: an interaction that is not zero any more."""
    torch.manual_seed(0)
    encoders = {m: nn.Sequential(nn.Linear(WIDTHS[m], S), nn.Tanh()) for m in names}
    head = nn.Linear(S, CLASSES)
    beside = mla.Interaction(S, CLASSES, names, R, gradient=gradient) if interaction else None
    if trained:
        nn.init.normal_(beside.out.weight)
    model = mla.MultimodalModel(encoders, head, interaction=beside).to(dtype)
    return model, wrap(model, **settings)


def batch(names=tuple(WIDTHS), N=9, missing=False, seed=1, dtype=f64):
    g = torch.Generator().manual_seed(seed)
    made = {m: x.to(dtype) for m, x in make_inputs(N, names, seed=seed).items()}, torch.randint(CLASSES, (N,), generator=g)
    return (*made, torch.rand(N, len(names), generator=g) < 0.6) if missing else made


def by_hand(model, optimizer, data):
    """One batch as the equations say it, sample by sample, with autograd; plain gradient descent is the optimizer's affair."""
    inputs, target, present = data if len(data) == 3 else (*data, torch.ones(len(data[1]), len(data[0]), dtype=torch.bool))
    features = {m: model.encoders[m](x) for m, x in inputs.items()}
    r = model.interaction
    losses = []
    for n in range(len(target)):
        here = [m for i, m in enumerate(inputs) if present[n, i]]
        if len(here) > 1:
            product = 1
            for m in here:
                A = r.factors[r.modalities.index(m)]
                product = product * torch.tanh(A.weight @ features[m][n] + A.bias)
            z = sum(model.head(features[m][n]) for m in here) / len(here)
            losses.append(F.cross_entropy((z.detach() + r.out.weight @ product)[None], target[n : n + 1]))
    L_r = sum(losses) / len(losses)
    encoders = [p for m in inputs for p in model.encoders[m].parameters()]
    own = list(r.parameters())
    of_encoders = torch.autograd.grad(L_r, encoders, retain_graph=True, allow_unused=True)
    of_own = torch.autograd.grad(L_r, own, retain_graph=True)
    of_encoders = {
        p: torch.zeros_like(p) if g is None or r.gradient == "detached" else g for p, g in zip(encoders, of_encoders, strict=True)
    }
    for i, m in enumerate(inputs):
        rows = present[:, i]
        if not rows.any():
            continue
        optimizer.zero_grad()
        F.cross_entropy(model.head(model.encoders[m](inputs[m][rows])), target[rows]).backward()
        for p in model.encoders[m].parameters():
            p.grad += of_encoders[p]
        optimizer.step(modality=m)
    optimizer.zero_grad()
    for p, g in zip(own, of_own, strict=True):
        p.grad = g
    optimizer.step()


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("gradient", ["encoders", "detached"])
@pytest.mark.parametrize("names", [("audio", "image"), tuple(WIDTHS)])
def test_a_batch_is_what_the_equations_say(names, gradient, missing, in_turn):
    ours, hand = (make(names, gradient, trained=True, projection="window") for _ in range(2))
    trainer = mla.Trainer(*ours, in_turn=in_turn)
    for seed in range(3):
        data = batch(names, missing=missing, seed=seed)
        trainer.fit([data], epochs=seed + 1)
        by_hand(*hand, data)
    torch.testing.assert_close(everything(*ours), everything(*hand), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("on_instance", [False, True])
def test_it_corrects_the_logits_that_the_model_has(on_instance, missing):
    """Those of a subclass, or of an attribute, not the head's."""

    def scaled(model, modality, features):
        return 3 * mla.MultimodalModel.logits(model, modality, features) + len(modality)

    model, optimizer = make(trained=True)
    if on_instance:
        model.logits = functools.partial(scaled, model)
    else:
        model.__class__ = type("Scaled", (mla.MultimodalModel,), {"logits": scaled})
    inputs, target, *present = batch(missing=missing)
    features = {m: model.features(m, x) for m, x in inputs.items()}
    logits = {m: model.logits(m, h) for m, h in features.items()}
    model.interaction.loss(features, logits, target, *present).backward()
    expected = [p.grad.clone() for p in model.interaction.parameters()]
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.interaction.parameters()]
    mla.alternating_step(model, optimizer, (inputs, target, *present))
    lr, decay = (optimizer.param_groups[0][name] for name in ("lr", "weight_decay"))
    for p, old, grad in zip(model.interaction.parameters(), before, expected, strict=True):
        torch.testing.assert_close((old - p) / lr, grad + decay * old, rtol=1e-9, atol=1e-12)


def test_nothing_is_mla_to_the_bit():
    with_r, without = make(), make(interaction=False)
    for data in (batch(), batch(missing=True)):
        inputs, _, *present = data
        assert_bitwise(tuple(with_r[0].predict(inputs, *present)), tuple(without[0].predict(inputs, *present)))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("in_turn", [False, True])
def test_detached_leaves_mla_as_it_is_to_the_bit(in_turn, missing):
    with_r, without = make(gradient="detached"), make(interaction=False)
    data = [batch(missing=missing, seed=seed) for seed in range(4)]
    for model, optimizer in (with_r, without):
        mla.Trainer(model, optimizer, in_turn=in_turn).fit(data, epochs=2)
    for name, p in without[0].state_dict().items():
        assert torch.equal(with_r[0].state_dict()[name], p)
    assert with_r[0].interaction.out.weight.abs().sum() > 0
    P, Q = (o.layers[0].projection.matrix() for _, o in (with_r, without))
    assert torch.equal(P, Q)


def test_what_is_absent_has_no_influence():
    results = []
    for filler in (0.0, float("nan")):
        model, optimizer = make(trained=True)
        inputs, target, present = batch(missing=True)
        inputs = {m: torch.where(present[:, i, None], x, filler) for i, (m, x) in enumerate(inputs.items())}
        mla.alternating_step(model, optimizer, (inputs, target, present))
        results.append((everything(model, optimizer), tuple(model.predict(inputs, present))))
        features = {m: torch.where(present[:, i, None], torch.ones(9, S, dtype=f64), filler) for i, m in enumerate(inputs)}
        r = model.interaction(features, present)
        r.sum().backward()
        assert r.isfinite().all() and (r[present.sum(1) < 2] == 0).all() and (r[present.sum(1) > 1] != 0).all()
        assert all(p.grad.isfinite().all() for p in model.interaction.parameters())
    assert_bitwise(*results)


def test_where_nobody_has_two_modalities_it_rests():
    model, optimizer = make(trained=True)
    before = copy.deepcopy(model.interaction.state_dict())
    inputs, target = batch()
    mla.alternating_step(model, optimizer, (inputs, target, torch.eye(3, dtype=torch.bool)[torch.arange(9) % 3]))
    mla.alternating_step(model, optimizer, ({"audio": inputs["audio"]}, target))
    assert_bitwise(model.interaction.state_dict(), before)  # no momentum, no decay


def test_what_is_not_finite_moves_nothing_of_it():
    model, optimizer = make(trained=True)
    before = copy.deepcopy(model.interaction.state_dict())
    inputs, target = batch()
    inputs["audio"][0, 0] = float("nan")
    with pytest.warns(UserWarning, match="step skipped"):
        mla.alternating_step(model, optimizer, (inputs, target))
    assert_bitwise(model.interaction.state_dict(), before)
    assert all(p.isfinite().all() for p in model.parameters())


def test_accumulated_clipped_and_scaled():
    """Two batches accumulated are the batch of both; a long clip changes nothing, and a scaler's powers of two neither."""
    whole, halves = make(trained=True), make(trained=True)
    inputs, target = batch(N=8)
    parts = [({m: x[i : i + 4] for m, x in inputs.items()}, target[i : i + 4]) for i in (0, 4)]
    mla.Trainer(*whole, in_turn=True).fit([(inputs, target)], epochs=1)
    mla.Trainer(*halves, accumulate=2, clip_norm=1e9).fit(parts, epochs=1)
    torch.testing.assert_close(everything(*halves), everything(*whole), rtol=1e-11, atol=1e-12)
    scaled, plain = make(trained=True, dtype=torch.float32), make(trained=True, dtype=torch.float32)
    data = [batch(dtype=torch.float32)] * 2
    mla.Trainer(*scaled, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)).fit(data, epochs=1)
    mla.Trainer(*plain, in_turn=True).fit(data, epochs=1)
    torch.testing.assert_close(everything(*scaled), everything(*plain), rtol=1e-4, atol=1e-5)


def test_a_clip_is_of_each_step():
    model, optimizer = make(trained=True)
    norms = []

    def look(_, *__):
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item())

    optimizer.register_step_pre_hook(look)
    mla.Trainer(model, optimizer, clip_norm=1e-3).fit([batch()], epochs=1)
    assert len(norms) == 4 and norms == pytest.approx([1e-3] * 4, rel=1e-4)


def test_bfloat16_leaves_the_interaction_in_float32():
    model, optimizer = make(dtype=torch.float32)
    inputs, target, present = batch(dtype=torch.float32, missing=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        r = model.interaction({m: model.features(m, x) for m, x in inputs.items()})
    assert r.dtype == torch.float32 and model.encoders["audio"][0](inputs["audio"]).dtype == torch.float32
    mla.Trainer(model, optimizer, amp=torch.bfloat16).fit([(inputs, target), (inputs, target, present)], epochs=2)
    assert model.interaction.out.weight.abs().sum() > 0 and model.interaction.out.weight.dtype == torch.float32


def test_a_run_goes_on_with_it(tmp_path):
    data = [batch(seed=seed) for seed in range(3)]
    whole, first, second = make(), make(), make(trained=True)
    mla.Trainer(*whole).fit(data, epochs=3)
    mla.Trainer(*first).fit(data, epochs=2, checkpoint=tmp_path / "c.pt")
    trainer = mla.Trainer(*second)
    trainer.resume(tmp_path / "c.pt")
    trainer.fit(data, epochs=3)
    assert_bitwise(everything(*second), everything(*whole))


def test_unpaired_loaders_are_said_to_leave_it_out():
    model, optimizer = make()
    inputs, target = batch()
    loaders = {m: [(x, target)] * 2 for m, x in inputs.items()}
    with pytest.warns(UserWarning, match="^interaction: it does not train on batches of one modality") as caught:
        mla.Trainer(model, optimizer).fit(loaders, epochs=2)
    assert len(caught) == 1 and not model.interaction.out.weight.any()


def test_a_loop_of_ones_own_has_one_line():
    """Its loss is what the engine takes, of the features and the head as they are."""
    model, _ = make(trained=True)
    inputs, target, present = batch(missing=True)
    features = {m: model.features(m, x) for m, x in inputs.items()}
    logits = {m: model.head(h) for m, h in features.items()}
    model.interaction.loss(features, logits, target, present).backward()
    assert model.head.weight.grad is None and model.encoders["audio"][0].weight.grad.any()


def test_what_it_is_for():
    """The class is the sum of what two modalities show: in neither alone, learned with it and not without."""
    torch.manual_seed(0)
    parts = torch.randint(4, (1500, 2))
    inputs = {m: F.one_hot(parts[:, i], 4).float() + 0.1 * torch.randn(1500, 4) for i, m in enumerate(("a", "b"))}
    data = mla.data.MultimodalDataset(inputs, parts.sum(1) % 4)
    train, test = data.subset(slice(0, 1200)), data.subset(slice(1200, 1500))
    scores = {}
    for kind in (False, True):
        torch.manual_seed(0)
        encoders = {m: nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16)) for m in inputs}
        interaction = mla.Interaction(16, 4, ("a", "b"), 32) if kind else None
        model = mla.MultimodalModel(encoders, nn.Linear(16, 4), interaction=interaction)
        optimizer = mla.MLAOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), model.head, projection="window")
        trainer = mla.Trainer(model, optimizer, seed=0, progress=False)
        trainer.fit(loader(train, 64, shuffle=True), epochs=8)
        scores[kind] = trainer.evaluate(loader(test, 300), use_test=True)
    assert scores[False]["accuracy"]["fused"] < 0.45 and scores[True]["accuracy"]["fused"] > 0.95
    assert scores[True]["accuracy"]["without_interaction"] < 0.45
    assert all(scores[True]["use"][name] > 0.5 for name in ("a", "b", "interaction"))
    assert "interaction" not in scores[False]["use"]


def test_the_use_test_finds_who_is_not_used():
    """Two views of which one is noise, without an interaction: permuting the noise costs nothing."""
    train = sparse_coding(400, 0.0, 0)
    train.inputs["r1"] = torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
    model = mla.MultimodalModel({m: nn.Linear(100, 16) for m in train.inputs}, nn.Linear(16, 10))
    trainer = mla.Trainer(model, mla.MLAOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), model.head), progress=False)
    trainer.fit(loader(train, 50), epochs=5)
    before = torch.get_rng_state()
    use = trainer.evaluate([train[:]], use_test=True)["use"]
    assert torch.equal(torch.get_rng_state(), before)
    assert use["r0"] > 0.5 > 0.2 > use["r1"]


@pytest.mark.parametrize(
    "arguments,error",
    [
        ((5, 3, ("a", "b"), 0), "^rank: expected a whole number of at least 1, got 0"),
        ((5, 3, ("a", "b"), 2.5), "^rank: expected a whole number"),
        ((5, 0, ("a", "b")), "^classes: expected a whole number"),
        ((0, 3, ("a", "b")), r"^features\['a'\]: expected a whole number"),
        (({"a": 5}, 3, ("a", "b")), "^features: expected a width for each of a, b, got a"),
        ((5, 3, ("a",)), "^modalities: expected at least two different names"),
        ((5, 3, ("a", "a")), "^modalities: expected at least two different names"),
        ((5, 3, "ab"), "^modalities: expected at least two different names"),
    ],
)
def test_bad_arguments_are_named(arguments, error):
    with pytest.raises(ValueError, match=error):
        mla.Interaction(*arguments)


@pytest.mark.parametrize("target", [torch.zeros(3), torch.zeros(3, dtype=torch.int32), torch.zeros(3, 1).long(), [0, 1, 2]])
def test_labels_of_its_loss_are_class_numbers(target):
    r = mla.Interaction(4, CLASSES, ("a", "b"))
    features, logits = {m: torch.randn(3, 4) for m in "ab"}, {m: torch.randn(3, CLASSES) for m in "ab"}
    with pytest.raises(TypeError, match=r"^target: expected int64 \[3\], got "):
        r.loss(features, logits, target)


def test_one_that_does_not_fit_the_model_is_refused():
    encoders, head = {m: nn.Linear(4, S) for m in ("a", "b")}, nn.Linear(S, CLASSES)
    for beside, kind, error in (
        (mla.Interaction(S, CLASSES, ("b", "a")), ValueError, "^interaction: expected the model's modalities a, b in that order"),
        (mla.Interaction(S, CLASSES + 1, ("a", "b")), ValueError, f"^interaction: expected {CLASSES} classes like the head"),
        (mla.Interaction(S + 1, CLASSES, ("a", "b")), ValueError, f"^interaction: expected features={S} like head.in_features"),
        (nn.Linear(S, CLASSES), TypeError, "^interaction: expected a mla_fast.Interaction or None, got Linear"),
    ):
        with pytest.raises(kind, match=error):
            mla.MultimodalModel(encoders, head, interaction=beside)
    with pytest.raises(ValueError, match="^gradient: expected one of encoders, detached, got 'head'"):
        mla.Interaction(S, CLASSES, ("a", "b"), gradient="head")


def test_encoders_of_unlike_widths():
    """A head of one's own may take them; each modality has its own A."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, CLASSES)

        def forward(self, h):
            return self.last(F.pad(h, (0, 6 - h.shape[1])))

    r = mla.Interaction({"a": 4, "b": 6}, CLASSES, ("a", "b"))
    nn.init.normal_(r.out.weight)
    features = {"a": torch.randn(3, 4), "b": torch.randn(3, 6)}
    assert r(features).shape == (3, CLASSES) and r.widths == {"a": 4, "b": 6}


def test_it_must_be_among_what_is_trained():
    model, _ = make()
    optimizer = wrap(model, lambda _: torch.optim.SGD([*model.encoders.parameters(), *model.head.parameters()], lr=0.1))
    with pytest.raises(ValueError, match="^optimizer: expected the interaction's parameters among the optimizer's"):
        mla.Trainer(model, optimizer)


def test_no_warning_where_all_is_well():
    model, optimizer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mla.Trainer(model, optimizer).fit([batch()] * 4, epochs=3, validation=[batch()])
        mla.Trainer(model, optimizer, in_turn=True).fit([batch()] * 4, epochs=3)


def on_ranks(in_turn, rank, world):
    """Each rank has every other sample; the second has modalities that the first lacks."""
    model, _ = make(trained=True)
    model = mla.distribute(model)
    trainer = mla.Trainer(model, wrap(model, projection="window"), in_turn=in_turn, accumulate=1 + in_turn)
    parts = [batch(missing=True, N=12, seed=seed) for seed in range(4)]
    trainer.fit([({m: x[rank::world] for m, x in i.items()}, t[rank::world], p[rank::world]) for i, t, p in parts], epochs=2)
    return portable_state_dict(model)


@pytest.mark.parametrize("in_turn", [False, True])
def test_ranks_train_on_the_samples_of_all(in_turn, tmp_path):
    results = run_ranks(functools.partial(on_ranks, in_turn), 2, tmp_path)
    model, optimizer = make(trained=True, projection="window")
    parts = [batch(missing=True, N=12, seed=seed) for seed in range(4)]
    mla.Trainer(model, optimizer, in_turn=in_turn, accumulate=1 + in_turn).fit(parts, epochs=2)
    for result in results:
        torch.testing.assert_close(result, model.state_dict(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("in_turn", [False, True])
def test_paired_samples_train_it_whatever_else_is_in_the_group(in_turn):
    """Beside a batch of one modality, and where nobody is paired every encoder still counts its rows once."""
    model, optimizer = make()
    inputs, target = batch()
    alone = {"audio": inputs["audio"]}, target
    mla.Trainer(model, optimizer, accumulate=2, in_turn=in_turn).fit([(inputs, target), alone], epochs=1)
    assert model.interaction.out.weight.any()
    with pytest.warns(UserWarning, match="^interaction: it does not train on batches of one modality"):
        mla.Trainer(model, optimizer, in_turn=in_turn).fit([alone] * 2, epochs=1)


def test_rows_are_encoded_once_where_nobody_is_paired():
    encoders = {m: nn.Sequential(nn.Linear(width, S), nn.BatchNorm1d(S)) for m, width in WIDTHS.items()}
    model = mla.MultimodalModel(encoders, nn.Linear(S, CLASSES), interaction=mla.Interaction(S, CLASSES, tuple(WIDTHS)))
    inputs, target = batch(dtype=torch.float32)
    present = torch.eye(3, dtype=torch.bool)[torch.arange(9) % 3]
    mla.Trainer(model, wrap(model), in_turn=True).fit([(inputs, target, present)], epochs=1)
    assert [int(encoder[1].num_batches_tracked) for encoder in model.encoders.values()] == [1, 1, 1]


@pytest.mark.parametrize("gradient", ["encoders", "detached"])
def test_a_frozen_one_stays_as_it_is(gradient):
    model, optimizer = make(gradient=gradient, trained=True)
    model.interaction.requires_grad_(False)
    before = copy.deepcopy(model.interaction.state_dict())
    for data in (batch(), batch(missing=True)):
        mla.Trainer(model, optimizer).fit([data], epochs=1)
    assert_bitwise(model.interaction.state_dict(), before)


def test_features_and_masks_that_do_not_fit_are_named():
    model, _ = make()
    r, h = model.interaction, {m: torch.randn(4, S, dtype=f64) for m in WIDTHS}
    two = {m: h[m] for m in ("audio", "text")}
    for features, present, error in (
        (two, torch.ones(4, 3, dtype=torch.bool), r"^present: expected bool \[4, 2\] \(samples, audio, text\), got .*\[4, 3\]"),
        (h, torch.ones(4, 3), r"^present: expected bool \[4, 3\]"),
        (h | {"text": h["text"][:1]}, None, r"^features\['text'\]: expected \[4, 5\], got \[1, 5\]"),
        (h | {"text": torch.randn(4, 7)}, None, r"^features\['text'\]: expected \[4, 5\], got \[4, 7\]"),
        (h | {"video": h["text"]}, None, "^features: expected modalities among audio, image, text"),
        ({}, None, "^features: expected modalities among audio, image, text, got none"),
    ):
        with pytest.raises(ValueError, match=error):
            r(features, present)
    with pytest.raises(ValueError, match="^logits: expected those of audio, text, got none of text"):
        r.loss(two, {"audio": torch.randn(4, CLASSES)}, torch.zeros(4, dtype=torch.int64))


def test_the_use_test_has_no_number_for_batches_of_one():
    model, optimizer = make(dtype=torch.float32)
    inputs, target = batch(dtype=torch.float32)
    one = [({m: x[i : i + 1] for m, x in inputs.items()}, target[i : i + 1]) for i in range(9)]
    assert all(value != value for value in mla.Trainer(model, optimizer).evaluate(one, use_test=True)["use"].values())

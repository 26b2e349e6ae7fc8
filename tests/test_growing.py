"""Modalities and classes that come later: what learns, what stays as it is, what is saved, and what is refused."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, WIDTHS, adam, assert_bitwise, everything, fused_sgd, labels, make_inputs, momentum_sgd, normal
from ranks import run_ranks
from torch import nn

import mla_fast as mla
from mla_fast import CheckpointError, reference

PROTECTS = {"target": "update", "bias": "project"}


def encoder(modality, s=5):
    return nn.Sequential(nn.Linear(WIDTHS[modality], s), nn.BatchNorm1d(s), nn.Tanh())


def grown(make=momentum_sgd, steps=6, names=("audio", "image"), dtype=torch.float32, **settings):
    """A model of these modalities and its optimizer, after some steps."""
    torch.manual_seed(0)
    model = mla.MultimodalModel({m: encoder(m) for m in names}, nn.Linear(5, CLASSES)).to(dtype)
    optimizer = mla.MLAOptimizer(make(model.parameters()), model.head, **{**PROTECTS, **settings})
    train(model, optimizer, names, steps)
    return model, optimizer


def batch(names, seed=1, N=8, dtype=torch.float32):
    inputs = {m: x.to(dtype) for m, x in make_inputs(N, names, seed).items()}
    return inputs, labels(torch.Generator().manual_seed(seed), N)


def train(model, optimizer, names, steps=4, seed=1):
    dtype = model.head.weight.dtype
    for step in range(steps):
        mla.alternating_step(model.train(), optimizer, batch(names, seed + step, dtype=dtype))


def trainer_of(model, optimizer):
    return mla.Trainer(model, optimizer, seed=0, progress=False)


def parts(model, *names):
    return copy.deepcopy({m: model.encoders[m].state_dict() for m in names})


@pytest.mark.parametrize("make", [momentum_sgd, fused_sgd, adam])
@pytest.mark.parametrize("how", ["together", "in turn", "by hand"])
def test_old_encoders_do_not_move_and_the_new_one_and_the_head_do(make, how):
    model, optimizer = grown(make)
    before, head = parts(model, "audio", "image"), model.head.weight.detach().clone()
    P = optimizer.layers[0].projection.matrix().clone()
    torch.manual_seed(1)
    model.add_modality("text", encoder("text"), optimizer=optimizer)
    new, inputs = parts(model, "text"), batch(["text"])
    assert torch.equal(optimizer.layers[0].projection.matrix(), P) and model.modalities == ("audio", "image", "text")
    for _ in range(3):
        model.train()
        if how == "by hand":
            optimizer.zero_grad()
            F.cross_entropy(model({"text": inputs[0]["text"]})["text"], inputs[1]).backward()
            optimizer.step(modality="text")
        elif how == "together":
            mla.alternating_step(model, optimizer, inputs)
        else:
            mla.Trainer(model, optimizer, in_turn=True, progress=False).fit([inputs], 1)
    assert_bitwise(parts(model, "audio", "image"), before)
    assert not torch.equal(model.head.weight, head) and optimizer.layers[0].projection.step > 12
    for name, value in parts(model, "text")["text"].items():
        assert not torch.equal(value, new["text"][name]), name
    assert model.frozen == ("audio", "image") and model.added == ("text",)
    assert model.encoders["text"].training and not model.encoders["audio"].training


def test_a_replay_of_old_data_trains_the_head_alone():
    model, optimizer = grown()
    model.add_modality("text", encoder("text"), optimizer=optimizer)
    before, head = parts(model, "audio"), model.head.weight.detach().clone()
    train(model, optimizer, ["audio", "text"], 1)
    assert_bitwise(parts(model, "audio"), before)
    alone, others = grown()
    alone.add_modality("text", encoder("text"), optimizer=others)
    train(alone, others, ["audio"], 1)
    assert not torch.equal(alone.head.weight, head)


def test_the_head_starts_without_momentum_and_goes_on_with_p():
    """The first step after the addition, by hand in float64: W ← W − γ g P⁺, with the new modality's x̄ in P."""
    model, optimizer = grown(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), dtype=torch.float64)
    assert optimizer.state[model.head.weight]["momentum_buffer"].any()
    P = optimizer.layers[0].projection.matrix().clone()
    model.add_modality("text", encoder("text").double(), optimizer=optimizer, lr=0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]
    assert model.head.weight not in optimizer.state and model.head.bias not in optimizer.state
    inputs, y = batch(["text"], dtype=torch.float64)
    h = copy.deepcopy(model.encoders["text"])(inputs["text"]).detach()
    joined = torch.cat([model.head.weight.detach(), model.head.bias.detach()[:, None]], 1)
    wide = torch.cat([h, h.new_ones(len(h), 1)], 1)
    delta = ((wide @ joined.T).softmax(1) - F.one_hot(y, CLASSES)) / len(y)
    expected = joined - 0.1 * (delta.T @ wide) @ reference.rls_update(P, wide.mean(0), 1.0)
    mla.alternating_step(model, optimizer, (inputs, y))
    got = torch.cat([model.head.weight.detach(), model.head.bias.detach()[:, None]], 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projection", ["window", "none"])
def test_what_does_not_protect_the_head_warns(projection):
    model, optimizer = grown(projection=projection)
    with pytest.warns(UserWarning, match=f"projection: '{projection}' does not keep the head from forgetting audio, image"):
        model.add_modality("text", encoder("text"), optimizer=optimizer)
    model, optimizer = grown()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_modality("text", encoder("text"), optimizer=optimizer)


def test_removing_is_the_way_back():
    model, optimizer = grown()
    encoders = parts(model, "audio", "image")
    model.encoders["audio"][0].bias.requires_grad_(False)
    added = encoder("text")
    model.add_modality("text", added, optimizer=optimizer)
    train(model, optimizer, ["text"])
    assert model.remove_modality("text", optimizer=optimizer) is added
    assert model.modalities == ("audio", "image") and model.frozen == () and len(optimizer.param_groups) == 1
    assert all(p not in optimizer.state for p in added.parameters())
    assert [p.requires_grad for p in model.encoders["audio"].parameters()] == [True, False, True, True]
    train(model, optimizer, ["audio", "image"])
    assert not torch.equal(model.encoders["image"][0].weight, encoders["image"]["0.weight"])
    model.remove_modality("audio", optimizer=optimizer)
    assert not {id(p) for group in optimizer.param_groups for p in group["params"]} & set(map(id, encoders["audio"].values()))
    train(model, optimizer, ["image"])


def test_what_is_frozen_is_what_was_there_before_the_last_addition():
    model, optimizer = grown(names=("audio",))
    model.add_modality("image", encoder("image"), optimizer=optimizer)
    model.add_modality("text", encoder("text"), optimizer=optimizer)
    assert model.frozen == ("audio", "image")
    model.remove_modality("image", optimizer=optimizer)
    assert model.frozen == ("audio",) and model.added == ("text",)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.frozen == ("audio",) and not again.train().encoders["audio"].training
        again.remove_modality("text")
        assert again.frozen == () and all(p.requires_grad for p in again.parameters())
    assert model.frozen == ("audio",)


def test_three_additions_each_from_a_file(tmp_path):
    """A process for each: the model as it was, its file, one more modality. A run that goes through says the same."""
    names = ("audio", "image", "text", "touch")

    def build(upto):
        torch.manual_seed(0)
        model = mla.MultimodalModel({"audio": encoder("audio")}, nn.Linear(5, CLASSES))
        trainer = trainer_of(model, mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, **PROTECTS))
        for name in names[1:upto]:
            trainer.add_modality(name, new(name))
        return trainer

    def new(name):
        torch.manual_seed(len(name))
        return encoder("text" if name == "touch" else name)

    def data(name):
        inputs, y = batch([{"touch": "text"}.get(name, name)])
        return [({name: x}, y) for x in inputs.values()] * 2

    through = build(1)
    through.fit(data("audio"), 2)
    for count, name in enumerate(names):
        trainer = build(count or 1)
        if count:
            trainer.resume(tmp_path / f"{count - 1}.pt")
            trainer.add_modality(name, new(name))
            through.add_modality(name, new(name))
        through.fit(data(name), 2 * count + 2)
        trainer.fit(data(name), 2 * count + 2, checkpoint=tmp_path / f"{count}.pt")
        assert_bitwise(trainer.model.state_dict(), through.model.state_dict())
        assert trainer.additions == through.additions == {n: 2 * i for i, n in enumerate(names[: count + 1]) if i}
    resumed = build(4)
    resumed.resume(tmp_path / "3.pt")  # as it was saved
    assert_bitwise(everything(resumed.model, resumed.optimizer), everything(through.model, through.optimizer))


def test_a_file_from_before_loads_after_and_not_the_other_way_round(tmp_path):
    model, optimizer = grown()
    trainer = trainer_of(model, optimizer)
    trainer.fit([batch(["audio", "image"])], 2, checkpoint=tmp_path / "before.pt")
    head, old = copy.deepcopy(model.head.state_dict()), parts(model, "audio", "image")
    trainer.add_modality("text", encoder("text"))
    trainer.fit([batch(["text"])], 4, checkpoint=tmp_path / "after.pt")
    text = parts(model, "text")
    trainer.resume(tmp_path / "before.pt")
    assert_bitwise(model.head.state_dict(), head)
    assert_bitwise(parts(model, "audio", "image", "text"), {**old, **text})
    assert trainer.epoch == 2 and trainer.additions == {"text": 2} and model.head.weight not in optimizer.state
    trainer.fit([batch(["text"])], 3)

    other = trainer_of(*grown(steps=1))
    before = copy.deepcopy(other.model.state_dict())
    with pytest.raises(CheckpointError, match="to which nothing was added, .* got one to which 'text' was added"):
        other.resume(tmp_path / "after.pt")
    assert_bitwise(other.model.state_dict(), before)
    with pytest.raises(ValueError, match="state_dict: expected one with no modality added, got one with 'text' added"):
        other.optimizer.load_state_dict(optimizer.state_dict())
    other.add_modality("touch", encoder("text"))
    with pytest.raises(CheckpointError, match="to which 'touch' was added, .* got one to which 'text' was added"):
        other.resume(tmp_path / "after.pt")


def test_what_each_has_seen_goes_with_model_and_checkpoint(tmp_path):
    model, optimizer = grown(names=("audio",))
    trainer = trainer_of(model, optimizer)
    inputs, y = batch(["audio"], N=30)
    trainer.fit([(inputs, y)], 1)
    assert "seen" not in model.state_dict()
    trainer.add_modality("image", encoder("image"))
    with pytest.warns(UserWarning, match="^predict: 'image' has no vote"):
        assert model.seen_by(["image"]).tolist() == [[False] * CLASSES]
    inputs, y = batch(["audio", "image"], N=30)
    assert torch.equal(trainer.predict(inputs).logits, trainer.predict({"audio": inputs["audio"]}).logits)
    some = y < 2
    trainer.fit([({"image": inputs["image"][some]}, y[some])], 2, checkpoint=tmp_path / "run.pt")
    seen = torch.tensor([[True] * 3, [True, True, False]])
    assert torch.equal(model.seen_by(model.modalities), seen)
    fused = mla.entropy_fusion(list(model.eval()(inputs).values()), seen=seen)
    assert_bitwise(tuple(trainer.predict(inputs)), tuple(fused))
    result = trainer.evaluate([(inputs, y)])["accuracy"]
    assert result["fused"] == pytest.approx((fused.logits.argmax(1) == y).float().mean().item())
    alone = trainer.predict({"image": inputs["image"]}).logits
    assert (alone[:, 2] == -torch.inf).all() and result["image"] == pytest.approx((alone.argmax(1) == y).float().mean().item())

    plain = mla.MultimodalModel({m: encoder(m) for m in ("audio", "image")}, nn.Linear(5, CLASSES))
    plain.load_state_dict(model.state_dict())
    assert_bitwise(tuple(plain.predict(inputs)), tuple(fused))
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if name != "seen"})
    assert plain.seen_by(plain.modalities) is None
    again = trainer_of(*grown(names=("audio",), steps=0))
    again.add_modality("image", encoder("image"))
    again.resume(tmp_path / "run.pt")
    assert_bitwise(tuple(again.predict(inputs)), tuple(fused))


class TestClasses:
    @pytest.mark.parametrize("make", [momentum_sgd, adam])
    def test_old_rows_stay_and_are_projected_new_ones_are_free(self, make):
        """By hand in float64: the update of the old rows is projected, that of the new ones is the optimizer's own."""
        model, optimizer = grown(make, dtype=torch.float64)
        inputs = batch(["audio"], dtype=torch.float64)[0]
        before, state = model.eval()(inputs)["audio"], copy.deepcopy(optimizer.state[model.head.weight])
        P = optimizer.layers[0].projection.matrix().clone()
        model.add_classes(2, optimizer=optimizer)
        assert model.classes == 5 and model.head.weight.shape == (5, 5)
        after = model.eval()(inputs)["audio"]
        torch.testing.assert_close(after[:, :3], before)
        assert not after[:, 3:].any()
        assert torch.equal(optimizer.layers[0].projection.matrix(), P)
        for name, value in optimizer.state[model.head.weight].items():
            assert torch.equal(value[:3], state[name]) if value.dim() else torch.equal(value, state[name])
        twin = copy.deepcopy(model.head)
        plain = make(twin.parameters())
        plain.load_state_dict(
            {
                "state": {i: copy.deepcopy(optimizer.state[p]) for i, p in enumerate(model.head.parameters())},
                "param_groups": plain.state_dict()["param_groups"],
            }
        )
        y = torch.arange(8) % 5
        h = model.train().features("audio", inputs["audio"]).detach()
        F.cross_entropy(twin(h), y).backward()
        old = torch.cat([twin.weight.detach(), twin.bias.detach()[:, None]], 1)
        plain.step()
        change = torch.cat([twin.weight.detach(), twin.bias.detach()[:, None]], 1) - old
        change[:3] = change[:3] @ reference.rls_update(P, torch.cat([h.mean(0), h.new_ones(1)]), 1.0)
        optimizer.zero_grad()
        F.cross_entropy(model.head(h), y).backward()
        optimizer.step(modality="audio")
        got = torch.cat([model.head.weight.detach(), model.head.bias.detach()[:, None]], 1)
        torch.testing.assert_close(got, old + change, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("target", ["gradient", "update"])
    def test_free_until_the_next_addition(self, target):
        model, optimizer = grown(target=target, names=("audio",))
        model.add_modality("image", encoder("image"), optimizer=optimizer, classes=2)
        assert optimizer.layers[0].free == 2 and model.classes == 5
        inputs, _ = batch(["image"])
        mla.alternating_step(model, optimizer, (inputs, torch.arange(8) % 2 + 3))
        assert optimizer.diagnostics()["layers"]["head"]["gradient_kept"] < 1.001
        assert model.seen_by(model.modalities).tolist() == [[True] * 3 + [False] * 2, [False] * 3 + [True] * 2]
        again, other = grown(target=target, names=("audio",), steps=0)
        again.add_modality("image", encoder("image"), optimizer=other, classes=2)
        other.load_state_dict(optimizer.state_dict())
        assert other.layers[0].free == 2
        model.add_modality("text", encoder("text"), optimizer=optimizer)
        assert optimizer.layers[0].free == 0

    def test_old_samples_are_answered_as_before(self):
        model, optimizer = grown()
        inputs, _ = batch(["audio", "image"])
        before = model.predict(inputs).logits
        model.add_classes(4, optimizer=optimizer)
        with pytest.warns(UserWarning, match="^predict: no answer can be class 3, 4, 5, 6: nothing has recorded"):
            fused = model.predict(inputs).logits
        torch.testing.assert_close(fused[:, :3], before)
        assert (fused[:, 3:] == -torch.inf).all()

    def test_heads_that_cannot_grow(self):
        for count in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match="^count: expected at least 1 class"):
                grown()[0].add_classes(count)
        torch.manual_seed(0)
        model = mla.MultimodalModel({"audio": encoder("audio")}, nn.Sequential(nn.Linear(5, 3), nn.Softplus()))
        with pytest.raises(ValueError, match="^head: expected an nn.Linear, or one that ends a sequence"):
            model.add_classes(1)


def _interacting():
    beside = mla.Interaction(5, CLASSES, ("audio", "image"), rank=2)
    return mla.MultimodalModel({m: encoder(m) for m in ("audio", "image")}, nn.Linear(5, CLASSES), interaction=beside)


BAD = {
    "a name that is there": (ValueError, "^name: expected one that no modality has, got 'audio'", {"name": "audio"}),
    "a reserved name": (ValueError, "^name: expected another than 'fused'", {"name": "fused"}),
    "no name": (ValueError, "^encoders: expected names of modalities that are not empty", {"name": ""}),
    "no string": (TypeError, "^encoders: expected strings", {"name": 3}),
    "no module": (TypeError, r"^encoders\['text'\]: expected an nn.Module, got str", {"encoder": "text"}),
    "another width": (ValueError, r"^encoder: expected features \[N, 5\] .* got \[N, 7\]", {"encoder": encoder("text", 7)}),
    "another width, nested": (
        ValueError,
        "^encoder: expected features",
        {"encoder": nn.Sequential(encoder("text", 4), nn.ReLU())},
    ),
    "an unknown setting": (ValueError, "^learning_rate: expected a setting of the optimizer", {"learning_rate": 1.0}),
    "no MLAOptimizer": (
        TypeError,
        "^optimizer: expected the model's MLAOptimizer, got SGD",
        {"optimizer": momentum_sgd([torch.zeros(1)])},
    ),
    "another's optimizer": (ValueError, "^optimizer: expected the MLAOptimizer of this model's head", {"optimizer": grown()[1]}),
    "classes": (ValueError, "^count: expected at least 1 class, got -2", {"classes": -2}),
    "a setting without optimizer": (ValueError, "^lr: expected an optimizer to set it for", {"optimizer": None, "lr": 0.1}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name):
    error, message, arguments = BAD[name]
    model, optimizer = grown()
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        model.add_modality(**{"name": "text", "encoder": encoder("text"), "optimizer": optimizer} | arguments)
    assert model.modalities == ("audio", "image") and model.frozen == () and model.added == ()
    assert_bitwise(everything(model, optimizer), before)
    assert all(p.requires_grad for p in model.parameters())


class Opaque(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.layer = nn.Linear(3, s)

    def forward(self, x):
        return self.layer(x)


def test_a_width_that_only_inputs_tell():
    model, optimizer = grown()
    with pytest.raises(ValueError, match=r"^encoder: expected features \[N, 5\] for 'text', got torch.float32 \[2, 6\]"):
        model.add_modality("text", Opaque(6), optimizer=optimizer, example=torch.randn(2, 3))
    assert model.modalities == ("audio", "image")
    model.add_modality("text", Opaque(6), optimizer=optimizer)
    with pytest.raises(ValueError, match="^features: expected .* to match head.in_features"):
        mla.alternating_step(model, optimizer, batch(["text"]))
    model.remove_modality("text", optimizer=optimizer)
    model.add_modality("text", Opaque(5), optimizer=optimizer, example=torch.randn(2, 3))


def test_more_that_is_refused():
    model, optimizer = grown()
    with pytest.raises(ValueError, match="^encoder: expected parameters of its own"):
        model.add_modality("text", model.encoders["audio"], optimizer=optimizer)
    shared = encoder("text")
    optimizer.add_param_group({"params": list(shared.parameters())})
    with pytest.raises(ValueError, match="^encoder: expected parameters that are not the optimizer's yet"):
        model.add_modality("text", shared, optimizer=optimizer)
    with pytest.raises(ValueError, match="^name: expected one of audio, image, got 'text'"):
        model.remove_modality("text")
    model.remove_modality("audio")
    with pytest.raises(ValueError, match="^name: .* 'image', which is the only one"):
        model.remove_modality("image")
    for call in (
        lambda m: m.add_modality("text", encoder("text")),
        lambda m: m.add_classes(1),
        lambda m: m.remove_modality("audio"),
    ):
        with pytest.raises(ValueError, match="^interaction: expected None, to "):
            call(_interacting())
    trainer = trainer_of(*grown())
    trainer._position.batches = 1
    with pytest.raises(ValueError, match="^name: expected to add 'text' between epochs, got 1 batches into one"):
        trainer.add_modality("text", encoder("text"))
    with pytest.raises(ValueError, match="^name: expected to remove 'audio' between epochs, got 1 batches into one"):
        trainer.remove_modality("audio")
    assert "audio" in trainer.model.modalities and trainer._position.batches == 1


def test_a_phase_has_its_own_scheduler_rate_and_patience():
    model, optimizer = grown()
    trainer = mla.Trainer(model, optimizer, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1), progress=False)
    whole = [batch(["audio", "image"])]
    trainer.fit(whole, 3, validation=whole)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    trainer.add_modality("text", encoder("text"), scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2), lr=0.05)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    trainer.history[0]["validation"]["accuracy"]["fused"] = 2.0  # of other modalities, and never reached again
    trainer.fit([batch(["text"])], 8, validation=whole, patience=5)
    assert trainer.epoch > 4 and optimizer.param_groups[1]["lr"] < 0.01


def distributed(rank, world):
    def build(wrap):
        torch.manual_seed(0)
        encoders = {"audio": nn.Sequential(nn.Linear(4, 5), nn.Tanh())}
        model = wrap(mla.MultimodalModel(encoders, nn.Linear(5, CLASSES)).double())
        group = "auto" if wrap is mla.distribute else None
        return model, mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, process_group=group, **PROTECTS)

    def go(model, optimizer, share):
        trainer = trainer_of(model, optimizer)
        for i, name in enumerate(("audio", "image")):
            if name == "image":
                torch.manual_seed(1)
                trainer.add_modality("image", nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double())
            inputs, y = batch([name], dtype=torch.float64)
            y = y if i == 0 else torch.arange(8) // 4
            trainer.fit([({name: inputs[name][share]}, y[share])] * 3, 2 * i + 2)
        return {n.replace("module.", ""): t for n, t in model.state_dict().items()}

    ranks = go(*build(mla.distribute), slice(4 * rank, 4 * rank + 4))
    return ranks, go(*build(lambda m: m), slice(None))


def test_ranks_are_one_process(tmp_path):
    for ranks, one in run_ranks(distributed, 2, tmp_path):
        assert ranks.keys() == one.keys() and "seen" in ranks
        torch.testing.assert_close(ranks, one, rtol=1e-10, atol=1e-12)


def test_compiled_encoders(monkeypatch):
    model, optimizer = grown()
    compiled = torch.compile(nn.Sequential(nn.Linear(3, 5), nn.Tanh()), backend="eager")
    model.add_modality("text", compiled, optimizer=optimizer, example=normal(torch.Generator().manual_seed(0), 4, 3))
    before = compiled._orig_mod[0].weight.detach().clone()
    train(model, optimizer, ["text"])
    assert not torch.equal(compiled._orig_mod[0].weight, before)

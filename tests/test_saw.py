"""What nobody has recorded is said; what is recorded goes into copies; heads whose number of classes only a call tells."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, WIDTHS, make_inputs, momentum_sgd, through_a_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mla_fast as mla
from mla_fast.seen import SeenClasses

N = 12
UNSAID = "^predict: 'text' has no vote: nothing has recorded that it was trained"


class Opaque(nn.Module):
    """Tells nothing but by a call."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.layer = nn.Linear(5, classes)

    def forward(self, h):
        return self.layer(h)


HEADS = {
    "linear": lambda: nn.Linear(5, CLASSES),
    "a module": Opaque,
    "compiled": lambda: torch.compile(nn.Linear(5, CLASSES), backend="eager"),
    "compiled, in sequence": lambda: nn.Sequential(nn.ReLU(), torch.compile(nn.Linear(5, CLASSES), backend="eager")),
    "a positive one": lambda: nn.Sequential(nn.Linear(5, CLASSES), nn.Softplus()),
}


def encoder(modality):
    return nn.Sequential(nn.Linear(WIDTHS[modality], 5), nn.Tanh())


def make(head=HEADS["linear"], names=("audio", "image"), **how):
    torch.manual_seed(0)
    model = mla.MultimodalModel({m: encoder(m) for m in names}, head(), **how)
    return model, mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, target="update", bias="project")


def batch(names, labels=range(CLASSES), seed=1):
    return make_inputs(N, names, seed), torch.tensor(list(labels) * N)[:N]


def own_loop(model, optimizer, inputs, y, rounds=3, saw=False):
    for _ in range(rounds):
        for modality, x in inputs.items():
            optimizer.zero_grad()
            F.cross_entropy(model({modality: x})[modality], y).backward()
            optimizer.step(modality=modality)
            if saw:
                model.saw(modality, y)


def silent(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


@pytest.mark.parametrize("how", ["Trainer", "model"])
def test_a_modality_that_a_loop_has_not_recorded(how):
    model, optimizer = make()
    trainer = mla.Trainer(model, optimizer, progress=False)
    trainer.fit([batch(["audio", "image"])], 1)
    add = trainer.add_modality if how == "Trainer" else model.add_modality
    add("text", encoder("text"), **({} if how == "Trainer" else {"optimizer": optimizer}))
    inputs, y = batch(["audio", "text"])
    own_loop(model, optimizer, {"text": inputs["text"]}, y)
    silent(lambda: model.predict({"audio": inputs["audio"]}))  # it is not asked
    silent(model.state_dict)
    with pytest.warns(UserWarning, match=UNSAID) as caught:
        assert not model.predict({"text": inputs["text"]}).weights.any()
    assert caught[0].filename == __file__
    silent(lambda: model.predict({"text": inputs["text"]}))  # once
    silent(lambda: trainer.evaluate([(inputs, y)]))
    with pytest.warns(UserWarning, match=UNSAID):
        copy.deepcopy(model).predict(inputs)
    model.saw("text", y)
    silent(lambda: copy.deepcopy(model).predict(inputs))
    torch.testing.assert_close(model.predict({"text": inputs["text"]}).logits, model.eval()(inputs)["text"])


def test_classes_that_a_loop_has_not_recorded():
    model, optimizer = make()
    own_loop(model, optimizer, *batch(["audio", "image"]))
    model.add_classes(2, optimizer=optimizer)
    inputs, y = batch(["audio", "image"], [CLASSES + 1])
    own_loop(model, optimizer, inputs, y, rounds=30)
    trainer = mla.Trainer(model, optimizer, progress=False)
    with pytest.warns(UserWarning, match="^predict: no answer can be class 3, 4: .* call model.saw"):
        assert trainer.evaluate([(inputs, y)])["accuracy"]["fused"] == 0
    for modality in inputs:
        model.saw(modality, y)
    assert silent(lambda: trainer.evaluate([(inputs, y)]))["accuracy"]["fused"] == 1
    model.add_classes(1)
    with pytest.warns(UserWarning, match="^predict: no answer can be class 3, 5: "):
        model.predict(inputs)


def test_what_trains_by_itself_is_silent(tmp_path):
    def train():
        model, optimizer = make()
        trainer = mla.Trainer(model, optimizer, progress=False)
        both, new = batch(["audio", "image"]), batch(["text"], [0, 1])
        trainer.fit([both], 1, validation=[both])
        trainer.add_modality("text", encoder("text"))
        trainer.fit([new], 3, validation=[batch(WIDTHS)])
        trainer.predict(new)

    silent(train)


def test_rows_stay_where_a_captured_step_writes_to_them():
    model, optimizer = make()
    model.saw("audio", torch.tensor([0]))
    at = model.seen.rows.data_ptr()
    model.saw("image", torch.tensor([1]))
    state = model.seen.recorded()
    model.saw("image", torch.tensor([2]))
    model.seen.take(state)
    assert model.seen.rows.data_ptr() == at and model.seen.recorded()["image"].tolist() == [False, True, False]
    model.add_modality("text", encoder("text"), optimizer=optimizer)
    at = model.seen.rows.data_ptr()
    model.saw("text", torch.tensor([1]))
    model.load_state_dict(model.state_dict())
    assert model.seen.rows.data_ptr() == at


def test_old_modalities_whose_records_nobody_has_kept_have_seen_all():
    model, optimizer = make()
    own_loop(model, optimizer, *batch(["audio", "image"]))
    model.add_modality("text", encoder("text"), optimizer=optimizer)
    mla.alternating_step(model, optimizer, batch(["audio", "text"], [1]))  # a replay
    assert model.seen_by(model.modalities).tolist() == [[True] * 3, [True] * 3, [False, True, False]]


SAW = {
    "an unknown name": (ValueError, "^modality: expected one of audio, image, got 'txt'", ("txt", torch.tensor([0]))),
    "floats": (TypeError, r"^target: expected int64 \[N\], got torch.float32 \[2\]", ("audio", torch.ones(2))),
    "int32": (TypeError, r"^target: expected int64 \[N\], got torch.int32", ("audio", torch.ones(2, dtype=torch.int32))),
    "a list": (TypeError, r"^target: expected int64 \[N\], got \(int, int\)", ("audio", [0, 1])),
    "a column": (TypeError, r"^target: expected int64 \[N\], got torch.int64 \[2, 1\]", ("audio", torch.tensor([[0], [1]]))),
    "too large": (ValueError, "^target: expected labels in 0 … 2, .* got 9", ("audio", torch.tensor([0, 9]))),
    "negative": (ValueError, "^target: expected labels in 0 … 2, .* got -1", ("audio", torch.tensor([0, -1]))),
    "weights": (
        ValueError,
        r"^weights: expected \[2\] .* got torch.float32 \[3\]",
        ("audio", torch.tensor([0, 1]), torch.ones(3)),
    ),
}


@pytest.mark.parametrize("name", SAW)
def test_what_was_not_seen_is_refused_and_not_recorded(name):
    error, message, arguments = SAW[name]
    model, _ = make()
    model.saw("audio", torch.tensor([1]))
    with pytest.raises(error, match=message):
        model.saw(*arguments)
    assert {name: row.tolist() for name, row in model.seen.recorded().items()} == {"audio": [False, True, False]}


def test_what_does_not_count_is_not_recorded():
    model, _ = make()
    model.saw("audio", torch.tensor([-100, 1]))
    model.saw("image", torch.tensor([255, 0, 2, -100]), torch.tensor([0, 1, 0, 1]))
    model.saw("image", torch.empty(0, dtype=torch.int64))
    assert [row.tolist() for row in model.seen.recorded().values()] == [[False, True, False], [True, False, False]]


def test_labels_on_a_device_are_not_looked_at(monkeypatch):
    """Those that name no class do not count, where nobody waits to see them."""
    model, _ = make()
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: pytest.fail("somebody waits"))
    model.saw("audio", torch.tensor([9, -1, -100, 1]))
    monkeypatch.undo()
    assert model.seen.recorded()["audio"].tolist() == [False, True, False]


AVERAGES = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "swa": {},
    "ema of buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "swa of buffers": {"use_buffers": True},
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("known", ["Trainer", "saw", "a file"])
def test_an_averaged_model_knows_what_was_seen(name, known):
    model, optimizer = make()
    model.add_modality("text", encoder("text"), optimizer=optimizer)
    averaged = AveragedModel(model, **AVERAGES[name])
    inputs = batch(WIDTHS)[0]
    for labels in ([0, 0], [0, 1]):
        new = {"text": inputs["text"]}, torch.tensor(labels * N)[:N]
        if known == "Trainer":
            mla.Trainer(model, optimizer, progress=False).fit([new], 1)
        elif known == "saw":
            own_loop(model, optimizer, *new, saw=True)
        else:
            other, _ = make(names=WIDTHS)
            other.seen.counts = True
            other.seen.take({m: torch.arange(CLASSES) < (2 if m == "text" else CLASSES) for m in WIDTHS})
            model.load_state_dict(other.state_dict())
        averaged.update_parameters(model)
        expected = model.seen_by(WIDTHS)
        assert expected[2].any() and torch.equal(silent(lambda: averaged.module.seen_by(WIDTHS)), expected)
    assert averaged.module.predict(inputs).weights[:, 2].any()
    again = make(names=WIDTHS)[0]
    again.load_state_dict(through_a_file(averaged.module.state_dict()))
    assert torch.equal(again.predict(inputs).logits, averaged.module.predict(inputs).logits)


def test_a_model_that_is_averaged_before_it_grows_has_the_same_buffers():
    model, optimizer = make()
    averaged = AveragedModel(model)
    mla.alternating_step(model, optimizer, batch(["audio", "image"]))
    averaged.update_parameters(model)
    assert not list(model.buffers()) and list(model.state_dict()) == list(averaged.module.state_dict())


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_go_ways_of_their_own(through):
    model, optimizer = make()
    model.add_modality("text", encoder("text"), optimizer=optimizer)
    model.saw("text", torch.tensor([1]))
    again = through(model)
    again.saw("text", torch.tensor([2]))
    assert model.seen_by(["text"]).tolist() == [[False, True, False]]
    assert again.double().seen_by(["text"]).tolist() == [[False, True, True]]


@pytest.mark.parametrize("counts", [False, True])
def test_a_model_that_was_pickled_when_the_record_was_no_module(counts):
    model, _ = make()
    old = SeenClasses.__new__(SeenClasses)
    rows = {"audio": torch.tensor([True, False, True, True])}
    old.__setstate__({"_rows": rows, "_masks": {}, **({"counts": True} if counts else {})})
    del model._modules["seen"]
    state = {**model.__dict__, "seen": old}
    again = mla.MultimodalModel.__new__(mla.MultimodalModel)
    again.__setstate__(state)
    assert again.seen.recorded()["audio"].tolist() == [True, False, True] and again.seen in again.children()
    seen = again.seen_by(["audio", "image"])
    assert seen.tolist() == [[True, False, True], [True] * 3] if counts else seen is None


def test_files_of_other_tools(tmp_path):
    """What safetensors and torch.distributed.checkpoint write has the record."""
    from safetensors.torch import load_model, save_model
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, optimizer = make()
    model.add_modality("text", encoder("text"), optimizer=optimizer)
    model.saw("text", torch.tensor([1]))
    save_model(model, tmp_path / "model.safetensors")
    for load in (
        lambda other: load_model(other, tmp_path / "model.safetensors"),
        lambda other: set_model_state_dict(other, get_model_state_dict(model)),
    ):
        other, _ = make(names=WIDTHS)
        load(other)
        assert torch.equal(other.seen_by(WIDTHS), model.seen_by(WIDTHS)) and other.seen_by(WIDTHS)[2].tolist() == [
            False,
            True,
            False,
        ]


@pytest.mark.parametrize("name", HEADS)
def test_every_head_lets_a_modality_vote_on_what_it_has_seen_alone(name):
    model, optimizer = make(HEADS[name])
    trainer = mla.Trainer(model, optimizer, progress=False)
    trainer.fit([batch(["audio", "image"])], 1)
    assert model.classes == CLASSES
    trainer.add_modality("text", encoder("text"))
    trainer.fit([batch(["text"], [0])], 3)
    assert model.seen_by(model.modalities).tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    fused = trainer.predict(batch(["text"])[0]).logits
    assert (fused[:, 1:] == -torch.inf).all() and fused[:, 0].isfinite().all()
    with pytest.raises(ValueError, match=r"^target: expected labels in 0 … 2, got (7|others: Target 7)"):
        mla.alternating_step(model, optimizer, batch(["text"], [7]))
    torch._dynamo.reset()


def test_a_head_that_only_a_call_tells_the_classes_of(tmp_path):
    model, optimizer = make(Opaque)
    assert model.classes is None
    with pytest.raises(ValueError, match="^head: expected a call of it before, which tells its classes, got Opaque"):
        model.saw("audio", torch.tensor([0]))
    with pytest.raises(
        ValueError, match="^example: expected a few inputs of 'text', since only a call of the Opaque tells its classes"
    ):
        model.add_modality("text", encoder("text"), optimizer=optimizer)
    assert model.modalities == ("audio", "image")
    with pytest.raises(ValueError, match="^target: expected labels in 0 … 2, got others: Target 7"):
        mla.alternating_step(model, optimizer, batch(["audio"], [7]))
    again, other = make(Opaque)
    again.add_modality("text", encoder("text"), optimizer=other, example=torch.randn(2, WIDTHS["text"]))
    assert again.classes == CLASSES and len(list(again.buffers())) == 1
    trainer = mla.Trainer(model, optimizer, progress=False)
    trainer.fit([batch(["audio", "image"])], 1, checkpoint=tmp_path / "run.pt")
    resumed = mla.Trainer(*make(Opaque), progress=False)
    resumed.resume(tmp_path / "run.pt")
    resumed.add_modality("text", encoder("text"))
    assert resumed.model.classes == CLASSES
    with pytest.raises(ValueError, match="^target: expected labels in 0 … 2, got others"):
        mla.Trainer(*make(Opaque), progress=False).evaluate([batch(["audio"], [7])])


def test_a_compiled_head_grows():
    model, optimizer = make(HEADS["compiled"])
    inputs, y = batch(["audio"], [4])
    own_loop(model, optimizer, inputs, y % 3, saw=True)
    model.add_classes(2, optimizer=optimizer)
    own_loop(model, optimizer, inputs, y, rounds=30, saw=True)
    with pytest.warns(UserWarning, match="^predict: no answer can be class 3: "):
        assert model.classes == 5 and (model.predict(inputs).logits.argmax(1) == 4).all()
    with pytest.raises(ValueError, match=r"^features: expected \[N, 5\] to match head.in_features, got \[12, 4\]"):
        mla.MultimodalModel({"audio": nn.Identity()}, model.head)(inputs)
    torch._dynamo.reset()

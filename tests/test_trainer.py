"""``Trainer`` against its loop written out, run twice, interrupted and resumed, with modalities missing."""

import copy
import errno
import functools
import itertools
import os
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALTERNATION,
    CLASSES,
    PROJECTIONS,
    assert_bitwise,
    assert_rounding,
    everything,
    make_inputs,
    make_model,
    momentum_sgd,
    noisy_model,
    train,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import mla_fast as mla
from mla_fast.checkpoint import CheckpointError


def make_batch(N=8, seed=1, present=None):
    target = torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(seed))
    return (make_inputs(N, seed=seed), target) if present is None else (make_inputs(N, seed=seed), target, present)


def make_trainer(model=None, scheduler=None, projection="window", **settings):
    model = noisy_model() if model is None else model
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, projection=projection)
    return mla.Trainer(model, optimizer, scheduler=scheduler and scheduler(optimizer), progress=False, **settings)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)


def samples(count=20, present=None, fill=None):
    """One by one, for a DataLoader; what is absent holds `fill`."""
    inputs, target = make_batch(count)
    if fill is not None:
        inputs = {m: x.where(present[:, i, None], fill) for i, (m, x) in enumerate(inputs.items())}
    rows = [({m: x[i] for m, x in inputs.items()}, target[i]) for i in range(count)]
    return rows if present is None else [(*row, present[i]) for i, row in enumerate(rows)]


def loader(shuffle=True, **settings):
    return DataLoader(samples(**settings), batch_size=10, shuffle=shuffle)


def some_present(count=20, seed=4):
    """Every modality somewhere, never enough of them, and one sample with none."""
    present = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) > 0.3
    present[5] = False
    return present


def state(trainer):
    return everything(trainer.model, trainer.optimizer)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_fit_is_the_loop_written_out(projection):
    """Each batch gives every modality one step, in the model's order whatever that of the inputs."""
    trainer, model = make_trainer(make_model(), projection=projection), make_model()
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, projection=projection)
    batches = [make_batch(seed=seed) for seed in range(3)]
    shuffled = [({m: inputs[m] for m in ("text", "audio", "image")}, target) for inputs, target in batches]
    history = trainer.fit(shuffled, epochs=2)
    for _ in range(2):
        train(model, optimizer, [(m, inputs[m], target) for inputs, target in batches for m in ALTERNATION])
    assert_rounding(state(trainer), everything(model, optimizer))
    assert [record["epoch"] for record in history] == [1, 2] and history is trainer.history
    assert list(history[0]["loss"]) == list(ALTERNATION)


def test_only_present_rows_are_trained_on():
    """And where a modality has no row in a batch, it has no step."""
    present = some_present(8)
    present[:, 1] = False
    trainer, model = make_trainer(make_model()), make_model()
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, projection="window")
    inputs, target, _ = batch = make_batch(present=present)
    history = trainer.fit([batch], epochs=1)
    train(model, optimizer, [(m, inputs[m][present[:, i]], target[present[:, i]]) for i, m in enumerate(ALTERNATION) if i != 1])
    assert_rounding(state(trainer), everything(model, optimizer))
    assert list(history[0]["loss"]) == ["audio", "text"]


@pytest.mark.parametrize("masked", [False, True])
def test_a_modality_may_be_left_out_of_the_inputs(masked):
    present = some_present(8) if masked else None
    trainer, model = make_trainer(make_model()), make_model()
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, projection="window")
    inputs, target, *_ = make_batch()
    part = {m: inputs[m] for m in ("text", "audio")}
    batch = (part, target) if present is None else (part, target, present)
    trainer.fit([batch], epochs=1)
    here = torch.ones(8, 3, dtype=torch.bool) if present is None else present
    train(model, optimizer, [(m, inputs[m][here[:, i]], target[here[:, i]]) for i, m in ((0, "audio"), (2, "text"))])
    assert_rounding(state(trainer), everything(model, optimizer))
    assert trainer.evaluate([batch])["accuracy"].keys() == {"text", "audio", "average", "fused"}
    assert trainer.predict(batch).weights.shape == (8, 2)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_what_absent_entries_hold_does_not_matter(projection, fill):
    results = []
    for filled in (0.0, fill):
        trainer = make_trainer(seed=0, projection=projection)
        validation = loader(shuffle=False, present=some_present(), fill=filled)
        history = trainer.fit(loader(present=some_present(), fill=filled), epochs=2, validation=validation)
        batch = next(iter(validation))
        results.append((history, {"state": state(trainer), "prediction": tuple(trainer.predict(batch))}))
    assert results[0][0] == results[1][0]
    assert_bitwise(results[1][1], results[0][1])


def test_a_seed_makes_runs_equal():
    results = []
    for seed in (0, 0, 1):
        trainer = make_trainer(scheduler=cosine, seed=seed)
        results.append((trainer.fit(loader(), epochs=2), state(trainer)))
    assert results[0][0] == results[1][0] != results[2][0]
    assert_bitwise(results[0][1], results[1][1])


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, projection):
    whole = make_trainer(scheduler=cosine, seed=0, projection=projection)
    whole.fit(loader(), epochs=4, validation=loader(shuffle=False))
    first = make_trainer(scheduler=cosine, seed=0, projection=projection)
    first.fit(loader(), epochs=2, validation=loader(shuffle=False))
    first.save(tmp_path / "c.pt", config={"width": 5})
    torch.manual_seed(99)
    second = make_trainer(noisy_model(seed=7), scheduler=cosine, seed=0, projection="none")
    second.resume(tmp_path / "c.pt")
    assert second.epoch == 2 and second.config == {"width": 5} and second.optimizer.settings == first.optimizer.settings
    assert second.fit(loader(), epochs=4, validation=loader(shuffle=False)) == whole.history
    assert_bitwise(state(second), state(whole))
    assert second.scheduler.state_dict() == whole.scheduler.state_dict()
    assert second.fit(loader(), epochs=4) == whole.history  # nothing left to do


def test_fit_saves_after_every_epoch(tmp_path):
    trainer, path = make_trainer(seed=0), tmp_path / "runs" / "c.pt"
    trainer.fit(loader(), epochs=3, checkpoint=path)
    resumed = make_trainer()
    resumed.resume(path)
    assert resumed.epoch == 3 and resumed.history == trainer.history
    assert_bitwise(state(resumed), state(trainer))


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer, path = make_trainer(seed=0), tmp_path / "c.pt"
    trainer.fit(loader(), epochs=1, checkpoint=path)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(os, "fsync", full)
        trainer.fit(loader(), epochs=2, checkpoint=path)
    resumed = make_trainer(seed=0)
    resumed.resume(path)
    assert resumed.epoch == 1 and os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.parametrize("masked", [False, True])
def test_evaluate_is_what_it_says(masked):
    trainer = make_trainer()
    present = some_present() if masked else torch.ones(20, 3, dtype=torch.bool)
    trainer.fit(loader(), epochs=1)
    report = trainer.evaluate(loader(shuffle=False, present=present if masked else None))
    inputs, target = make_batch(20)
    trainer.model.eval()
    with torch.no_grad():
        logits = torch.stack(list(trainer.model(inputs).values()))
    loss = {m: F.cross_entropy(logits[i][present[:, i]], target[present[:, i]]).item() for i, m in enumerate(ALTERNATION)}
    hits = {m: (logits[i].argmax(1) == target)[present[:, i]].float().mean().item() for i, m in enumerate(ALTERNATION)}
    kept = logits * present.T[..., None]
    there = torch.ones(20, dtype=torch.bool) if present is None else present.any(1)
    hits["average"] = (kept.sum(0).argmax(1) == target)[there].float().mean().item()
    hits["fused"] = (mla.entropy_fusion(logits, present).logits.argmax(1) == target)[there].float().mean().item()
    assert report["samples"] == 20 and report.keys() == {"samples", "loss", "accuracy", "macro_f1", "majority", "class_accuracy"}
    assert report["loss"] == pytest.approx(loss, rel=1e-5)
    assert report["accuracy"] == pytest.approx(hits)


def test_evaluate_has_no_number_for_what_nobody_had():
    present = torch.ones(8, 3, dtype=torch.bool)
    present[:, 1] = False
    report = make_trainer().evaluate([make_batch(present=present)])
    assert report["loss"] == pytest.approx(report["loss"] | {"image": torch.nan}, nan_ok=True)
    assert report["accuracy"]["image"] != report["accuracy"]["image"]
    report = make_trainer().evaluate([make_batch(present=torch.zeros(8, 3, dtype=torch.bool))])
    assert report["samples"] == 8 and all(value != value for value in report["accuracy"].values())


def test_logits_that_are_no_number_are_wrong():
    trainer, (inputs, _) = make_trainer(), make_batch()
    nn.init.constant_(trainer.model.head.weight, torch.nan)
    assert set(trainer.evaluate([(inputs, torch.zeros(8, dtype=torch.int64))])["accuracy"].values()) == {0.0}


def test_evaluate_and_predict_change_nothing():
    trainer = make_trainer()
    trainer.fit(loader(), epochs=1)
    trainer.model.train()
    before, random = state(trainer), torch.get_rng_state()
    trainer.evaluate([make_batch()])
    trainer.predict(make_batch())
    assert trainer.model.training and torch.equal(torch.get_rng_state(), random)
    assert_bitwise(state(trainer), before)


@pytest.mark.parametrize("masked", [False, True])
def test_predict_takes_every_form_of_a_batch(masked):
    present = some_present(8) if masked else None
    trainer, (inputs, target) = make_trainer(), make_batch()
    expected = tuple(trainer.model.predict(inputs, present))
    for batch in (
        [(inputs, target, present), (inputs, present)]
        if masked
        else [inputs, (inputs,), (inputs, target), (inputs, target, None)]
    ):
        assert_bitwise(tuple(trainer.predict(batch)), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_predict_refuses_a_mask_of_numbers(dtype):
    """Taken for a target, it would be left out, and what is absent predicted from."""
    trainer, (inputs, target) = make_trainer(), make_batch()
    present = some_present(8).to(dtype)
    for batch in ((inputs, present), (inputs, target, present)):
        with pytest.raises(ValueError, match="^present: expected bool"):
            trainer.predict(batch)


def test_predict_names_what_is_no_batch():
    trainer, (inputs, _) = make_trainer(), make_batch()
    with pytest.raises(TypeError, match="^batch: expected inputs: dict"):
        trainer.predict(inputs["audio"])
    with pytest.raises(TypeError, match=r"^inputs\['audio'\]: expected a tensor .* got ndarray"):
        trainer.predict({"audio": inputs["audio"].numpy()})


def test_fit_puts_the_model_in_training_mode():
    trainer = make_trainer()
    trainer.model.eval()
    before = trainer.model.encoders["audio"][1].running_mean.clone()
    trainer.fit([make_batch()], epochs=1)
    assert trainer.model.training and not torch.equal(trainer.model.encoders["audio"][1].running_mean, before)


def edited(**changes):
    """A batch with some of its parts replaced."""
    inputs, target = make_batch()
    batch = {"inputs": inputs, "target": target, "present": torch.ones(8, 3, dtype=torch.bool)} | changes
    return batch["inputs"], batch["target"], batch["present"]


def labelled(value):
    target = make_batch()[1]
    target[3] = value
    return target


BAD_BATCHES = {
    "a tensor": (torch.ones(3), "^batch: expected"),
    "one part": ((make_inputs(),), "^batch: expected"),
    "four parts": ((*edited(), None), "^batch: expected"),
    "inputs in a list": (edited(inputs=[torch.ones(8, 4)]), "^batch: expected"),
    "no inputs": (edited(inputs={}), "^inputs: expected modalities among audio, image, text"),
    "unknown modality": (edited(inputs={"video": torch.ones(8, 4)}), "^inputs: expected modalities among .*, got video"),
    "unlike N": (edited(inputs=make_inputs(8) | {"text": torch.ones(5, 3)}), r"^inputs\['text'\]: expected 8 samples .* got 5"),
    "an array": (edited(inputs={"text": np.ones((8, 3))}), r"^inputs\['text'\]: expected a tensor .* got ndarray"),
    "label too high": (edited(target=labelled(CLASSES)), "^target: expected labels in 0 … 2, got 3"),
    "negative label": (edited(target=labelled(-1)), "^target: expected labels in 0 … 2, got -1"),
    "present as numbers": (edited(present=torch.ones(8, 3)), r"^present: expected bool \[8, 3\]"),
    "present of another N": (edited(present=torch.ones(7, 3, dtype=torch.bool)), r"^present: expected bool \[8, 3\]"),
    "present of another M": (edited(present=torch.ones(8, 2, dtype=torch.bool)), r"^present: expected bool \[8, 3\]"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_is_refused_and_moves_nothing(name):
    batch, error = BAD_BATCHES[name]
    trainer = make_trainer()
    before = copy.deepcopy(state(trainer))
    for call in (lambda: trainer.fit([batch], epochs=1), lambda: trainer.evaluate([batch])):
        with pytest.raises((ValueError, TypeError), match=error):
            call()
    assert_bitwise(state(trainer), before)
    assert trainer.epoch == 0 and trainer.history == []


def test_inputs_of_several_tensors():
    """What a tensor does by itself does it in tuples and dicts, beside others, together and in turn, with missing rows."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, parts):
            left, (extra, right) = (parts["left"], parts["rest"]) if isinstance(parts, dict) else (parts, (None, None))
            assert extra is None or (extra == 7).all()
            return self.linear(left if right is None else torch.cat([left, right], 1))

    def model():
        model = make_model()
        model.encoders["audio"] = Halves()
        model.load_state_dict({k: torch.full_like(p, 0.1 * i) for i, (k, p) in enumerate(model.state_dict().items())})
        return model

    def split(inputs, here):
        sevens = torch.full((8, 2, 3), 7).masked_fill(~here[:, None, None], 0)
        x = inputs["audio"]
        return {**inputs, "audio": {"left": x[:, :1], "rest": (sevens, x[:, 1:])}}

    present = some_present(8)
    whole = make_inputs(8), make_batch()[1], present
    parts = split(whole[0], present[:, 0]), *whole[1:]
    for settings in ({}, {"in_turn": True}):
        trainers = [make_trainer(model(), **settings) for _ in range(2)]
        for trainer, batch in zip(trainers, (whole, parts), strict=True):
            trainer.fit([batch, batch], epochs=2)
        assert_rounding(state(trainers[0]), state(trainers[1]))
        for name, values in trainers[0].evaluate([whole]).items():
            assert trainers[1].evaluate([parts])[name] == pytest.approx(values, nan_ok=True)
        for expected, got in zip(trainers[0].predict(whole), trainers[1].predict(parts), strict=True):
            torch.testing.assert_close(got, expected)
    everywhere = split(whole[0], torch.ones(8, dtype=torch.bool))["audio"]
    logits = [t.model({"audio": x})["audio"] for t, x in zip(trainers, (whole[0]["audio"], everywhere), strict=True)]
    torch.testing.assert_close(*logits)
    with pytest.raises(ValueError, match=r"^inputs\['audio'\]: expected tensors of the same N, got \("):
        trainers[1].fit([({"audio": (torch.ones(8, 1), torch.ones(7, 3))}, whole[1])], epochs=9)
    with pytest.raises(TypeError, match=r"^inputs\['audio'\]: expected a tensor .*, got \(torch.float32 \[8, 1\], NoneType\)"):
        trainers[1].predict({"audio": (torch.ones(8, 1), None)})


@pytest.mark.parametrize("batches", [[], [make_batch(0)], [make_batch(present=torch.zeros(8, 3, dtype=torch.bool))]])
def test_an_epoch_without_samples_is_refused(batches):
    with pytest.raises(ValueError, match="^loader: expected at least one batch with a sample in it"):
        make_trainer().fit(batches, epochs=1)


def test_a_generator_lasts_for_an_epoch():
    with pytest.raises(
        ValueError, match=r"^loader: .* in every epoch \(generators are exhausted after one epoch\), got none in epoch 2"
    ):
        make_trainer().fit((batch for batch in [make_batch()]), epochs=2)


BAD_SETTINGS = {
    "callbacks": (print, TypeError),
    "backward": (3, TypeError),
    "scheduler": (lambda optimizer: lr_scheduler.StepLR, TypeError),
    "scaler": (1, TypeError),
    "clip_norm": ("1", ValueError),
    "accumulate": (1.5, ValueError),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_setting_that_cannot_be_is_refused(name):
    value, error = BAD_SETTINGS[name]
    with pytest.raises(error, match=f"^{name}: expected "):
        make_trainer(**{name: value})


@pytest.mark.parametrize("name", ["epochs", "patience", "checkpoint_every"])
@pytest.mark.parametrize("value", [1.5, -1, "3"])
def test_a_number_that_cannot_be_is_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number, got "):
        make_trainer().fit(loader(), **{"epochs": 1, "validation": loader(), "checkpoint": tmp_path / "c.pt", name: value})


def test_data_and_model_draw_numbers_of_their_own():
    """Augmentation and dropout from one stream would be one variable."""
    drawn = {"data": [], "model": []}

    class Drawing(nn.Linear):
        def forward(self, x):
            drawn["model"].append(torch.rand(40))
            return super().forward(x)

    def batches():
        while True:
            drawn["data"].append(torch.rand(40))
            yield {"audio": torch.ones(4, 4)}, torch.zeros(4, dtype=torch.int64)

    model = make_model()
    model.encoders["audio"] = Drawing(4, 5)
    make_trainer(model, seed=0).fit(itertools.islice(batches(), 5), epochs=1)
    data, model = (torch.cat(numbers).tolist() for numbers in drawn.values())
    assert len(model) == 200 and len(data) == 200 and not set(data) & set(model)


def test_a_batch_without_samples_is_passed_over():
    trainers = [make_trainer() for _ in range(2)]
    for trainer, extra in zip(trainers, ([], [make_batch(0)]), strict=True):
        torch.manual_seed(0)
        trainer.fit([make_batch(), *extra], epochs=2)
        assert trainer.evaluate([make_batch(), *extra])["samples"] == 8
    assert_bitwise(state(trainers[0]), state(trainers[1]))


def test_what_is_no_model_or_optimizer_is_refused():
    model = make_model()
    with pytest.raises(TypeError, match="^model: expected a MultimodalModel .*, got Linear"):
        mla.Trainer(nn.Linear(2, 2), mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head))
    with pytest.raises(TypeError, match="^optimizer: expected an MLAOptimizer, got SGD"):
        mla.Trainer(model, momentum_sgd(model.parameters()))


def another_head():
    model = noisy_model()
    model.head = nn.Linear(5, CLASSES + 1)
    return make_trainer(model, cosine)


def fewer_modalities():
    model = noisy_model()
    del model.encoders["text"]
    return make_trainer(model, cosine)


def averaging():
    model = noisy_model()
    return make_trainer(mla.MultimodalModel(dict(model.encoders.items()), model.head, fusion="mean"), cosine)


def two_groups():
    trainer = make_trainer()
    groups = [{"params": trainer.model.encoders.parameters()}, {"params": trainer.model.head.parameters()}]
    optimizer = mla.MLAOptimizer(momentum_sgd(groups), trainer.model.head)
    return mla.Trainer(trainer.model, optimizer, scheduler=cosine(optimizer), progress=False)


def test_a_part_that_does_not_fit_takes_back_those_that_do(tmp_path):
    def in_sequence(count, optimizer):
        schedulers = [lr_scheduler.ConstantLR(optimizer) for _ in range(count)]
        return lr_scheduler.SequentialLR(optimizer, schedulers, list(range(1, count)))

    source, trainer = (make_trainer(scheduler=functools.partial(in_sequence, count)) for count in (3, 2))
    source.fit(loader(), epochs=3, checkpoint=tmp_path / "c.pt")
    trainer.fit(loader(), epochs=1)
    before = copy.deepcopy(state(trainer))
    with pytest.raises(CheckpointError, match="c.pt: its scheduler does not fit: "):
        trainer.resume(tmp_path / "c.pt")
    assert_bitwise(state(trainer), before)
    assert trainer.epoch == 1


def test_other_settings_of_the_projection_are_said_to_go(tmp_path):
    make_trainer().fit(loader(), epochs=1, checkpoint=tmp_path / "c.pt")
    with pytest.warns(UserWarning, match="^state_dict: the projection goes on as it was saved, .*window.*, not .*rls"):
        make_trainer(projection="rls").resume(tmp_path / "c.pt")


def test_a_head_that_was_replaced_is_refused():
    trainer = make_trainer()
    trainer.model.head = nn.Linear(5, CLASSES)
    with pytest.raises(ValueError, match="^optimizer: expected an MLAOptimizer whose head is in the model"):
        trainer.fit(loader(), epochs=1)


@pytest.mark.parametrize(
    "make,error",
    [
        (another_head, r"of this model, .* head.bias \(4,\) ≠ \(3,\)"),
        (fewer_modalities, r"of this model, .* encoders.text.0.bias none ≠ \(5,\)"),
        (make_trainer, "c.pt: expected it to be saved with scheduler none, got CosineAnnealingLR"),
        (averaging, "c.pt: expected it to be saved with fusion mean, got entropy"),
        (two_groups, "parameter group"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, make, error):
    source, trainer = make_trainer(scheduler=cosine, seed=0), make()
    source.fit(loader(), epochs=1, checkpoint=tmp_path / "c.pt")
    before, settings, random = copy.deepcopy(state(trainer)), trainer.optimizer.settings, torch.get_rng_state()
    with pytest.raises(ValueError, match=error):
        trainer.resume(tmp_path / "c.pt")
    assert_bitwise(state(trainer), before)
    assert trainer.epoch == 0 and trainer.history == [] and trainer.optimizer.settings == settings
    assert torch.equal(torch.get_rng_state(), random)


def test_going_on_with_another_loss_is_said(tmp_path):
    make_trainer().fit(loader(), epochs=1, checkpoint=tmp_path / "c.pt")
    with pytest.warns(UserWarning, match="^resume: the run was saved with loss cross_entropy, and goes on with CrossEntropyLoss"):
        make_trainer(loss=nn.CrossEntropyLoss(label_smoothing=0.1)).resume(tmp_path / "c.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer().resume(tmp_path / "c.pt")


def test_plateau_scheduler_sees_the_training_loss():
    def plateau(optimizer):  # no improvement is ever enough
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs")

    trainer = make_trainer(scheduler=plateau)
    before = trainer.optimizer.param_groups[0]["lr"]
    trainer.fit(loader(), 3)
    assert trainer.optimizer.param_groups[0]["lr"] == before / 4


def test_config_must_be_what_json_can_hold(tmp_path):
    trainer = make_trainer()
    with pytest.raises(TypeError):
        trainer.save(tmp_path / "checkpoint.pt", config={"model": trainer.model})
    assert not list(tmp_path.iterdir())
    trainer.save(tmp_path / "checkpoint.pt", config={"widths": (3, 4)})
    again = make_trainer()
    again.resume(tmp_path / "checkpoint.pt")
    assert again.config == {"widths": [3, 4]}


def test_unpaired_loaders_take_turns_for_as_long_as_the_longest(monkeypatch):
    model = make_model()
    trainer = mla.Trainer(model, mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head), progress=False)
    taken, features = [], model.features
    monkeypatch.setattr(model, "features", lambda modality, x: (taken.append((modality, len(x))), features(modality, x))[1])

    def batches(modality, sizes):
        return [(make_inputs(N, (modality,))[modality], torch.zeros(N, dtype=torch.int64)) for N in sizes]

    trainer.fit({"text": batches("text", [2]), "audio": batches("audio", [5, 4, 3]), "image": batches("image", [6, 7])}, epochs=1)
    assert [m for m, _ in taken] == ["audio", "image", "text"] * 3
    assert [n for m, n in taken if m == "audio"] == [5, 4, 3]
    assert [n for m, n in taken if m == "image"] == [6, 7, 6] and [n for m, n in taken if m == "text"] == [2, 2, 2]
    for loaders, message in (
        ({}, "got none"),
        ({"smell": []}, "smell"),
        ({"audio": batches("audio", [2]), "text": []}, "'text'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.fit(loaders, epochs=5)


class Bar:
    """A progress bar that is drawn at every batch."""

    said: list = []

    def __init__(self, **_):
        pass

    __enter__ = __exit__ = lambda self, *_: self

    def update(self, count):
        return True

    def set_postfix_str(self, text, refresh):
        self.said.append(text)


def test_the_bar_says_loss_and_accuracy(monkeypatch):
    monkeypatch.setattr("mla_fast.trainer.tqdm", Bar)
    monkeypatch.setattr(Bar, "said", [])
    absent = make_batch(seed=2, present=torch.zeros(8, 3, dtype=torch.bool))
    trainer = make_trainer(make_model())
    batches = [absent, make_batch(seed=3), make_batch(seed=4)]
    first, second = trainer.fit(batches, 2, validation=batches)
    assert Bar.said[0] == ""  # nobody has a loss yet
    assert Bar.said[2] == f"loss {sum(first['loss'].values()) / 3:.3f}"
    accuracy = f"validation accuracy {100 * first['validation']['accuracy']['fused']:.1f} %"
    assert Bar.said[5] == f"loss {sum(second['loss'].values()) / 3:.3f}, {accuracy}"

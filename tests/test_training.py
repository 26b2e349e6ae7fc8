"""What real training does to a ``Trainer``: accumulation, clipping, mixed precision, others' backward, callbacks, stops."""

import contextlib
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALTERNATION,
    CLASSES,
    PROJECTIONS,
    assert_bitwise,
    everything,
    make_inputs,
    make_model,
    momentum_sgd,
    noisy_model,
)
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, WeightedRandomSampler

import mla_fast as mla
from mla_fast.callbacks import TensorBoard, flatten

f64 = torch.float64
PRESENT = torch.rand(24, 3, generator=torch.Generator().manual_seed(5)) < 0.6


def whole(N=24, dtype=f64, masked=False):
    inputs = {m: x.to(dtype) for m, x in make_inputs(N).items()}
    target = torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(2))
    return (inputs, target, PRESENT[:N]) if masked else (inputs, target)


def split(batch, sizes):
    """Micro-batches of these sizes."""
    parts = []
    for begin, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
        rows = slice(begin, begin + size)
        inputs, *others = batch
        parts.append(({m: x[rows] for m, x in inputs.items()}, *(t[rows] for t in others)))
    return parts


def make_trainer(model=None, dtype=f64, projection="rls", lr=0.1, optimizer=momentum_sgd, **settings):
    model = (make_model() if model is None else model).to(dtype)
    wrapped = mla.MLAOptimizer(optimizer(model.parameters(), lr=lr), model.head, projection=projection)
    return mla.Trainer(model, wrapped, progress=False, **settings)


def state(trainer):
    return everything(trainer.model, trainer.optimizer)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_accumulated_batches_are_one_large_batch(projection, masked):
    """x̄ and G are means over all rows whatever the micro-batches' sizes, and P moves once."""
    one, four = make_trainer(projection=projection), make_trainer(projection=projection, accumulate=4)
    batch = whole(masked=masked)
    first = one.fit([batch], epochs=3)
    second = four.fit(split(batch, [9, 1, 6, 8]), epochs=3)
    torch.testing.assert_close(state(four), state(one), rtol=1e-11, atol=1e-12)
    assert four.optimizer.layers[0].projection.step == 9
    for before, after in zip(first, second, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-11)


def test_what_is_left_over_is_a_step_too():
    trainer = make_trainer(accumulate=3)
    trainer.fit(split(whole(), [6, 6, 6, 6]), epochs=1)
    assert trainer.optimizer.layers[0].projection.step == 6


def test_unpaired_loaders_accumulate_each_modality():
    inputs, target = whole()
    paired, unpaired = make_trainer(), make_trainer(accumulate=2)
    paired.fit([(inputs, target)], epochs=2)
    unpaired.fit({m: [(x[:10], target[:10]), (x[10:], target[10:])] for m, x in inputs.items()}, epochs=2)
    torch.testing.assert_close(state(unpaired), state(paired), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_gradients_are_clipped_before_they_are_projected(clip):
    trainer, model = make_trainer(clip_norm=clip), make_model().to(f64)
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head)
    inputs, target = whole()
    trainer.fit([(inputs, target)], epochs=3)
    for _ in range(3):
        for modality in ALTERNATION:
            optimizer.zero_grad()
            F.cross_entropy(model({modality: inputs[modality]})[modality], target).backward()
            held = [p for p in model.parameters() if p.grad is not None]
            before = torch.nn.utils.clip_grad_norm_(held, clip)
            assert (before > clip) == (clip < 1)
            optimizer.step(modality=modality)
            assert torch.nn.utils.get_total_norm([p.grad for p in held]) <= clip * (1 + 1e-9)  # P makes nothing longer
    torch.testing.assert_close(state(trainer), everything(model, optimizer), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("projection", ["rls", "window"])
def test_an_overflow_moves_nothing(projection, fused):
    """float16 under a scaler: the first scale is too large for any gradient; then training goes on."""

    def sgd(parameters, **settings):
        return torch.optim.SGD(parameters, **settings, momentum=0.9, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=10**6)
    trainer = make_trainer(dtype=torch.float32, projection=projection, amp=torch.float16, scaler=scaler, optimizer=sgd)
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    batch = whole(dtype=torch.float32, masked=True)
    trainer.fit([batch], epochs=1)
    assert scaler.get_scale() == 2.0**37
    assert_bitwise(dict(trainer.model.state_dict()), before)
    P = trainer.optimizer.layers[0].projection.matrix()
    assert_bitwise(P, torch.eye(5))
    trainer.fit([batch], epochs=20)
    assert scaler.get_scale() < 2.0**24
    assert all((t != before[name]).any() for name, t in trainer.model.state_dict().items())
    assert trainer.history[-1]["loss"]["audio"] < trainer.history[0]["loss"]["audio"]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_bfloat16_follows_float64(accumulate):
    exact, half = (make_trainer(dtype=d, amp=a, accumulate=accumulate) for d, a in ((f64, None), (torch.float32, torch.bfloat16)))
    exact.fit(split(whole(), [6] * 4), epochs=5)
    half.fit(split(whole(dtype=torch.float32), [6] * 4), epochs=5)
    for (name, got), expected in zip(half.model.state_dict().items(), exact.model.state_dict().values(), strict=True):
        assert (got - expected).abs().max() < 0.02, name  # bfloat16 keeps 8 bits: 4e-3 a factor
    assert half.optimizer.layers[0].projection.P.dtype == torch.float32


def test_optimizer_steps_in_float32_under_autocast():
    models = [make_model() for _ in range(2)]
    optimizers = [mla.MLAOptimizer(momentum_sgd(m.parameters()), m.head, backend="reference") for m in models]
    inputs, target = whole(dtype=torch.float32)
    for model, optimizer, inside in zip(models, optimizers, (False, True), strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model({"audio": inputs["audio"]})["audio"], target).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                optimizer.step()
    assert_bitwise(everything(models[1], optimizers[1]), everything(models[0], optimizers[0]))


def test_backward_is_the_callers():
    seen = []
    mine = make_trainer(backward=lambda loss: (seen.append(loss.item()), loss.backward()))
    plain = make_trainer()
    for trainer in (mine, plain):
        trainer.fit([whole()], epochs=2)
    assert len(seen) == 6 and seen[0] == pytest.approx(plain.history[0]["loss"]["audio"], rel=1e-12)
    torch.testing.assert_close(state(mine), state(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"accumulate": 0}, "^accumulate: expected at least 1 batch, got 0"),
        ({"clip_norm": 0.0}, "^clip_norm: expected a positive number or None, got 0.0"),
        ({"amp": torch.float16}, "^scaler: expected a torch.amp.GradScaler"),
        ({"scaler": torch.amp.GradScaler("cpu"), "backward": print}, "^backward: expected None with a scaler"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


def test_callbacks_see_every_epoch():
    seen = []
    trainer = make_trainer(callbacks=[seen.append])
    trainer.fit([whole()], epochs=3, validation=[whole()])
    assert seen == trainer.history
    flat = flatten(seen[-1])
    assert flat["epoch"] == 3 and flat["validation/accuracy/fused"] == seen[-1]["validation"]["accuracy"]["fused"]
    assert {"loss/audio", "projection/head", "validation/loss/text"} <= flat.keys()


def test_tensorboard_gets_every_number(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(callbacks=[TensorBoard(tmp_path)])
    trainer.fit([whole()], epochs=3, validation=[whole()])
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    for name in flatten(trainer.history[0]):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(r["epoch"], pytest.approx(flatten(r)[name], rel=1e-6)) for r in trainer.history]


@pytest.mark.parametrize(
    "monitor,values,epochs",
    [
        ("validation/accuracy/fused", [0.5, 0.7, 0.7, 0.6, 0.9], 4),
        ("validation/accuracy/fused", [0.5, float("nan"), 0.6, 0.7, 0.8], 5),
        ("validation/loss/audio", [0.5, 0.4, 0.6, 0.45, 0.3], 4),
    ],
)
def test_early_stopping(monkeypatch, monitor, values, epochs):
    trainer = make_trainer()
    _, kind, name = monitor.split("/")
    monkeypatch.setattr(trainer, "evaluate", lambda _: {"samples": 1, kind: {name: values[trainer.epoch]}})
    assert len(trainer.fit([whole()], epochs=5, validation=[whole()], patience=2, monitor=monitor)) == epochs
    assert (
        len(trainer.fit([whole()], epochs=5, validation=[whole()], patience=2, monitor=monitor)) == epochs
    )  # told by the history


def test_an_unknown_monitor_is_refused():
    with pytest.raises(ValueError, match="^monitor: expected one of epoch, loss/audio, .*, got 'loss/video'"):
        make_trainer().fit([whole()], epochs=3, patience=1, monitor="loss/video")


@pytest.mark.parametrize("patience,error", [(1, "^validation: expected a loader"), (0, "^patience: expected at least 1 epoch")])
def test_patience_that_cannot_work_is_refused_before_the_first_epoch(patience, error):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=error):
        trainer.fit([whole()], epochs=3, patience=patience)
    assert trainer.epoch == 0


def test_amp_is_a_dtype():
    with pytest.raises(ValueError, match="^amp: expected torch.bfloat16, torch.float16 or None, got 'bf16'"):
        make_trainer(amp="bf16")


def test_a_frozen_head_is_announced_once():
    trainer = make_trainer()
    batch = ({m: 100 + x for m, x in whole()[0].items()}, whole()[1])
    model = trainer.model
    for encoder in model.encoders.values():  # every feature the same, so that P takes all of the gradient
        encoder[0].weight.data.zero_()
        encoder[0].bias.data.fill_(20.0)
    with pytest.warns(UserWarning, match='head: less than a thousandth .* raise alpha, or use projection="window"') as warned:
        history = make_frozen(trainer).fit([batch], epochs=3)
    assert len([w for w in warned if "thousandth" in str(w.message)]) == 1
    assert history[-1]["projection"]["head"] < 1e-3


def make_frozen(trainer):
    model = trainer.model
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, alpha=1e-9)
    return mla.Trainer(model, optimizer, progress=False)


def test_a_modality_may_sound_like_a_loss():
    model = mla.MultimodalModel({"gloss": torch.nn.Linear(4, 5)}, torch.nn.Linear(5, CLASSES))
    trainer = mla.Trainer(model, mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head), progress=False)
    accuracies = iter([0.2, 0.4, 0.6, 0.8])
    trainer.evaluate = lambda _: {"samples": 1, "accuracy": {"gloss": next(accuracies)}}
    batch = ({"gloss": torch.randn(4, 4)}, torch.zeros(4, dtype=torch.int64))
    trainer.fit([batch], 4, validation=[batch], patience=1, monitor="validation/accuracy/gloss")
    assert trainer.epoch == 4


def test_a_failed_validation_repeats_nothing():
    """Neither the epoch's training nor the scheduler's step."""
    plain, failing = (make_trainer(seed=0) for _ in range(2))
    for trainer in (plain, failing):
        trainer.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1)
    evaluate, failing.evaluate = failing.evaluate, None
    with pytest.raises(TypeError):
        failing.fit([whole()], 2, validation=[whole()])
    failing.evaluate = evaluate
    assert failing.fit([whole()], 2, validation=[whole()]) == plain.fit([whole()], 2, validation=[whole()])
    assert_bitwise(state(failing), state(plain))


def test_loaders_without_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows())

    trainer = make_trainer(dtype=torch.float32)
    assert len(trainer.fit(DataLoader(Stream(), 4), epochs=2)) == 2
    with pytest.raises(ValueError, match="^loader: expected at least one batch"):
        trainer.fit(iter([]), epochs=3)
    with pytest.raises(ValueError, match="^validation: expected at least one sample in each epoch"):
        trainer.fit([whole(dtype=torch.float32)], epochs=3, validation=iter([]))


def test_samplers_inside_of_samplers_are_told_the_epoch():
    data = rows()
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    loader = DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(sampler, 4, drop_last=False))
    make_trainer(dtype=torch.float32).fit(loader, epochs=3)
    assert sampler.epoch == 2


def test_what_a_checkpoint_could_not_hold(tmp_path):
    """numpy's numbers become Python's; a callback changes a copy; the rest is refused before anything is written."""
    trainer = make_trainer(lr=np.logspace(-2, -1, 2)[0], callbacks=[lambda record: record.update(path=tmp_path)])
    trainer.fit([whole()], 1, checkpoint=tmp_path / "c.pt")
    resumed = make_trainer()
    resumed.resume(tmp_path / "c.pt")
    assert resumed.history == trainer.history and resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    trainer.history[0]["path"] = tmp_path
    with pytest.raises(TypeError, match=r"^checkpoint\['history'\]\[0\]\['path'\]: expected tensors and plain values, got"):
        trainer.save(tmp_path / "d.pt")
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_checkpoint_of_other_parts_changes_nothing(tmp_path):
    def make(optimizer=momentum_sgd, scheduler=torch.optim.lr_scheduler.StepLR, order=ALTERNATION, s=5):
        model = make_model()
        model.encoders = torch.nn.ModuleDict({m: model.encoders[m] for m in order})
        trainer = make_trainer(model, optimizer=optimizer)
        trainer.scheduler = scheduler(trainer.optimizer, 1)
        return trainer

    make().save(tmp_path / "c.pt")
    for other, message in (
        (make(optimizer=torch.optim.Adam), "with optimizer Adam, got SGD"),
        (make(scheduler=torch.optim.lr_scheduler.ExponentialLR), "with scheduler ExponentialLR, got StepLR"),
        (make(order=ALTERNATION[::-1]), "parameters in the same order"),
    ):
        before = state(other)
        with pytest.raises(mla.CheckpointError, match=message):
            other.resume(tmp_path / "c.pt")
        assert_bitwise(state(other), before)


class Stopped(Exception):
    pass


def stop_after(batches, trainer):
    left, train_on = iter(range(batches)), trainer._train_on

    def stopping(group):
        if next(left, None) is None:
            raise Stopped
        return train_on(group)

    trainer._train_on = stopping


def rows(count=20):
    inputs, target = whole(count, torch.float32)
    return [({m: x[i] for m, x in inputs.items()}, target[i]) for i in range(count)]


def loaders():
    def unpaired():
        return {
            m: DataLoader([(x[m], y) for x, y in rows(size)], 4, shuffle=True)
            for m, size in zip(ALTERNATION, (20, 10, 6), strict=True)
        }

    def ranks():
        data = rows()
        return DataLoader(data, 4, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=3))

    def weighted():
        sampler = WeightedRandomSampler([1.0, 2.0] * 10, 20, generator=torch.Generator().manual_seed(6))
        return DataLoader(rows(), 4, sampler=sampler)

    class Lazy(RandomSampler):
        """Accelerate's kind: a generator of its own from the first look on, seeded anew in each."""

        epoch = 0

        def __iter__(self):
            self.generator = self.generator or torch.Generator()
            self.generator.manual_seed(7 + self.epoch)
            return super().__iter__()

        def set_epoch(self, epoch):
            self.epoch = epoch

    return {
        "lazy": lambda: DataLoader(data := rows(), 4, sampler=Lazy(data)),
        "weighted": weighted,
        "shuffled": lambda: DataLoader(rows(), 4, shuffle=True),
        "generator": lambda: DataLoader(rows(), 4, shuffle=True, generator=torch.Generator().manual_seed(5)),
        "workers": lambda: DataLoader(rows(), 4, shuffle=True, num_workers=1),
        "unpaired": unpaired,
        "distributed sampler": ranks,
    }


@pytest.mark.parametrize("kind", loaders())
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_last_bit(tmp_path, kind):
    """Dropout, a scheduler, and checkpoints inside of epochs; unpaired loaders begin anew in the middle of one."""

    def make(**settings):
        trainer = make_trainer(noisy_model(), torch.float32, "window", seed=0, **settings)
        trainer.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, 3)
        return trainer

    def run(trainer):
        return trainer.fit(loaders()[kind](), 3, validation=[whole(dtype=torch.float32)], checkpoint=path, checkpoint_every=2)

    path = tmp_path / "c.pt"
    expected = make()
    history = run(expected)
    os.remove(path)
    for batches in (3, 4, 9) if kind == "workers" else (2, 5, 8, 11, 14):
        trainer = make()
        if path.exists():
            trainer.resume(path)
            trainer.evaluate(loaders()[kind]() if kind == "shuffled" else [whole(dtype=torch.float32)])  # draws a number
            trainer.save(path)
        stop_after(batches, trainer)
        with contextlib.suppress(Stopped):
            run(trainer)
        torch.manual_seed(batches)
    trainer = make()
    trainer.resume(path)
    assert run(trainer) == history
    assert_bitwise(state(trainer), state(expected))


def test_an_epoch_goes_on_with_the_loader_it_was_begun_with():
    trainer = make_trainer(noisy_model(), torch.float32, "window", seed=0)
    stop_after(3, trainer)
    with pytest.raises(Stopped):
        trainer.fit(loaders()["shuffled"](), 1)
    del trainer._train_on
    said = "^loader: expected the one that this epoch was begun with .*another Trainer.*"
    for loader, error in (
        (loaders()["generator"](), "with a generator where that had one"),
        (DataLoader(rows(8), 4), "which had at least 3"),
    ):
        with pytest.raises(ValueError, match=said + error):
            trainer.fit(loader, 1)
    assert len(trainer.fit(loaders()["shuffled"](), 1)) == 1
    assert len(trainer.fit(loaders()["generator"](), 2)) == 2  # between epochs it may be another

"""What users have beside encoders and a head: parameters, hooks, modes, and a loss with a state. It counts once, and is kept."""

import contextlib
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, WIDTHS, make_inputs, momentum_sgd, wrap
from torch import nn

import mla_fast as mla
from mla_fast.resume import Losses
from mla_fast.step import why_in_turn


def batch(seed=0, N=8, bad=False):
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(N, seed=seed)
    if bad:
        inputs["audio"][2, 1] = torch.nan
    return inputs, torch.randint(CLASSES, (N,), generator=generator)


BATCHES = [batch(i) for i in range(4)]


class Tempered(mla.MultimodalModel):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.temperature = nn.Parameter(torch.full((), 2.0))

    def logits(self, modality, features):
        return super().logits(modality, features) / self.temperature


class Projected(mla.MultimodalModel):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.shared = nn.Linear(5, 5)

    def features(self, modality, inputs):
        return self.shared(super().features(modality, inputs))


class Scaled(nn.Module):
    """A loss that learns, and counts."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, logits, target):
        if self.training:
            self.rows += len(target)
        return F.cross_entropy(logits * self.scale, target)


def make(kind=mla.MultimodalModel, loss=None, **settings):
    torch.manual_seed(0)
    model = kind({m: nn.Sequential(nn.Linear(w, 5), nn.Tanh()) for m, w in WIDTHS.items()}, nn.Linear(5, CLASSES))
    return model, mla.MLAOptimizer(momentum_sgd([*model.parameters(), *([] if loss is None else loss.parameters())]), model.head)


def loop(model, optimizer, loss):
    for inputs, target in BATCHES:
        for modality, x in inputs.items():
            optimizer.zero_grad()
            (loss or F.cross_entropy)(model({modality: x})[modality], target).backward()
            optimizer.step(modality=modality)


def at_once(model, optimizer, loss):
    for data in BATCHES:
        mla.alternating_step(model, optimizer, data, loss=loss)


def by_trainer(model, optimizer, loss):
    mla.Trainer(model, optimizer, loss=loss, progress=False).fit(BATCHES, 1)


def in_turn(model, optimizer, loss):
    mla.Trainer(model, optimizer, loss=loss, progress=False, in_turn=True).fit(BATCHES, 1)


@pytest.mark.parametrize("kind, of_loss", [(Tempered, False), (mla.MultimodalModel, True), (Tempered, True), (Projected, False)])
@pytest.mark.parametrize("train", [at_once, by_trainer, in_turn])
def test_parameters_beside_encoders_and_head_take_one_step_a_modality(train, kind, of_loss):
    trained = []
    for way in (loop, train):
        loss = Scaled() if of_loss else None
        model, optimizer = make(kind, loss)
        if way is at_once and kind is Projected:
            with pytest.raises(
                ValueError, match=r"^model: expected features that depend on their own encoder .* got 2 parameters"
            ):
                way(model, optimizer, loss)
            assert all(p.grad is None for p in model.parameters())
            return
        way(model, optimizer, loss)
        trained.append({**model.state_dict(), **({} if loss is None else loss.state_dict())})
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)


def test_a_layer_that_encoders_share_behind_the_models_back_is_refused():
    torch.manual_seed(0)
    backbone = nn.Linear(5, 5)
    encoders = {m: nn.Linear(w, 5) for m, w in WIDTHS.items()}
    for encoder in encoders.values():
        encoder.register_forward_hook(lambda module, x, h: backbone(h))
    model = mla.MultimodalModel(encoders, nn.Linear(5, CLASSES))
    optimizer = mla.MLAOptimizer(momentum_sgd([*model.parameters(), *backbone.parameters()]), model.head)
    for train in (at_once, by_trainer):
        with pytest.raises(ValueError, match=r"in_turn=True\) takes them one after another"):
            train(model, optimizer, None)
    in_turn(model, optimizer, None)


def test_why_modalities_take_turns():
    model, optimizer = make()
    assert why_in_turn(model, optimizer) is None
    model.alias = model.head
    assert why_in_turn(model, optimizer) is None
    calls, norms = [], []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    assert "hooks of its own" in why_in_turn(model, optimizer)
    by_trainer(model, optimizer, None)
    assert len(calls) == len(BATCHES) * len(WIDTHS)
    with pytest.raises(ValueError, match="^model: expected .* MultimodalModel's own forward without hooks"):
        at_once(model, optimizer, None)
    hook.remove()
    optimizer.register_step_pre_hook(lambda o, *_: norms.append(model.head.weight.grad.norm()))
    assert "hooks before its step" in why_in_turn(model, optimizer)
    by_trainer(model, optimizer, None)
    assert len(norms) == len(BATCHES) * len(WIDTHS)


def test_a_hook_that_clips_sees_the_head():
    trained = []
    for train in (loop, by_trainer):
        model, optimizer = make()
        optimizer.register_step_pre_hook(lambda *_, model=model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None)
        train(model, optimizer, None)
        trained.append(model.state_dict())
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-7)


def frozen_backbone():
    torch.manual_seed(0)
    made = {m: nn.Sequential(nn.BatchNorm1d(w), nn.Dropout(0.5), nn.Linear(w, 5), nn.Dropout(0.5)) for m, w in WIDTHS.items()}
    model = mla.MultimodalModel(made, nn.Linear(5, CLASSES))
    for encoder in made.values():
        encoder[0].requires_grad_(False).eval()
    return model, wrap(model)


def test_what_is_frozen_stays_in_evaluation_mode():
    model, optimizer = frozen_backbone()
    model.encoders["image"].eval()  # as from_pretrained returns models: it is to be trained
    model.encoders["text"][1].train()
    before = [encoder[0].running_mean.clone() for encoder in model.encoders.values()]
    trainer = mla.Trainer(model, optimizer, progress=False)
    trainer.fit(BATCHES, 2, validation=BATCHES)
    for encoder, mean in zip(model.encoders.values(), before, strict=True):
        assert torch.equal(encoder[0].running_mean, mean) and not encoder[0].training
        assert all(module.training for module in encoder[1:]) and encoder.training
    added = nn.Sequential(nn.BatchNorm1d(3).requires_grad_(False).eval(), nn.Linear(3, 5))
    trainer.add_modality("touch", added)
    assert not added[0].training and added[1].training
    assert not any(module.training for module in model.encoders["audio"].modules())
    trainer.remove_modality("touch")
    assert model.encoders["audio"].training and not model.encoders["audio"][0].training


def test_a_loss_with_a_state_goes_on_with_it(tmp_path):
    losses, histories = [], []
    for epochs in ((3,), (1, 3)):
        torch.manual_seed(0)
        for last in epochs:
            loss = Scaled()
            model, optimizer = make(loss=loss)
            trainer = mla.Trainer(model, optimizer, loss=loss, progress=False)
            if last != epochs[0]:
                trainer.resume(tmp_path / "c.pt")
            trainer.fit(BATCHES, last, validation=BATCHES)
            trainer.save(tmp_path / "c.pt")
        losses.append(loss.state_dict())
        histories.append(trainer.history)
    assert losses[0] == losses[1] and histories[0] == histories[1]
    assert losses[0]["rows"] == 3 * 4 * 8 * len(WIDTHS)  # of training alone
    model, optimizer = make()
    weighted = nn.CrossEntropyLoss(torch.ones(CLASSES))
    trainer = mla.Trainer(model, optimizer, loss=weighted, progress=False)
    trainer.save(tmp_path / "d.pt")
    weighted.weight[0] = 2
    trainer.resume(tmp_path / "d.pt")
    assert weighted.weight[0] == 2  # a setting
    with pytest.raises(mla.CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mla.Trainer(*make(loss=Scaled()), loss=Scaled(), progress=False).resume(tmp_path / "d.pt")


@pytest.mark.filterwarnings("ignore:step skipped")
@pytest.mark.parametrize("turns", [False, True])
def test_a_step_that_was_skipped_is_not_in_the_mean_loss(turns, tmp_path):
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    trainer = mla.Trainer(model, optimizer, scheduler=scheduler, in_turn=turns, progress=False)
    history = trainer.fit([*BATCHES, batch(9, bad=True)], 4, checkpoint=tmp_path / "c.pt", checkpoint_every=1)
    assert all(loss == loss for record in history for loss in record["loss"].values())
    assert scheduler.num_bad_epochs == 0 and optimizer.param_groups[0]["lr"] == 0.1
    trainer = mla.Trainer(*make(), progress=False)
    (record,) = trainer.fit([batch(9, bad=True)], 1)
    assert record["loss"]["audio"] != record["loss"]["audio"] and record["loss"]["image"] == record["loss"]["image"]


@dataclasses.dataclass
class Unhashable:
    weight: float = 1.0

    def __call__(self, logits, target):
        return self.weight * (logits - target).square().mean()


SQUEEZES = [
    lambda z, y: (z.squeeze(1) - y).square().mean(),
    lambda z, y: (z.squeeze() - y).abs().mean(),
    lambda z, y: F.mse_loss(z[:, 0], y),
]
FINE = [
    Unhashable(),
    lambda z, y: (z - y).square().mean(),
    lambda z, y: (z.flatten() - y.flatten()).square().mean(),
    lambda z, y: F.mse_loss(z, y),
    lambda z, y: (z - z.mean()).mul(y - y.mean()).sum().neg(),  # of the batch, not a mean of rows
]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("loss, refused", [*((loss, True) for loss in SQUEEZES), *((loss, False) for loss in FINE)])
@pytest.mark.parametrize("column", [False, True])
def test_a_loss_that_broadcasts_logits_over_targets_is_refused(column, loss, refused):
    torch.manual_seed(0)
    model = mla.MultimodalModel({m: nn.Linear(w, 5) for m, w in WIDTHS.items()}, nn.Linear(5, 1), fusion="mean")
    optimizer = wrap(model)
    target = torch.randn(8, 1) if column else torch.randn(8)
    for _ in range(2):  # and again
        said = pytest.raises(ValueError, match="^loss: expected .* got one for a target") if refused else contextlib.nullcontext()
        with said:
            mla.alternating_step(model, optimizer, (make_inputs(8), target), loss=loss)


@pytest.mark.parametrize("elsewhere", [None, 1, 2])
def test_encoders_that_no_optimizer_moves_are_said_in_a_loop_of_ones_own(elsewhere):
    """elsewhere: another optimizer has the encoder, and steps after so many of its batches."""
    model, _ = make()
    held = [p for name, p in model.named_parameters() if "audio" not in name]
    optimizer = mla.MLAOptimizer(momentum_sgd(held), model.head)
    other = momentum_sgd(model.encoders["audio"].parameters())
    said = pytest.warns(UserWarning, match="^step: 2 of 2 parameters of the encoder of 'audio' are not the optimizer's")
    with said if elsewhere is None else warnings.catch_warnings():
        if elsewhere is not None:
            warnings.simplefilter("error")
        for i in range(10):
            for modality, x in BATCHES[0][0].items():
                optimizer.zero_grad()
                F.cross_entropy(model({modality: x})[modality], BATCHES[0][1]).backward()
                optimizer.step(modality=modality)
                if elsewhere is not None and i % elsewhere == 0:
                    other.step()


def test_classes_are_added_to_factored_moments():
    model, _ = make()
    optimizer = mla.MLAOptimizer(torch.optim.Adafactor(model.parameters()), model.head)
    at_once(model, optimizer, None)
    before = optimizer.state[model.head.weight]["row_var"].clone()
    model.add_classes(2, optimizer=optimizer)
    assert torch.equal(optimizer.state[model.head.weight]["row_var"], torch.cat([before, torch.zeros(2, 1)]))
    at_once(model, optimizer, None)


def test_an_addition_under_inference_mode_is_refused():
    model, optimizer = make()
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="^add_modality: expected to be called outside of inference_mode"),
    ):
        model.add_modality("touch", nn.Linear(3, 5), optimizer=optimizer)


def test_losses_are_added_step_by_step_however_often_they_are_looked_at():
    often, seldom, expected = Losses(), Losses(), {"a": [0.0, 0], "b": [0.0, 0]}
    value = torch.empty(())  # a CUDA graph writes over it
    for i in range(2500):
        value.copy_(torch.nan if i % 7 == 0 else torch.rand(()))
        names = "a" if i % 3 else "ab"
        for losses in (often, seldom):
            losses.add({name: value for name in names})
        if i % 100 == 0:
            often.sums()
        for name in names if i % 7 else ():
            expected[name] = [expected[name][0] + value.item(), expected[name][1] + 1]
    assert often.sums() == seldom.sums() == expected
    assert Losses(often.sums()).sums() == expected and not Losses().sums()

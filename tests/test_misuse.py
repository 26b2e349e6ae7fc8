"""Use that trains something else than it seems to is refused, warned of, or handled."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, everything
from torch import nn

import mla_fast as mla
from mla_fast.alternation import LOOKS
from mla_fast.encoders import ResNet18

f64 = torch.float64
LOOP = "MLA takes one modality a step"


def encoders(names=("audio", "image"), width=5):
    torch.manual_seed(0)
    return {name: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, width)) for name in names}


def make(names=("audio", "image"), parts=None, **settings):
    model = mla.MultimodalModel(parts or encoders(names), nn.Linear(5, CLASSES))
    return model, mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.head, **settings)


def batch(names=("audio", "image"), N=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {m: torch.randn(N, 4, generator=g) for m in names}, torch.randint(CLASSES, (N,), generator=g)


def joint_loss(model, optimizer, name):
    inputs, target = batch()
    optimizer.zero_grad()
    sum(F.cross_entropy(z, target) for z in model(inputs).values()).backward()
    optimizer.step(modality=name)


def mean_of_logits(model, optimizer, name):
    inputs, target = batch()
    optimizer.zero_grad()
    F.cross_entropy(sum(model(inputs).values()) / 2, target).backward()
    optimizer.step(modality=name)


def accumulation_inside_out(model, optimizer, name):
    optimizer.zero_grad()
    for seed in range(2):
        inputs, target = batch(seed=seed)
        for m, x in inputs.items():
            (F.cross_entropy(model({m: x})[m], target) / 2).backward()
    optimizer.step(modality=name)


def joined(model, optimizer, name):
    inputs, target = batch()
    optimizer.zero_grad()
    features = torch.stack([model.features(m, x) for m, x in inputs.items()]).mean(0)
    F.cross_entropy(model.head(features), target).backward()
    optimizer.step(modality=name)


def no_zero_grad(model, optimizer, name):
    inputs, target = batch()
    F.cross_entropy(model({name: inputs[name]})[name], target).backward()
    optimizer.step(modality=name)


def zeros_in_place_of_none(model, optimizer, name):
    inputs, target = batch()
    optimizer.zero_grad()
    F.cross_entropy(model({name: inputs[name]})[name], target).backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer.step(modality=name)


@pytest.mark.parametrize("step", [no_zero_grad, zeros_in_place_of_none])
def test_gradients_of_encoders_that_nothing_went_through_are_said(step):
    (message,) = said(*make(), step, ("audio", "image"))
    assert message.startswith("step: 4 parameters of encoders that nothing went through have a gradient")


def said(model, optimizer, step, names, times=40):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(times):
            step(model, optimizer, names[i % len(names)])
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("names", [(None,), ("audio",), ("audio", "image")])
@pytest.mark.parametrize("step", [joint_loss, mean_of_logits, accumulation_inside_out, joined])
def test_what_is_not_alternation_is_said_once(step, names):
    (message,) = said(*make(), step, names)
    assert message.startswith("step: ") and LOOP in message
    assert ("joint training" if step is joined else "2 encoders (of 4, 4 parameters)") in message


def test_a_step_that_mixes_what_earlier_ones_kept_apart_is_said():
    """Encoders on one trunk share parameters, so only the steps before can tell."""
    trunk = nn.Linear(4, 6)
    model, optimizer = make(parts={name: nn.Sequential(trunk, nn.ReLU(), nn.Linear(6, 5)) for name in ("audio", "image")})
    assert said(model, optimizer, in_turn, ("audio", "image"), times=4) == []
    assert len(said(model, optimizer, joint_loss, ("audio",))) == 1


def in_turn(model, optimizer, name):
    inputs, target = batch()
    optimizer.zero_grad()
    for part in (slice(0, 4), slice(4, 8)):  # accumulated, inside of the modality's turn
        (F.cross_entropy(model({name: inputs[name][part]})[name], target[part]) / 2).backward()
    optimizer.step(modality=name)


def all_at_once_one_backward_each(model, optimizer, name):
    inputs, target = batch()
    optimizer.zero_grad()
    logits = model(inputs)  # of both, but only one is differentiated
    F.cross_entropy(logits[name], target).backward()
    optimizer.step(modality=name)


def by_the_engine(model, optimizer, name):
    mla.alternating_step(model, optimizer, batch())


class WithPosition(nn.Module):
    """A token and a position are added and joined to what share nothing with them, as in a ViT."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(1, 4))
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        h = self.first(x) + self.position
        return self.last(torch.stack([h, self.token.expand_as(h)]).mean(0))


class TwoBranches(nn.Module):
    """Both directions of an LSTM meet before any parameter is shared."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, bidirectional=True)
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        return self.last(self.lstm(x[None])[0][0])


@pytest.mark.parametrize("step", [in_turn, all_at_once_one_backward_each, by_the_engine])
@pytest.mark.parametrize("kind", [None, WithPosition, TwoBranches])
def test_alternation_is_not_warned_of(step, kind):
    model, optimizer = make(parts=None if kind is None else {name: kind() for name in ("audio", "image")})
    assert said(model, optimizer, step, ("audio", "image")) == []


def test_one_encoder_for_all_is_the_trainers_own_affair():
    shared = nn.Linear(4, 5)
    model, optimizer = make(parts={"audio": shared, "image": shared})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mla.Trainer(model, optimizer).fit([batch()] * 3, epochs=1)
    assert len(said(*make(parts={"audio": shared, "image": shared}), in_turn, ("audio", "image"))) == 1


def test_gradients_that_the_optimizer_does_not_hold_are_not_its_affair():
    """Encoders with optimizers of their own, and a loop without names."""
    model, _ = make(parts={name: TwoBranches() for name in ("audio", "image")})
    own = {m: torch.optim.SGD(encoder.parameters(), lr=0.1) for m, encoder in model.encoders.items()}
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.head.parameters(), lr=0.1), model.head)

    def step(model, optimizer, name):
        inputs, target = batch()
        optimizer.zero_grad()
        own[name].zero_grad()
        F.cross_entropy(model({name: inputs[name]})[name], target).backward()
        own[name].step()
        optimizer.step()

    assert said(model, optimizer, step, ("audio", "image")) == []


def test_nothing_is_left_of_looking_after_the_first_steps():
    model, optimizer = make()
    said(model, optimizer, in_turn, ("audio", "image"), times=LOOKS)
    assert optimizer.layers[0].features.alternation is None


def test_features_can_be_kept_over_zero_grad():
    """Two losses with a zero_grad between, gradients put back by hand, as PCGrad does: x̄ is over the rows of both."""
    results = []
    for keep in (True, False):
        head = nn.Linear(5, CLASSES).double()
        nn.init.ones_(head.weight)
        optimizer = mla.MLAOptimizer(torch.optim.SGD(head.parameters(), lr=0.1), head, order="project_first", alpha=0.3)
        x, y = torch.randn(6, 5, dtype=f64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % CLASSES
        if keep:
            with optimizer.keep_features():
                gradients = []
                for part in (slice(0, 2), slice(2, 6)):
                    optimizer.zero_grad()
                    F.cross_entropy(head(x[part]), y[part], reduction="sum").backward()
                    gradients.append([p.grad for p in head.parameters()])
                for p, *both in zip(head.parameters(), *gradients, strict=True):
                    p.grad = sum(both)
                optimizer.step()
        else:
            F.cross_entropy(head(x), y, reduction="sum").backward()
            optimizer.step()
        optimizer.zero_grad()
        assert optimizer.layers[0].features.take() == (None, 0)
        results.append(optimizer.layers[0].projection.matrix().clone())
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_a_head_that_freezes_is_said_by_step():
    head = nn.Linear(3, CLASSES)
    optimizer = mla.MLAOptimizer(torch.optim.SGD(head.parameters(), lr=0.0), head, alpha=1e-6)
    with pytest.warns(UserWarning, match="^head: less than a thousandth of the gradient is left") as caught:
        for seed in range(250):
            optimizer.zero_grad()
            g = torch.Generator().manual_seed(seed)
            F.cross_entropy(head(torch.randn(4, 3, generator=g)), torch.arange(4) % CLASSES).backward()
            optimizer.step(modality="audio")
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_state_with_other_settings_is_said():
    (_, window), (_, rls) = make(projection="window"), make()
    with pytest.warns(UserWarning, match="^state_dict: .* as it was saved, .*window.*, not as it was built, .*rls"):
        rls.load_state_dict(window.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rls.load_state_dict(window.state_dict())


def test_a_layer_that_is_unfrozen_later_is_said():
    head = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    head[0].requires_grad_(False)
    optimizer = mla.MLAOptimizer(torch.optim.SGD(head.parameters(), lr=0.1), head)
    F.cross_entropy(head(torch.randn(4, 5)), torch.arange(4) % CLASSES).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    head[0].requires_grad_(True)
    F.cross_entropy(head(torch.randn(4, 5)), torch.arange(4) % CLASSES).backward()
    with pytest.warns(UserWarning, match="^head: the weight of 0 was frozen when MLAOptimizer was built"):
        optimizer.step()


def test_a_bias_that_is_unfrozen_later_is_said():
    head = nn.Linear(5, CLASSES)
    head.bias.requires_grad_(False)
    optimizer = mla.MLAOptimizer(torch.optim.SGD([head.weight, head.bias], lr=0.1), head, bias="project")
    head.bias.requires_grad_(True)
    F.cross_entropy(head(torch.randn(4, 5)), torch.arange(4) % CLASSES).backward()
    with pytest.warns(UserWarning, match="^head: the bias of head was frozen"):
        optimizer.step()


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


def test_a_linear_with_a_forward_of_its_own_is_said():
    head = Cosine(5, CLASSES)
    with pytest.warns(UserWarning, match=r"^head: head \(Cosine\) has a forward of its own"):
        mla.MLAOptimizer(torch.optim.SGD(head.parameters(), lr=0.1), head)


class SAM(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"rho": 0.05})

    def first_step(self):
        pass

    def second_step(self):
        pass

    def step(self, closure=None):
        pass


class Asserts(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "needs closure"
        return super().step(closure)


class Raises(torch.optim.SGD):
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("needs closure")
        return super().step(closure)


class Calls(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        loss = closure()
        super().step()
        return loss


class Plain(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        super().step()
        return loss


class ReturnsEarly(torch.optim.SGD):
    def step(self, closure=None):
        if closure is None:
            return super().step()
        loss = closure()
        super().step()
        return loss


@pytest.mark.parametrize("kind", [SAM, Asserts, Raises, Calls, torch.optim.LBFGS])
def test_an_optimizer_that_needs_its_closure_is_refused_at_once(kind):
    head = nn.Linear(5, CLASSES)
    with pytest.raises(TypeError, match=f"^optimizer: {kind.__name__} needs a closure"):
        mla.MLAOptimizer(kind(head.parameters()), head)


@pytest.mark.parametrize("kind", [Plain, ReturnsEarly])
def test_an_optimizer_that_can_do_without_is_not(kind):
    head = nn.Linear(5, CLASSES)
    mla.MLAOptimizer(kind(head.parameters(), lr=0.1), head)


def rates(interval, scheduler):
    model, optimizer = make()
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    trainer = mla.Trainer(model, optimizer, scheduler=scheduler(optimizer), scheduler_interval=interval, in_turn=True)
    trainer.fit([batch()] * 3, epochs=2)
    return seen[::2]  # two modalities a batch


def test_a_scheduler_may_step_with_every_batch():
    def one_cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=6)

    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    expected, scheduler = [], one_cycle(plain)
    for _ in range(6):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        scheduler.step() if len(expected) < 6 else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rates("batch", one_cycle) == pytest.approx(expected)
    with pytest.warns(UserWarning, match='^scheduler: OneCycleLR is planned over 6 steps but .* 2 in all.*="batch"'):
        assert rates("epoch", one_cycle) == pytest.approx(expected[:1] * 3 + expected[1:2] * 3)


@pytest.mark.parametrize("interval", ["step", None])
def test_an_unknown_interval_is_refused(interval):
    with pytest.raises(ValueError, match='^scheduler_interval: expected "epoch" or "batch", got'):
        mla.Trainer(*make(), scheduler_interval=interval)


def test_a_plateau_is_of_epochs():
    model, optimizer = make()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match='^scheduler_interval: expected "epoch" for ReduceLROnPlateau'):
        mla.Trainer(model, optimizer, scheduler=plateau, scheduler_interval="batch")


def normalized(names=("audio", "image")):
    torch.manual_seed(0)
    return {name: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)) for name in names}


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_lone_row_under_batch_norm_is_left_out_and_counted(in_turn):
    """The other modality trains as if the lone row had not been there."""
    inputs, target = batch()
    present = torch.ones(8, 2, dtype=torch.bool)
    present[1:, 0] = False
    ours, without = make(parts=normalized()), make(parts=normalized())
    with pytest.warns(UserWarning, match=r"^a row is left out.*inputs\['audio'\]: expected at least 2 rows.*drop_last") as caught:
        history = mla.Trainer(*ours, in_turn=in_turn).fit([(inputs, target, present)] * 2, epochs=2)
    assert len(caught) == 1 and caught[0].filename == __file__
    mla.Trainer(*without, in_turn=in_turn).fit([({"image": inputs["image"]}, target)] * 2, epochs=2)
    assert ours[1].diagnostics()["skipped_lone"] == 4 and history[0]["loss"].keys() == {"image"}
    ours[1].skipped["lone"] = 0
    torch.testing.assert_close(everything(*ours), everything(*without), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("interaction", [False, True])
def test_a_lone_row_does_not_count_in_the_mean_of_an_accumulated_step(interaction):
    inputs, target = batch(N=4)
    parts = [({m: x[rows] for m, x in inputs.items()}, target[rows]) for rows in (slice(0, 3), slice(3, 4))]
    losses = []
    for data, accumulate in ((parts, 2), (parts[:1], 1)):
        torch.manual_seed(0)
        beside = mla.Interaction(5, CLASSES, ("audio", "image"), 2) if interaction else None
        model = mla.MultimodalModel(normalized(), nn.Linear(5, CLASSES), interaction=beside)
        optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history = mla.Trainer(model, optimizer, accumulate=accumulate, in_turn=True).fit(data, epochs=1)
        losses.append((history[0]["loss"], [p.detach().clone() for p in model.parameters()], list(model.buffers())))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_lone_row_under_batch_norm_in_the_head_is_left_out(in_turn):
    model = mla.MultimodalModel(encoders(), nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, CLASSES)))
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.head)
    with pytest.warns(UserWarning, match=r"^a row is left out.*inputs\['audio'\]: .*the BatchNorm in the head"):
        mla.Trainer(model, optimizer, in_turn=in_turn).fit([batch(), batch(N=1)], epochs=1)
    assert optimizer.diagnostics()["skipped_lone"] == 2


def test_a_last_batch_of_one_is_left_out():
    torch.manual_seed(0)
    model = mla.MultimodalModel({"image": ResNet18(1)}, nn.Linear(512, CLASSES))
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model.head)
    batches = [({"image": torch.randn(N, 28, 28)}, torch.zeros(N, dtype=torch.int64)) for N in (2, 1)]
    with pytest.warns(UserWarning, match="^a row is left out"):
        mla.Trainer(model, optimizer).fit(batches, epochs=1)
    assert optimizer.diagnostics()["skipped_lone"] == 1 and optimizer.diagnostics()["layers"]["head"]["steps"] == 1


def test_a_lone_row_that_batch_norm_can_train_on_is_trained_on():
    model = mla.MultimodalModel({"image": ResNet18(1)}, nn.Linear(512, CLASSES))
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model.head)
    mla.alternating_step(model, optimizer, ({"image": torch.randn(1, 64, 64)}, torch.zeros(1, dtype=torch.int64)))
    assert optimizer.diagnostics()["skipped_lone"] == 0 and optimizer.diagnostics()["layers"]["head"]["steps"] == 1


def test_a_loop_of_ones_own_is_told_the_remedy():
    model, _ = make(parts=normalized())
    with pytest.raises(ValueError, match=r"^inputs\['audio'\]: expected at least 2 rows in training"):
        model({"audio": torch.randn(1, 4)})


@pytest.mark.parametrize("masked", [False, True])
def test_evaluate_says_what_accuracy_hides(masked):
    """Against scikit-learn, on a rare class, a class nobody has, and one that is never answered."""
    metrics = pytest.importorskip("sklearn.metrics")
    model, optimizer = make()
    g = torch.Generator().manual_seed(1)
    inputs, target = batch(N=63)
    target = torch.where(torch.rand(63, generator=g) < 0.9, 0, 2)
    present = torch.rand(63, 2, generator=g) < 0.6 if masked else torch.ones(63, 2, dtype=torch.bool)
    parts = [({m: x[i : i + 10] for m, x in inputs.items()}, target[i : i + 10], present[i : i + 10]) for i in range(0, 63, 10)]
    report = mla.Trainer(model, optimizer).evaluate(parts)
    some = present.any(1)
    answers = {"fused": (model.predict(inputs, present).logits[some].argmax(1), target[some])}
    for i, m in enumerate(model.modalities):
        answers[m] = model({m: inputs[m][present[:, i]]})[m].argmax(1), target[present[:, i]]
    for name, (answer, right) in answers.items():
        assert report["accuracy"][name] == pytest.approx(metrics.accuracy_score(right, answer))
        assert report["macro_f1"][name] == pytest.approx(metrics.f1_score(right, answer, average="macro", zero_division=0))
    answer, right = answers["fused"]
    recall = [(answer == c)[right == c].double().mean().item() for c in range(CLASSES)]
    assert report["class_accuracy"] == pytest.approx(recall, nan_ok=True)
    assert report["majority"] == pytest.approx((right == 0).double().mean().item())

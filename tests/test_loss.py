"""``Trainer(loss=…)``: losses of any targets against a loop by hand in float64, and what is refused."""

import functools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, WIDTHS, assert_bitwise, everything, make_inputs, momentum_sgd, normal
from ranks import run_ranks
from torch import nn

import mla_fast as mla

f64 = torch.float64


def of_classes(generator, N):
    return torch.randint(CLASSES, (N,), generator=generator)


def of_probabilities(generator, N):
    return normal(generator, N, CLASSES, dtype=f64).softmax(1)


def of_labels(generator, N):
    return (normal(generator, N, CLASSES) > 0).double()


def of_numbers(generator, N, outputs=CLASSES):
    return normal(generator, N, outputs, dtype=f64)


class Kind:
    """A loss with its targets, its fusion, and what it is by hand: a sum over rows that is divided by their number."""

    def __init__(self, loss, targets, by_hand, fusion="entropy", outputs=CLASSES):
        self.loss, self.targets, self.by_hand, self.fusion, self.outputs = loss, targets, by_hand, fusion, outputs


def log_p(z):
    return z - z.exp().sum(1, keepdim=True).log()


def weighted(z, y, weights=(1.0, 2.0, 0.5)):
    w = torch.tensor(weights, dtype=z.dtype)[y]
    return -(w * log_p(z)[range(len(y)), y]).sum() / w.sum()


def smoothed(z, y):
    return -(log_p(z) * (0.9 * F.one_hot(y, CLASSES).double() + 0.1 / CLASSES)).sum() / len(y)


KINDS = {
    "weights": Kind(nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=f64)), of_classes, weighted),
    "smoothing": Kind(nn.CrossEntropyLoss(label_smoothing=0.1), of_classes, smoothed),
    "soft": Kind(nn.CrossEntropyLoss(), of_probabilities, lambda z, y: -(log_p(z) * y).sum() / len(y)),
    "labels": Kind(
        nn.BCEWithLogitsLoss(), of_labels, lambda z, y: ((1 + z.exp()).log() - y * z).sum() / y.numel(), fusion="mean"
    ),
    "numbers": Kind(nn.MSELoss(), of_numbers, lambda z, y: ((z - y) ** 2).sum() / y.numel(), fusion="mean"),
    "one number": Kind(
        nn.MSELoss(),
        lambda generator, N: of_numbers(generator, N, 1)[:, 0],
        lambda z, y: ((z[:, 0] - y) ** 2).sum() / len(y),
        fusion="mean",
        outputs=1,
    ),
    "a function": Kind(
        lambda z, y: (z - y).abs().mean(), of_numbers, lambda z, y: (z - y).abs().sum() / y.numel(), fusion="mean"
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def make(kind, dtype=f64, interaction=False):
    torch.manual_seed(0)
    encoders = {name: nn.Sequential(nn.Linear(width, 5), nn.Tanh()) for name, width in WIDTHS.items()}
    beside = mla.Interaction(5, kind.outputs, tuple(WIDTHS), 4) if interaction else None
    model = mla.MultimodalModel(encoders, nn.Linear(5, kind.outputs), interaction=beside, fusion=kind.fusion).to(dtype)
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, projection="window", target="update")
    return model, optimizer


def batches(kind, count=4, N=7, missing=False, dtype=f64):
    generator = torch.Generator().manual_seed(3)
    made = []
    for seed in range(count):
        inputs = {m: x.to(dtype) for m, x in make_inputs(N, seed=seed).items()}
        batch = inputs, kind.targets(generator, N)
        made.append((*batch, torch.rand(N, 3, generator=generator) < 0.6) if missing else batch)
    return made


def by_hand(model, optimizer, batches, loss, autocast=None):
    """One step of each modality over all batches: Σ of the batches' means, each times its rows, over all rows."""
    rows = {}
    for batch in batches:
        inputs, target, present = batch if len(batch) == 3 else (*batch, torch.ones(len(batch[1]), 3, dtype=torch.bool))
        for i, modality in enumerate(WIDTHS):
            here = present[:, i]
            if here.any():
                rows.setdefault(modality, []).append((inputs[modality][here], target[here]))
    losses = {}
    for modality, parts in rows.items():
        optimizer.zero_grad()
        total, mean = sum(len(y) for _, y in parts), 0.0
        for x, y in parts:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                z = model.head(model.encoders[modality](x))
                part = loss(z.to(torch.promote_types(z.dtype, torch.float32)), y) * (len(y) / total)
            part.backward()
            mean += part.item()
        optimizer.step(modality=modality)
        losses[modality] = mean
    return losses


@every_kind
@pytest.mark.parametrize("missing", (False, True), ids=("complete", "missing"))
@pytest.mark.parametrize("accumulate", (1, 2))
def test_a_loss_is_trained_as_by_hand(kind, missing, accumulate):
    (model, optimizer), (other, others) = make(kind), make(kind)
    data = batches(kind, missing=missing)
    trainer = mla.Trainer(model, optimizer, loss=kind.loss, accumulate=accumulate, progress=False)
    history = trainer.fit(data, epochs=1)
    losses = [by_hand(other, others, data[i : i + accumulate], kind.by_hand) for i in range(0, len(data), accumulate)]
    for modality in WIDTHS:
        of = [each[modality] for each in losses if modality in each]
        assert history[0]["loss"][modality] == pytest.approx(sum(of) / len(of), rel=1e-10)
    torch.testing.assert_close(everything(model, optimizer), everything(other, others), rtol=1e-9, atol=1e-10)


@every_kind
def test_in_turn_and_alternating_step_agree_with_it(kind):
    data = batches(kind, missing=True)
    found = []
    for how in ("alternating_step", "in turn", "clipped"):
        model, optimizer = make(kind)
        if how == "alternating_step":
            for batch in data:
                mla.alternating_step(model, optimizer, batch, loss=kind.loss)
        else:
            settings = {"in_turn": True} if how == "in turn" else {"clip_norm": 1e9}
            mla.Trainer(model, optimizer, loss=kind.loss, progress=False, **settings).fit(data, epochs=1)
        found.append(everything(model, optimizer))
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ("smoothing", "soft", "labels", "numbers"))
def test_amp(name):
    kind = KINDS[name]
    (model, optimizer), (other, others) = make(kind, torch.float32), make(kind, torch.float32)
    data = batches(kind, count=1, dtype=torch.float32)
    got = mla.alternating_step(model, optimizer, data[0], amp=torch.bfloat16, loss=kind.loss)
    expected = by_hand(other, others, data, kind.by_hand, torch.bfloat16)
    for modality, loss in expected.items():
        assert got[modality].item() == pytest.approx(loss, rel=2e-2)  # the head's logits are of 8 bits
    assert model.head.weight.dtype == torch.float32


@every_kind
@pytest.mark.parametrize("missing", (False, True), ids=("complete", "missing"))
def test_the_interaction_learns_by_the_same_loss(kind, missing):
    """Its gradient of the first step: ∂O = ∂L(mean_m z_m + r)/∂r pᵀ, over the samples with at least two modalities."""
    model, optimizer = make(kind, interaction=True)
    (batch,) = batches(kind, count=1, missing=missing)
    inputs, target, present = batch if missing else (*batch, torch.ones(7, 3, dtype=torch.bool))
    both = present.sum(1) > 1
    h = {m: model.encoders[m](x.where(present[:, i, None], 0)).detach() for i, (m, x) in enumerate(inputs.items())}
    z = torch.stack([model.head(x) for x in h.values()])
    mean = (z * present.T[..., None]).sum(0) / present.sum(1, keepdim=True).clamp(min=1)
    r = model.interaction(h, present)
    kind.by_hand((mean.detach() + r)[both], target[both]).backward()
    expected = model.interaction.out.weight.grad.clone()
    model.zero_grad()
    before = model.interaction.out.weight.detach().clone()
    mla.alternating_step(model, optimizer, batch, loss=kind.loss)
    moved = before - model.interaction.out.weight.detach()
    torch.testing.assert_close(moved, 0.1 * (expected + 0.01 * before), rtol=1e-9, atol=1e-10)


def test_the_mean_of_what_is_there():
    kind = KINDS["numbers"]
    model, _ = make(kind)
    inputs, _, present = batches(kind, count=1, missing=True)[0]
    present[0], present[1] = False, torch.tensor([True, False, False])
    fused = model.predict(inputs, present)
    z = torch.stack(list(model(inputs).values()), 1)  # [N, M, C]
    for i, here in enumerate(present):
        expected = z[i][here].mean(0) if here.any() else torch.zeros(CLASSES, dtype=f64)
        torch.testing.assert_close(fused.logits[i], expected)
        torch.testing.assert_close(fused.weights[i], here / max(here.sum(), 1).double() if here.any() else here.double())
    torch.testing.assert_close(model.predict(inputs).logits, z.mean(1))
    assert not fused.entropy.any()


@every_kind
def test_evaluation_reports_what_means_something(kind):
    model, optimizer = make(kind)
    data = batches(kind, missing=True)
    trainer = mla.Trainer(model, optimizer, loss=kind.loss, progress=False)
    report = trainer.evaluate(data)
    sums, fused, total = dict.fromkeys(WIDTHS, 0.0), 0.0, 0
    for inputs, target, present in data:
        for i, (modality, z) in enumerate(model(inputs).items()):
            here = present[:, i]
            sums[modality] += kind.by_hand(z[here], target[here]).item() * int(here.sum())
        some = present.any(1)
        fused += kind.by_hand(trainer.predict((inputs, present)).logits[some], target[some]).item() * int(some.sum())
        total += int(some.sum())
    counts = torch.cat([present for *_, present in data]).sum(0).tolist()
    for modality, count in zip(WIDTHS, counts, strict=True):
        assert report["loss"][modality] == pytest.approx(sums[modality] / count, rel=1e-9)
    assert report["loss"]["fused"] == pytest.approx(fused / total, rel=1e-9)
    assert report["samples"] == 28
    assert ("accuracy" in report) == (kind.fusion == "entropy")
    if kind.fusion == "entropy":
        every = [(trainer.predict((x, p)).logits.argmax(1), y if y.dim() == 1 else y.argmax(1), p.any(1)) for x, y, p in data]
        right = sum(int((got == y)[some].sum()) for got, y, some in every)
        assert report["accuracy"]["fused"] == pytest.approx(right / total)
    else:
        with pytest.raises(ValueError, match="use_test: expected False"):
            trainer.evaluate(data, use_test=True)
    history = trainer.fit(data, epochs=2, validation=data, patience=1, monitor="validation/loss/fused")
    assert history[-1]["validation"]["samples"] == 28


def test_plain_cross_entropy_as_a_loss_is_the_default():
    found = []
    for loss in (None, nn.CrossEntropyLoss()):
        model, optimizer = make(KINDS["smoothing"])
        trainer = mla.Trainer(model, optimizer, loss=loss, progress=False)
        trainer.fit(batches(KINDS["smoothing"], missing=True), epochs=2)
        found.append(everything(model, optimizer))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_ignored_labels_are_trained_on_and_counted_nowhere():
    kind = KINDS["smoothing"]
    model, optimizer = make(kind)
    ((inputs, target),) = batches(kind, count=1)
    target = target.clone()
    target[:3] = -100
    trainer = mla.Trainer(model, optimizer, loss=nn.CrossEntropyLoss(), progress=False)
    trainer.fit([(inputs, target)], epochs=1)
    report, part = trainer.evaluate([(inputs, target)]), {m: x[3:] for m, x in inputs.items()}
    assert report["accuracy"] == trainer.evaluate([(part, target[3:])])["accuracy"]


NUMBERS = (nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.PoissonNLLLoss(), nn.BCEWithLogitsLoss())


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.bool), ids=str)
@pytest.mark.parametrize(
    "loss", (*NUMBERS, F.huber_loss, lambda z, y: (z - y.to(z.dtype)).square().mean()), ids=(*map(str, NUMBERS), "huber", "own")
)
def test_whole_numbers_beside_one_output_are_numbers(loss, dtype):
    found = []
    for to in (dtype, torch.float64):
        kind = Kind(loss, lambda g, N: torch.randint(2, (N,), generator=g), None, "mean", outputs=1)
        model, optimizer = make(kind)
        data = [(inputs, target.to(to)) for inputs, target in batches(kind, count=2)]
        trainer = mla.Trainer(model, optimizer, loss=loss, progress=False)
        history = trainer.fit(data, epochs=1)
        found.append((everything(model, optimizer), history[0]["loss"], trainer.evaluate(data)["loss"]))
        assert_bitwise(trainer.predict(data[0]).logits, model.predict(data[0][0]).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_whole_numbers_of_several_outputs():
    kind = Kind(nn.BCEWithLogitsLoss(), lambda g, N: of_labels(g, N).long(), None, fusion="mean")
    (model, optimizer), (other, others) = make(kind), make(kind)
    data = batches(kind)
    mla.Trainer(model, optimizer, loss=kind.loss, progress=False).fit(data, epochs=1)
    floating = [(x, y.double()) for x, y in data]
    mla.Trainer(other, others, loss=kind.loss, progress=False).fit(floating, epochs=1)
    assert_bitwise(everything(model, optimizer), everything(other, others))


def test_as_many_rows_as_outputs_do_not_make_one_of_the_other():
    model, optimizer = make(Kind(None, None, None, "mean"), torch.float32)
    with pytest.raises(ValueError, match="target: expected one that PoissonNLLLoss takes"):
        mla.alternating_step(model, optimizer, (make_inputs(CLASSES), torch.ones(CLASSES)), loss=nn.PoissonNLLLoss())


@pytest.mark.parametrize("label", (-100, 0))
@pytest.mark.parametrize("interaction", (False, True))
@pytest.mark.parametrize("missing", (False, True))
@pytest.mark.parametrize("settings", ({}, {"in_turn": True}, {"accumulate": 2}), ids=str)
def test_what_is_ignored_is_no_row(label, interaction, missing, settings):
    """All of the second batch, all of a modality's rows in the third, some of the last."""
    kind = Kind(nn.CrossEntropyLoss(ignore_index=label), lambda g, N: torch.randint(1, CLASSES, (N,), generator=g), None)
    data, kept = batches(kind, missing=missing), []
    data[1][1][:] = label
    data[2][1][data[2][2][:, 0] if missing else slice(2)] = label
    data[3][1][:3] = label
    for inputs, target, *present in data:
        rows = target != label
        if rows.any():
            kept.append(({m: x[rows] for m, x in inputs.items()}, target[rows], *(p[rows] for p in present)))
    if "accumulate" in settings:  # the second batch keeps its place
        kept.insert(1, ({m: x[:0] for m, x in data[1][0].items()}, *(y[:0] for y in data[1][1:])))
    found = []
    for loss, those in ((kind.loss, data), (nn.CrossEntropyLoss(), kept)):
        model, optimizer = make(kind, interaction=interaction)
        trainer = mla.Trainer(model, optimizer, loss=loss, progress=False, **settings)
        history = trainer.fit(those, epochs=1)
        found.append((everything(model, optimizer), history[0]["loss"], trainer.evaluate(those)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12, equal_nan=True)
    assert all(value == value for value in (*found[0][1].values(), *found[0][2]["loss"].values()))


@pytest.mark.parametrize("loss", (F.cross_entropy, functools.partial(F.cross_entropy, ignore_index=1)), ids=("plain", "partial"))
def test_functions_ignore_labels_too(loss):
    label = getattr(loss, "keywords", {}).get("ignore_index", -100)
    kind = Kind(loss, of_classes, None)
    model, optimizer = make(kind)
    data = batches(kind, count=2)
    data[0][1][:], data[1][1][:] = label, 2
    trainer = mla.Trainer(model, optimizer, loss=loss, progress=False)
    assert trainer.fit(data, epochs=1)[0]["loss"]["text"] > 0
    assert trainer.evaluate(data)["samples"] == 7


def test_float64_numbers_of_a_float32_model():
    kind = Kind(nn.HuberLoss(), of_numbers, None, fusion="mean")  # torch's own refuses float64 beside float32
    model, optimizer = make(kind, torch.float32)
    batch = batches(kind, count=1, dtype=torch.float32)[0]
    assert batch[1].dtype == f64
    mla.alternating_step(model, optimizer, batch, loss=kind.loss)


def test_predictions_of_a_batch_with_other_targets_than_classes():
    kind = KINDS["numbers"]
    model, optimizer = make(kind)
    batch = batches(kind, count=1)[0]
    trainer = mla.Trainer(model, optimizer, loss=kind.loss)
    assert_bitwise(trainer.predict(batch).logits, model.predict(batch[0]).logits)


def ordinal(z, y):
    return F.binary_cross_entropy_with_logits(z, (y[:, None] > torch.arange(z.shape[1])).to(z.dtype))


def test_labels_beyond_the_outputs_are_for_a_function_to_understand():
    kind = Kind(ordinal, lambda g, N: torch.randint(CLASSES + 1, (N,), generator=g), None, fusion="mean")
    model, optimizer = make(kind)
    data = batches(kind)
    trainer = mla.Trainer(model, optimizer, loss=ordinal, progress=False)
    trainer.fit(data, epochs=1)
    assert trainer.evaluate(data)["loss"]["fused"] > 0


@pytest.mark.parametrize(
    ("loss", "fusion", "error", "message"),
    (
        (nn.CrossEntropyLoss, "entropy", TypeError, r"loss: expected a function of \(logits, target\)"),
        (0.1, "entropy", TypeError, "loss: expected a function"),
        (nn.CrossEntropyLoss(reduction="sum"), "entropy", ValueError, "loss: expected reduction=\"mean\".*'sum'"),
        (nn.MSELoss(), "entropy", ValueError, 'loss: MSELoss expects MultimodalModel\\(…, fusion="mean"\\)'),
        (nn.BCEWithLogitsLoss(), "entropy", ValueError, "loss: BCEWithLogitsLoss expects"),
    ),
)
def test_losses_that_are_refused(loss, fusion, error, message):
    model, optimizer = make(Kind(loss, None, None, fusion))
    with pytest.raises(error, match=message):
        mla.Trainer(model, optimizer, loss=loss)
    with pytest.raises(error, match=message):
        mla.alternating_step(model, optimizer, (make_inputs(), torch.zeros(6, dtype=torch.int64)), loss=loss)


N = 6
WRONG = {
    "each row's loss": (
        lambda z, y: F.cross_entropy(z, y, reduction="none"),
        torch.zeros(N).long(),
        "entropy",
        "loss: expected a",
    ),
    "a number": (lambda z, y: 1.0, torch.zeros(N).long(), "entropy", "loss: expected a floating 0-d tensor.*got float"),
    "no probabilities": (nn.CrossEntropyLoss(), torch.ones(N, CLASSES), "entropy", 'target: expected int64 .*fusion="mean"'),
    "too few": (
        nn.CrossEntropyLoss(),
        torch.ones(N, 2) / 2,
        "entropy",
        r"target: expected int64 \[N\], or prob.*float32 \[6, 2\]",
    ),
    "numbers as classes": (F.mse_loss, torch.ones(N), "entropy", "target: expected int64"),
    "a class too many": (nn.CrossEntropyLoss(), torch.full((N,), CLASSES), "entropy", "target: expected one that.*out of bounds"),
    "one for three": (nn.MSELoss(), torch.ones(N), "mean", "target: expected one that MSELoss takes.*target size"),
    "one wide for three": (F.mse_loss, torch.ones(N, 1), "mean", "target: expected one that mse_loss takes"),
    "labels as numbers": (nn.PoissonNLLLoss(), torch.ones(N).long(), "mean", "target: expected one that Poisson.*target size"),
    "whole numbers for three": (F.mse_loss, torch.ones(N).long(), "mean", "target: expected one that mse_loss.*target size"),
    "truths": (nn.BCEWithLogitsLoss(), torch.ones(N, CLASSES).bool(), "mean", "target: expected floating of 0 and 1.*bool"),
    "other rows": (nn.MSELoss(), torch.ones(N + 1, CLASSES), "mean", r"inputs\['audio'\]: expected 7 samples to match target"),
    "no tensor": (nn.MSELoss(), [1.0] * N, "mean", r"target: expected a tensor \[N, …\]"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("in_turn", (False, True))
def test_targets_that_are_refused(case, in_turn):
    loss, target, fusion, message = case
    model, optimizer = make(Kind(loss, None, None, fusion), torch.float32)
    before = everything(model, optimizer)
    trainer = mla.Trainer(model, optimizer, loss=loss, in_turn=in_turn, progress=False)
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.fit([(make_inputs(N), target)], epochs=1)
    assert_bitwise(everything(model, optimizer)["model"], before["model"])


def test_a_fusion_that_there_is_not():
    with pytest.raises(ValueError, match="fusion: expected one of entropy, mean, got 'median'"):
        mla.MultimodalModel({"a": nn.Linear(2, 3)}, nn.Linear(3, 2), fusion="median")


def test_a_modality_that_comes_later_votes_on_what_probabilities_named():
    model = mla.MultimodalModel({"a": nn.Linear(2, 4)}, nn.Linear(4, CLASSES))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = mla.MLAOptimizer(sgd, model.head, target="update", bias="project")
    trainer = mla.Trainer(model, optimizer, loss=nn.CrossEntropyLoss(), progress=False)
    x, soft = torch.randn(6, 2), functools.partial(torch.tensor, dtype=torch.float32)
    trainer.fit([({"a": x}, soft([[0.5, 0.3, 0.2]] * 6))], epochs=1)
    trainer.add_modality("b", nn.Linear(2, 4))
    trainer.fit([({"b": x}, soft([[0.7, 0.3, 0.0]] * 6))], epochs=2)
    assert model.seen_by(("a", "b")).tolist() == [[True] * 3, [True, True, False]]


def on_ranks(rank, world):
    """A third of each batch on the first rank, the rest on the second, accumulated in pairs of batches."""
    results = {}
    for name in ("smoothing", "numbers"):
        model, optimizer = make(KINDS[name], interaction=True)
        rows = slice(0, 2) if rank == 0 else slice(2, 7)
        data = [({m: x[rows] for m, x in b[0].items()}, b[1][rows], b[2][rows]) for b in batches(KINDS[name], missing=True)]
        ddp = mla.distribute(model)
        trainer = mla.Trainer(ddp, optimizer, loss=KINDS[name].loss, accumulate=2, progress=False)
        trainer.fit(data, epochs=1)
        results[name] = {n: t.clone() for n, t in model.named_parameters()}, trainer.evaluate(data)["loss"]
    return results


def test_ranks_are_one_process_with_all_samples(tmp_path):
    ranks = run_ranks(on_ranks, 2, tmp_path)
    for name in ranks[0]:
        model, optimizer = make(KINDS[name], interaction=True)
        data = batches(KINDS[name], missing=True)
        trainer = mla.Trainer(model, optimizer, loss=KINDS[name].loss, accumulate=2, progress=False)
        trainer.fit(data, epochs=1)
        assert_bitwise(ranks[0][name], ranks[1][name])
        expected = [t.detach() for t in model.parameters()]
        torch.testing.assert_close([t.detach() for t in ranks[0][name][0].values()], expected, rtol=1e-9, atol=1e-10)
        assert ranks[0][name][1] == pytest.approx(trainer.evaluate(data)["loss"], rel=1e-9)


def ignoring_on_ranks(rank, world):
    """What the second rank has of the first batch is ignored whole, and all of the second batch on both."""
    kind = KINDS["smoothing"]
    model, optimizer = make(kind)
    data = batches(kind)
    data[0][1][3:], data[1][1][:] = -100, -100
    rows = slice(0, 3) if rank == 0 else slice(3, 7)
    data = [({m: x[rows] for m, x in inputs.items()}, target[rows]) for inputs, target in data]
    trainer = mla.Trainer(mla.distribute(model), optimizer, loss=kind.loss, progress=False)
    history = trainer.fit(data, epochs=1)
    return [t.detach().clone() for t in model.parameters()], history[0]["loss"], trainer.evaluate(data)["loss"]


def test_a_rank_all_of_whose_rows_are_ignored(tmp_path):
    ranks = run_ranks(ignoring_on_ranks, 2, tmp_path)
    kind = KINDS["smoothing"]
    model, optimizer = make(kind)
    data = batches(kind)
    data[0][1][3:], data[1][1][:] = -100, -100
    trainer = mla.Trainer(model, optimizer, loss=kind.loss, progress=False)
    trainer.fit(data, epochs=1)
    assert_bitwise(ranks[0], ranks[1])
    torch.testing.assert_close(ranks[0][0], [t.detach() for t in model.parameters()], rtol=1e-9, atol=1e-10)
    assert ranks[0][2] == pytest.approx(trainer.evaluate(data)["loss"], rel=1e-9)
    assert all(value == value for value in ranks[0][1].values())


def test_unpaired_loaders():
    kind = KINDS["numbers"]
    model, optimizer = make(kind)
    inputs, target = batches(kind, count=1)[0]
    loaders = {m: [(x[:4], target[:4]), (x[4:], target[4:])] for m, x in inputs.items()}
    trainer = mla.Trainer(model, optimizer, loss=kind.loss, progress=False)
    history = trainer.fit(loaders, epochs=1)
    other, others = make(kind)
    losses = [
        by_hand(other, others, [({m: x[rows] for m, x in inputs.items()}, target[rows])], kind.by_hand)
        for rows in (slice(0, 4), slice(4, 7))
    ]
    torch.testing.assert_close(everything(model, optimizer), everything(other, others), rtol=1e-9, atol=1e-10)
    assert history[0]["loss"]["text"] == pytest.approx((losses[0]["text"] + losses[1]["text"]) / 2)


def test_the_documentations_example():
    """As it stands on the page, on a few samples."""
    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    inputs = {"audio": torch.randn(12, 4), "image": torch.randn(12, 6)}
    loader = [(inputs, inputs["audio"][:, 0])]
    names = {"encoders": {m: nn.Linear(x.shape[1], 512) for m, x in inputs.items()}, "inputs": inputs}
    names |= {"mla": mla, "torch": torch, "nn": nn, "loader": loader, "held_out": loader}
    exec(compile(code, "losses.md", "exec"), names)
    history = names["trainer"].history
    assert history[-1]["loss"]["audio"] < history[0]["loss"]["audio"]
    assert set(history[-1]["validation"]["loss"]) == {"audio", "image", "fused"}

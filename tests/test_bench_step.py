"""The loops that training steps are checked by and raced with, what is refused a time, and what is reported."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import WIDTHS, everything, labels, make_model, momentum_sgd, normal
from torch import nn

import mla_fast as mla
from bench.throughput import step, timing, training
from bench.throughput.providers import GateError
from bench.throughput.reference_loop import PaperLoop, ReleasedLoop
from bench.throughput.training import Training, WithoutEncoders, Workload
from mla_fast import ops, reference
from mla_fast.encoders import MLP, SmallCNN

f64 = torch.float64
CPU = torch.device("cpu")
needs_cpp = pytest.mark.skipif(not ops.available("cpp"), reason=str(ops.MISSING["cpp"]))
SHAPES = {"audio": (3,), "video": (2, 5, 9)}


def tiny_encoders():
    return {"audio": MLP(3, 7), "video": SmallCNN((2, 5, 9), 7)}


TINY = Workload("resnets", tiny_encoders, SHAPES, SHAPES, s=7, C=3, N=5, bounds={"head": 1e-4, "encoders": 1e-3})


def batches(count, N=6):
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        inputs = {modality: normal(generator, N, width, dtype=f64) for modality, width in WIDTHS.items()}
        yield inputs, labels(generator, N)


def test_the_released_loop_is_the_optimizers_official_arithmetic():
    model, other = make_model(f64), make_model(f64)
    loop = ReleasedLoop(model, momentum_sgd(model.parameters()), batches=2)
    settings = {"projection": "official", "alpha": lambda t: 0.1 if t % 6 < 3 else 0.1**1.5}
    optimizer = mla.MLAOptimizer(momentum_sgd(other.parameters()), other.head, **settings)
    for inputs, target in batches(4):
        loop(inputs, target)
        for modality, x in inputs.items():
            optimizer.zero_grad()
            nn.functional.cross_entropy(other({modality: x})[modality], target).backward()
            optimizer.step(modality=modality)
    torch.testing.assert_close(loop.P, everything(other, optimizer)["layers"]["head"]["P"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-10, atol=1e-12)


def test_the_released_loop_encodes_everything_first():
    model, seen = make_model(f64), []
    for modality, encoder in model.encoders.items():
        encoder.register_forward_hook(lambda *_, modality=modality: seen.append(modality))
    model.head.register_forward_hook(lambda *_: seen.append("head"))
    ReleasedLoop(model, momentum_sgd(model.parameters()), batches=1)(*next(batches(1)))
    assert seen == ["audio", "image", "text", "head", "head", "head"]


def test_the_papers_loop_is_algorithm_1():
    model = mla.MultimodalModel({"a": nn.Identity(), "b": nn.Identity()}, nn.Linear(4, 3, bias=False)).double()
    generator = torch.Generator().manual_seed(5)
    steps = [(normal(generator, 6, 4, dtype=f64), torch.randint(3, (6,), generator=generator)) for _ in range(3)]
    expected, P = reference.algorithm_1(model.head.weight, [s for s in steps for _ in "ab"], 0.3, 0.7)
    loop = PaperLoop(model, torch.optim.SGD(model.parameters(), lr=0.3), "rls", 0.7)
    for x, target in steps:
        loop({"a": x, "b": x}, target)
    torch.testing.assert_close(model.head.weight.detach(), expected)
    torch.testing.assert_close(loop.P, P)


@needs_cpp
def test_every_way_to_train_passes_its_gate(capsys):
    case = step.build(TINY, CPU)
    assert not case.failed and "left out" not in capsys.readouterr().err
    names = ["plain loop", "ours in turn rls", "ours in turn window"]
    whole = ["ours rls", "ours window", "ours interaction window", "joint concat", "released"]
    assert sorted(case.providers) == sorted([*names, *(f"{name} without encoders" for name in names), *whole])


@pytest.mark.parametrize("exact", ["none", "window", "rls"])
@pytest.mark.parametrize("got", [None, "window", "rls"])
def test_one_projection_does_not_pass_for_another(got, exact):
    mlps, _ = training.workloads(CPU)
    for kind, make, right in (
        (Training, training.in_turn, training.paper),
        (WithoutEncoders, training.without_encoders, training.paper_on_features),
    ):
        bench = kind(mlps, CPU)
        gate = partial(bench.gate, bench.model, partial(make, got), partial(right, exact))
        if (got or "none") == exact:
            gate()
        else:
            with pytest.raises(GateError, match="the change of the head"):
                gate()


def quickly(providers, **options):
    return timing.sample(providers, **{**options, "seconds": 0, "rounds": (3, 3), "host_us": 0})


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.throughput.step", "--device", "cpu", *map(str, arguments)])
    monkeypatch.setattr(step, "sample", quickly)
    monkeypatch.setattr(step, "workloads", lambda device: (TINY,))
    step.main()


@needs_cpp
def test_main_measures_compares_and_fails_when_ours_does(monkeypatch, tmp_path, capsys):
    output = tmp_path / "results" / "step.jsonl"
    run(monkeypatch, "--output", output)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    times = [line for line in lines if "provider" in line]
    compared = {line["comparison"]: line for line in lines if "comparison" in line}
    pairs = [pair for pair in step.COMPARED if not {"streams", "graph"} & set(" ".join(pair).split())]  # which are for a GPU
    assert len(times) == 8 + 3 and len(compared) == len(pairs) + 2 and len(lines) == len(times) + len(compared)
    assert all((line["case"], line["machine"]["threads"], line["rounds"]) == ("resnets N=5", 1, 3) for line in times)
    median = {line["provider"]: line["median_us"] for line in times}
    found = compared["ours rls / joint concat"]
    assert found["ratio"] == pytest.approx(median["ours rls"] / median["joint concat"])
    ratio = step.Ratio(found["ratio"], found["low"], found["high"], found["p20"], found["p80"])
    assert (found["target"], found["verdict"]) == step.target("resnets", "ours rls", "joint concat", ratio)
    assert f"| ours rls / joint concat | {found['ratio']:.4f} |" in capsys.readouterr().out

    run(monkeypatch, "--ways", "joint concat,ours rls")
    assert capsys.readouterr().out.count("| 3 |") == 2
    with pytest.raises(SystemExit, match="--ways: expected some of plain loop,.*, got ours"):
        run(monkeypatch, "--ways", "ours,ours rls")

    monkeypatch.setattr(mla, "alternating_step", lambda *_: None)
    with pytest.raises(SystemExit, match="resnets N=5: ours rls: GateError"):
        run(monkeypatch, "--output", output)
    again = [json.loads(line) for line in output.read_text().splitlines()][len(lines) :]
    assert {line.get("provider") for line in again} == {None, *median} - {"ours rls", "ours window", "ours interaction window"}


def test_what_is_compared_by_hand():
    samples = {"plain loop": [100.0, 200.0, 300.0], "ours in turn rls": [110.0, 200.0, 330.0], "ours rls": [100.0, 100.0, 100.0]}
    samples |= {"plain loop without encoders": [10.0, 11.0, 12.0], "ours in turn rls without encoders": [14.0, 17.0, 27.0]}
    batch, added, whole, together = step.compare("resnets", samples)
    assert batch.name == "ours in turn rls / plain loop" and batch.ratio == pytest.approx((1, 1, 1.1, 1.04, 1.1))
    assert added.ratio == pytest.approx((1 + 6 / 200, 1.03, 1.05, 1.034, 1.046))  # of 1.04, 1.03 and 1.05
    assert whole.name == "ours rls / plain loop" and whole.ratio.value == 0.5
    assert (batch.target, batch.verdict, added.verdict, together.verdict) == ("≤ 1.03", "unclear", "unclear", "")
    *_, together = step.compare("mlps", samples)
    assert together.name == "ours in turn rls / ours rls" and (together.ratio.value, together.verdict) == (2, "unclear")


@pytest.mark.parametrize(
    ("key", "interval", "expected"),
    [
        (("resnets", "ours rls", "joint concat"), (1.0, 1.04), ("≤ 1.05", "met")),
        (("resnets", "ours rls", "joint concat"), (1.0, 1.06), ("≤ 1.05", "unclear")),
        (("resnets", "ours rls", "joint concat"), (1.06, 1.2), ("≤ 1.05", "missed")),
        (("mlps", "ours in turn rls", "ours rls"), (1.1, 1.25), ("≥ 1.30", "missed")),
        (("mlps", "ours in turn rls", "ours rls"), (1.35, 1.5), ("≥ 1.30", "met")),
        (("mlps", "ours rls", "joint concat"), (1.35, 1.5), ("", "")),
    ],
)
def test_verdicts(key, interval, expected):
    assert step.target(*key, step.Ratio(1.2, *interval, 0.5, 2.0)) == expected


def test_the_interval_of_a_ratio_holds_the_true_one_and_shrinks_with_the_rounds():
    generator, widths = np.random.default_rng(3), []
    for rounds in (16, 256):
        held = 0
        for _ in range(50):
            busy = generator.lognormal(0, 0.5, rounds)  # of the machine, for both alike
            ours, theirs = busy * generator.lognormal(0, 0.1, rounds), 1.5 * busy * generator.lognormal(0, 0.1, rounds)
            ratio = step.estimate(lambda a, b: a / b, theirs, ours)
            held += ratio.low <= 1.5 <= ratio.high
        assert held >= 45
        widths.append(ratio.high - ratio.low)
    assert widths[1] < widths[0] / 2


def test_the_widths_are_those_of_the_digits():
    pytest.importorskip("sklearn")
    train, _ = mla.data.digits()
    assert {modality: x.shape[1] for modality, x in train.inputs.items()} == training.DIGITS


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.throughput.step", "--device", "cuda"])
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        step.main()

"""Whole paths on a GPU: each does what it does on the CPU, where float64 hand computations have judged it."""

import copy

import numpy as np
import pytest
import torch
from helpers import CLASSES, everything
from test_interaction import batch, by_hand, make

import mla_fast as mla
from mla_fast import cli, data
from mla_fast.baselines import METHODS, Setup, fit_joint
from mla_fast.encoders import M3AE, MLP, CAVMAEAudio, ResNet18

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
f64 = torch.float64


def to_gpu(data):
    inputs, *rest = data
    return {m: x.cuda() for m, x in inputs.items()}, *(t.cuda() for t in rest)


def on_gpu(model, optimizer, **settings):
    """The same model on a GPU, with an optimizer of its own."""
    moved = copy.deepcopy(model).cuda()
    group = optimizer.param_groups[0]
    plain = torch.optim.SGD(moved.parameters(), **{name: group[name] for name in ("lr", "momentum", "weight_decay")})
    return moved, mla.MLAOptimizer(plain, moved.head, projection="window", **settings)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("gradient", ["encoders", "detached"])
@pytest.mark.parametrize("streams", [False, True])
def test_the_interaction_on_a_gpu(gradient, missing, streams):
    model, optimizer = make(gradient=gradient, trained=True, projection="window")
    other, own = on_gpu(model, optimizer)
    other.streams = streams
    for seed in range(5):
        drawn = batch(missing=missing, seed=seed)
        by_hand(model, optimizer, drawn)
        mla.alternating_step(other, own, to_gpu(drawn))
    torch.testing.assert_close({k: v.cpu() for k, v in other.state_dict().items()}, model.state_dict(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("gradient", ["encoders", "detached"])
def test_the_interaction_in_a_graph(gradient, missing):
    model, optimizer = make(gradient=gradient, trained=True, projection="window", dtype=torch.float32)
    runs = []
    for graphed in (True, False):
        own = on_gpu(model, optimizer)
        trainer = mla.Trainer(*own, progress=False, cuda_graph=graphed)
        trainer.fit([to_gpu(batch(missing=missing, seed=seed, dtype=torch.float32)) for seed in range(9)], epochs=2)
        runs.append(everything(*own))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_evaluation_on_a_gpu():
    model, optimizer = make(trained=True)
    batches = [batch(missing=True, seed=seed, N=N) for seed, N in enumerate((9, 5, 1))]
    expected = mla.Trainer(model, optimizer, progress=False).evaluate(batches, use_test=True)
    found = mla.Trainer(*on_gpu(model, optimizer), progress=False).evaluate(batches, use_test=True)
    flat = [{f"{k}.{m}": x for k, v in report.items() for m, x in (v.items() if isinstance(v, dict) else [("", v)])}
            for report in (found, expected)]  # fmt: skip
    torch.testing.assert_close(*flat, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("N,s,C", [(1, 1, 2), (63, 513, 6), (64, 128, 10), (512, 64, 1001)])
def test_the_gradients_of_a_head_on_a_gpu(N, s, C):
    g = torch.Generator().manual_seed(N)
    x, W, b = (torch.randn(*shape, generator=g, dtype=f64) for shape in ((N, s), (C, s), (C,)))
    y = torch.randint(C, (N,), generator=g)
    expected = mla.ops.head_gradients(x, y, W, b, float(N))
    found = mla.ops.head_gradients(x.cuda(), y.cuda(), W.cuda(), b.cuda(), float(N))
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_a_gpu_as_on_the_cpu(method):
    g = torch.Generator().manual_seed(1)
    y = torch.arange(24) % CLASSES
    inputs = {m: torch.randn(24, w, generator=g, dtype=f64) for m, w in (("audio", 3), ("image", 5))}
    states = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = METHODS[method]({m: MLP(x.shape[1], 4) for m, x in inputs.items()}, 4, CLASSES).double().to(device)
        torch.manual_seed(1)
        here = [({m: x.to(device) for m, x in inputs.items()}, y.to(device), None, torch.arange(24, device=device))]
        fit = lambda m, n, here=here: fit_joint(m, torch.optim.SGD(m.parameters(), lr=0.1), here, n)  # noqa: E731
        fit(model, model.prepare(Setup(here, here, fit, 2)))
        states.append({k: v.cpu() for k, v in model.state_dict().items()})
    noise = 0.05 if method == "OGM-GE" else 0  # it draws some, of each device's own generator
    torch.testing.assert_close(*states, rtol=1e-9 + noise, atol=1e-10 + noise)


@pytest.mark.parametrize(
    "make_encoder,shape",
    [
        (lambda: ResNet18(1), (1, 65, 33)),
        (lambda: ResNet18(3), (3, 3, 32, 32)),
        (lambda: M3AE("image", (128, 2, 4), image_size=64), (3, 64, 64)),
        (lambda: CAVMAEAudio(64, (128, 2, 4)), (64, 128)),
    ],
    ids=["spectrogram", "frames", "m3ae", "cavmae"],
)
def test_encoders_on_a_gpu(make_encoder, shape):
    encoder = make_encoder().double().eval()
    x = torch.randn(2, *shape, dtype=f64)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(encoder).cuda()(x.cuda()).cpu(), encoder(x), rtol=1e-8, atol=1e-9)


def saved(path):
    train, _ = data.digits(0)
    some = train.subset(torch.arange(400))
    np.savez(path, **{m: x.numpy() for m, x in some.inputs.items()}, label=some.target.numpy())
    return str(path)


def test_the_command_line_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, names = saved(tmp_path / "digits.npz"), "pixels,fourier,profile"
    common = ["--data", path, "--modalities", names, "--device", "cuda"]
    cli.main(["train", *common, "--epochs", "3", "--output", "trained"])
    cli.main(["train", *common, "--epochs", "3", "--output", "graphed", "--interaction", "4"])
    cli.main(["compare", *common, "--epochs", "2", "--trials", "1", "--seeds", "0", "--jobs", "1", "--output", "compared",
              "--methods", "Concat,OGM-GE,MLA window,MLA + interaction"])  # fmt: skip
    assert (tmp_path / "compared" / "report.html").exists()

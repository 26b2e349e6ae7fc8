"""What MLA is for, on real data: it beats joint training, and the head remembers."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mla_fast as mla
from mla_fast import data
from mla_fast.encoders import encoder_for

AVDIGITS = Path(__file__).parents[2] / "shared" / "data" / "avdigits.npz"


@pytest.mark.skipif(not AVDIGITS.exists(), reason="avdigits.npz is not here")
def test_mla_beats_joint_training_on_spoken_and_handwritten_digits():
    """One seed, half of the epochs; ``python -m bench.accuracy`` is the whole comparison."""
    from bench.accuracy.__main__ import Job, run
    from bench.accuracy.settings import setting

    task = setting(str(AVDIGITS), "B", epochs=10)
    fused = {method: run(Job(task, method, 0, 0.0))["accuracy"]["fused"] for method in ("Sum", "Concat", "MLA rls", "MLA window")}
    joint = max(fused["Sum"], fused["Concat"])
    assert fused["MLA window"] >= joint + 0.02
    assert fused["MLA rls"] >= joint + 0.02


def cross_entropy(model, modality, dataset):
    inputs, target = dataset[:]
    with torch.no_grad():
        return F.cross_entropy(model({modality: inputs[modality]})[modality], target).item()


def train_on(modality, model, optimizer, dataset, epochs, seed):
    trainer = mla.Trainer(model, optimizer, seed=seed, progress=False)
    batches = data.loader(dataset, 64, shuffle=True)
    for _ in range(epochs):
        trainer.fit([({modality: inputs[modality]}, target) for inputs, target in batches], trainer.epoch + 1)


def rises_after_the_other(seed, bias):
    """By how much the loss of one view rises, through the shared head, while another is learned after it: {projection: rise}.

    The same model and P come out of the first view's training; then the head goes on with that P, or without.
    """
    train, test = data.digits(seed)
    torch.manual_seed(seed)
    encoders = {name: encoder_for(train.inputs[name].shape[1:], 64) for name in ("pixels", "fourier")}
    model = mla.MultimodalModel(encoders, nn.Linear(64, 10))
    settings = {"alpha": 0.1, "bias": bias}
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.3), model.head, projection="rls", **settings)
    train_on("pixels", model, optimizer, train, 15, seed)
    learned = cross_entropy(model, "pixels", test)
    rises = {}
    for projection in ("rls", "none"):
        after, remembering = copy.deepcopy((model, optimizer))
        if projection == "none":
            remembering = mla.MLAOptimizer(torch.optim.SGD(after.parameters(), lr=0.3), after.head, projection="none")
        train_on("fourier", after, remembering, train, 15, seed)
        rises[projection] = cross_entropy(after, "pixels", test) - learned
    return rises


@pytest.mark.parametrize("bias", ["free", "project"])
def test_projection_halves_forgetting(bias):
    pytest.importorskip("sklearn")
    for seed in range(5):
        rises = rises_after_the_other(seed, bias)
        assert rises["none"] > 0.01
        assert rises["rls"] <= 0.5 * rises["none"], (seed, rises)

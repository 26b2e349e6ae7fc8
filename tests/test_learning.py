"""What MLA is for, on real data that everyone has: it beats joint training, and the head remembers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mla_fast as mla
from mla_fast import data
from mla_fast.baselines import MLA_SETTINGS, Concat, Sum, fit_joint, joint_accuracy
from mla_fast.encoders import encoder_for


def few_and_noisy(seed):
    """(train, test): scikit-learn's digits, 300 of them to train on, their pixels under noise; no view is enough by itself."""
    generator, parts = torch.Generator().manual_seed(100 + seed), []
    for part, count in zip(data.digits(seed), (300, 450), strict=True):
        pixels = part.inputs["pixels"] + torch.randn(part.inputs["pixels"].shape, generator=generator)
        dataset = data.MultimodalDataset({"pixels": pixels, "fourier": part.inputs["fourier"]}, part.target)
        parts.append(dataset.subset(slice(count)))
    return parts


def accuracy_of(method, train, test, seed):
    """After 20 epochs of the same SGD, from the same encoders: accuracy of each view and of both."""
    torch.manual_seed(seed)
    encoders = {name: encoder_for(x.shape[1:], 64) for name, x in train.inputs.items()}
    batches = data.loader(train, 64, shuffle=True)
    joint = {"Sum": Sum, "Concat": Concat}.get(method)
    model = joint(encoders, 64, 10) if joint else mla.MultimodalModel(encoders, nn.Linear(64, 10))
    sgd = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    if joint:
        fit_joint(model, sgd, batches, 20)
        return joint_accuracy(model, data.loader(test, 500))
    trainer = mla.Trainer(model, mla.MLAOptimizer(sgd, model.head, **MLA_SETTINGS[method]), progress=False)
    trainer.fit(batches, 20)
    return trainer.evaluate(data.loader(test, 500))["accuracy"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 4))])
def test_mla_beats_joint_training(seed):
    """Which learns the pixels by heart and leaves the other view; ``python -m bench.accuracy`` is the whole comparison."""
    parts = few_and_noisy(seed)
    joint = [accuracy_of(method, *parts, seed) for method in ("Sum", "Concat")]
    for method in ("MLA rls", "MLA window"):
        ours = accuracy_of(method, *parts, seed)
        assert ours["fused"] >= max(found["joint"] for found in joint) + 0.02
        assert ours["fourier"] >= max(found["fourier"] for found in joint) + 0.15


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


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 5))])
@pytest.mark.parametrize("bias", ["free", "project"])
def test_projection_halves_forgetting(bias, seed):
    rises = rises_after_the_other(seed, bias)
    assert rises["none"] > 0.01
    assert rises["rls"] <= 0.5 * rises["none"]

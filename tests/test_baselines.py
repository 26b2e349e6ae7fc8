"""Joint training: what the model computes, that it learns, and what it refuses."""

import pytest
import torch
from torch import nn

from mla_fast import data
from mla_fast.baselines import Concat, Sum, fit_joint, joint_accuracy
from mla_fast.encoders import MLP

WIDTHS = {"a": 3, "b": 5}
FUSIONS = {"sum": Sum, "concat": Concat}


def make_model(fusion, s=4, classes=3):
    torch.manual_seed(0)
    return FUSIONS[fusion]({m: MLP(width, s) for m, width in WIDTHS.items()}, s, classes)


def make_inputs(N=6):
    return {m: torch.randn(N, width) for m, width in WIDTHS.items()}


def make_dataset(N=90):
    """Classes that either modality shows."""
    y = torch.arange(N) % 3
    generator = torch.Generator().manual_seed(0)
    shown = {m: nn.functional.one_hot(y, width) + 0.2 * torch.randn(N, width, generator=generator) for m, width in WIDTHS.items()}
    return data.MultimodalDataset(shown, y)


def test_sum_is_one_head_on_the_sum():
    model, inputs = make_model("sum"), make_inputs()
    features = model.encoders["a"](inputs["a"]) + model.encoders["b"](inputs["b"])
    torch.testing.assert_close(model(inputs), model.head(features))
    assert model.modalities == ("a", "b") and model.head.in_features == 4


def test_concat_is_one_head_on_all():
    model, inputs = make_model("concat"), make_inputs()
    features = torch.cat([model.encoders[m](inputs[m]) for m in "ab"], 1)
    torch.testing.assert_close(model(inputs), model.head(features))
    torch.testing.assert_close(model({m: inputs[m] for m in "ba"}), model(inputs))  # the model's order counts, not the batch's


@pytest.mark.parametrize("fusion", ["sum", "concat"])
def test_the_modalities_alone_add_up_to_the_joint_logits(fusion):
    model, inputs = make_model(fusion).double(), {m: x.double() for m, x in make_inputs().items()}
    alone = sum(model({m: x}) - model.head.bias for m, x in inputs.items())
    torch.testing.assert_close(alone + model.head.bias, model(inputs))


@pytest.mark.parametrize("fusion", ["sum", "concat"])
def test_learns(fusion):
    model, dataset = make_model(fusion), make_dataset()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    losses = fit_joint(model, optimizer, data.loader(dataset, 16, shuffle=True), 15, scheduler=scheduler)
    assert len(losses) == 15 and losses[-1] < 0.2 * losses[0] and optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    accuracy = joint_accuracy(model, data.loader(dataset, 32))
    assert set(accuracy) == {"a", "b", "joint"} and accuracy["joint"] > 0.95


def test_accuracy_is_in_evaluation_mode_and_takes_no_gradient():
    model = make_model("sum")
    model.encoders["a"].append(nn.Dropout(0.9))
    first, second = (joint_accuracy(model, data.loader(make_dataset(), 7)) for _ in range(2))
    assert first == second and model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fusion", ["sum", "concat"])
def test_accuracy_alone_is_that_of_the_samples_which_have_it(fusion):
    whole, model = make_dataset(), make_model(fusion)
    present = data.missing_mask(len(whole), 2, 0.5, 1)
    dataset = data.MultimodalDataset(whole.inputs, whole.target, present=present)
    expected = {}
    for m, modality in enumerate("ab"):
        right = model({modality: whole.inputs[modality]}).argmax(1) == whole.target
        expected[modality] = right[present[:, m]].double().mean().item()
    zeros = {m: model.encoders[m](x) * present[:, [i]] for i, (m, x) in enumerate(whole.inputs.items())}
    joined = zeros["a"] + zeros["b"] if fusion == "sum" else torch.cat([zeros["a"], zeros["b"]], 1)
    expected["joint"] = (model.head(joined).argmax(1) == whole.target).double().mean().item()
    assert joint_accuracy(model, data.loader(dataset, 7)) == pytest.approx(expected)


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_leaves_the_mode_as_it_was(training):
    model = make_model("sum").train(training)
    model.encoders["a"].eval()
    joint_accuracy(model, data.loader(make_dataset(), 32))
    with pytest.raises(ValueError, match="^inputs: expected modalities among"):
        joint_accuracy(model, [({"c": torch.zeros(1, 3)}, torch.zeros(1, dtype=torch.long))])
    assert model.training is model.encoders["b"].training is training and not model.encoders["a"].training


def test_refuses():
    with pytest.raises(ValueError, match="encoders: expected at least one modality"):
        Sum({}, 4, 3)
    model = make_model("sum")
    with pytest.raises(ValueError, match="inputs: expected modalities among a, b, got c"):
        model({"c": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="inputs: expected modalities among a, b, got none"):
        model({})
    with pytest.raises(ValueError, match=r"features: expected \[N, 9\] from the encoder of 'a', got \[1, 4\]"):
        Sum({"a": MLP(3, 4)}, 9, 3)({"a": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="loader: expected at least one batch, got none"):
        fit_joint(model, torch.optim.SGD(model.parameters(), lr=0.1), [], 1)

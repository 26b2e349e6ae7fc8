"""Modalities of any name: attributes of a module, dots, percent signs. What is trained under them is what plain names train."""

import copy
import pickle

import pytest
import torch
from helpers import CLASSES, assert_bitwise, momentum_sgd
from ranks import run_ranks
from torch import nn

import mla_fast as mla
from mla_fast.baselines import Concat
from mla_fast.checkpoint import read_checkpoint
from mla_fast.modality_dict import ModalityDict

ODD = {"audio": "type", "image": "a.b", "text": "100%25"}
PLAIN = {name: name for name in ODD}
WIDTH = 4


def named(names):
    """A model and its optimizer, of the same initial values under any names."""
    torch.manual_seed(0)
    encoders = {name: nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh()) for name in names.values()}
    model = mla.MultimodalModel(encoders, nn.Linear(5, CLASSES))
    return model, mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head)


def batches(names, count=3, N=7):
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        inputs = {name: torch.randn(N, WIDTH, generator=generator) for name in names.values()}
        present = torch.rand(N, len(names), generator=generator) < 0.7
        present[0] = True
        made.append((inputs, torch.randint(CLASSES, (N,), generator=generator), present))
    return made


def outcome(model, names, folder):
    """All that a user asks of a model that has been trained, under plain names."""
    trainer = mla.Trainer(model, mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head), seed=0, progress=False)
    history = trainer.fit(batches(names), 2, checkpoint=folder / "checkpoint.pt")
    again = named(names)
    resumed = mla.Trainer(*again, seed=0, progress=False)
    resumed.resume(folder / "checkpoint.pt")
    result = resumed.evaluate(batches(names))
    inputs, _, present = batches(names)[0]
    logits = again[0](inputs)
    plain = {odd: plain for plain, odd in names.items()}
    return {
        "history": [{plain[name]: loss for name, loss in record["loss"].items()} for record in history],
        "accuracy": {plain.get(name, name): value for name, value in result["accuracy"].items()},
        "loss": {plain[name]: value for name, value in result["loss"].items()},
        "predicted": trainer.predict((inputs, present)).logits,
        "logits": [logits[odd] for odd in names.values()],
        "parameters": list(read_checkpoint(folder / "checkpoint.pt")["model"].values()),
    }


def test_training_resuming_evaluating_and_predicting(tmp_path):
    results = [outcome(named(names)[0], names, tmp_path / str(i)) for i, names in enumerate((ODD, PLAIN))]
    assert_bitwise(*results)


def stepped(names, model, optimizer):
    losses = [mla.alternating_step(model, optimizer, batch) for batch in batches(names)]
    return [[loss[odd] for odd in names.values()] for loss in losses], list(model.state_dict().values())


def test_alternating_steps():
    assert_bitwise(stepped(ODD, *named(ODD)), stepped(PLAIN, *named(PLAIN)))


def on_two_ranks(rank, world):
    result = []
    for names in (ODD, PLAIN):
        model = mla.distribute(named(names)[0])
        optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head)
        trainer = mla.Trainer(model, optimizer, progress=False)
        trainer.fit([batches(names)[rank]], 1, checkpoint="checkpoint.pt" if names is ODD else None)
        result.append([t.clone() for t in model.state_dict().values()])
    return model.modalities, result, tuple(read_checkpoint("checkpoint.pt")["model"])


def test_on_two_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, (odd, plain), saved in run_ranks(on_two_ranks, 2, tmp_path):
        assert_bitwise(odd, plain)
        assert saved == tuple(named(ODD)[0].state_dict())  # what was saved fits a model that is not distributed


def test_a_joint_model():
    torch.manual_seed(0)
    encoders = {name: nn.Linear(WIDTH, 5) for name in ODD.values()}
    odd, plain = Concat(encoders, 5, 3), Concat(dict(zip(PLAIN, encoders.values(), strict=True)), 5, 3)
    plain.head = odd.head
    for (x, _, present), (y, _, _) in zip(batches(ODD), batches(PLAIN), strict=True):
        assert torch.equal(odd(x, present), plain(y, present)) and odd.modalities == tuple(ODD.values())


NAMES = [
    "audio",
    "type",
    "values",
    "keys",
    "training",
    "forward",
    "_modules",
    "a.b",
    ".",
    "%",
    "100%",
    "%type",
    "%25type",
    "%2E",
    "ä",
]


def test_names_come_back_and_none_is_taken_for_another():
    modules = ModalityDict({name: nn.Linear(1, 1) for name in NAMES})
    assert list(modules) == list(modules.keys()) == [name for name, _ in modules.items()] == NAMES and len(modules) == len(NAMES)
    assert len(set(modules.state_dict())) == 2 * len(NAMES) and {"audio.weight", "ä.weight"} < set(modules.state_dict())
    for like in (modules, copy.deepcopy(modules), pickle.loads(pickle.dumps(modules))):
        assert list(like) == NAMES and all(
            name in like and torch.equal(like[name].weight, modules[name].weight) for name in NAMES
        )
    last = modules["%2E"]
    assert modules.pop("%2E") is last and "%2E" not in modules and "." in modules and 3 not in modules
    modules["a.b"] = last
    assert modules["a.b"] is last and len(modules) == len(NAMES) - 1


@pytest.mark.parametrize(
    ("encoders", "error", "message"),
    [
        ({"": nn.Identity()}, ValueError, "^encoders: expected names of modalities that are not empty"),
        ({3: nn.Identity()}, TypeError, "^encoders: expected strings as names of modalities, got 3"),
        ({"a": None}, TypeError, r"^encoders\['a'\]: expected an nn.Module, got NoneType"),
        ([nn.Identity()], TypeError, r"^encoders: expected a dict \{modality: module\}, got list"),
    ],
)
def test_what_is_no_name_is_refused(encoders, error, message):
    with pytest.raises(error, match=message):
        mla.MultimodalModel(encoders, nn.Linear(1, 1))


def test_compiled():
    model, _ = named(ODD)
    inputs, _, _ = batches(ODD)[0]
    compiled = torch.compile(lambda x: model(x), fullgraph=True, backend="eager")
    assert_bitwise(compiled(inputs), model(inputs))

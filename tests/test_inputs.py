"""Inputs in containers: what is mapped and moved, counted and described."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import mla_fast as mla
from mla_fast.inputs import describe, leaves, sample_count, sample_counts, to_device, tree_map

Tokens = namedtuple("Tokens", ["ids", "mask"])


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


class Encoding(UserDict):
    """As transformers' BatchEncoding: a mapping that is no dict, with attributes of its own."""

    def __init__(self, data, kind):
        super().__init__(data)
        self.kind = kind


class Stored(MutableMapping):
    """Its items are somewhere else, and a copy of it shares them."""

    def __init__(self, items):
        self.items_ = items

    def __getitem__(self, name):
        return self.items_[name]

    def __setitem__(self, name, value):
        self.items_[name] = value

    def __delitem__(self, name):
        del self.items_[name]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


NESTED = [
    3,
    (),
    [1, [2, (3,)], {}],
    {"b": 1, "a": (2, {"c": 3})},
    Tokens(1, [2, 3]),
    OrderedDict(b=1, a=2),
    defaultdict(list, b=1, a=Tokens(2, 3)),
    Encoding({"ids": 1, "more": Encoding({"mask": [2]}, "b")}, "a"),
]


@pytest.mark.parametrize("nested", NESTED, ids=repr)
def test_a_map_keeps_containers_and_order(nested):
    seen = []
    mapped = tree_map(lambda x: seen.append(x) or -x, nested)
    assert seen == leaves(nested) and type(mapped) is type(nested) and leaves(mapped) == [-x for x in seen]
    assert tree_map(lambda x: -x, mapped) == nested


def test_what_a_tokenizer_returns_stays_what_it_is():
    ids = torch.arange(6).view(3, 2)
    encoding = Encoding({"ids": ids, "mask": ids > 0}, "bert")
    moved = to_device({"text": encoding}, torch.device("meta"))["text"]
    assert type(moved) is Encoding and moved.kind == "bert" and moved["ids"].device.type == "meta"
    assert encoding["ids"] is ids and sample_counts({"text": encoding}) == {"text": 3}  # and the caller's as it was


def test_a_model_learns_from_what_a_tokenizer_returns():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, x):
            assert type(x) is Encoding and x.kind == "bert"
            return (self.table(x["ids"]) * x["mask"][..., None]).sum(1)

    torch.manual_seed(0)
    model = mla.MultimodalModel({"text": Encoder(), "sound": nn.Linear(3, 4)}, nn.Linear(4, 2))
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.head)
    text = Encoding({"ids": torch.arange(8).view(4, 2), "mask": torch.ones(4, 2)}, "bert")
    batch = ({"text": text, "sound": torch.randn(4, 3)}, torch.tensor([0, 1, 0, 1]))
    present = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
    before = model.encoders["text"].table.weight.clone()
    mla.alternating_step(model, optimizer, (*batch, present))
    moved = (model.encoders["text"].table.weight != before).any(1)
    assert moved.tolist() == [True, True, False, False, True, True, True, True, False]  # those of the rows that have text
    trainer = mla.Trainer(model, optimizer, progress=False)
    trainer.fit([batch], 1)
    assert trainer.evaluate([(*batch, present)])["samples"] == 4 and trainer.predict((batch[0], present)).logits.shape == (4, 2)


def test_other_mappings_become_dicts_and_are_not_written_to():
    stored = Stored({"ids": torch.arange(3), "mask": Stored({"a": torch.ones(3)})})
    moved = to_device(stored, torch.device("meta"))
    assert type(moved) is type(moved["mask"]) is dict and moved["mask"]["a"].device.type == "meta"
    assert stored["ids"].device.type == stored["mask"]["a"].device.type == "cpu" and sample_count("inputs", "text", stored) == 3


def test_other_objects_are_leaves():
    pair = Pair(torch.ones(1), torch.ones(1))
    assert leaves({"a": pair, "b": None}) == [pair, None] and tree_map(lambda x: x, [pair])[0] is pair
    with pytest.raises(TypeError, match=r"^inputs\['a'\]: expected a tensor .* got Pair"):
        sample_count("inputs", "a", pair)


def test_tensors_are_moved_and_nothing_else():
    ids, name = torch.arange(3), object()
    moved = to_device({"tokens": Tokens(ids, [ids, name])}, torch.device("meta"))
    assert moved["tokens"].ids.device.type == moved["tokens"].mask[0].device.type == "meta" and moved["tokens"].mask[1] is name
    assert to_device(ids, torch.device("cpu")) is ids


def test_samples_are_counted_in_any_container():
    x = torch.ones(4, 2)
    assert sample_counts({"a": x, "b": Tokens(x, {"m": x[:, 0]})}) == {"a": 4, "b": 4}
    for nothing in ((), torch.tensor(1.0), [x, None], "text"):
        with pytest.raises(TypeError, match=r"^present\[0\]: expected a tensor \[N, …\], or such tensors in"):
            sample_count("present", 0, nothing)
    with pytest.raises(ValueError, match=r"^inputs\['a'\]: expected tensors of the same N, got \(torch.float32 \[4, 2\], torch"):
        sample_count("inputs", "a", (x, x[:3]))
    with pytest.raises(TypeError, match=r"^inputs: expected a dict \{modality: tensor\}, got torch.float32 \[4, 2\]"):
        sample_counts(x)


def test_descriptions():
    assert describe((torch.ones(2), None)) == "(torch.float32 [2], NoneType)"
    assert describe({"a": 1, "b": 2}) == "dict with a, b" and describe([0] * 9) == "list"

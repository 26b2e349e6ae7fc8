"""What fully_shard has split goes on with another number of ranks, by the recipe of docs/ranks.md."""

import functools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, exhaustive, make_inputs, make_model, momentum_sgd
from ranks import run_ranks
from torch.distributed.tensor import DTensor

import mla_fast as mla

PAGE = Path(__file__).parents[1] / "docs" / "ranks.md"
f64, N = torch.float64, 12


def recipe():
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1), names)
    return names


def make(projection, split, seed=0):
    from torch.distributed.fsdp import fully_shard

    model = make_model(dtype=f64, seed=seed)
    for part in (*model.encoders.values(), model.head) if split else ():
        fully_shard(part)
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, projection=projection, bias="project")
    return model, optimizer


def train(model, optimizer, steps, rank, world):
    """Each rank an equal share of N samples."""
    rows = slice(N * rank // world, N * (rank + 1) // world)
    for step in steps:
        modality, y = model.modalities[step % 3], torch.arange(N) % CLASSES
        x = make_inputs(N, seed=step)[modality].to(f64)
        optimizer.zero_grad()
        F.cross_entropy(model({modality: x[rows]})[modality], y[rows]).backward()
        optimizer.step(modality=modality)


def state(model, optimizer):
    """Parameters, momentum and all that the projection keeps, whole."""

    def whole(t):
        return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()

    momentum = [whole(optimizer.state[p]["momentum_buffer"]) for p in model.parameters()]
    layer = optimizer.state_dict()["mla"]["layers"][0]
    return [whole(p) for p in model.parameters()], momentum, layer["tensors"], layer["step"]


def saved(folder, rank, world):
    for projection in ("rls", "window"):
        model, optimizer = make(projection, split=True)
        train(model, optimizer, range(7), rank, world)
        recipe()["save"](model, optimizer, folder / projection)


def loaded(folder, rank, world, split=True):
    found = {}
    for projection in ("rls", "window"):
        model, optimizer = make(projection, split, seed=5)
        recipe()["load"](model, optimizer, folder / projection)
        train(model, optimizer, range(7, 14), rank, world)
        found[projection] = state(model, optimizer)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("world", [1, 4, *exhaustive(3)])
def test_it_loads_on_another_number_of_ranks(tmp_path, world):
    (tmp_path / "two").mkdir()
    run_ranks(functools.partial(saved, tmp_path), 2, tmp_path / "two")
    if world == 1:
        found = [loaded(tmp_path, 0, 1, split=False)]
    else:
        found = run_ranks(functools.partial(loaded, tmp_path), world, tmp_path)
    for projection in ("rls", "window"):
        model, optimizer = make(projection, split=False)
        train(model, optimizer, range(14), 0, 1)
        for of_rank in found:
            torch.testing.assert_close(of_rank[projection][:3], state(model, optimizer)[:3], rtol=1e-10, atol=1e-12)
            assert of_rank[projection][3] == 14

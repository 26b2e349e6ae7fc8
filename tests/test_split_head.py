"""A head that fully_shard has split by rows: alternating_step leaves them where they are, and is one process with all samples."""

import pytest
import torch
from helpers import ALTERNATION, exhaustive, make_inputs, make_model, wrap
from ranks import run_ranks
from test_accounting import Sent
from torch import nn

import mla_fast as mla
from mla_fast.ops import large_head

f64, S, STEPS = torch.float64, 5, 12
# Classes: with these samples the rows stay, or a call puts them together; of five, with one a rank, the last of four has none.
MANY, FEW, ODD = 67, 4, 5
SAMPLES = (7, 4, 0, 2)  # of each rank


def make(classes, split, with_bias=True, **settings):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    model = make_model(dtype=f64, s=S, head=nn.Linear(S, classes, bias=with_bias))
    for part in (*model.encoders.values(), model.head) if split else ():
        fully_shard(part)
    return model, wrap(model, **settings)


def batch_of(rank, step, classes):
    """Samples of a rank; of the first rank's none has text."""
    N, seed = min(SAMPLES[rank], 1 if classes == ODD else 99), 100 * step + rank
    present = torch.rand(N, len(ALTERNATION), generator=torch.Generator().manual_seed(seed)) < 0.7
    present[:, 2] &= rank != 0
    inputs = {m: x.to(f64) for m, x in make_inputs(N, seed=seed).items()}
    for m, here in zip(inputs, present.T, strict=True):
        inputs[m][~here] = torch.nan
    if step == 4 and rank == 1:
        inputs["image"][0] = torch.nan  # of a sample that has it
        present[0, 1] = True
    return inputs, torch.randint(classes, (N,), generator=torch.Generator().manual_seed(seed)), present


def joined(batches):
    inputs = {m: torch.cat([inputs[m] for inputs, _, _ in batches]) for m in ALTERNATION}
    return inputs, *(torch.cat([batch[i] for batch in batches]) for i in (1, 2))


CASES = [
    (MANY, {"projection": "rls"}),
    (MANY, {"projection": "window", "bias": "project", "target": "update"}),
    (MANY, {"projection": "none", "with_bias": False}),
    (ODD, {"projection": "rls", "bias": "project"}),
    (FEW, {"projection": "rls", "target": "update"}),
]


def state(model, optimizer):
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.state_dict().items()}
    return whole, optimizer.state_dict()["mla"]["layers"][0]["tensors"]


def trained(rank, world):
    large_head.FEWEST = 3  # several chunks
    found = []
    for classes, settings in CASES:
        model, optimizer = make(classes, True, **settings)
        losses = []
        for step in range(STEPS):
            losses.append(mla.alternating_step(model, optimizer, batch_of(rank, step, classes)))
            if step == 7:  # which puts the head together
                model.predict({m: x.to(f64) for m, x in make_inputs(2).items()})
        found.append((*state(model, optimizer), losses))
    return found


@pytest.mark.filterwarnings("ignore:step skipped")
@pytest.mark.parametrize("world", [2, *exhaustive(4)])
def test_ranks_are_one_process_with_all_samples(tmp_path, world):
    ranks = run_ranks(trained, world, tmp_path)
    for (classes, settings), *found in zip(CASES, *ranks, strict=True):
        model, optimizer = make(classes, False, **settings)
        losses = [
            mla.alternating_step(model, optimizer, joined([batch_of(rank, step, classes) for rank in range(world)]))
            for step in range(STEPS)
        ]
        for whole, tensors, _ in found:
            torch.testing.assert_close((whole, tensors), state(model, optimizer), rtol=1e-9, atol=1e-11)
        for step, one in enumerate(losses):
            means = {m: torch.stack([of_rank[step][m] for _, _, of_rank in found]).mean() for m in one}
            torch.testing.assert_close(means, one, rtol=1e-9, atol=1e-11, equal_nan=True)


def what_is_sent(rank, world):
    found = []
    for classes in (MANY, FEW):
        model, optimizer = make(classes, True)
        x, y = make_inputs(6, seed=rank)["audio"].to(f64), torch.arange(6) % classes
        for _ in range(2):
            with Sent() as sent:
                mla.alternating_step(model, optimizer, ({"audio": x}, y))
        found.append(sent.log)
    return found


def test_the_rows_stay_where_they_are(tmp_path):
    """Of the head nothing is sent but features, softmax and gradients of features, while there are fewer samples than classes."""
    n, N = 6, 12
    softmax = [n * S + N * S, 2 * n + 2 * N, N, 3 * N]  # features, labels and what they count; the highest, the sums
    for many, few in run_ranks(what_is_sent, 2, tmp_path):
        of_head = [(name, size) for name, size in many if size >= N]
        assert sorted(size for _, size in of_head) == sorted([*softmax, n * S + N * S, *([45] * 2)])  # 45: of the encoder
        assert [name for name, _ in of_head].count("_reduce_scatter_base") == 2
        assert max(size for _, size in many) < MANY * S and 3 * N not in [size for name, size in few if name == "allreduce"]

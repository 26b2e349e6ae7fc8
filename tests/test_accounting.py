"""What ranks send in a step, number by number, and when."""

import torch
import torch.nn.functional as F
from helpers import CLASSES, make_inputs, make_model, momentum_sgd
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mla_fast as mla

S, HIDDEN = 5, 7  # features of the head's two layers
COUNTS = 3 * 3 + 2  # of alternating_step, once a batch: rows, batches and their square of each modality, two flags


class Sent(TorchDispatchMode):
    """Keep the name and the size of every collective in ``log``."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            sizes = [t.numel() for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.log.append((function._schema.name.split("::")[1].rstrip("_"), sum(sizes)))
        return function(*args, **(kwargs or {}))


def make(projection, **settings):
    model = make_model(head=nn.Sequential(nn.Linear(S, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)))
    model = mla.distribute(model)
    return model, mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, projection=projection, **settings)


def parameters(part):
    return sum(p.numel() for p in part.parameters())


def whole_batches(rank, world):
    """alternating_step, after the first two batches, in which DistributedDataParallel settles its buckets."""
    found = []
    for projection in ("rls", "window", "none"):
        model, optimizer = make(projection, target="update")
        for step in range(3):
            batch = make_inputs(6, seed=10 * step + rank), torch.arange(6) % CLASSES
            with Sent() as sent:
                mla.alternating_step(model, optimizer, batch)
        found.append(sent.log)
    return found, [parameters(e) for e in model.encoders.values()], parameters(model.head)


def test_x_bar_is_all_that_is_sent_beside_the_gradients(tmp_path):
    """s + 1 numbers for each layer of the head and modality, whatever the projection; rows are counted once a batch."""
    for found, encoders, head in run_ranks(whole_batches, 2, tmp_path):
        of_modality = [HIDDEN + 1, S + 1, head]  # x̄ of the last layer first, as its gradient comes back first
        for log in found:
            assert {name for name, _ in log} == {"allreduce"}
            assert sorted(size for _, size in log) == sorted([COUNTS, *(3 * of_modality), *encoders])
            assert log[0][1] == COUNTS


def in_flight(rank, world):
    """A loop of one's own: the log of a step, with when the encoder's backward pass begins and when the step is taken."""
    model, optimizer = make("rls")
    for step in range(9):
        modality = model.modalities[step % 3]
        with Sent() as sent:

            def begins(*_, log=sent.log):
                log.append(("encoder's backward pass, in flight:", [len(layer.features.in_flight) for layer in optimizer.layers]))

            x, y = make_inputs(6, seed=10 * step + rank)[modality], torch.arange(6) % CLASSES
            features = model.encoders[modality](x)
            hook = features.register_hook(begins)
            optimizer.zero_grad()
            F.cross_entropy(model.head(features), y).backward()
            hook.remove()
            sent.log.append(("step", 0))
            optimizer.step(modality=modality)
    return sent.log, parameters(model.encoders[modality]), parameters(model.head)


def test_x_bar_travels_during_the_encoders_backward_pass(tmp_path):
    for log, encoder, head in run_ranks(in_flight, 2, tmp_path):
        assert log.index(("allreduce", HIDDEN + 1)) < log.index(("allreduce", S + 1))
        begins = log.index(("encoder's backward pass, in flight:", [1, 1]))
        assert log.index(("allreduce", S + 1)) < begins < log.index(("allreduce", encoder)) < log.index(("step", 0))
        assert sorted(size for name, size in log if name == "allreduce") == sorted([HIDDEN + 1, S + 1, head, encoder])
        assert log[-1] == ("step", 0)  # which sends nothing


def evaluated(rank, world):
    model, optimizer = make("rls")
    with Sent() as sent:
        mla.Trainer(model, optimizer, progress=False).evaluate([(make_inputs(6, seed=rank), torch.arange(6) % CLASSES)])
    return sent.log


def test_evaluating_reduces_three_numbers_of_each_loss(tmp_path):
    """Its sum, its count, and whether there was any."""
    for log in run_ranks(evaluated, 2, tmp_path):
        assert [size for name, size in log if name == "allreduce"] == [3 * 3]

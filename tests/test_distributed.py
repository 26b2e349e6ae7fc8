"""Two and three real processes over gloo against one process that has all the samples."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import (
    ALTERNATION,
    CLASSES,
    assert_bitwise,
    everything,
    exhaustive,
    make_inputs,
    make_model,
    momentum_sgd,
    noisy_model,
)
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mla_fast as mla
from mla_fast.distributed import portable_state_dict

f64 = torch.float64


def batches(count, N, dtype=f64):
    """Whole batches in which modalities are missing: the first third of the samples has no audio, so the first rank has none."""
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        present = torch.rand(N, 3, generator=generator) < 0.7
        present[: N // 3, 0] = False
        inputs = {m: x.to(dtype) for m, x in make_inputs(N, seed=seed).items()}
        made.append((inputs, torch.randint(CLASSES, (N,), generator=generator), present))
    return made


def share(batch, rank, world):
    """The rank's samples: a third or less for the first, the rest in uneven parts."""
    N = len(batch[1])
    bounds = [0, N // 3, N] if world == 2 else [0, N // 3, N // 2, N]
    rows = slice(bounds[rank], bounds[rank + 1])
    inputs, target, present = batch
    return {m: x[rows] for m, x in inputs.items()}, target[rows], present[rows]


def make_optimizer(model, projection="rls", **settings):
    return mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, projection=projection, **settings)


def state(model, optimizer):
    return {**everything(model, optimizer), "model": portable_state_dict(model)}


def together(rank, world):
    """``alternating_step`` on shares of unequal size, for each projection."""
    results = {}
    for projection in ("rls", "window", "none"):
        model = mla.distribute(make_model(dtype=f64))
        optimizer = make_optimizer(model, projection)
        losses = [mla.alternating_step(model, optimizer, share(batch, rank, world)) for batch in batches(12, 18)]
        results[projection] = state(model, optimizer), losses
    return results


@pytest.mark.parametrize("world", [2, *exhaustive(3)])
def test_ranks_are_one_process_with_all_samples(tmp_path, world):
    ranks = run_ranks(together, world, tmp_path)
    for projection in ranks[0]:
        model = make_model(dtype=f64)
        optimizer = make_optimizer(model, projection)
        losses = [mla.alternating_step(model, optimizer, batch) for batch in batches(12, 18)]
        for rank in ranks:
            assert_bitwise(rank[projection][0], ranks[0][projection][0])
        torch.testing.assert_close(ranks[0][projection][0], state(model, optimizer), rtol=1e-9, atol=1e-10)
        for step, expected in enumerate(losses):
            for modality, loss in expected.items():
                mean = sum(rank[projection][1][step][modality] for rank in ranks) / world
                torch.testing.assert_close(mean, loss, rtol=1e-9, atol=1e-12)


def loop(rank, world):
    """The README's loop for 200 steps in float32: batches of 1 + rank, none at all now and then, one modality at a time."""
    results = {}
    for kind in ("parts", "whole"):
        model = make_model()
        target_of = torch.Generator().manual_seed(rank)
        ddp = mla.distribute(model) if kind == "parts" else DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = make_optimizer(ddp if kind == "parts" else model, "rls", target="update")
        started, idle = [], True
        for step in range(200):
            modality = ALTERNATION[step % 3]
            N = 0 if rank == step % 7 else 1 + rank
            x = make_inputs(N, seed=1000 * step + rank)[modality]
            y = torch.randint(CLASSES, (N,), generator=target_of)
            before = {m: e[0].weight.clone() for m, e in model.encoders.items()}
            optimizer.zero_grad()
            F.cross_entropy(ddp({modality: x})[modality], y, reduction="sum").backward()
            started.append(len(optimizer.layers[0].features.in_flight))
            optimizer.step(modality=modality)
            idle &= all(torch.equal(e[0].weight, before[m]) for m, e in model.encoders.items() if m != modality)
        results[kind] = everything(model, optimizer), started, idle
    return results


@pytest.mark.parametrize("world", [2, *exhaustive(3)])
def test_P_is_equal_to_the_last_bit_after_200_steps(tmp_path, world):
    ranks = run_ranks(loop, world, tmp_path)
    for kind in ("parts", "whole"):
        for rank in ranks:
            got, started, idle = rank[kind]
            assert_bitwise(got, ranks[0][kind][0])
            assert started == [1] * 200  # on its way before anyone waits for it
            assert idle
    P = ranks[0]["parts"][0]["layers"]["head"]["P"]
    assert P.trace() < 4.9 and torch.linalg.eigvalsh(P).min() > 0


def matrix(rank, world):
    """Trainer: {float32, bfloat16} × {1, 4 batches accumulated}."""
    results = {}
    for amp in (None, torch.bfloat16):
        for accumulate in (1, 4):
            model = make_model() if world == 1 else mla.distribute(make_model())
            trainer = mla.Trainer(model, make_optimizer(model), amp=amp, accumulate=accumulate, progress=False)
            whole = batches(8, 12, torch.float32)
            history = trainer.fit([share(b, rank, world) if world > 1 else b for b in whole], epochs=2)
            results[str(amp), accumulate] = portable_state_dict(model), history
    return results


def test_trajectories_follow_one_process_in_float64(tmp_path):
    """Bounds from the formats: float32 has 2⁻²⁴, bfloat16 2⁻⁹, after 48 (12 accumulated) steps of size 0.1."""
    one, two = matrix(0, 1), run_ranks(matrix, 2, tmp_path)
    for (amp, accumulate), (got, history) in one.items():
        model = make_model(dtype=f64)
        exact = mla.Trainer(model, make_optimizer(model), accumulate=accumulate, progress=False)
        expected = exact.fit(batches(8, 12), epochs=2)
        bound = 1e-4 if amp == "None" else 0.1
        for state in (got, *(rank[amp, accumulate][0] for rank in two)):
            error = max((state[name] - t).abs().max() for name, t in model.state_dict().items())
            assert error < bound, (amp, accumulate, error)
        for record in (history, *(rank[amp, accumulate][1] for rank in two)):
            assert record[-1]["loss"] == pytest.approx(expected[-1]["loss"], abs=bound)
        assert two[0][amp, accumulate][1] == two[1][amp, accumulate][1]


def sharded(rank, world):
    """A head split by rows: 4 classes over 3 ranks leave the last one without any."""
    from torch.distributed.fsdp import fully_shard

    results = {}
    for projection in ("rls", "window"):
        for target in ("gradient", "update"):
            torch.manual_seed(0)
            head = nn.Linear(5, 4).to(f64)
            fully_shard(head)
            optimizer = make_optimizer(mla.MultimodalModel({"features": nn.Identity()}, head), projection, target=target)
            for step in range(10):
                generator = torch.Generator().manual_seed(100 * step + rank)
                optimizer.zero_grad()
                x = 0.5 + torch.randn(6, 5, generator=generator, dtype=f64)
                if step == 4 and rank == 1:
                    x[0, 0] = torch.nan
                F.cross_entropy(head(x), torch.randint(4, (6,), generator=generator)).backward()
                optimizer.step(modality=str(step % 2))
            projection_state = optimizer.state_dict()["mla"]["layers"][0]["tensors"]
            kept = optimizer.diagnostics()["layers"]["head"]["gradient_kept"]
            results[projection, target] = (
                head.weight.full_tensor().detach(),
                head.bias.full_tensor().detach(),
                projection_state,
                kept,
            )
    return results


@pytest.mark.filterwarnings("ignore:step skipped")
@pytest.mark.parametrize("world", [2, *exhaustive(3)])
def test_a_head_split_by_rows_is_projected_where_its_rows_are(tmp_path, world):
    ranks = run_ranks(sharded, world, tmp_path)
    for (projection, target), (weight, bias, tensors, kept) in ranks[0].items():
        torch.manual_seed(0)
        head = nn.Linear(5, 4).to(f64)
        optimizer = make_optimizer(mla.MultimodalModel({"features": nn.Identity()}, head), projection, target=target)
        for step in range(10):
            if step == 4:
                continue
            draws = [torch.Generator().manual_seed(100 * step + rank) for rank in range(world)]
            x = torch.cat([0.5 + torch.randn(6, 5, generator=g, dtype=f64) for g in draws])
            optimizer.zero_grad()
            F.cross_entropy(head(x), torch.cat([torch.randint(4, (6,), generator=g) for g in draws])).backward()
            optimizer.step(modality=str(step % 2))
        torch.testing.assert_close((weight, bias), (head.weight.detach(), head.bias.detach()), rtol=1e-9, atol=1e-11)
        expected = optimizer.state_dict()["mla"]["layers"][0]["tensors"]
        torch.testing.assert_close(tensors, expected, rtol=1e-9, atol=1e-11)
        for rank in ranks:
            assert_bitwise(rank[projection, target][:3], (weight, bias, tensors))
        assert 0 < kept <= 1


def trained(rank, world):
    """Save in the middle of an epoch, go on from it, evaluate; dropout and BatchNorm draw and count on each rank."""
    folder = trained.folder

    def make(seed=0):
        model = mla.distribute(noisy_model(seed=seed))
        return mla.Trainer(model, make_optimizer(model, "window"), progress=False, seed=rank)

    data = [share(batch, rank, world) for batch in batches(6, 18, torch.float32)]
    whole, first, second = make(), make(), make(seed=5)
    whole.fit(data, 3)
    stop = iter(range(8))
    step = first._train_on
    first._train_on = lambda group: step(group) if next(stop, None) is not None else (_ for _ in ()).throw(KeyboardInterrupt)
    try:
        first.fit(data, 3, checkpoint=folder / "c.pt", checkpoint_every=2)
    except KeyboardInterrupt:
        pass
    second.resume(folder / "c.pt")
    assert (second.epoch, second._position.batches) == (1, 2)
    second.fit(data, 3)
    same = all(
        torch.equal(a, b) for a, b in zip(second.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    )
    second.save(folder / "end.pt")
    return same, (second.history, whole.history), second.evaluate(data)


def trained_in(folder, rank, world):
    trained.folder = folder
    return trained(rank, world)


def test_trainer_saves_resumes_and_evaluates_over_ranks(tmp_path):
    import functools

    results = run_ranks(functools.partial(trained_in, tmp_path), 2, tmp_path)
    for same, (resumed, uninterrupted), _ in results:
        assert same and resumed == uninterrupted
    assert results[0][2] == results[1][2]
    model = noisy_model()
    alone = mla.Trainer(model, make_optimizer(model, "window"), progress=False)
    alone.resume(tmp_path / "end.pt")  # without processes, without distribute
    scores = alone.evaluate(batches(6, 18, torch.float32))
    assert scores["samples"] == results[0][2]["samples"] == 108 and alone.epoch == 3


def refusals(rank, world):
    """What is asked of the caller, by name."""
    model, messages = make_model(), []
    optimizer = make_optimizer(model)
    attempts = [
        lambda: mla.Trainer(model, optimizer),
        lambda: mla.alternating_step(DistributedDataParallel(make_model()), optimizer, batches(1, 6)[0]),
        lambda: make_optimizer(model, process_group="world"),
        lambda: make_optimizer(mla.MultimodalModel({"x": nn.Identity()}, by_columns())),
    ]
    for attempt in attempts:
        try:
            attempt()
            messages.append("nothing")
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    alone, own = (make_optimizer(make_model(), process_group=group) for group in (None, dist.new_group()))
    assert alone.process_group is None and optimizer.process_group is dist.group.WORLD
    assert copy.deepcopy(optimizer).process_group is dist.group.WORLD
    with pytest.raises(TypeError, match="^process_group: .* cannot be copied or pickled"):
        pickle.dumps(own)
    return messages


def disagreements(rank, world):
    """Batches that differ in their modalities, and in their number: an error on every rank, where waiting would last for ever."""
    messages = []
    whole = batches(4, 12, torch.float32)
    for number, without, accumulate in ((4, (0, 1, 2, 3), 1), (3, (), 1), (3, (), 2), (3, (), 4), (4, (1,), 2)):
        model = mla.distribute(make_model())
        trainer = mla.Trainer(model, make_optimizer(model), progress=False, accumulate=accumulate)
        data = [share(batch, rank, world)[:2] for batch in whole]
        if rank:
            keep = [set(inputs) - {"text"} if i in without else inputs for i, (inputs, _) in enumerate(data)]
            data = [({m: inputs[m] for m in k}, target) for k, (inputs, target) in zip(keep, data, strict=True)][:number]
        try:
            trainer.fit(data, epochs=2)
            messages.append("nothing")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_ranks_that_disagree_are_told(tmp_path):
    unlike = "inputs: expected as many batches with {!r} on every rank"
    for never, number, *accumulated, once in run_ranks(disagreements, 2, tmp_path):
        assert never.startswith(unlike.format("text")) and never.endswith("got 1 on 2 ranks")
        assert number == "loader: expected as many batches on every rank, but 1 of 2 have come to their end"
        # The last group of batches is of one on one rank and of two on the other; or the only one, of three and of four.
        assert [message.startswith(unlike.format("audio")) for message in accumulated] == [True, True]
        assert once.startswith(unlike.format("text")) and once.endswith("got 3 on 2 ranks")


def by_columns():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    head, mesh = nn.Linear(4, 3), init_device_mesh("cpu", (dist.get_world_size(),))
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(1)]))
    return head


def test_what_cannot_be_right_is_refused_by_name(tmp_path):
    for messages in run_ranks(refusals, 2, tmp_path):
        for message, expected in zip(
            messages,
            [
                "model: expected mla_fast.distribute(model) where torch.distributed has several processes",
                "model: expected a MultimodalModel (in distributed training mla.distribute's), got DistributedDataParallel(Multi",
                "process_group: expected \"auto\", a ProcessGroup or None, got 'world'",
                "head: expected the weight of head whole or split by rows, [Shard(0)] over a 1-D mesh as fully_shard does, got",
            ],
            strict=True,
        ):
            assert message.startswith(expected), message

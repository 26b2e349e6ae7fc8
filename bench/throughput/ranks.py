"""Steps in several processes: ``python -m bench.throughput.ranks [--ranks 1,2,4] [--output out.jsonl]``; or ``--formulas``.

Each number of ranks is a gloo group of processes of one thread, the parts of the model wrapped by ``mla.distribute``; a batch of
N samples is split over them and takes one step of each modality by ``mla.alternating_step``. The groups take turns, round after
round. More ranks than cores share these: their times are of that, too. ``--formulas`` prints what the same costs on GPUs, as
``costs`` says, in the table of docs/scale.md; nothing of that is measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import mla_fast as mla
from bench.throughput.timing import write_jsonl
from mla_fast.encoders import MLP

INPUT = 256


class Case(NamedTuple):
    """Features s, classes C, modalities M, samples N of all ranks together, and the head's projection."""

    s: int
    C: int
    M: int
    N: int
    projection: str


BASE = Case(512, 100, 2, 256, "rls")
CASES = [
    BASE,
    BASE._replace(projection="window"),
    BASE._replace(s=2048),
    BASE._replace(C=4096),
    BASE._replace(M=4),
    BASE._replace(N=1024),
]


def model_of(case: Case) -> tuple[mla.MultimodalModel, mla.MLAOptimizer]:
    torch.manual_seed(0)
    model = mla.MultimodalModel({f"m{i}": MLP(INPUT, case.s) for i in range(case.M)}, nn.Linear(case.s, case.C))
    model = mla.distribute(model) if dist.get_world_size() > 1 else model
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, mla.MLAOptimizer(sgd, model.head, projection=case.projection, target="update")


def worker(rank: int, world: int, store: str, pipe: Connection) -> None:
    """Take as many steps of a case as the other end asks for, and send the seconds a batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    built: dict[Case, Any] = {}
    while asked := pipe.recv():
        case, count = asked
        if case not in built:
            built = {case: model_of(case)}
        share = case.N // world
        batch = {m: torch.randn(share, INPUT) for m in built[case][0].modalities}, torch.randint(case.C, (share,))
        dist.barrier()
        start = time.perf_counter()
        for _ in range(count):
            mla.alternating_step(*built[case], batch)
        dist.barrier()
        pipe.send((time.perf_counter() - start) / count)
    dist.destroy_process_group()


def measure(ranks: list[int], rounds: int, batches: int) -> list[dict[str, Any]]:
    context, groups = multiprocessing.get_context("spawn"), {}
    for world in ranks:
        store, groups[world] = str(Path(tempfile.mkdtemp()) / "store"), []
        for rank in range(world):
            ours, theirs = context.Pipe()
            context.Process(target=worker, args=(rank, world, store, theirs)).start()
            theirs.close()
            groups[world].append(ours)
    records = []
    for case in CASES:
        times: dict[int, list[float]] = {world: [] for world in ranks}
        for i in range(rounds + 1):
            for world, pipes in groups.items():
                for pipe in pipes:
                    pipe.send((case, batches if i else 3))
                seconds = max(pipe.recv() for pipe in pipes)
                times[world] += [seconds] if i else []  # the first round warms up
        records += [{"op": "ranks", **case._asdict(), "ranks": world, "batch_ms": of(times[world])} for world in ranks]
        print(case, ", ".join(f"{world} ranks {of(times[world]):.1f} ms" for world in ranks), flush=True)
    for pipes in groups.values():
        for pipe in pipes:
            pipe.send(None)
    return records


def of(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


# Of an H200, as its vendor gives them: memory, float32, one direction of NVLink; and a network of 400 Gb/s for each GPU.
# The latency of a hop is assumed.
MEMORY, FLOPS, NVLINK, NETWORK, HOP = 4.8e12, 67e12, 450e9, 50e9, 5e-6


def costs(
    s: int, C: int, M: int, N: int, ranks: int, projection: str, *, sharded: bool = False, encoder: float = 0.0
) -> dict[str, float]:
    """Return the seconds of each part of a batch on one rank of many, and bytes of its memory, by formula.

    N: samples of all ranks together; encoder: parameters of each modality's; sharded: the head's rows are split over the ranks by
    ``fully_shard``, which then send features and sums in place of the head's gradient. A part takes the longer of its arithmetic
    and its traffic.
    """
    n, own = N / ranks, C / ranks if sharded else C
    rows = N if sharded else n  # each rank has the classes of all samples, or all classes of its samples
    link = NVLINK if ranks <= 8 else NETWORK

    def reduced(numbers: float) -> float:  # a ring
        return 0.0 if ranks == 1 else 2 * (ranks - 1) / ranks * 4 * numbers / link + 2 * HOP * max(1, ranks - 1).bit_length()

    step = {"rls": (2 * own * s * s + 4 * s * s, 8 * s * s + 8 * own * s), "window": (4 * (M - 1) * own * s, 8 * own * s)}[
        projection
    ]
    sent = reduced(N * s + 3 * N) if sharded else reduced(own * s)
    return {
        "head": M * max(6 * rows * s * own / FLOPS, 4 * (3 * own * s + 2 * rows * own) / MEMORY),
        "projection": M * max(step[0] / FLOPS, step[1] / MEMORY),
        "x_bar": M * reduced(s + 1),
        "head_sent": M * sent,
        "encoders_sent": M * reduced(encoder),
        "bytes": 4 * (3 * own * s + rows * own + (s * s if projection == "rls" else (M - 1) * s)),
    }


def formulas() -> None:
    """Print the table of docs/scale.md."""
    print("| s | C | GPUs | head's rows | head | rls | window | x̄ | for the head | encoders | memory of the head |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for s, C, ranks, sharded in (
        (512, 1000, 1, False),
        (512, 1000, 8, False),
        (512, 1000, 1024, False),
        (4096, 1000, 1024, False),
        (512, 10**6, 8, False),
        (512, 10**6, 1024, False),
        (512, 10**6, 8, True),
        (512, 10**6, 1024, True),
        (4096, 10**6, 1024, True),
    ):
        rls, window = (costs(s, C, 2, 64 * ranks, ranks, p, sharded=sharded, encoder=86e6) for p in ("rls", "window"))
        times = (rls["head"], rls["projection"], window["projection"], rls["x_bar"], rls["head_sent"], rls["encoders_sent"])
        cells = [
            f"{s:,}",
            f"{C:,}",
            f"{ranks:,}",
            "sharded" if sharded else "whole",
            *map(duration, times),
            f"{rls['bytes'] / 2**30:.2f} GiB",
        ]
        print(f"| {' | '.join(cells)} |")


def duration(seconds: float) -> str:
    return "–" if not seconds else f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def main() -> None:
    parser = argparse.ArgumentParser(description="steps in several processes")
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=10, help="of a turn")
    parser.add_argument("--formulas", action="store_true", help="print the table of docs/scale.md, and measure nothing")
    parser.add_argument("--output", type=Path, help="append JSONL here")
    arguments = parser.parse_args()
    if arguments.formulas:
        return formulas()
    records = measure(arguments.ranks, arguments.rounds, arguments.batches)
    if arguments.output:
        write_jsonl(arguments.output, records)


if __name__ == "__main__":
    main()

"""Training on data larger than memory: ``python -m bench.throughput.memmap [--gb 8] [--output out.jsonl]``.

A folder of .npy arrays, two modalities of float32, is trained on as ``mla-fast train`` does, beside the same model on some of
their rows, standardised and held in memory: `--held-gb`, since the page cache needs room for the files. Each way has a process of
its own, they take turns round after round, with the same model, batch size and loader. Memory is of a process and its workers:
the largest VmRSS that the kernel has seen, mapped files included, and the largest RssAnon of those looked at after each round.
Preparing is the pass for the statistics, and of the other way reading its rows.

Files that were just written are in the page cache, as far as memory holds it; ``--cold`` has it forget them before each round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mla_fast as mla
from bench.throughput.timing import write_jsonl
from mla_fast import data
from mla_fast.encoders import MLP

MODALITIES, CLASSES, BLOCK = ("audio", "image"), 10, 4096


def write(folder: Path, gb: float, width: int) -> int:
    """Write arrays [N, width] of both modalities, which show the class, some rows at a time; return N."""
    N = int(gb * 1e9 / (4 * width * len(MODALITIES)))
    random, target = np.random.default_rng(0), np.arange(N) % CLASSES
    np.save(folder / "label.npy", target)
    for modality in MODALITIES:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (N, width)}
        with open(folder / f"{modality}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, shape)
            for start in range(0, N, BLOCK):
                rows = random.standard_normal((min(BLOCK, N - start), width), np.float32)
                rows[:, :CLASSES] += np.eye(CLASSES, dtype=np.float32)[target[start : start + BLOCK]]
                file.write(rows.tobytes())
    return N


def opened(folder: Path) -> data.MultimodalDataset:
    """Return four fifths of the data, which are read when they are asked for."""
    return data.random_split(data.load(folder, MODALITIES), 0.2, 0)[0]


def held(dataset: data.MultimodalDataset) -> data.MultimodalDataset:
    """Return the same in memory, without a second copy on the way."""
    inputs = {}
    for modality, column in dataset.inputs.items():
        start, inputs[modality] = 0, torch.empty(column.shape)
        for x in dataset.chunks(modality):
            inputs[modality][start : start + len(x)] = x
            start += len(x)
    return dataset.with_inputs(inputs)


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def memory() -> dict[str, float]:
    """Return MiB of this process and its workers as the kernel says: VmRSS at its peak and now, and the parts of the latter.

    What a worker shares with the process that it was forked from counts twice.
    """
    total = dict.fromkeys(("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem"), 0.0)
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        for name in total:
            total[name] += int(lines[name].split()[0]) / 1024
    return total


def worker(way: str, folder: Path, options: argparse.Namespace, pipe: Connection) -> None:
    """Find statistics, or take them over; train as many batches as the other end asks for; send seconds and memory."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dataset, start = opened(folder), time.perf_counter()
    if way == "disk":
        pipe.send(data.statistics(dataset, "feature", {m: "features" for m in MODALITIES}))
        dataset = data.apply_statistics(dataset, pipe.recv())
    else:
        some = dataset.subset(torch.arange(int(len(dataset) * min(1.0, options.held_gb / options.gb))))
        dataset = held(data.apply_statistics(some, pipe.recv()))
    seconds = time.perf_counter() - start
    s = options.features
    encoders = {m: MLP(x.shape[1], s, (2 * s,)) for m, x in dataset.inputs.items()}
    model = mla.MultimodalModel(encoders, nn.Linear(s, CLASSES))
    sgd = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    optimizer = mla.MLAOptimizer(sgd, model.head, projection="window", target="update")
    batches = endless(data.loader(dataset, options.batch_size, shuffle=True, workers=options.workers))
    pipe.send({"prepared_s": seconds, **memory()})
    while count := pipe.recv():
        start = time.perf_counter()
        for _ in range(count):
            mla.alternating_step(model, optimizer, next(batches))
        pipe.send({"s": time.perf_counter() - start, **memory()})


def forget(folder: Path) -> None:
    """Have the page cache forget the arrays."""
    for path in folder.glob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a record of each way: samples a second as median and percentiles over the rounds, and its memory."""
    context, pipes, found, of_train = multiprocessing.get_context("spawn"), {}, {}, None
    for way in ("disk", "memory"):
        pipes[way], theirs = context.Pipe()
        context.Process(target=worker, args=(way, folder, options, theirs)).start()
        theirs.close()  # so that each end sees it when the other is gone
        of_train = of_train or pipes[way].recv()
        pipes[way].send(of_train)
        found[way] = [pipes[way].recv()]
        print(f"{way}: ready in {found[way][0]['prepared_s']:.1f} s", flush=True)
    for i in range(options.rounds + 1):
        for way in random.sample(list(pipes), 2):
            if options.cold and way == "disk":
                forget(folder)
            pipes[way].send(options.batches)
            answer = pipes[way].recv()
            found[way] += [answer] if i else []  # the first round warms up
    for pipe in pipes.values():
        pipe.send(0)
    return [record(way, answers, options) for way, answers in found.items()]


def record(way: str, answers: list[dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    rates = [options.batches * options.batch_size / answer["s"] for answer in answers[1:]]
    fifths = statistics.quantiles(rates, n=5, method="inclusive")
    names = ("gb", "held_gb", "width", "features", "batch_size", "workers", "cold", "batches", "rounds", "threads")
    return {
        "op": "memmap",
        "provider": way,
        **{name: getattr(options, name) for name in names},
        "samples_per_s": statistics.median(rates),
        "p20": fifths[0],
        "p80": fifths[-1],
        "prepared_s": answers[0]["prepared_s"],
        "peak_rss_mb": max(answer["VmHWM"] for answer in answers),
        "peak_rss_anon_mb": max(answer["RssAnon"] for answer in answers),
        "peak_rss_file_mb": max(answer["RssFile"] for answer in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="training on data larger than memory, beside data in memory")
    parser.add_argument("--gb", type=float, default=8.0, help="10^9 bytes of arrays")
    parser.add_argument("--held-gb", type=float, default=2.0, help="of them in memory, so that the page cache has room for all")
    parser.add_argument("--width", type=int, default=2048, help="floats of a row of each modality")
    parser.add_argument("--features", type=int, default=512, help="s: the encoders are MLPs of 2 s and s")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=100, help="of a turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    parser.add_argument("--cold", action="store_true", help="have the page cache forget the files before each turn")
    parser.add_argument("--folder", type=Path, help="keep the arrays there, and take them from there (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="append JSONL here")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "label.npy").exists():
            print(f"{write(folder, options.gb, options.width)} rows in {folder}", flush=True)
        records = measure(folder, options)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    for r in records:
        peaks = ", ".join(f"{name} {r[key]:.0f} MiB" for name, key in (("VmRSS", "peak_rss_mb"), ("RssAnon", "peak_rss_anon_mb")))
        rate, ratio = r["samples_per_s"], r["samples_per_s"] / records[1]["samples_per_s"]
        print(f"{r['provider']:8} {rate:8.0f} samples/s ({r['p20']:.0f} … {r['p80']:.0f}), {ratio:.2f} of memory's; peak {peaks}")
    if options.output:
        write_jsonl(options.output, records)


if __name__ == "__main__":
    main()

"""How fast samples of CREMA-D come from the disk: ``python -m bench.throughput.input_pipeline [--output out.jsonl]``.

A tree of real files is made, 256 clips of 2.5 s of sound at 16 kHz and three JPEG frames of 480 × 360, and read in batches of 64
by two workers: from a cache of ``mla-fast prepare`` and decoded on the fly, by ``datasets.Loader`` and by torch's ``DataLoader``,
in turns. "Loader, bytes" ends where a GPU would take over: what becomes of them there costs the host nothing. Seconds of the
processor, of workers and all, are given beside those on the clock: they bound what a quiet machine does.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import tempfile
import time
import wave
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from bench.records import append
from bench.throughput.timing import machine
from mla_fast.datasets import CremaD, Loader, prepare
from mla_fast.datasets.crema_d import EMOTIONS
from mla_fast.tables import markdown_table

BATCH = 64


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.throughput.input_pipeline", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="append JSONL here")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.clips, arguments.workers, arguments.rounds)
    if arguments.output is not None:
        for row in rows:
            append(arguments.output, {**row, "machine": machine()})
    names = ["source", "loader", "samples_per_s", "cpu_ms_per_sample"]
    print(markdown_table(names, [[str(row[name]) for name in names] for row in rows]))


def measure(folder: Path, clips: int, workers: int, rounds: int) -> list[dict]:
    root, cache = folder / "crema-d", folder / "cache"
    make_clips(root, clips)
    prepare(CremaD(root, "all"), cache, workers=workers, progress=False)
    rows = []
    for source in ("cache", "files"):
        data = CremaD(root, "all", augment=True, cache=cache if source == "cache" else None)
        loaders: dict[str, Callable[[], Iterable]] = {
            "Loader": lambda data=data: Loader(data, BATCH, shuffle=True, workers=workers),
            "Loader, bytes": lambda data=data: Loader(data, BATCH, shuffle=True, workers=workers).compact(),
            "DataLoader": lambda data=data: DataLoader(data, BATCH, shuffle=True, num_workers=workers),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
        for _, (name, make) in itertools.product(range(rounds), loaders.items()):
            times[name].append(pass_over(make()))
        for name, passes in times.items():
            wall, cpu = (statistics.median(each) for each in zip(*passes, strict=True))
            row = {
                "op": "input_pipeline",
                "load": round(os.getloadavg()[0], 1),
                "source": source,
                "loader": name,
                "clips": clips,
                "workers": workers,
            }
            rows.append(row | {"samples_per_s": round(clips / wall, 1), "cpu_ms_per_sample": round(1e3 * cpu / clips, 2)})
    return rows


def pass_over(loader: Iterable) -> tuple[float, float]:
    """Seconds of one pass, workers and their start included: on the clock, and of the processor."""
    started, before = time.perf_counter(), _cpu_seconds()
    for _ in loader:
        pass
    return time.perf_counter() - started, _cpu_seconds() - before


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def make_clips(root: Path, count: int) -> None:
    """Write clips under the names and in the folders of CREMA-D."""
    rng = np.random.default_rng(0)
    for i in range(count):
        name = f"{1001 + i // 6}_IEO_{list(EMOTIONS)[i % 6]}_LO"
        sound = (root / "AudioWAV" / f"{name}.wav", root / "Image-01-FPS" / name)
        sound[0].parent.mkdir(parents=True, exist_ok=True)
        sound[1].mkdir(parents=True)
        with wave.open(str(sound[0]), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(rng.normal(0, 3000, 40000).clip(-32768, 32767).astype("<i2").tobytes())
        for second in range(3):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize((480, 360), Image.Resampling.BICUBIC).save(sound[1] / f"{second:05}.jpg")


if __name__ == "__main__":
    main()

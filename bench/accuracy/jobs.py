"""Jobs that are run unless their records are there, and the command that all studies share."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import records
from bench.accuracy.settings import setting
from bench.records import Record
from mla_fast.cli_options import seeds


def describe(job: Any) -> Record:
    """The part of a record that is known before the run; job: a named tuple with a ``task`` and plain values."""
    fields = job._asdict()
    task = fields.pop("task")
    return {"data": task.data, "config": task.config, "epochs": task.epochs, **fields}


def run_missing(
    jobs: Sequence[Any], run: Callable[[Any], Record], describe: Callable[[Any], Record], path: Path, processes: int
) -> list[Record]:
    """Runs those jobs whose records are not in the file, adds each as soon as it is done, and returns the records of all."""
    names = list(describe(jobs[0]))
    done = {records.key(record, names): record for record in records.read(path)}
    wanted = [records.key(describe(job), names) for job in jobs]
    left = [job for job, key in zip(jobs, wanted, strict=True) if key not in done]
    started = time.perf_counter()
    for count, record in enumerate(_results(left, run, processes), 1):
        records.append(path, record)
        key = records.key(record, names)
        done[key] = record
        print(f"[{count}/{len(left)}, {time.perf_counter() - started:.0f} s] {' '.join(map(str, key))}", flush=True)
    return [done[key] for key in wanted]


def _results(jobs: Sequence[Any], run: Callable[[Any], Record], processes: int) -> Iterator[Record]:
    if processes == 1:
        yield from map(run, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run, jobs)  # in their order, so that the tables of a file are always the same


class Study(NamedTuple):
    """name: of its records, and of its file unless told; jobs: (task, seeds) → named tuples with a ``task``; run: job → what was
    found, beside what the job says already; table: records → Markdown; draw: (records, path) → whether it could."""

    name: str
    jobs: Callable[[Any, Sequence[int]], list]
    run: Callable[[Any], Record]
    table: Callable[[Sequence[Record]], str]
    draw: Callable[[Sequence[Record], Path], bool]
    seeds: str = "0-2"

    def describe(self, job: Any) -> Record:
        return {"study": self.name, **describe(job)}

    def record(self, job: Any) -> Record:
        torch.set_num_threads(1)
        return {**self.describe(job), **self.run(job)}


def main(study: Study, argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"bench.accuracy.studies.{study.name}")
    parser.add_argument("--data", default="digits", help="digits, or avdigits.npz with a --config")
    parser.add_argument("--config")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=seeds, default=seeds(study.seeds))
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--output", type=Path, default=Path(f"{study.name}.jsonl"))
    parser.add_argument("--show", type=Path, help="only the table and the picture of this file")
    arguments = parser.parse_args(argv)
    try:
        if arguments.show is None:
            jobs = study.jobs(setting(arguments.data, arguments.config, epochs=arguments.epochs), arguments.seeds)
            found = run_missing(jobs, study.record, study.describe, arguments.output, arguments.jobs)
        else:
            found = [record for record in records.read(arguments.show) if record.get("study") == study.name]
            if not found:
                raise ValueError(f"{arguments.show}: expected results of bench.accuracy.studies.{study.name}, got none")
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"bench.accuracy.studies.{study.name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(study.table(found))
    study.draw(found, (arguments.show or arguments.output).with_suffix(".png"))

"""Runs spread over ranks: each takes the next one when it has room for it, and the first collects the results of all."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from mla_fast import ranks
from mla_fast.compare.records import Record
from mla_fast.compare.run import Job

TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]  # public, and imported there without being said to be
PAUSE = 0.1  # seconds between looks for results
Work = Callable[[Iterable[Job]], Iterator[Record]]


def spread(jobs: Sequence[Job], work: Work) -> Iterator[Record]:
    """Yield the results of all ranks as they come on the first one, and nothing on the others.

    jobs: the same on all ranks; work: yields the results of jobs, each of which it takes when it has room for it. A run that
    fails ends the work of all; its error is raised on its rank, and RankError on the others.
    """
    store = _open_store()
    with ranks.together():
        if not ranks.is_first():
            _hand_over(jobs, work, store)
            return
        failed: list[Exception] = []
        working = threading.Thread(target=_hand_over, args=(jobs, work, store, failed))
        working.start()
        try:
            yield from _collect(len(jobs), store)
        finally:
            store.set("stop", "")
            working.join()
        if failed:
            raise failed[0]


def _open_store() -> Any:
    """Return what the ranks share, which ends with the first one."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    first = TCPStore(host, 0, is_master=True, wait_for_workers=False) if ranks.is_first() else None
    port = ranks.from_first(lambda: None if first is None else first.port)
    return first or TCPStore(host, port, is_master=False)


def _hand_over(jobs: Sequence[Job], work: Work, store: Any, failed: list[Exception] | None = None) -> None:
    """Work off what no other rank has taken; where it fails, raise the error or keep it."""
    try:
        for record in work(_untaken(jobs, store)):
            store.set(f"result {store.add('results', 1)}", json.dumps(record))
    except Exception as error:
        store.set("stop", "")
        if failed is None:
            raise
        failed.append(error)


def _untaken(jobs: Sequence[Job], store: Any) -> Iterator[Job]:
    while not store.check(["stop"]) and (number := store.add("taken", 1)) <= len(jobs):
        yield jobs[number - 1]


def _collect(count: int, store: Any) -> Iterator[Record]:
    """Yield as many results as there are jobs, or those that there are when the work ends."""
    for number in range(1, count + 1):
        while not store.check([f"result {number}"]):
            if store.check(["stop"]):
                return
            time.sleep(PAUSE)
        yield json.loads(store.get(f"result {number}"))

"""Several processes of one command, as torchrun starts them: who is who, what they agree on, and each one's share of the data."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import os
import socket
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader, Sampler

from mla_fast.data.dataset import Announced
from mla_fast.distributed import RankError, exchange, rank_and_size
from mla_fast.features import world

COMMANDS = ("train", "eval", "compare")  # the others are one process's
LONGEST = datetime.timedelta(days=30)  # runs of a comparison may end hours apart; of ranks that have died torchrun knows
T = TypeVar("T")


def launched() -> int:
    """Return how many processes torchrun has started for this command; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if _by_torchrun() else 1


def _by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def on_this_machine() -> int:
    """Return how many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched())) if launched() > 1 else 1


@contextlib.contextmanager
def silent_but_first() -> Iterator[None]:
    """Print and warn on the first rank alone; errors go to stderr on all."""
    with contextlib.ExitStack() as stack:
        if launched() > 1 and os.environ["RANK"] != "0":
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def joined(command: str, device: str) -> Iterator[None]:
    """Have a process group of all ranks inside, and this rank's GPU where `device` (``--device``) takes one.

    Raises ValueError for a command of one process, and where there are fewer GPUs than ranks on this machine.
    """
    if launched() == 1:
        yield
        return
    if command not in COMMANDS:
        raise ValueError(f"{command}: expected one process, got {launched()}: start it without torchrun")
    backend = _backend(device)
    store, rank, size = next(rendezvous("env://"))
    if on_this_machine() == size:  # the agent's store may be that of the ranks before, whose addresses nobody answers at
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST if command == "compare" else None)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _backend(device: str) -> str:
    """Return what the ranks communicate by, and make this rank's GPU the current one."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "gloo"
    if device not in ("auto", "cuda"):
        raise ValueError(f"--device: expected auto, cpu or cuda under torchrun, with a GPU for each rank, got {device!r}")
    if (gpus := torch.cuda.device_count()) < (needed := on_this_machine()):
        raise ValueError(f"--device: expected a GPU for each of the {needed} ranks on this machine, or cpu, got {gpus} GPUs")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return "cpu:gloo,cuda:nccl"


def device_name(device: str) -> str:
    """Return what ``--device`` means in a process that this rank starts: its own GPU where it takes one."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and several() else device


def several() -> bool:
    return world() is not None


def is_first() -> bool:
    """Whether this is the rank that prints and writes, or the only process."""
    return rank_and_size(world())[0] == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Make an error inside of it one on every rank: the others raise RankError. Nothing inside may wait for another rank."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    exchange(None, world(), failure)


@contextlib.contextmanager
def naming_the_unused() -> Iterator[None]:
    """Raise ValueError that names --encoder for what DistributedDataParallel says of parameters that a pass has not used."""
    try:
        yield
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        raise ValueError(
            "--encoder: expected all parameters to be used in every pass, as ranks wait for all gradients, got one of one's own "
            "where some are not: leave them out, or freeze them with requires_grad_(False)"
        ) from error


def from_first(function: Callable[[], T]) -> T:
    """Return what the first rank's call returns, or raise what it raises, on every rank."""
    value = None
    with together():
        value = function() if is_first() else None
    first: T = exchange(value, world())[0]
    return first


def check_alike(source: Any, facts: Mapping[str, Any]) -> None:
    """Raise RankError on all ranks, for the first of these facts (JSON values) that differs, unless they are the same on all."""
    told = exchange({name: json.dumps(value) for name, value in facts.items()}, world())
    for rank, (name, value) in itertools.product(range(len(told)), told[0].items()):
        if (other := told[rank].get(name)) != value:
            here, there = (text if text is None or len(text) < 80 else f"{text[:77]}…" for text in (value, other))
            raise RankError(f"{source}: expected the same {name} on every rank, got {here} on rank 0 and {there} on rank {rank}")


def digest(values: Tensor) -> str:
    """Return what tells these values from others."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()[:12]


def check_batch_size(size: int) -> None:
    """Raise ValueError unless every rank gets as many samples of a batch."""
    _, ranks = rank_and_size(world())
    if size % ranks:  # also one that is smaller
        raise ValueError(f"--batch-size: expected a multiple of the {ranks} ranks, which share each batch, got {size}")


def check_shared(folder: Path) -> None:
    """Raise RankError on all ranks unless they share the folder, which is made."""
    if not several():
        return
    token = folder / from_first(lambda: f".{uuid.uuid4().hex}")
    with together():
        folder.mkdir(parents=True, exist_ok=True)
        if is_first():
            token.touch()
    seen = exchange(token.exists(), world())
    if is_first():
        token.unlink()
    for rank, there in enumerate(seen):
        if not there:
            raise RankError(f"--output: expected a folder that all ranks share, got another {folder} on rank {rank}")


def has_restarted(marker: Path) -> bool:
    """Whether torchrun has restarted the ranks since this launch of it wrote `marker`; that of another launch is removed."""
    if not _by_torchrun():
        return False
    again = any(exchange(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", world()))

    def look() -> bool:
        if not again:
            marker.unlink(missing_ok=True)
        return marker.exists() and marker.read_text(encoding="utf-8") == _launch()

    return from_first(look)


def mark(marker: Path) -> None:
    """Leave word for a restart that this launch of torchrun has begun."""
    if _by_torchrun():
        marker.write_text(_launch(), encoding="utf-8")


def _launch() -> str:
    """Return what tells this launch of torchrun from others: its identifier, or where there is none the agent's process."""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"


class ShareOfBatches(Sampler[list[int]]):
    """Yield this rank's samples of every batch of a batch sampler.

    One rank after another they are the batch as a single process has it; shares differ by one sample at most.
    """

    def __init__(self, sampler: Any, rank: int, size: int):
        self.sampler, self.rank, self.size = sampler, rank, size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler:
            N = len(batch)
            yield batch[N * self.rank // self.size : N * (self.rank + 1) // self.size]

    def __len__(self) -> int:
        return len(self.sampler)


class EveryOther(Sampler[list[int]]):
    """Yield whole batches of a batch sampler, of K one after another each rank its own."""

    def __init__(self, sampler: Any, rank: int, size: int):
        self.sampler, self.rank, self.size = sampler, rank, size

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(iter(self.sampler), self.rank, None, self.size)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.sampler), self.size))


def share(loader: DataLoader[Any], by: type[ShareOfBatches] | type[EveryOther]) -> DataLoader[Any]:
    """Return a loader (of ``data.loader``) with this rank's share of the batches; the loader itself in a single process.

    by: ``ShareOfBatches`` to train on, ``EveryOther`` to evaluate on, which is the same for any number of ranks.
    """
    if not several():
        return loader
    batches: Any = loader.sampler
    if isinstance(batches, Announced):  # what another rank reads is no concern of this one's disk
        own: Sampler[list[int]] = Announced(by(batches.sampler, *rank_and_size(world())), batches.dataset)
    else:
        own = by(batches, *rank_and_size(world()))
    return DataLoader(loader.dataset, sampler=own, batch_size=None, num_workers=loader.num_workers)

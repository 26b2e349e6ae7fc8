"""Where a run stands inside of an epoch, so that what was interrupted goes on bit for bit."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mla_fast.distributed import exchange
from mla_fast.evaluate import Sums
from mla_fast.inputs import Inputs, describe
from mla_fast.random_state import Replayable, random_states, set_random_states

Loader = Iterable[Any] | Mapping[str, Iterable[Any]]
_FACTOR, _MODULUS = 2654435761, 2**31 - 1  # of labels' marks
_OF_THE_EPOCH = "expected the one that this epoch was begun with (another Trainer begins anew)"


class Taken(NamedTuple):
    """What batches were of, over all ranks the sum of each one's. mark: tells the labels of the batches from others."""

    samples: int
    mark: int | Tensor

    def with_(self, other: Taken) -> Taken:
        return Taken(self.samples + other.samples, (self.mark + other.mark) % _MODULUS)

    def on_host(self) -> Taken:
        return Taken(self.samples, int(self.mark))


def taken(number: int, target: Tensor) -> Taken:
    """Return what the batch of this number in an epoch is of; nobody waits for a device."""
    bits = target.float().view(torch.int32) if target.is_floating_point() else target
    return Taken(len(target), (bits.long() * _FACTOR % _MODULUS).sum() * (number % 1024 + 1))  # of 2^21 labels less than 2^63


class Losses:
    """The losses of an epoch's steps by modality. One that is NaN or infinite, of a step that was skipped, does not count."""

    def __init__(self, sums: Mapping[str, Sequence[Any]] | None = None):
        self._sums = Sums({name: [float(total), float(count)] for name, (total, count) in (sums or {}).items()})
        self._steps: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Keep a copy of a step's losses, each []: a CUDA graph writes over its own, and nobody waits for a device."""
        if losses:
            self._steps.append((tuple(losses), torch.stack(list(losses.values()))))
        if len(self._steps) == 1024:
            self.sums()

    def sums(self) -> Sums:
        """Return [sum, count] of each modality in float64, one step after another; waits for the device."""
        for names, steps in itertools.groupby(self._steps, operator.itemgetter(0)):
            for losses in torch.stack([losses for _, losses in steps]).tolist():
                for name, loss in zip(names, losses, strict=True):
                    finite = math.isfinite(loss)
                    self._sums.add(name, loss if finite else 0.0, int(finite))
        self._steps.clear()
        return self._sums


class Position:
    """The batches of the current epoch that were trained on, their losses, and the random states that its data is drawn with."""

    def __init__(self) -> None:
        self.batches = 0
        self.taken = Taken(0, 0)  # by this rank, in these batches
        self.losses = Losses()
        self.data: dict[str, Any] | None = None  # the states that the epoch's first batch was drawn with
        self.random: dict[str, Any] | None = None  # to go on with, whatever has been drawn since `load`
        self._loaded = False
        self._expected: Taken | None = None  # by all ranks, where another number of them has trained on these batches

    def start_fit(self, seed: int | None, epoch: int) -> None:
        """Set the random states of a run that begins, or goes on."""
        if self.random is not None:
            set_random_states(self.random)
            self.random = None
        elif epoch == 0 and self.batches == 0 and seed is not None:
            torch.manual_seed(seed)

    def begin(
        self, loader: Loader, epoch: int, modalities: tuple[str, ...], group: dist.ProcessGroup | None = None
    ) -> Replayable:
        """Return the epoch's batches, without those that were trained on before."""
        batches, failure = None, None
        try:
            batches = self._begin(loader, epoch, modalities)
        except Exception as error:
            failure = error
        self._check_taken(group, failure)
        assert batches is not None  # or there was a failure
        return batches

    def _begin(self, loader: Loader, epoch: int, modalities: tuple[str, ...]) -> Replayable:
        for sampler in _samplers(loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        generators, now = _generators(loader), random_states()
        again, self._loaded = self._loaded or self.batches > 0, False
        if again:
            self._restore_generators(loader, generators)
        if self.data is None or self.batches == 0:
            states = _states(generators)
            own = self.data["torch"] if self.data else _fresh_state()
            self.data = {**now, "torch": own, "generators": states}
        else:
            set_random_states(self.data)
        begin = (lambda: take_turns(loader, modalities)) if isinstance(loader, Mapping) else (lambda: iter(loader))
        batches = Replayable(begin, self.data["torch"])
        skipped, number = Taken(0, 0), 0
        for batch in itertools.islice(batches, self.batches):
            if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
                raise ValueError(f"loader: {_OF_THE_EPOCH}, of batches (inputs, target, …), got {describe(batch)}")
            skipped, number = skipped.with_(taken(number, batch[1])), number + 1
        if number < self.batches:
            raise ValueError(f"loader: {_OF_THE_EPOCH}, which had at least {self.batches} batches, got one with fewer")
        self.taken = skipped
        if self.batches:
            set_random_states(now)
        return batches

    def _check_taken(self, group: dist.ProcessGroup | None, failure: Exception | None) -> None:
        """Raise ValueError on all ranks where another number of them has trained on other samples in these batches, and the
        failure of a rank that has not read them."""
        expected = self._expected
        if expected is None:
            if failure is not None:
                raise failure
            return
        found = functools.reduce(Taken.with_, exchange(self.taken.on_host(), group, failure))
        if found != expected:
            others = "others" if found.samples == expected.samples else str(found.samples)
            raise ValueError(
                f"loader: expected the batches that this epoch was begun with on another number of ranks, {self.batches} of "
                f"{expected.samples} samples over all of them, got {others}: the batches of all ranks together must stay"
            )
        self._expected = None

    def advance(self, group: Sequence[Sequence[Any]]) -> None:
        """Count batches (inputs, target, …) that were trained on."""
        for batch in group:
            self.taken = self.taken.with_(taken(self.batches, batch[1]))
            self.batches += 1

    def _restore_generators(self, loader: Loader, generators: list[torch.Generator | None]) -> None:
        """Set them to where this epoch began; inside of it the loaders have one where they had one then."""
        assert self.data is not None
        before, own = self.data["generators"], len(_loaders(loader))
        lacking = [[part is None for part in parts[:own]] for parts in (before, generators)]
        if self.batches and lacking[0] != lacking[1]:
            raise ValueError(f"loader: {_OF_THE_EPOCH}, with a generator where that had one, got another")
        for generator, state in zip(generators, before, strict=False):
            if generator is not None and state is not None:
                generator.set_state(state)

    def end_epoch(self, batches: Replayable, loader: Loader) -> None:
        """Begin the next epoch with what the loader draws next."""
        self.batches, self.taken, self.losses = 0, Taken(0, 0), Losses()
        self.data = {**(self.data or {}), "torch": batches.state, "generators": _states(_generators(loader))}

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of a checkpoint."""
        losses = {name: (torch.tensor(total, dtype=torch.float64), n) for name, (total, n) in self.losses.sums().items()}
        return {
            "random": self.random or random_states(),
            "data": self.data,
            "losses": losses,
            "taken": tuple(self.taken.on_host()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = Losses(state["losses"])
        self.data, self._loaded, self._expected = state["data"], state["data"] is not None, state.get("expected")
        self.taken = Taken(*state.get("taken", (0, 0)))
        self.random = state["random"]
        set_random_states(state["random"])


def shared_anew(states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """Return a rank's part of a checkpoint that another number of ranks has saved inside of an epoch.

    Raises ValueError for one from before these could go on. Whether the loaders give the batches that those ranks had shows when
    the epoch begins.
    """
    first, K = states[0], len(states)
    if not all("taken" in state for state in states):
        raise ValueError(f"expected {K} ranks, by an mla_fast that did not say yet what they had trained on")
    names = dict.fromkeys(name for state in states for name in state["losses"])
    losses = {}  # every rank the mean, so that a batch of before counts as one of now does
    for name in names:
        pairs = [state["losses"][name] for state in states if name in state["losses"]]
        losses[name] = (torch.stack([total for total, _ in pairs]).sum() / K, sum(number for _, number in pairs) / K)
    expected = functools.reduce(Taken.with_, [Taken(*state["taken"]) for state in states])
    own = tuple(expected) if rank == 0 else (0, 0)  # so that what is saved before the epoch goes on adds up to it
    return {**first, "random": states[rank % K]["random"], "losses": losses, "taken": own, "expected": expected}


def batches_in(loader: Loader) -> int | None:
    """Return how many batches an epoch of a loader has; None of several loaders, and of one that does not know."""
    try:
        return None if isinstance(loader, Mapping) else len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterator, or a DataLoader of one
        return None


def _fresh_state() -> Tensor:
    """Return a state for the data alone, or the model would draw the very numbers that the data has drawn."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ()))).get_state()


def _loaders(loader: Loader) -> list[Iterable[Any]]:
    return list(loader.values()) if isinstance(loader, Mapping) else [loader]


def _samplers(loader: Loader) -> Iterator[Any]:
    """Yield all that decide on the order, and what they ask."""
    for one in _loaders(loader):
        for sampler in (getattr(one, "sampler", None), getattr(one, "batch_sampler", None)):
            while sampler is not None:
                yield sampler
                sampler = getattr(sampler, "sampler", None)


def _generators(loader: Loader) -> list[torch.Generator | None]:
    """Return what each loader, then each sampler, draws from in place of the global one; None where it has none, or none yet."""
    found = [getattr(one, "generator", None) for one in (*_loaders(loader), *_samplers(loader))]
    return [generator if isinstance(generator, torch.Generator) else None for generator in found]


def _states(generators: list[torch.Generator | None]) -> list[Tensor | None]:
    return [None if generator is None else generator.get_state() for generator in generators]


def take_turns(loaders: Mapping[str, Iterable[Any]], modalities: tuple[str, ...]) -> Iterator[tuple[dict[str, Inputs], Tensor]]:
    """Yield one batch of each modality after another, until the longest loader has ended; shorter ones begin anew."""
    unknown = [m for m in loaders if m not in modalities]
    if unknown or not loaders:
        raise ValueError(f"loader: expected modalities among {', '.join(modalities)}, got {', '.join(loaders) or 'none'}")
    iterators = {m: iter(loaders[m]) for m in modalities if m in loaders}
    first_pass = set(iterators)
    while True:
        turn = {m: next(iterators[m], None) for m in iterators}
        first_pass -= {m for m, batch in turn.items() if batch is None}
        if not first_pass:
            return
        for modality, batch in turn.items():
            if batch is None:
                iterators[modality] = iter(loaders[modality])
                batch = next(iterators[modality], None)
            if batch is None:
                raise ValueError(f"loader: expected at least one batch of {modality!r}, got none")
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"loader: expected batches (x, target) of {modality!r}, got {describe(batch)}")
            x, y = batch
            yield {modality: x}, y

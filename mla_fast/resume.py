"""Where a run stands inside of an epoch, so that what was interrupted goes on bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mla_fast.distributed import all_reduce_sum
from mla_fast.evaluate import Sums
from mla_fast.inputs import Inputs, describe
from mla_fast.random_state import Replayable, random_states, set_random_states

Loader = Iterable[Any] | Mapping[str, Iterable[Any]]
_OF_THE_EPOCH = "expected the one that this epoch was begun with (another Trainer begins anew)"


class Position:
    """The batches of the current epoch that were trained on, their losses, and the random states that its data is drawn with."""

    def __init__(self) -> None:
        self.batches = self.rows = 0  # the latter this rank's
        self.losses = Sums()  # in float64, by modality
        self.data: dict[str, Any] | None = None  # the states that the epoch's first batch was drawn with
        self.random: dict[str, Any] | None = None  # to go on with, whatever has been drawn since `load`
        self._loaded = False
        self._expected: int | None = None  # rows of all ranks, where another number of them has trained on these batches

    def start_fit(self, seed: int | None, epoch: int) -> None:
        """Set the random states of a run that begins, or goes on."""
        if self.random is not None:
            set_random_states(self.random)
            self.random = None
        elif epoch == 0 and self.batches == 0 and seed is not None:
            torch.manual_seed(seed)

    def begin(self, loader: Loader, epoch: int, modalities: tuple[str, ...]) -> Replayable:
        """Return the epoch's batches, without those that were trained on before."""
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
        taken = [len(batch[1]) for batch in itertools.islice(batches, self.batches)]
        if len(taken) < self.batches:
            raise ValueError(f"loader: {_OF_THE_EPOCH}, which had at least {self.batches} batches, got one with fewer")
        self.rows = sum(taken)
        if self.batches:
            set_random_states(now)
        return batches

    def check_rows(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Raise ValueError on all ranks where another number of them has trained on other samples in these batches."""
        expected, self._expected = self._expected, None
        if expected is not None:
            found = int(all_reduce_sum(torch.tensor(self.rows), group, device))
            if found != expected:
                raise ValueError(
                    f"loader: expected the batches that this epoch was begun with on another number of ranks, {self.batches} of "
                    f"{expected} samples in all, got {found} samples: keep the batch size times the ranks"
                )

    def advance(self, group: Sequence[Sequence[Any]]) -> None:
        """Count batches (inputs, target, …) that were trained on."""
        self.batches, self.rows = self.batches + len(group), self.rows + sum(len(batch[1]) for batch in group)

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
        self.batches, self.rows, self.losses = 0, 0, Sums()
        self.data = {**(self.data or {}), "torch": batches.state, "generators": _states(_generators(loader))}

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of a checkpoint."""
        losses = {modality: (total.cpu(), number) for modality, (total, number) in self.losses.items()}
        return {"random": self.random or random_states(), "data": self.data, "losses": losses, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.losses = Sums({modality: [total.to(device), number] for modality, (total, number) in state["losses"].items()})
        self.data, self._loaded, self._expected = state["data"], state["data"] is not None, state.get("expected")
        self.random = state["random"]
        set_random_states(state["random"])


def shared_anew(states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """Return a rank's part of a checkpoint that another number of ranks has saved inside of an epoch.

    Raises ValueError where those have not drawn their batches alike: what each of them has trained on is then not known here.
    """
    first, K = states[0], len(states)
    if any(not _alike(first["data"], state["data"]) for state in states[1:]):
        raise ValueError(f"expected {K} ranks, which have drawn their batches each by itself")
    names = dict.fromkeys(name for state in states for name in state["losses"])
    losses = {}  # every rank the mean, so that a batch of before counts as one of now does
    for name in names:
        pairs = [state["losses"][name] for state in states if name in state["losses"]]
        losses[name] = (torch.stack([total for total, _ in pairs]).sum() / K, sum(number for _, number in pairs) / K)
    rows = sum(state.get("rows", 0) for state in states)
    return {**first, "random": states[rank % K]["random"], "losses": losses, "expected": rows}


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the data of an epoch are drawn alike from both."""
    pairs = [(one["torch"], other["torch"]), *zip(one["generators"], other["generators"], strict=True)]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


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

"""``Trainer``: the MLA loop, thin enough to read before you decide to write your own."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mla_fast import graph
from mla_fast.alternating import (
    can_step_together,
    check_belong,
    row_totals,
    rows_by_modality,
    steps_in_turn,
    steps_together,
    unpack_batch,
)
from mla_fast.callbacks import flatten
from mla_fast.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from mla_fast.distributed import (
    added_up,
    is_distributed,
    load_portable_state_dict,
    of_all_ranks,
    portable_state_dict,
    rank_and_size,
)
from mla_fast.graph import GraphedStep
from mla_fast.head import FROZEN
from mla_fast.inputs import Inputs, counts, moved, outline
from mla_fast.model import MultimodalModel
from mla_fast.ops.dispatch import dispatch
from mla_fast.ops.fusion import Fused
from mla_fast.optimizer import MLAOptimizer
from mla_fast.random_state import Replayable, random_states, set_random_states


class Trainer:
    """Trains a ``MultimodalModel`` one modality at a time (eqs. 1–5) and evaluates it alone and fused (eqs. 6–8).

    A batch is ``(inputs: {modality: [N, …]}, target: int64 [N])``, optionally with ``present: bool [N, M]`` over
    ``model.modalities``; absent entries of the inputs may hold anything and are not read. In each batch every modality takes one
    optimizer step on the rows that have it, in the order of ``model.modalities``; one that no row has takes none.

    Args:
        model, optimizer: what to train and the ``MLAOptimizer`` over its parameters, with its head. Where torch.distributed has
            several processes, ``mla_fast.distribute(model)``, and a loader with a share of every batch on each.
        scheduler: a learning-rate scheduler, stepped once an epoch; ``ReduceLROnPlateau`` sees the mean training loss.
        device: where batches go; by default where the model is.
        seed: set for torch's global generator when the first epoch begins, so that shuffling and dropout repeat.
        progress: show a progress bar while training on a terminal.
        amp: dtype of autocast for the forward passes, torch.bfloat16 or, with a scaler, torch.float16.
        scaler: a ``torch.amp.GradScaler``; a step that overflows moves nothing, P included.
        accumulate: batches whose mean gradient (and mean x̄), over all their rows, makes one step of each modality.
        clip_norm: longest gradient of a step, its modality's encoder and the head together; clipped before it is projected.
        backward: in place of ``loss.backward()``, as ``fabric.backward`` or ``accelerator.backward``.
        callbacks: called with a copy of each epoch's record; ``mla_fast.callbacks`` has one for TensorBoard.
        in_turn: take every step with a backward pass of its own, for wrapped optimizers whose step is more than one of each
            parameter by itself.
        cuda_graph: replay CUDA graphs of whole batches; see ``GraphedStep``. What it cannot capture (a scaler, clipping,
            accumulation, ranks, batches of several loaders) is trained on eagerly, with a warning that says so.

    Batches are trained on by ``alternating_step``, or in turn where scaler, accumulate, clip_norm, backward or a model that it
    refuses ask for it: the same steps, one backward pass for each.
    """

    def __init__(
        self,
        model: MultimodalModel,
        optimizer: MLAOptimizer,
        *,
        scheduler: Any = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        progress: bool = True,
        amp: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        backward: Callable[[Tensor], Any] | None = None,
        callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
        in_turn: bool = False,
        cuda_graph: bool = False,
    ):
        check_belong(model, optimizer)
        if optimizer.process_group is not None and not is_distributed(model):
            raise ValueError(
                "model: expected mla_fast.distribute(model) where torch.distributed has several processes "
                "(or MLAOptimizer(…, process_group=None), to train a model in each)"
            )
        if not _is_count(accumulate) or accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1 batch, got {accumulate!r}")
        if clip_norm is not None and not (isinstance(clip_norm, Real) and clip_norm > 0):
            raise ValueError(f"clip_norm: expected a positive number or None, got {clip_norm!r}")
        if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
            raise TypeError(f"callbacks: expected a sequence of functions of an epoch's record, got {callbacks!r}")
        if backward is not None and not callable(backward):
            raise TypeError(f"backward: expected a function of the loss, got {backward!r}")
        if scheduler is not None and (isinstance(scheduler, type) or not hasattr(scheduler, "step")):
            raise TypeError(f"scheduler: expected a learning-rate scheduler, got {scheduler!r}")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler: expected a torch.amp.GradScaler or None, got {scaler!r}")
        if amp not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"amp: expected torch.bfloat16, torch.float16 or None, got {amp!r}")
        if amp is torch.float16 and scaler is None:
            raise ValueError(
                "scaler: expected a torch.amp.GradScaler with amp=torch.float16, whose small gradients vanish, got None"
            )
        if scaler is not None and backward is not None:
            raise ValueError("backward: expected None with a scaler, whose scaled loss goes backward, got both")
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.seed, self.progress = seed, progress
        self.amp, self.scaler, self.accumulate, self.clip_norm = amp, scaler, accumulate, clip_norm
        self.backward, self.callbacks = backward, tuple(callbacks)
        self.in_turn = in_turn or bool(scaler or clip_norm or backward)
        self._graphed = self._graphed_step() if cuda_graph else None
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] | None = None
        # Of the epoch that is going on: batches trained on, their losses, and the random states that the first was drawn with.
        self._batches = 0
        self._losses: dict[str, list] = {}  # sum, in float64, and number of each modality's
        self._data_states: dict[str, Any] | None = None
        self._resumed = False
        self._random_states: dict[str, Any] | None = None  # to begin with, whatever has been drawn since resume

    def _graphed_step(self) -> GraphedStep | None:
        """None, and a warning, where the settings leave nothing to capture."""
        if self.optimizer.device.type not in graph.DEVICES:
            raise ValueError(f"cuda_graph: expected False where the model is on {self.optimizer.device}, got True")
        asked = {
            "scaler": self.scaler is not None,
            "clip_norm": self.clip_norm is not None,
            "backward": self.backward is not None,
            "accumulate": self.accumulate > 1,
            "in_turn": self.in_turn,
        }
        if (name := next((name for name, given in asked.items() if given), None)) is not None:
            reason = f"{name} was given, for which modalities take their steps one after another"
        elif not can_step_together(self.model):
            reason = "parts of the model share parameters, or it has a forward of its own"
        else:
            return GraphedStep(self.model, self.optimizer, amp=self.amp)
        warnings.warn(f"cuda_graph: steps are taken eagerly: {reason}", stacklevel=3)
        return None

    def fit(
        self,
        loader: Iterable | Mapping[str, Iterable],
        epochs: int,
        *,
        validation: Iterable | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        patience: int | None = None,
        monitor: str = "validation/accuracy/fused",
    ) -> list[dict[str, Any]]:
        """Trains until `epochs` epochs are done in all, those before a ``resume`` included; returns ``history``.

        loader: of batches, or unpaired, {modality: a loader of (x [N, …], target [N])}; MLA needs no pairs to train. Unpaired,
        the modalities take turns, and an epoch lasts as long as the longest loader: the others begin anew when they end.
        Each epoch adds ``{"epoch", "loss": {modality: mean}, "projection": {layer: ‖GP‖/‖G‖}}``, and ``"validation"`` if asked
        for. With `checkpoint` the state is saved there after every epoch, and after every `checkpoint_every` batches. With
        `patience`, stops once `monitor`, a path into the record, has not become better for that many epochs: larger, or
        smaller for a loss. Raises ValueError for a batch that does not fit the model.
        """
        check_belong(self.model, self.optimizer)
        for name, value in (("epochs", epochs), ("checkpoint_every", checkpoint_every), ("patience", patience)):
            if not (value is None or _is_count(value) or (name == "epochs" and value == math.inf)):
                raise ValueError(f"{name}: expected a whole number, got {value!r}")
        if checkpoint_every is not None and (checkpoint is None or checkpoint_every < 1):
            raise ValueError(f"checkpoint_every: expected at least 1 batch, and a checkpoint to write to, got {checkpoint_every}")
        if patience is not None and patience < 1:
            raise ValueError(f"patience: expected at least 1 epoch or None, got {patience}")
        if patience is not None and validation is None and monitor.startswith("validation/"):
            raise ValueError(f"validation: expected a loader, for patience to monitor {monitor!r}, got None")
        if self._random_states is not None:
            set_random_states(self._random_states)
            self._random_states = None
        elif self.epoch == 0 and self._batches == 0 and self.seed is not None:
            torch.manual_seed(self.seed)
        save = None if checkpoint is None else lambda: self.save(checkpoint)
        while self.epoch < epochs and not self._stopped(patience, monitor):
            batches = self._train_epoch(loader, epochs, save, checkpoint_every)
            record: dict[str, Any] = {"epoch": self.epoch + 1, "loss": self._mean_losses(), "projection": self._kept()}
            if validation is not None:
                record["validation"] = self.evaluate(validation)
                if not record["validation"]["samples"]:
                    raise ValueError("validation: expected at least one sample in each epoch, got none")
            self._end_epoch(record, batches, loader)
            if save is not None:
                save()
            for callback in self.callbacks:
                callback(copy.deepcopy(record))
        return self.history

    def _end_epoch(self, record: dict[str, Any], batches: Replayable, loader: Iterable | Mapping[str, Iterable]) -> None:
        """From here on the epoch is done; one that fails before is gone on with by the next ``fit``."""
        self._step_scheduler(record["loss"])
        self.history.append(record)
        self.epoch += 1
        self._batches, self._losses = 0, {}
        self._data_states = {**self._data_states, "torch": batches.state, "generators": _states(_generators(loader))}

    def _stopped(self, patience: int | None, monitor: str) -> bool:
        """Told by the history alone, so that a resumed run stops where it would have."""
        if patience is None or not self.history:
            return False
        flat = [flatten(record) for record in self.history]
        if monitor not in flat[-1]:
            raise ValueError(f"monitor: expected one of {', '.join(flat[-1])}, got {monitor!r}")
        sign = -1 if "loss" in monitor.split("/")[:2] else 1
        values = [sign * record.get(monitor, float("nan")) for record in flat]
        best = max(range(len(values)), key=lambda i: values[i] if values[i] == values[i] else -float("inf"))
        return len(values) - 1 - best >= patience

    def _kept(self) -> dict[str, float]:
        """‖GP‖/‖G‖ of each layer of the head in its last step; says so once if it has frozen."""
        layers = self.optimizer.diagnostics()["layers"]
        frozen = [name for name, layer in layers.items() if layer["frozen"]]
        before = self.history[-1]["projection"] if self.history else {}
        if frozen and not any(kept < FROZEN for kept in before.values()):
            warnings.warn(
                f"{', '.join(frozen)}: less than a thousandth of the gradient is left after the projection, so this layer has "
                'stopped learning; raise alpha, or use projection="window", which does not shrink',
                stacklevel=3,
            )
        return {name: layer["gradient_kept"] for name, layer in layers.items()}

    def _step_scheduler(self, loss: dict[str, float]) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(sum(loss.values()) / len(loss))
        elif self.scheduler is not None:
            self.scheduler.step()

    def _train_epoch(
        self, loader: Iterable | Mapping[str, Iterable], epochs: int, save: Callable[[], None] | None, every: int | None
    ) -> Replayable:
        """Trains on what is left of the epoch; returns its batches, all taken."""
        self.model.train()
        batches = self._begin(loader)
        unpaired = isinstance(loader, Mapping)
        try:
            total = None if unpaired else len(loader)
        except TypeError:  # an iterator, or a DataLoader of one
            total = None
        # disable=None: no bar where the output is not a terminal
        with tqdm(
            desc=f"epoch {self.epoch + 1}/{epochs}",
            total=total,
            initial=self._batches,
            leave=False,
            disable=None if self.progress else True,
        ) as bar:
            while group := list(itertools.islice(batches, self.accumulate * (len(loader) if unpaired else 1))):
                for modality, loss in self._train_on(group).items():
                    _add(self._losses, modality, loss if modality in self._losses else loss.double(), 1)
                before, self._batches = self._batches, self._batches + len(group)
                if save is not None and every is not None and self._batches // every > before // every:
                    save()
                bar.update(len(group))
        if self.optimizer.process_group is not None:
            row_totals(self.model, self.optimizer, [])  # the others must have come to their end, too
        return batches

    def _mean_losses(self) -> dict[str, float]:
        if not self._losses:
            raise ValueError(
                "loader: expected at least one batch with a sample in it in every epoch (a generator lasts for one), "
                f"got none in epoch {self.epoch + 1}"
            )
        sums = self._over_ranks(self._losses, self.model.modalities)
        return _means({modality: both for modality, both in sums.items() if both[1]})

    def _begin(self, loader: Iterable | Mapping[str, Iterable]) -> Replayable:
        """The epoch's batches, without those that were trained on before."""
        for sampler in _samplers(loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        generators, now = _generators(loader), random_states()
        again, self._resumed = self._resumed or self._batches > 0, False
        if again:
            self._restore_generators(loader, generators)
        if self._batches == 0:
            states = _states(generators)
            own = self._data_states["torch"] if self._data_states else _fresh_state()
            self._data_states = {**now, "torch": own, "generators": states}
        else:
            set_random_states(self._data_states)
        begin = (lambda: _take_turns(loader, self.model.modalities)) if isinstance(loader, Mapping) else (lambda: iter(loader))
        batches = Replayable(begin, self._data_states["torch"])
        if sum(1 for _ in itertools.islice(batches, self._batches)) < self._batches:
            raise ValueError(f"loader: {_OF_THE_EPOCH}, which had at least {self._batches} batches, got one with fewer")
        if self._batches:
            set_random_states(now)
        return batches

    def _restore_generators(self, loader: Iterable | Mapping[str, Iterable], generators: list[torch.Generator | None]) -> None:
        """To where this epoch began; inside of it the loaders have one where they had one then."""
        before, own = self._data_states["generators"], len(_loaders(loader))
        lacking = [[part is None for part in parts[:own]] for parts in (before, generators)]
        if self._batches and lacking[0] != lacking[1]:
            raise ValueError(f"loader: {_OF_THE_EPOCH}, with a generator where that had one, got another")
        for generator, state in zip(generators, before, strict=False):
            if generator is not None and state is not None:
                generator.set_state(state)

    def _train_on(self, group: list[tuple]) -> dict[str, Tensor]:
        """One step of each modality; the mean losses."""
        if self._graphed is not None and len(group) == 1:
            return self._graphed(group[0])
        if self._graphed is not None:
            self._graphed.say("the modalities come from loaders of their own")
        batches = [unpack_batch(self.model, b, self.device) for b in group]
        rows = [rows_by_modality(self.model, *batch) for batch in batches]
        totals = row_totals(self.model, self.optimizer, rows)
        each_once = sum(map(len, rows)) == len({modality for r in rows for modality in r})
        if each_once and not self.in_turn and can_step_together(self.model):
            once = {modality: part for r in rows for modality, part in r.items()}
            return steps_together(self.model, self.optimizer, once, totals, self.amp)
        return steps_in_turn(self.model, self.optimizer, rows, totals, self.amp, self.scaler, self.clip_norm, self.backward)

    @torch.no_grad()
    def evaluate(self, loader: Iterable) -> dict[str, Any]:
        """``{"samples", "loss", "accuracy"}``: each modality alone, over the samples that have it, and two ways of fusing.

        loss is the mean cross-entropy of each modality; accuracy, as fractions, has each modality, over the samples that have it,
        and over those that have any ``"average"`` (of the logits that are present) and ``"fused"`` (entropy-weighted); NaN for
        what no sample had. Logits that are NaN are wrong. Over the samples of all ranks, those included that a
        ``DistributedSampler`` gives twice.
        """
        samples, correct, loss = {}, {}, {}
        for batch in loader:
            inputs, target, present = unpack_batch(self.model, batch, self.device)
            N = len(target)
            here = target.new_ones(N, len(inputs), dtype=torch.bool) if present is None else self.model.columns(present, inputs)
            plan = dispatch(here, tuple(inputs))
            logits = self.model.packed_logits(inputs, None if present is None else plan)
            parts, targets = logits.split(plan.counts), plan.pack([target] * len(inputs))
            some = here.any(1)
            _add(samples, "all", 0, N)
            for modality, z, y in zip(inputs, parts, targets, strict=True):
                _add(loss, modality, F.cross_entropy(z, y, reduction="sum"), len(y))
                _add(correct, modality, _right(z, y).sum(), len(y))
            average = sum(plan.unpack(list(parts)))  # as good as the mean for the largest class
            for name, z in (("average", average), ("fused", plan.fuse(logits).logits)):
                _add(correct, name, (_right(z, target) & some).sum(), some.sum())
        samples = self._over_ranks(samples, ["all"])
        loss = self._over_ranks(loss, self.model.modalities)
        correct = self._over_ranks(correct, (*self.model.modalities, "average", "fused"))
        return {"samples": int(samples["all"][1]) if samples else 0, "loss": _means(loss), "accuracy": _means(correct)}

    def _over_ranks(self, sums: dict[str, list], names: Sequence[str]) -> dict[str, list]:
        """Sums and counts of all ranks together, of which some may have seen none of the names."""
        group = self.optimizer.process_group
        if group is None:
            return sums
        both = [[float(total), float(count)] for total, count in (sums.get(name, (0, 0)) for name in names)]
        return dict(zip(names, added_up(torch.tensor(both, dtype=torch.float64), group, self.device).tolist(), strict=True))

    def predict(self, batch: Mapping[str, Inputs] | tuple) -> Fused:
        """``model.predict`` on the trainer's device for ``inputs``, ``(inputs, present)`` or a batch as in training."""
        inputs, *rest = (batch,) if isinstance(batch, Mapping) else batch
        if not isinstance(inputs, Mapping):
            raise TypeError(f"batch: expected inputs: dict, (inputs, present) or a batch as in training, got {outline(batch)}")
        counts(inputs)
        present = rest[-1] if rest else None
        if len(rest) == 1 and present is not None and present.dim() == 1 and present.dtype != torch.bool:
            present = None  # it is the target
        inputs = {modality: moved(x, self.device) for modality, x in inputs.items()}
        return self.model.predict(inputs, present.to(self.device) if isinstance(present, Tensor) else present)

    def save(self, path: str | Path, *, config: dict[str, Any] | None = None) -> None:
        """Writes all it takes to continue, atomically; `config` (JSON values, else TypeError) is kept for your own use.

        In distributed training every rank calls it, and the first one writes; processes without ``distribute`` can read it too.
        """
        if config is not None:
            self.config = json.loads(json.dumps(config))  # so that it can be read back without pickle
        group = self.optimizer.process_group
        losses = {modality: (total.cpu(), number) for modality, (total, number) in self._losses.items()}
        random = self._random_states or random_states()
        payload = {
            "epoch": self.epoch,
            "batches": self._batches,
            "history": self.history,
            "model": portable_state_dict(self.model),
            **{name: None if part is None else part.state_dict() for name, part in self._parts().items()},
            "kinds": self._kinds(),
            "ranks": of_all_ranks({"random": random, "data": self._data_states, "losses": losses}, group),
            "config": self.config,
        }
        failure = None
        if rank_and_size(group)[0] == 0:
            try:
                write_checkpoint(path, payload)
            except (OSError, TypeError) as error:
                failure = error
        failure = of_all_ranks(failure, group)[0]  # and it is there for all of them, or for none
        if failure is not None:
            raise failure

    def _parts(self) -> dict[str, Any]:
        """What has a state beside the model."""
        scaler = self.scaler if self.scaler is not None and self.scaler.is_enabled() else None
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": scaler}

    def _kinds(self) -> dict[str, str]:
        wrapped = {**self._parts(), "optimizer": self.optimizer.optimizer}
        return {name: "none" if part is None else type(part).__name__ for name, part in wrapped.items()}

    def _load_parts(self, path: str | Path, saved: dict[str, Any]) -> None:
        """All, or CheckpointError and none."""
        parts = {name: part for name, part in self._parts().items() if part is not None}
        before, settings = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}, self.optimizer.settings
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        except Exception as error:
            for name, part in parts.items():
                part.load_state_dict(before[name])
            raise CheckpointError(f"{path}: its {name} does not fit: {error}") from error
        if self.optimizer.settings != settings:
            warnings.warn(
                f"resume: the projection goes on as it was saved, {self.optimizer.settings}, not {settings}", stacklevel=3
            )

    def resume(self, path: str | Path) -> None:
        """Continues from ``save``, in the middle of an epoch too: bitwise, with as many ranks, where what is random in the loader
        draws from torch's global generator, from the loader's own, or from a seed of its own as ``DistributedSampler`` does;
        workers that persist over epochs do not. The projection's settings are those that were saved.

        Raises CheckpointError (a ValueError) or FileNotFoundError, and changes nothing, if the file does not fit.
        """
        saved = read_checkpoint(path)
        _check_fits(path, portable_state_dict(self.model), saved["model"])
        for name, kind in self._kinds().items():
            if saved["kinds"][name] != kind:
                raise CheckpointError(f"{path}: expected it to be saved with {name} {kind}, got {saved['kinds'][name]}")
        rank, size = rank_and_size(self.optimizer.process_group)
        if saved["batches"] and len(saved["ranks"]) != size:
            raise CheckpointError(
                f"{path}: saved inside of an epoch by {len(saved['ranks'])} processes, which {size} cannot go on with"
            )
        self._load_parts(path, saved)
        load_portable_state_dict(self.model, saved["model"])
        self.epoch, self.history, self.config = saved["epoch"], saved["history"], saved["config"]
        self._batches = saved["batches"]
        if rank < len(saved["ranks"]):
            own = saved["ranks"][rank]
            self._losses = {modality: [total.to(self.device), number] for modality, (total, number) in own["losses"].items()}
            self._data_states, self._resumed = own["data"], own["data"] is not None
            self._random_states = own["random"]
            set_random_states(own["random"])


_OF_THE_EPOCH = "expected the one that this epoch was begun with (another Trainer begins anew)"


def _fresh_state() -> Tensor:
    """A state for the data's own, or the model would draw the very numbers that the data has drawn."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ()))).get_state()


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


def _loaders(loader: Iterable | Mapping[str, Iterable]) -> list[Iterable]:
    return list(loader.values()) if isinstance(loader, Mapping) else [loader]


def _samplers(loader: Iterable | Mapping[str, Iterable]) -> Iterator[Any]:
    """All that decide on the order, and what they ask."""
    for one in _loaders(loader):
        for sampler in (getattr(one, "sampler", None), getattr(one, "batch_sampler", None)):
            while sampler is not None:
                yield sampler
                sampler = getattr(sampler, "sampler", None)


def _generators(loader: Iterable | Mapping[str, Iterable]) -> list[torch.Generator | None]:
    """What each loader, then each sampler, draws from in place of the global one; None where it has none, or none yet."""
    found = [getattr(one, "generator", None) for one in (*_loaders(loader), *_samplers(loader))]
    return [generator if isinstance(generator, torch.Generator) else None for generator in found]


def _states(generators: list[torch.Generator | None]) -> list[Tensor | None]:
    return [None if generator is None else generator.get_state() for generator in generators]


def _take_turns(loaders: Mapping[str, Iterable], modalities: tuple[str, ...]) -> Iterator[tuple[dict[str, Inputs], Tensor]]:
    """One batch of each modality after another, until the longest loader has ended; shorter ones begin anew."""
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
                raise TypeError(f"loader: expected batches (x, target) of {modality!r}, got {outline(batch)}")
            x, y = batch
            yield {modality: x}, y


def _add(sums: dict[str, list], key: str, value: Tensor | int, count: Tensor | int) -> None:
    """Adds to a running [sum, count]; what is a tensor stays on its device."""
    total = sums.setdefault(key, [0, 0])
    total[0], total[1] = total[0] + value, total[1] + count


def _right(logits: Tensor, target: Tensor) -> Tensor:
    """bool [N]; a NaN counts as the largest, and is wrong."""
    largest, classes = logits.max(1)
    return (classes == target) & (largest == largest)


def _means(sums: dict[str, list]) -> dict[str, float]:
    return {name: float(total) / float(count) if count else float("nan") for name, (total, count) in sums.items()}


def _check_fits(path: str | Path, model: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """load_state_dict copies what fits before it complains about the rest; so look first."""
    expected, got = ({name: tuple(getattr(t, "shape", ())) for name, t in state.items()} for state in (model, saved))
    if list(expected) != list(got) and expected == got:
        raise CheckpointError(f"{path}: expected the model's parameters in the same order, which the optimizer counts them in")
    if expected != got:
        names = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        differences = ", ".join(f"{name} {expected.get(name, 'none')} ≠ {got.get(name, 'none')}" for name in names[:4])
        raise CheckpointError(f"{path}: expected a checkpoint of this model, but (model ≠ checkpoint) {differences}")

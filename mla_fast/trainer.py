"""``Trainer``: the MLA loop, thin enough to read before you decide to write your own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mla_fast.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from mla_fast.dispatch import dispatch
from mla_fast.fusion import Fused
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer


class Trainer:
    """Trains a ``MultimodalModel`` one modality at a time (eqs. 1–5) and evaluates it alone and fused (eqs. 6–8).

    A batch is ``(inputs: {modality: [N, …]}, target: int64 [N])``, optionally with ``present: bool [N, M]`` over
    ``model.modalities``; absent entries of the inputs may hold anything and are not read. In each batch every modality takes one
    optimizer step on the rows that have it, in the order of ``model.modalities``; one that no row has takes none.

    Args:
        model, optimizer: what to train and the ``MLAOptimizer`` over its parameters, with its head.
        scheduler: a learning-rate scheduler, stepped once an epoch; ``ReduceLROnPlateau`` sees the mean training loss.
        device: where batches go; by default where the model is.
        seed: set for torch's global generator when the first epoch begins, so that shuffling and dropout repeat.
        progress: show a progress bar while training on a terminal.
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
    ):
        if not isinstance(model, MultimodalModel):
            raise TypeError(f"model: expected a MultimodalModel, got {type(model).__name__}")
        if not isinstance(optimizer, MLAOptimizer):
            raise TypeError(f"optimizer: expected an MLAOptimizer, got {type(optimizer).__name__}")
        modules = set(model.modules())
        if not any(layer.module in modules for layer in optimizer.layers):
            raise ValueError("optimizer: expected an MLAOptimizer whose head is in the model, got one for another head")
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.seed, self.progress = seed, progress
        self._classes = _classes(model.head)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] | None = None

    def fit(
        self,
        loader: Iterable | Mapping[str, Iterable],
        epochs: int,
        *,
        validation: Iterable | None = None,
        checkpoint: str | Path | None = None,
    ) -> list[dict[str, Any]]:
        """Trains until `epochs` epochs are done in all, those before a ``resume`` included; returns ``history``.

        loader: of batches, or unpaired, {modality: a loader of (x [N, …], target [N])}; MLA needs no pairs to train. Unpaired,
        the modalities take turns, and an epoch lasts as long as the longest loader: the others begin anew when they end.
        Each epoch adds ``{"epoch", "loss": {modality: mean}}``, and ``"validation"`` if asked for. With `checkpoint` the state is
        saved there after every epoch. Raises ValueError for a batch that does not fit the model.
        """
        if self.epoch == 0 and self.seed is not None:
            torch.manual_seed(self.seed)
        while self.epoch < epochs:
            record: dict[str, Any] = {"epoch": self.epoch + 1, "loss": self._train_epoch(loader, epochs)}
            self._step_scheduler(record["loss"])
            if validation is not None:
                record["validation"] = self.evaluate(validation)
            self.history.append(record)
            self.epoch += 1
            if checkpoint is not None:
                self.save(checkpoint)
        return self.history

    def _step_scheduler(self, loss: dict[str, float]) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(sum(loss.values()) / len(loss))
        elif self.scheduler is not None:
            self.scheduler.step()

    def _train_epoch(self, loader: Iterable | Mapping[str, Iterable], epochs: int) -> dict[str, float]:
        self.model.train()
        losses: dict[str, list[Tensor]] = {}
        batches = _take_turns(loader, self.model.modalities) if isinstance(loader, Mapping) else loader
        # disable=None: no bar where the output is not a terminal
        bar = tqdm(batches, desc=f"epoch {self.epoch + 1}/{epochs}", leave=False, disable=None if self.progress else True)
        for batch in bar:
            for modality, x, y in self._steps(*self._unpack(batch)):
                losses.setdefault(modality, []).append(self._train_step(modality, x, y))
        if not losses:
            raise ValueError("loader: expected at least one batch with a sample in it, got none")
        return {modality: torch.stack(values).mean().item() for modality, values in losses.items()}

    def _steps(self, inputs: dict[str, Tensor], target: Tensor, present: Tensor | None) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(modality, inputs, targets) of each optimizer step of a batch, without the rows that a modality lacks."""
        inputs = {modality: inputs[modality] for modality in self.model.modalities if modality in inputs}
        targets = [target] * len(inputs)
        if present is not None:
            plan = dispatch(self.model.columns(present, inputs), tuple(inputs))
            inputs, targets = plan.pack(inputs), plan.pack(targets)
        for (modality, x), y in zip(inputs.items(), targets, strict=True):
            if len(y):
                yield modality, x, y

    def _train_step(self, modality: str, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model({modality: x})[modality], y)
        loss.backward()
        self.optimizer.step(modality=modality)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, loader: Iterable) -> dict[str, Any]:
        """``{"samples", "loss", "accuracy"}``: each modality alone, over the samples that have it, and two ways of fusing.

        loss is the mean cross-entropy of each modality; accuracy has each modality, ``"average"`` (of the logits that are
        present) and ``"fused"`` (entropy-weighted), as fractions; NaN for what no sample had.
        """
        samples, correct, loss = 0, {}, {}
        for batch in loader:
            inputs, target, present = self._unpack(batch)
            N = len(target)
            samples += N
            here = target.new_ones(N, len(inputs), dtype=torch.bool) if present is None else self.model.columns(present, inputs)
            plan = dispatch(here, tuple(inputs))
            logits = self.model.packed_logits(inputs, None if present is None else plan)
            parts, targets = logits.split(plan.counts), plan.pack([target] * len(inputs))
            for modality, z, y in zip(inputs, parts, targets, strict=True):
                _add(loss, modality, F.cross_entropy(z, y, reduction="sum"), len(y))
                _add(correct, modality, (z.argmax(1) == y).sum(), len(y))
            average = sum(plan.unpack(list(parts)))  # as good as the mean for the largest class
            _add(correct, "average", (average.argmax(1) == target).sum(), N)
            _add(correct, "fused", (plan.fuse(logits).logits.argmax(1) == target).sum(), N)
        return {"samples": samples, "loss": _means(loss), "accuracy": _means(correct)}

    def predict(self, batch: Mapping[str, Tensor] | tuple) -> Fused:
        """``model.predict`` on the trainer's device for ``inputs``, ``(inputs, present)`` or a batch as in training."""
        inputs, *rest = (batch,) if isinstance(batch, Mapping) else batch
        present = next((t for t in rest if t is not None and t.dtype == torch.bool), None)
        inputs = {modality: x.to(self.device, non_blocking=True) for modality, x in inputs.items()}
        return self.model.predict(inputs, None if present is None else present.to(self.device))

    def save(self, path: str | Path, *, config: dict[str, Any] | None = None) -> None:
        """Writes all it takes to continue, atomically; `config` (JSON values, else TypeError) is kept for your own use."""
        if config is not None:
            self.config = json.loads(json.dumps(config))  # so that it can be read back without pickle
        rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
        payload = {
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "rng": rng,
            "config": self.config,
        }
        write_checkpoint(path, payload)

    def resume(self, path: str | Path) -> None:
        """Continues from ``save``: bitwise, if the loader shuffles with torch's global generator. The projection's settings are
        those that were saved.

        Raises CheckpointError (a ValueError) or FileNotFoundError, and changes nothing, if the file does not fit.
        """
        saved = read_checkpoint(path)
        _check_fits(path, self.model, saved["model"])
        if (saved["scheduler"] is None) != (self.scheduler is None):
            raise CheckpointError(
                f"{path}: expected it to be saved {'without' if self.scheduler is None else 'with'} a scheduler"
            )
        self.optimizer.load_state_dict(saved["optimizer"])
        self.model.load_state_dict(saved["model"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.epoch, self.history, self.config = saved["epoch"], saved["history"], saved["config"]
        torch.set_rng_state(saved["rng"]["cpu"])
        if torch.cuda.is_available() and len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])

    def _unpack(self, batch: Any) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """(inputs, target, present) on the device, or an error that says what is wrong with the batch."""
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3) or not isinstance(batch[0], Mapping):
            raise TypeError(f"batch: expected (inputs: dict, target) or (inputs, target, present), got {_outline(batch)}")
        inputs, target, present = batch if len(batch) == 3 else (*batch, None)
        unknown = [m for m in inputs if m not in self.model.encoders]
        if unknown or not inputs:
            raise ValueError(f"inputs: expected modalities among {', '.join(self.model.modalities)}, got {', '.join(inputs)}")
        if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.dim() != 1:
            raise TypeError(f"target: expected int64 [N], got {_outline(target)}")
        for modality, x in inputs.items():
            if len(x) != len(target):
                raise ValueError(f"inputs[{modality!r}]: expected {len(target)} samples to match target, got {len(x)}")
        if target.device.type == "cpu" and len(target) and self._classes is not None:
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= self._classes:
                raise ValueError(f"target: expected labels in 0 … {self._classes - 1}, got {low if low < 0 else high}")
        if present is not None:
            self.model.columns(present, inputs)
            present = present.to(self.device, non_blocking=True)
        on_device = {modality: x.to(self.device, non_blocking=True) for modality, x in inputs.items()}
        return on_device, target.to(self.device, non_blocking=True), present


def _take_turns(loaders: Mapping[str, Iterable], modalities: tuple[str, ...]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """One batch of each modality after another, until the longest loader has ended; shorter ones begin anew."""
    unknown = [m for m in loaders if m not in modalities]
    if unknown or not loaders:
        raise ValueError(f"loader: expected modalities among {', '.join(modalities)}, got {', '.join(loaders) or 'none'}")
    iterators = {m: iter(loaders[m]) for m in modalities if m in loaders}
    running, begun = set(iterators), set()
    while running:
        for modality in iterators:
            batch = next(iterators[modality], None)
            if batch is None:
                running.discard(modality)
                if not running:
                    return
                if modality not in begun:
                    raise ValueError(f"loader: expected at least one batch of {modality!r}, got none")
                iterators[modality] = iter(loaders[modality])
                batch = next(iterators[modality])
            begun.add(modality)
            x, y = batch
            yield {modality: x}, y


def _classes(head: torch.nn.Module) -> int | None:
    """The number of classes, where the head's last linear layer tells it."""
    layers = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
    return layers[-1].out_features if layers else None


def _outline(value: Any) -> str:
    """What something is, for an error: a tensor's dtype and shape, a container's kind and contents."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) < 5:
        return f"({', '.join(map(_outline, value))})"
    return f"dict with {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__


def _add(sums: dict[str, list], key: str, value: Tensor, count: int) -> None:
    """Adds to a running [sum, count]; the sum stays on its device."""
    total = sums.setdefault(key, [0, 0])
    total[0], total[1] = total[0] + value, total[1] + count


def _means(sums: dict[str, list]) -> dict[str, float]:
    return {key: float(total) / count if count else float("nan") for key, (total, count) in sums.items()}


def _check_fits(path: str | Path, model: torch.nn.Module, saved: Mapping[str, Tensor]) -> None:
    """load_state_dict copies what fits before it complains about the rest; so look first."""
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in saved.items()}
    if expected != got:
        names = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        differences = ", ".join(f"{name} {expected.get(name, 'none')} ≠ {got.get(name, 'none')}" for name in names[:4])
        raise CheckpointError(f"{path}: expected a checkpoint of this model, but (model ≠ checkpoint) {differences}")

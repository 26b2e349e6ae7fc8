"""``Trainer``: the MLA loop, thin enough to read before you decide to write your own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mla_fast.batch import row_totals, rows_by_modality, unpack_batch, unpack_unlabelled
from mla_fast.caller import warn
from mla_fast.evaluate import evaluate
from mla_fast.graph import GraphedStep
from mla_fast.inputs import Inputs
from mla_fast.loss import Loss
from mla_fast.model import MultimodalModel
from mla_fast.ops.fusion import Fused
from mla_fast.optimizer import MLAOptimizer
from mla_fast.parts import begin_training
from mla_fast.phases import Phases
from mla_fast.random_state import Replayable
from mla_fast.resume import Loader, Position, batches_in
from mla_fast.run import Run
from mla_fast.step import check_arguments, check_belong, steps_together, why_in_turn
from mla_fast.trainer_checks import (
    check_fit,
    check_scheduler,
    check_trainer,
    kept,
    obstacle_to_graphs,
    said,
    step_scheduler,
    stopped,
    warn_of_scheduler,
)
from mla_fast.turns import steps_in_turn

Callback = Callable[[dict[str, Any]], Any]


class Trainer(Phases):
    """Train a ``MultimodalModel`` one modality at a time (eqs. 1–5) and evaluate it alone and fused (eqs. 6–8).

    A batch is ``(inputs: {modality: [N, …]}, target: int64 [N])``, optionally with ``present: bool [N, M]`` over
    ``model.modalities``; absent entries of the inputs may hold anything and are not read. In each batch every modality takes one
    optimizer step on the rows that have it, in the order of ``model.modalities``; one that no row has takes none.

    Args:
        model, optimizer: what to train and the ``MLAOptimizer`` over its parameters, with its head. Where torch.distributed has
            several processes, ``mla_fast.distribute(model)``, and a loader with a share of every batch on each.
        loss: a function of logits [n, C] and target [n, …] in place of cross-entropy, for other targets, too; moved to `device`.
            It returns the mean of the rows that are there (``reduction="mean"``), which counts by their number beside others of
            a step, also on other ranks. Several labels at once and regression need ``MultimodalModel(…, fusion="mean")``.
        scheduler: a learning-rate scheduler; ``ReduceLROnPlateau`` sees the mean training loss.
        scheduler_interval: when it steps, once an ``"epoch"``, or once a ``"batch"`` (or group of `accumulate` batches), as
            ``OneCycleLR`` and warm-up are meant.
        device: where batches go; by default where the model is. progress: show a progress bar while training on a terminal.
        seed: set for torch's global generator when the first epoch begins, so that shuffling and dropout repeat.
        amp: dtype of autocast for the forward passes, torch.bfloat16 or, with a scaler, torch.float16.
        scaler: a ``torch.amp.GradScaler``; a step that overflows moves nothing, P included.
        accumulate: batches whose mean gradient and x̄, over all their rows, make a step of each modality.
        clip_norm: longest gradient of a step, its modality's encoder and the head together; clipped before it is projected.
        backward: in place of ``loss.backward()``, as ``fabric.backward`` or ``accelerator.backward``.
        callbacks: called with a copy of each epoch's record; ``mla_fast.callbacks`` has one for TensorBoard.
        in_turn: take every step with a backward pass of its own, as wrapped optimizers need that do more than step parameters.
        cuda_graph: replay CUDA graphs of whole batches; see ``GraphedStep``. What it cannot capture (a scaler, clipping,
            accumulation, ranks, batches of several loaders) is trained on eagerly, with a warning that says so.

    Batches are trained on by ``alternating_step``, or in turn where scaler, accumulate, clip_norm, backward or a model that it
    refuses ask for it: the same steps, one backward pass for each. Hooks of ``optimizer.step`` then run once a modality, and
    otherwise once a batch.
    """

    def __init__(
        self,
        model: MultimodalModel,
        optimizer: MLAOptimizer,
        *,
        loss: Loss | None = None,
        scheduler: Any = None,
        scheduler_interval: str = "epoch",
        device: torch.device | str | None = None,
        seed: int | None = None,
        progress: bool = True,
        amp: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        backward: Callable[[Tensor], Any] | None = None,
        callbacks: Sequence[Callback] = (),
        in_turn: bool = False,
        cuda_graph: bool = False,
    ):
        check_arguments(model, optimizer, amp, loss)
        check_scheduler(scheduler, scheduler_interval, optimizer)
        check_trainer(model, optimizer, amp, scaler, accumulate, clip_norm, backward, callbacks)
        self.model, self.optimizer, self.scheduler, self.scheduler_interval = model, optimizer, scheduler, scheduler_interval
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.loss = loss.to(self.device) if isinstance(loss, nn.Module) else loss
        self.seed, self.progress = seed, progress
        self.amp, self.scaler, self.accumulate, self.clip_norm = amp, scaler, accumulate, clip_norm
        self.backward, self.callbacks = backward, tuple(callbacks)
        self.in_turn = in_turn or bool(scaler or clip_norm or backward)
        self._graphed = self._graphed_step() if cuda_graph else None
        self.epoch, self._position = 0, Position()
        self.history: list[dict[str, Any]] = []
        self.additions: dict[str, int] = {}
        self.config: dict[str, Any] | None = None

    def _graphed_step(self) -> GraphedStep | None:
        """Return None, with a warning, where the settings leave nothing to capture."""
        given = {name: getattr(self, name) is not None for name in ("scaler", "clip_norm", "backward")}
        given |= {"accumulate": self.accumulate > 1, "in_turn": self.in_turn}
        if (reason := obstacle_to_graphs(self.model, self.optimizer, given)) is None:
            return GraphedStep(self.model, self.optimizer, amp=self.amp, loss=self.loss)
        warn(f"cuda_graph: steps are taken eagerly: {reason}")
        return None

    def fit(
        self,
        loader: Loader,
        epochs: float,
        *,
        validation: Iterable[Any] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        patience: int | None = None,
        monitor: str = "validation/accuracy/fused",
    ) -> list[dict[str, Any]]:
        """Train until `epochs` epochs are done in all, those before a ``resume`` included; returns ``history``.

        loader: of batches, or unpaired, {modality: a loader of (x [N, …], target [N])}; MLA needs no pairs to train. Unpaired,
        the modalities take turns, and an epoch lasts as long as the longest loader: the others begin anew when they end.
        Each epoch adds ``{"epoch", "loss": {modality: mean}, "projection": {layer: ‖GP‖/‖G‖}}``, and ``"validation"`` if asked
        for. With `checkpoint` the state is saved there after every epoch, and after every `checkpoint_every` batches. With
        `patience`, stops once `monitor`, a path into the record, has not become better for that many epochs: larger, or
        smaller for a loss; the model keeps the last weights, not the best. It trains in training mode, but for what is frozen,
        ``backbone.requires_grad_(False).eval()``: a part in evaluation mode with parameters or buffers, none of which requires
        gradients. Raises ValueError for a batch that does not fit the model, and RuntimeError under ``no_grad``.
        """
        check_belong(self.model, self.optimizer)
        check_fit(epochs, validation, checkpoint, checkpoint_every, patience, monitor)
        if not self.history:
            warn_of_scheduler(self.scheduler, self.scheduler_interval, epochs)
        self._position.start_fit(self.seed, self.epoch)
        save = None if checkpoint is None else lambda: self.save(checkpoint)
        while self.epoch < epochs and not stopped(self._of_this_phase(), patience, monitor):
            batches = self._train_epoch(loader, epochs, save, checkpoint_every)
            record: dict[str, Any] = {"epoch": self.epoch + 1, "loss": self._mean_losses()}
            record["projection"] = kept(self.optimizer, self.history)
            if validation is not None:
                record["validation"] = self.evaluate(validation)
                record["validation"].pop("class_accuracy", None)  # as many numbers as classes in every epoch
                if not record["validation"]["samples"]:
                    raise ValueError("validation: expected at least one sample in each epoch, got none")
            # From here on the epoch is done; one that fails before is continued by the next ``fit``.
            if self.scheduler_interval == "epoch":
                step_scheduler(self.scheduler, record["loss"])
            self.history.append(record)
            self.epoch += 1
            self._position.end_epoch(batches, loader)
            if save is not None:
                save()
            for callback in self.callbacks:
                callback(copy.deepcopy(record))
        return self.history

    def _train_epoch(self, loader: Loader, epochs: float, save: Callable[[], None] | None, every: int | None) -> Replayable:
        """Train on what is left of the epoch; returns its batches, all taken."""
        begin_training(self.model)
        position = self._position
        with self._told_to_all():
            batches = position.begin(loader, self.epoch, self.model.modalities, self.optimizer.process_group)
        at_once = self.accumulate * (len(loader) if isinstance(loader, Mapping) else 1)
        bar = tqdm(
            desc=f"epoch {self.epoch + 1}/{epochs}",
            total=batches_in(loader),
            initial=position.batches,
            leave=False,
            mininterval=0.5,
            disable=None if self.progress else True,  # None: where the output is not a terminal
        )
        with bar:
            while group := self._next(batches, at_once):
                position.losses.add(self._train_on(group))
                if self.scheduler is not None and self.scheduler_interval == "batch":
                    self.scheduler.step()
                before = position.batches
                position.advance(group)
                if save is not None and every is not None and position.batches // every > before // every:
                    save()
                if bar.update(len(group)):  # drawn: so often somebody may wait for the device
                    bar.set_postfix_str(said(position.losses.sums().means(), self.history), refresh=False)
        if self.optimizer.process_group is not None:
            row_totals(self.model.modalities, self.optimizer, [])  # the others must have come to their end, too
            self._share_seen()
        return batches

    def _train_on(self, group: list[tuple[Any, ...]]) -> dict[str, Tensor]:
        """Take one step of each modality; returns the mean losses."""
        if self._graphed is not None and len(group) == 1:
            return self._graphed(group[0])
        if self._graphed is not None:
            self._graphed.say("the modalities come from loaders of their own")
        with self._told_to_all():
            batches = [unpack_batch(self.model, b, self.device, self.loss) for b in group]
            rows = [rows_by_modality(self.model, *batch) for batch in batches]
        totals = row_totals(self.model.modalities, self.optimizer, rows)
        each_once = sum(map(len, rows)) == len({modality for r in rows for modality in r})
        if each_once and not self.in_turn and why_in_turn(self.model, self.optimizer) is None:
            once = rows[0] if len(rows) == 1 else {modality: part for r in rows for modality, part in r.items()}
            return steps_together(self.model, self.optimizer, once, totals, self.amp, self.loss)
        how = self.amp, self.scaler, self.clip_norm, self.backward, self.loss
        return steps_in_turn(self.model, self.optimizer, rows, totals, *how)

    def evaluate(self, loader: Iterable[Any], *, use_test: bool = False) -> dict[str, Any]:
        """Return how good each modality is, over the samples that have it, and two ways of fusing, over those that have any.

        ``"samples"``: how many there are in all; ``"loss"``: the mean cross-entropy of each modality; ``"accuracy"`` and
        ``"macro_f1"`` (the mean over classes), as fractions: each modality, ``"average"`` (of the logits that are present) and
        ``"fused"`` (entropy-weighted); ``"majority"``: what answering always the most frequent class would be right for;
        ``"class_accuracy"``: a list, of the fused answer to each class. With an interaction ``"fused"`` has it, and accuracy and
        macro_f1 have ``"without_interaction"``, too.

        use_test: add ``"use"``, by how much fused accuracy falls when the features of one modality are permuted among the samples
        of a batch (let it be large and shuffled: sorted samples are replaced by their like), for each modality and for what the
        ``"interaction"`` alone sees: whether modalities add up, or act on each other.

        With a ``loss`` that is given, ``"loss"`` is its mean, of ``"fused"``, too. Of a target's probabilities the largest is
        right; where it names no class, ``"samples"`` and ``"loss"`` are all there is.

        NaN for what no sample had. Logits that are NaN are wrong. Over the samples of all ranks, those included that a
        ``DistributedSampler`` gives twice.
        """
        return evaluate(self.model, loader, self.device, self.optimizer.process_group, use_test, self.loss)

    def predict(self, batch: Mapping[str, Inputs] | tuple[Any, ...]) -> Fused:
        """Return ``model.predict`` on the trainer's device for ``inputs``, ``(inputs, present)`` or a batch as in training."""
        inputs, present = unpack_unlabelled(batch, self.device, self.loss)
        return self.model.predict(inputs, present)

    def save(self, path: str | Path, *, config: dict[str, Any] | None = None) -> None:
        """Write all it takes to continue, atomically; `config` (JSON values, else TypeError) is kept for your own use.

        In distributed training every rank calls it, and the first one writes; processes without ``distribute`` can read it too.
        """
        if config is not None:
            self.config = json.loads(json.dumps(config))  # so that it can be read back without pickle
        run = {"epoch": self.epoch, "history": self.history, "config": self.config, "additions": self.additions}
        self._run().save(path, {**run, "batches": self._position.batches}, self._position.state_dict())

    def _run(self) -> Run:
        return Run(self.model, self.optimizer, self.scheduler, self.scaler, self.loss)

    def resume(self, path: str | Path) -> None:
        """Continue from ``save``, in the middle of an epoch too: bitwise, with as many ranks, where what is random in the loader
        draws from torch's global generator, from the loader's own, or from a seed of its own as ``DistributedSampler`` does;
        workers that persist over epochs do not. Another number of ranks goes on with the same batches, over all of them.
        The projection's settings are those that were saved.

        A checkpoint from before modalities were added goes with those as they are: they begin where it ends. One from after it
        needs the same modalities added before.

        Raises CheckpointError (a ValueError) or FileNotFoundError, and changes nothing, if the file does not fit.
        """
        saved, own = self._run().load(path)
        self.epoch, self.history, self.config = saved["epoch"], saved["history"], saved["config"]
        self._position.batches = saved["batches"]
        self._take_additions(saved)
        if own is not None:
            self._position.load_state_dict(own)

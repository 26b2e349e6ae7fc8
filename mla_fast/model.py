"""One encoder for each modality and one head shared by all."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mla_fast import buffers
from mla_fast.caller import warn
from mla_fast.fusing import FUSIONS, fuse
from mla_fast.growing import Growing
from mla_fast.inputs import Inputs, check_by_modality, describe, leaves, sample_count, sample_counts
from mla_fast.interaction import Interaction, check_fits
from mla_fast.modality_dict import ModalityDict
from mla_fast.ops.dispatch import DispatchPlan, dispatch
from mla_fast.ops.fusion import Fused
from mla_fast.parts import evaluating, parameters_in, unwrap, unwrap_ddp
from mla_fast.streams import run_on_streams

_PARTS = {"encoders", "head", "interaction", "seen"}


class MultimodalModel(Growing):
    """Join encoders, each of which returns features [N, s], with one shared head [N, s] → logits [N, C].

        model = MultimodalModel({"audio": audio_encoder, "image": image_encoder}, head=nn.Linear(512, 6))
        model({"audio": x})["audio"]                    # logits [N, 6] of one modality, as MLA trains it
        model.predict({"audio": xa, "image": xv})       # fused logits, weights and entropies

    The inputs of a modality are a tensor [N, …], or several of the same N in a tuple, list or mapping, nested to any depth:
    tokens and their mask, say, as a tokenizer returns them. They are passed to its encoder as they are.

    encoders: {modality: module}, of any names but the empty one and "average" and "fused", which results use (and beside an
        interaction "interaction" and "without_interaction"); see ``ModalityDict`` for the names of their parameters.
    head: a module, usually an ``nn.Linear``.
    interaction: a ``mla_fast.Interaction`` beside the head, for what is in no modality alone. ``predict`` adds it to the fused
        logits; ``forward`` is without it.
    fusion: how ``predict`` joins the modalities: ``"entropy"``, by certainty (eqs. 6–8) · ``"mean"``, all alike, for outputs that
        are no logits of classes that exclude each other: several labels at once, regression.
    streams: on a GPU, run the encoders of ``predict`` and ``alternating_step`` concurrently, each on a CUDA stream of its own,
        forward and backward. This can pay off where one encoder leaves part of the GPU idle and the host is ahead of it, as in a
        CUDA graph. Encoders that share parameters or are in DistributedDataParallel still take turns. Others must not share
        anything that they write to, such as the memory of CUDA graphs (``torch.compile(mode="reduce-overhead")``).

    ``add_modality``, ``remove_modality`` and ``add_classes`` change a model that has been trained, and an optimizer with it.

    Raises ValueError for an unknown modality and for features that do not fit the head, and TypeError for features that are not
    a floating-point tensor. An error raised by an encoder gets a note (from Python 3.11) with the modality and its inputs.
    """

    streams = False  # also for models that were pickled without it
    interaction: Interaction | None
    _said_forward = False

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | nn.ModuleDict,
        head: nn.Module,
        *,
        interaction: Interaction | None = None,
        fusion: str = "entropy",
        streams: bool = False,
    ):
        super().__init__()
        self.encoders = ModalityDict(encoders)
        self.seen.names = self.modalities
        reserved = ("average", "fused", *(() if interaction is None else ("interaction", "without_interaction")))
        for name in reserved:
            if name in encoders:
                raise ValueError(f"encoders: expected another name than {name!r}, which results use for all modalities together")
        if not isinstance(head, nn.Module):
            raise TypeError(f"head: expected an nn.Module, got {type(head).__name__}")
        self.head = head
        if interaction is not None:
            check_fits(unwrap_ddp(interaction), self.modalities, self.classes, unwrap_ddp(head))
        if fusion not in FUSIONS:
            raise ValueError(f"fusion: expected one of {', '.join(FUSIONS)}, got {fusion!r}")
        self.interaction, self.fusion, self.streams = interaction, fusion, streams

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "interaction" not in state["_modules"]:  # of a model that was pickled without it, too
            state.setdefault("interaction", None)
        super().__setstate__(state)

    @property
    def shared_parameters(self) -> bool:
        """Whether a parameter belongs to two encoders, or to an encoder and the head."""
        parts = [set(map(id, parameters_in(part))) for part in (*self.encoders.values(), self.head)]
        return len(set().union(*parts)) < sum(map(len, parts))

    @property
    def own_parameters(self) -> bool:
        """Whether there are trainable parameters that belong to no encoder, to the head or the interaction: a subclass's own."""
        if not self._parameters and self._modules.keys() <= _PARTS:
            return False
        parts = [self.encoders, self.head, *([] if self.interaction is None else [self.interaction])]
        of_parts = {id(p) for part in parts for p in parameters_in(part)}
        return any(p.requires_grad and id(p) not in of_parts for p in parameters_in(self))

    def features(self, modality: str, inputs: Inputs) -> Tensor:
        """Return the features [N, s] that the encoder of `modality` computes from its inputs [N, …]."""
        encoders = self.encoders
        if modality not in encoders:
            raise ValueError(f"modality: expected one of {', '.join(self.modalities)}, got {modality!r}")
        N, encoder = sample_count("inputs", modality, inputs), encoders[modality]
        encoder = encoder if torch.is_grad_enabled() and modality not in self.frozen else unwrap_ddp(encoder)
        name = f"the encoder of {modality!r}"
        compiling = torch.compiler.is_compiling()
        features = _traced(encoder, inputs) if compiling else _call_or_note(encoder, inputs, modality, name)
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"features: expected a floating tensor from the encoder of {modality!r}, got {got}")
        shape = features.shape
        if len(shape) != 2 or shape[0] != N:
            raise ValueError(f"features: expected [{N}, s] from the encoder of {modality!r}, got {list(shape)}")
        head = unwrap(self.head)
        if isinstance(head, nn.Linear) and shape[1] != head.in_features:
            raise ValueError(
                f"features: expected [N, {head.in_features}] to match head.in_features, "
                f"got {list(shape)} from the encoder of {modality!r}"
            )
        return features

    def all_features(self, inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """Return ``features`` of each modality in `inputs`, computed concurrently with `streams`."""
        if not self.streams or not inputs or self._must_take_turns():
            return {modality: self.features(modality, x) for modality, x in inputs.items()}
        jobs = {modality: functools.partial(self.features, modality, x) for modality, x in inputs.items()}
        return run_on_streams(jobs, leaves(next(iter(inputs.values())))[0].device)

    def _must_take_turns(self) -> bool:
        # Another stream would read the weights that autocast has cast for a shared module before they are ready.
        return self.shared_parameters or any(isinstance(part, DistributedDataParallel) for part in self.encoders.values())

    def forward(self, inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """Return {modality: logits [N, C]} for each modality in `inputs`; N may differ between them.

        ``predict`` and ``Trainer.evaluate`` do not call this method or its hooks, and a subclass had better not replace it: they
        call ``features`` and ``logits``, as it does.
        """
        check_by_modality(inputs)
        return {modality: self.logits(modality, self.features(modality, x)) for modality, x in inputs.items()}

    def logits(self, modality: str, features: Tensor) -> Tensor:
        """Return the head's logits [N, C] of a modality's features [N, s]."""
        compiling = torch.compiler.is_compiling()
        called = _traced(self.head, features) if compiling else _call_or_note(self.head, features, modality, "the head")
        return self._checked(called, len(features))

    def _checked(self, logits: Any, N: int) -> Tensor:
        """Return what the head has returned, and remember its C, which not every head tells before."""
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(f"head: expected floating logits [{N}, C] from {type(self.head).__name__}, got {describe(logits)}")
        if logits.dim() != 2 or len(logits) != N:
            raise ValueError(f"head: expected logits [{N}, C] from {type(self.head).__name__}, got {list(logits.shape)}")
        if self._logits != logits.shape[1]:
            self._logits = logits.shape[1]
        return logits

    @torch.no_grad()
    def packed_features(self, inputs: Mapping[str, Inputs], plan: DispatchPlan | None = None) -> dict[str, Tensor]:
        """Return the features [n, s] of each modality of `inputs` in evaluation mode, without those that have no rows.

        plan: of ``mla_fast.dispatch`` over these modalities; only its rows are encoded, by default all N of each modality.

        Raises ValueError if `inputs` is empty or the modalities differ in N.
        """
        sizes = sample_counts(inputs)
        if not sizes:
            raise ValueError("inputs: expected at least one modality, got none")
        if len(set(sizes.values())) != 1:
            raise ValueError(f"inputs: expected the same number of samples for every modality, got {sizes}")
        if type(self).forward is not MultimodalModel.forward and not self._said_forward:
            self._said_forward = True
            warn(f"{type(self).__name__}.forward: predict and evaluate do not call it; override features or logits instead")
        packed = dict(inputs if plan is None else plan.pack(inputs))
        # If there are no rows at all, the first encoder computes the logits [0, C] from none.
        rows = {modality: x for modality, x in packed.items() if len(leaves(x)[0])} or dict(list(packed.items())[:1])
        with evaluating(self):
            return self.all_features(rows)

    @torch.no_grad()
    def logits_of(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the logits [K, C] of features [n, s], one modality after another, in evaluation mode."""
        with evaluating(self):
            return self.joined_logits(features)

    def joined_logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the same in the mode that the model is in, by one call of the head unless ``logits`` is overridden."""
        if self.overrides_logits:
            return torch.cat([self.logits(modality, h) for modality, h in features.items()])
        joined = torch.cat(list(features.values()))
        return self._checked(unwrap_ddp(self.head)(joined), len(joined))

    @property
    def overrides_logits(self) -> bool:
        """Whether a subclass, or an attribute of this model, takes the place of ``logits``."""
        return type(self).logits is not MultimodalModel.logits or "logits" in vars(self)

    def predict(self, inputs: Mapping[str, Inputs], present: Tensor | None = None) -> Fused:
        """Return the fused prediction (eqs. 6–8) for N samples, each with any of the modalities, in evaluation mode.

        inputs: {modality: [N, …]}; a modality that is left out is absent from all samples.
        present: bool [N, M] over ``self.modalities``. Only present rows are encoded; absent rows may hold anything.

        The weights and entropies [N, M'] are over the modalities in `inputs`, in their order. Where modalities were trained on
        different classes each has a say among its own alone (``entropy_fusion`` with ``seen``). With an interaction the logits
        are the fused ones + r.
        """
        plan = None if present is None else dispatch(self.columns(present, inputs), tuple(inputs))
        features = self.packed_features(inputs, plan)
        logits = self.logits_of(features)
        return self.corrected(fuse(self.fusion, logits, len(inputs), plan, self.seen_by(inputs)), features, plan)

    @torch.no_grad()
    def corrected(self, fused: Fused, features: Mapping[str, Tensor], plan: DispatchPlan | None) -> Fused:
        """Add r of packed features, if there is an interaction and anything for it to act on."""
        if self.interaction is None or len(features) < 2:
            return fused
        interaction, present = unwrap_ddp(self.interaction), None
        if plan is not None:
            first, present = next(iter(features.values())), plan.present
            # Modalities without rows were not encoded.
            rows = {m: features.get(m, first.new_empty(0, interaction.widths[m])) for m in plan.modalities or features}
            features = plan.unpack(rows)
        with evaluating(self):
            r = interaction(features, present)
        return fused._replace(logits=fused.logits + r.to(fused.logits.dtype))

    def columns(self, present: Tensor, inputs: Mapping[str, Inputs]) -> Tensor:
        """Return the columns of present [N, M] that belong to the modalities in `inputs`, in their order.

        Raises ValueError unless `present` is bool [N, M] over ``self.modalities``.
        """
        N, M = max(sample_counts(inputs).values(), default=0), len(self.modalities)
        if not isinstance(present, Tensor) or present.dtype != torch.bool or present.shape != (N, M):
            expected = f"bool [{N}, {M}] (samples, {', '.join(self.modalities)})"
            raise ValueError(f"present: expected {expected}, got {describe(present)}")
        if tuple(inputs) == self.modalities:
            return present
        return present[:, [self.modalities.index(m) for m in inputs]]


class LoneRowError(ValueError):
    """Raised for a single row that an encoder's BatchNorm cannot train on."""


def _traced(part: nn.Module, inputs: Inputs) -> Any:
    """Call a part inside of a compiled model."""
    kept = buffers.statistics_of(part)
    called = part(inputs)
    buffers.restore_unless_finite(kept)
    return called


def _call_or_note(part: nn.Module, inputs: Inputs, modality: str, name: str) -> Any:
    """Call a part; an error gets a note with its name and inputs, and says what to do where it is about a single row. What a
    pass in training has made of its running statistics stays only if it is finite, and is made once."""
    training = torch.is_grad_enabled()
    lone = training and len(leaves(inputs)[0]) == 1
    before = [(buffer, buffer.clone()) for buffer in part.buffers()] if lone else []
    kept = buffers.statistics_of(part)
    try:
        called = part(inputs)
    except Exception as error:
        if lone and "more than 1 value per channel" in str(error):
            for buffer, value in before:  # some layers have counted the row
                buffer.data.copy_(value)  # a graph that another batch has left may have saved it
            raise LoneRowError(
                f"inputs[{modality!r}]: expected at least 2 rows in training, for the BatchNorm in {name}, got 1; "
                "drop the last batch if it is one row (drop_last=True), take larger batches, or GroupNorm in place of BatchNorm"
            ) from error
        if hasattr(error, "add_note"):
            error.add_note(f"in {name}, which was given {describe(inputs)}")
        raise
    after = buffers.restore_unless_finite(kept)
    if training and isinstance(called, Tensor):
        buffers.hold_in_backward(part, after, called)
    return called

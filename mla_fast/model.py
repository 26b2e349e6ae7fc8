"""``MultimodalModel``: one encoder per modality and one head for all."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mla_fast.inputs import Inputs, check_by_modality, count, counts, leaves, outline
from mla_fast.ops.dispatch import DispatchPlan, dispatch
from mla_fast.ops.fusion import Fused, entropy_fusion
from mla_fast.streams import side_by_side


class MultimodalModel(nn.Module):
    """Encoders of your own, each giving features [N, s], and one shared head [N, s] → logits [N, C].

        model = MultimodalModel({"audio": audio_encoder, "image": image_encoder}, head=nn.Linear(512, 6))
        model({"audio": x})["audio"]                    # logits [N, 6] of one modality, as MLA trains it
        model.predict({"audio": xa, "image": xv})       # fused logits, weights and entropies

    What a modality's encoder is given is a tensor [N, …], or several of one N in a tuple, list or dict (tokens and their mask,
    say), nested as you like: the encoder's own affair.

    streams: on a GPU the encoders of ``predict`` and ``alternating_step`` run side by side, each on a CUDA stream of its own,
    forward and backward. It can pay where one encoder leaves the GPU partly idle and the host is ahead of it, as in a CUDA graph.
    They take turns all the same if they share parameters or are in DistributedDataParallel, and must not share anything else that
    they write to, such as the memory of CUDA graphs (``torch.compile(mode="reduce-overhead")``).

    Raises ValueError for a modality it does not have, and where an encoder's features do not fit the head; TypeError where
    they are no floating tensor. An encoder's own error says in a note (Python 3.11 and later) whose it is and what it was given.
    """

    streams = False  # of a model that was pickled without it, too
    _shared: tuple[tuple[nn.Module, ...], bool] = ((), False)  # of these parts

    def __init__(self, encoders: Mapping[str, nn.Module], head: nn.Module, *, streams: bool = False):
        super().__init__()
        if not encoders:
            raise ValueError("encoders: expected at least one modality, got none")
        if not isinstance(encoders, Mapping):
            raise TypeError(f"encoders: expected a dict of modules by modality, got {type(encoders).__name__}")
        for name in ("average", "fused"):
            if name in encoders:
                raise ValueError(f"encoders: expected another name than {name!r}, which stands for all modalities in results")
        if not isinstance(head, nn.Module):
            raise TypeError(f"head: expected an nn.Module, got {type(head).__name__}")
        self.encoders = nn.ModuleDict(encoders)
        self.head = head
        self.streams = streams

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names, in the order of ``present``'s columns and of the training schedule (eq. 1)."""
        return tuple(self.encoders)

    @property
    def classes(self) -> int | None:
        """C, where the head is an ``nn.Linear`` or ends in one."""
        last = bare(self.head)
        while isinstance(last, nn.Sequential) and len(last):
            last = last[-1]
        return last.out_features if isinstance(last, nn.Linear) else None

    @property
    def shared_parameters(self) -> bool:
        """Some parameter belongs to two encoders, or to an encoder and the head; looked for once, and again where one of these is
        another module."""
        parts = (*self.encoders.values(), self.head)
        if self._shared[0] != parts:
            parameters = [p for part in parts for p in part.parameters()]
            self._shared = parts, len(set(parameters)) < len(parameters)
        return self._shared[1]

    def features(self, modality: str, inputs: Inputs) -> Tensor:
        """What `modality`'s encoder makes of its inputs [N, …]: features [N, s]."""
        encoders = self.encoders
        if modality not in encoders:
            raise ValueError(f"modality: expected one of {', '.join(self.modalities)}, got {modality!r}")
        N, encoder = count("inputs", modality, inputs), encoders[modality]
        run = encoder if torch.is_grad_enabled() else bare(encoder)
        features = run(inputs) if torch.compiler.is_compiling() else _run(run, inputs, modality)
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"features: expected a floating tensor from the encoder of {modality!r}, got {got}")
        shape = features.shape
        if len(shape) != 2 or shape[0] != N:
            raise ValueError(f"features: expected [{N}, s] from the encoder of {modality!r}, got {list(shape)}")
        head = bare(self.head)
        if isinstance(head, nn.Linear) and shape[1] != head.in_features:
            raise ValueError(
                f"features: expected [N, {head.in_features}] to match head.in_features, "
                f"got {list(shape)} from the encoder of {modality!r}"
            )
        return features

    def all_features(self, inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """``features`` of each modality in `inputs`, side by side with `streams`."""
        if not self.streams or not inputs or self._must_take_turns():
            return {modality: self.features(modality, x) for modality, x in inputs.items()}
        jobs = {modality: functools.partial(self.features, modality, x) for modality, x in inputs.items()}
        return side_by_side(jobs, leaves(next(iter(inputs.values())))[0].device)

    def _must_take_turns(self) -> bool:
        # What autocast has cast for one encoder would be read by another too early.
        return self.shared_parameters or any(isinstance(part, DistributedDataParallel) for part in self.encoders.values())

    def forward(self, inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """Logits [N, C] of each modality in `inputs`; N may differ between them. ``predict`` does not come by here."""
        check_by_modality(inputs)
        return {modality: self.head(self.features(modality, x)) for modality, x in inputs.items()}

    @torch.no_grad()
    def packed_logits(self, inputs: Mapping[str, Inputs], plan: DispatchPlan | None = None) -> Tensor:
        """Logits [K, C] of the modalities in `inputs`, one after another, in evaluation mode: the rows that the plan (of
        ``mla_fast.dispatch``, over these modalities) has, or all N of each. One product with the head; a modality without rows is
        not encoded."""
        sizes = counts(inputs)
        if not sizes:
            raise ValueError("inputs: expected at least one modality, got none")
        if len(set(sizes.values())) != 1:
            raise ValueError(f"inputs: expected the same number of samples for every modality, got {sizes}")
        if plan is not None:
            inputs = plan.pack(inputs)
        # Where there is nothing at all, the first encoder makes logits [0, C] of nothing.
        rows = {modality: x for modality, x in inputs.items() if len(leaves(x)[0])} or dict(list(inputs.items())[:1])
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return bare(self.head)(torch.cat(list(self.all_features(rows).values())))
        finally:
            for module in training:  # and no others: an encoder may be in evaluation mode on purpose
                module.training = True

    def predict(self, inputs: Mapping[str, Inputs], present: Tensor | None = None) -> Fused:
        """Entropy-weighted prediction (eqs. 6–8) for samples of any of the modalities, in evaluation mode.

        inputs: {modality: [N, …]}, a modality left out is absent for all; present: bool [N, M] over ``self.modalities``. Only
        present rows are encoded; what absent ones hold does not matter. Weights and entropies [N, M'] are over the modalities in
        `inputs`, in their order.
        """
        if present is None:
            return entropy_fusion(self.packed_logits(inputs).unflatten(0, (len(inputs), -1)))
        plan = dispatch(self.columns(present, inputs), tuple(inputs))
        return plan.fuse(self.packed_logits(inputs, plan))

    def columns(self, present: Tensor, inputs: Mapping[str, Inputs]) -> Tensor:
        """The columns of present [N, M] that belong to the modalities in `inputs`, in their order."""
        N, M = max(counts(inputs).values(), default=0), len(self.modalities)
        if not isinstance(present, Tensor) or present.dtype != torch.bool or present.shape != (N, M):
            raise ValueError(f"present: expected bool [{N}, {M}] (samples, {', '.join(self.modalities)}), got {outline(present)}")
        if tuple(inputs) == self.modalities:
            return present
        return present[:, [self.modalities.index(m) for m in inputs]]


def _run(encoder: nn.Module, inputs: Inputs, modality: str) -> Tensor:
    try:
        return encoder(inputs)
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"in the encoder of {modality!r}, which was given {outline(inputs)}")
        raise


def bare(part: nn.Module) -> nn.Module:
    """The module itself, without DistributedDataParallel, whose forward pass may wait for other ranks."""
    return part.module if isinstance(part, DistributedDataParallel) else part

"""Batched modality dispatch: only the rows that are there are moved, encoded and fused.

plan = mla.dispatch(present)                            # bool [N, M]
rows = plan.pack({"audio": xa, "image": xv})            # {modality: [count, …]}
logits = head(torch.cat([encoders[m](x) for m, x in rows.items()]))          # ONE product, [K, C]
fused = plan.fuse(logits)                               # of every sample, whatever it has
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mla_fast import ops
from mla_fast.fusion import Fused, check_dtype
from mla_fast.inputs import Inputs, count, leaves, outline


class DispatchPlan:
    """Which rows of a batch each modality has, as ``dispatch`` made it. Packed rows are modality-major, each modality's in the
    order of the samples.

    Tensors on the mask's device: ``present`` bool [N, M]; ``rows`` int64 [N M], the sample of each packed row, −1 for rows that
    are none; ``offsets`` int64 [M + 1], where each modality's packed rows begin; ``slot`` int64 [N, M], the packed row of each
    (sample, modality) or −1. K is the number of packed rows: those present, or N M for a padded plan.
    """

    def __init__(self, present: Tensor, modalities: tuple[str, ...] | None, padded: bool, backend: str):
        self.present, self.modalities, self.padded, self.backend = present, modalities, padded, backend
        self.N, self.M = present.shape
        self.rows, self.offsets, self._counts, self.slot = ops.dispatch_plan(backend, present, padded)
        self._host: Tensor | None = None
        if present.is_cuda and not padded:  # the sizes of what is packed, on their way while the host goes on
            self._host = torch.empty(self.M, dtype=torch.int64, device="cpu", pin_memory=True)
            self._host.copy_(self._counts, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(present.device))

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """How many rows each modality has. On CUDA the first look waits for the plan; in a padded one, for the device."""
        if self._host is None:
            return tuple(self._counts.tolist())
        self._copied.synchronize()
        return tuple(self._host.tolist())

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows that each modality is packed into: ``counts``, or N for each in a padded plan."""
        return (self.N,) * self.M if self.padded else self.counts

    @functools.cached_property
    def samples(self) -> tuple[Tensor, ...]:
        """For each modality the samples of its packed rows, int64 [sizes[m]], −1 in a padded plan where there is none."""
        return self.rows[: sum(self.sizes)].split(self.sizes)

    def __repr__(self) -> str:
        names = self.modalities or range(self.M)
        here = ", ".join(f"{name}: {count}" for name, count in zip(names, self.counts, strict=True))
        return f"DispatchPlan({self.N} samples; {here}{'; padded' if self.padded else ''}; {self.present.device})"

    def pack(self, inputs: Mapping[str, Inputs] | Sequence[Inputs]) -> dict[str, Inputs] | list[Inputs]:
        """The rows that are present, of all modalities in one launch: {modality: [sizes[m], …]}, or a list for a sequence.

        inputs: for each column of ``present`` a tensor [N, …], by name or in order; shapes and dtypes may differ. A modality may
        have several tensors, in tuples, lists or dicts, and gets the same back, in as many launches as one has tensors. What
        absent rows hold is not read. Differentiable; the padding of a padded plan is zeros.
        """
        values = self._of_all_samples("inputs", inputs)
        packed = self._pack(values) if all(isinstance(x, Tensor) for x in values) else self._pack_trees(values)
        return dict(zip(inputs, packed, strict=True)) if isinstance(inputs, Mapping) else packed

    def _pack(self, tensors: list[Tensor]) -> list[Tensor]:
        return ops.pack_rows(self.backend, tensors, self.rows, self.offsets, self.slot, list(self.sizes))

    def _pack_trees(self, trees: list[Inputs]) -> list[Inputs]:
        """The first tensors of all modalities, then the second ones; one that has no more takes part with rows of nothing."""
        flat, specs = zip(*map(pytree.tree_flatten, trees), strict=True)
        nothing = self.present.new_empty(self.N, 0)
        packed = zip(*(self._pack(list(level)) for level in itertools.zip_longest(*flat, fillvalue=nothing)), strict=True)
        return [pytree.tree_unflatten(list(t[: len(own)]), spec) for t, own, spec in zip(packed, flat, specs, strict=True)]

    def pack_features(self, features: Mapping[str, Tensor] | Sequence[Tensor]) -> tuple:
        """(packed, means): what ``pack`` gives and x̄ of every modality, for inputs that are features already, those of frozen
        encoders say. The CPU reads each row once for both.

        features: floating tensors [N, …] as for ``pack``; widths may differ. means: {modality: […]} or a list like packed, in
        float32 or wider, zeros for a modality without rows. Differentiable.
        """
        tensors = self._of_all_samples("features", features)
        for name, x in self._named(tensors):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(f"features[{name!r}]: expected a floating tensor, got {outline(x)}")
        sizes = list(self.sizes)
        results = ops.pack_features(self.backend, tensors, self.rows, self.offsets, self.slot, sizes, self._counts)
        if not isinstance(features, Mapping):
            return results
        packed, means = (dict(zip(features, tensors, strict=True)) for tensors in results)
        return packed, means

    def unpack(self, packed: Mapping[str, Tensor] | Sequence[Tensor]) -> dict[str, Tensor] | list[Tensor]:
        """Packed rows back at their samples: [N, …] each, zeros where absent. Differentiable."""
        tensors = self._in_order("packed", packed)
        for (name, x), size in zip(self._named(tensors), self.sizes, strict=True):
            self._check_tensor(f"packed[{name!r}]", x)
            if x.dim() == 0 or x.shape[0] != size:
                raise ValueError(f"packed[{name!r}]: expected [{size}, …], the rows that are present, got {list(x.shape)}")
        unpacked = ops.unpack_rows(self.backend, tensors, self.slot, self.offsets)
        return dict(zip(packed, unpacked, strict=True)) if isinstance(packed, Mapping) else unpacked

    def fuse(self, logits: Tensor, *, backend: str = "auto") -> Fused:
        """Entropy-weighted fusion (eqs. 6–8) of packed logits [K, C] into one prediction for every sample; see
        ``mla_fast.entropy_fusion``. Differentiable once in the logits."""
        self._check_tensor("logits", logits)
        check_dtype(logits)
        K = sum(self.sizes)
        if logits.dim() != 2 or logits.shape[0] != K or logits.shape[1] == 0:
            raise ValueError(f"logits: expected [{K}, C], the packed rows, got {list(logits.shape)}")
        return Fused(*ops.entropy_fusion([logits], None, ops.resolve(backend, logits.device), self.slot))

    def segment_mean(self, features: Tensor) -> Tensor:
        """x̄ of every modality in one launch: features [K, s] → [M, s], in float32 or wider; zeros for one without rows."""
        self._check_tensor("features", features)
        K = sum(self.sizes)
        if features.dim() != 2 or features.shape[0] != K or not features.is_floating_point():
            raise ValueError(
                f"features: expected floating [{K}, s], the packed rows, got {features.dtype} {list(features.shape)}"
            )
        return ops.segment_mean(self.backend, features, self.offsets, self._counts if self.padded else None)

    def _of_all_samples(self, label: str, values: Mapping[str, Inputs] | Sequence[Inputs]) -> list[Inputs]:
        """[N, …] for each column of ``present``."""
        values = self._in_order(label, values)
        for name, x in self._named(values):
            if count(label, name, x) != self.N:
                raise ValueError(f"{label}[{name!r}]: expected [{self.N}, …] to match present, got {outline(x)}")
            for t in leaves(x):
                self._check_tensor(f"{label}[{name!r}]", t)
        return values

    def _named(self, values: Sequence[Inputs]) -> Iterator[tuple[str | int, Inputs]]:
        return zip(self.modalities or range(self.M), values, strict=True)

    def _check_tensor(self, label: str, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {type(x).__name__}")
        if x.device != self.present.device:
            raise ValueError(f"{label}: expected on {self.present.device} like present, got {x.device}")

    def _in_order(self, label: str, values: Mapping[str, Inputs] | Sequence[Inputs]) -> list[Inputs]:
        """One for each column of ``present``, in the columns' order."""
        if isinstance(values, Mapping):
            names = tuple(values)
            if self.modalities is not None and names != self.modalities:
                expected = ", ".join(self.modalities)
                raise ValueError(f"{label}: expected the modalities {expected} in that order, got {', '.join(names)}")
            values = list(values.values())
        if len(values) != self.M:
            raise ValueError(f"{label}: expected {self.M} modalities, one for each column of present, got {len(values)}")
        return list(values)


def dispatch(
    present: Tensor, modalities: Sequence[str] | None = None, *, padded: bool = False, backend: str = "auto"
) -> DispatchPlan:
    """Plans a batch in which samples miss modalities: present bool [N, M], one column for each modality.

    modalities: the columns' names, to check the dictionaries that are packed against. padded: every modality is packed into N
    rows, zeros behind those that are present, so that no shape depends on the mask (for CUDA graphs); sizes are then known
    without asking the device. backend: "auto", "reference" or "cpp" (compiled, for the CPU and for CUDA).

    Raises ValueError or TypeError that names the argument, what it was and what it should be.
    """
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        raise TypeError(f"present: expected a bool tensor, got {outline(present)}")
    if present.dim() != 2 or present.shape[1] == 0:
        raise ValueError(f"present: expected [N, M] (samples, modalities), got {list(present.shape)}")
    if modalities is not None and len(modalities) != present.shape[1]:
        raise ValueError(f"modalities: expected {present.shape[1]} names, one for each column of present, got {len(modalities)}")
    names = None if modalities is None else tuple(modalities)
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"modalities: expected names that differ, got {', '.join(names)}")
    return DispatchPlan(present, names, padded, ops.resolve_dispatch(backend, present.device))

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
from typing import Any, overload

import torch
from torch import Tensor

from mla_fast import reference
from mla_fast.inputs import Inputs, describe, leaves, sample_count, tree_map
from mla_fast.ops.backend import MISSING, BackendError, announce, check_choice, operator
from mla_fast.ops.fusion import Fused, check_dtype, fuse_packed


# Here rows, offsets, counts and slot are what DispatchPlan says of them.
@operator("dispatch_plan(Tensor present, bool padded=False) -> (Tensor, Tensor, Tensor, Tensor)", reference.dispatch_plan)
def _plan(present: Tensor, padded: bool = False) -> tuple[Tensor, ...]:
    N, M = present.shape
    return tuple(present.new_empty(shape, dtype=torch.int64) for shape in ((N * M,), (M + 1,), (M,), (N, M)))


@operator(
    "pack_rows(Tensor[] inputs, Tensor rows, Tensor offsets, Tensor slot, int[] sizes) -> Tensor[]",
    lambda inputs, rows, offsets, slot, sizes: reference.pack_rows(inputs, rows, offsets, sizes),
)
def _pack_rows(inputs: list[Tensor], rows: Tensor, offsets: Tensor, slot: Tensor, sizes: list[int]) -> list[Tensor]:
    return [x.new_empty(size, *x.shape[1:]) for x, size in zip(inputs, sizes, strict=True)]


@operator("pack_features(Tensor[] features, Tensor rows, Tensor offsets, Tensor slot, int[] sizes) -> (Tensor[], Tensor[])")
def _pack_features(features: list[Tensor], *index: Any) -> tuple[list[Tensor], list[Tensor]]:
    means = [x.new_empty(x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32)) for x in features]
    return _pack_rows.fake(features, *index), means


@operator("unpack_rows(Tensor[] packed, Tensor slot, Tensor offsets) -> Tensor[]", reference.unpack_rows)
def _unpack_rows(packed: list[Tensor], slot: Tensor, offsets: Tensor) -> list[Tensor]:
    return [x.new_empty(slot.shape[0], *x.shape[1:]) for x in packed]


@operator("segment_mean(Tensor features, Tensor offsets, Tensor? counts=None) -> Tensor", reference.segment_mean)
def _segment_mean(features: Tensor, offsets: Tensor, counts: Tensor | None = None) -> Tensor:
    wide = torch.promote_types(features.dtype, torch.float32)
    return features.new_empty(offsets.shape[0] - 1, features.shape[1], dtype=wide)


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])


def _pack_backward(library: str, ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    offsets, slot = ctx.saved_tensors
    return _unpack_rows.overloads[library](list(grads), slot, offsets), None, None, None, None


def _features_backward(library: str, ctx: Any, grads: list[Tensor], grad_means: list[Tensor]) -> tuple[Any, ...]:
    _, slot = ctx.saved_tensors
    counts = (slot >= 0).sum(0).clamp_min(1)
    grads = [g + (mean / n).to(g.dtype) for g, mean, n in zip(grads, grad_means, counts, strict=True)]
    return _pack_backward(library, ctx, grads)


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.sizes = [len(x) for x in inputs[0]]


def _unpack_backward(library: str, ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    slot, offsets = ctx.saved_tensors
    rows = reference.packed_rows(slot, slot.numel())
    return _pack_rows.overloads[library](list(grads), rows, offsets, slot, ctx.sizes), None, None


def _save_mean(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.K, ctx.dtype = len(inputs[0]), inputs[0].dtype


def _mean_backward(library: str, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Each row of a segment gets its share of the mean's gradient."""
    offsets, counts = ctx.saved_tensors
    begin = offsets[:-1]
    counts = offsets[1:] - begin if counts is None else counts
    k = torch.arange(ctx.K, device=grad.device)
    m = torch.searchsorted(offsets[1:].contiguous(), k, right=True).clamp_max(len(begin) - 1)
    inside = (k >= begin[m]) & (k < begin[m] + counts[m])
    return torch.where(inside[:, None], grad[m] / counts[m].clamp_min(1)[:, None], 0).to(ctx.dtype), None, None


_pack_rows.differentiate(_pack_backward, _save_pack)
_pack_features.differentiate(_features_backward, _save_pack)
_unpack_rows.differentiate(_unpack_backward, _save_unpack)
_segment_mean.differentiate(_mean_backward, _save_mean)


def _resolve(backend: str, device: torch.device) -> str:
    """The backend that dispatches on `device`: "cpp" (compiled for the CPU and for CUDA) or "reference"."""
    check_choice("backend", backend, ("auto", "reference", "cpp"))
    names = {"cpu": "cpp", "cuda": "cpp on CUDA"}
    missing = MISSING[names[device.type]] if device.type in names else f"it does not serve {device.type!r}"
    if backend == "reference" or missing is None:
        return "reference" if backend == "reference" else "cpp"
    if backend == "cpp":
        raise BackendError(f"backend: 'cpp' is not available for dispatch on {device.type}: {missing}")
    announce(f"dispatch on {device.type}", missing)
    return "reference"


class DispatchPlan:
    """Which rows of a batch each modality has, as ``dispatch`` made it.

    Packed rows are modality-major, each modality's in the order of the samples. Tensors on the mask's device: ``present`` bool
    [N, M]; ``rows`` int64 [N M], the sample of each packed row, −1 for rows that are none; ``offsets`` int64 [M + 1], where each
    modality's packed rows begin; ``slot`` int64 [N, M], the packed row of each (sample, modality) or −1. K is the number of
    packed rows: those present, or N M for a padded plan.
    """

    def __init__(self, present: Tensor, modalities: tuple[str, ...] | None, padded: bool, backend: str):
        self.present, self.modalities, self.padded, self.backend = present, modalities, padded, backend
        self.N, self.M = present.shape
        self.rows, self.offsets, self._counts, self.slot = _plan.on(backend, present.device)(present, padded)
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
        samples: tuple[Tensor, ...] = self.rows[: sum(self.sizes)].split(self.sizes)
        return samples

    def __repr__(self) -> str:
        names = self.modalities or range(self.M)
        here = ", ".join(f"{name}: {count}" for name, count in zip(names, self.counts, strict=True))
        return f"DispatchPlan({self.N} samples; {here}{'; padded' if self.padded else ''}; {self.present.device})"

    @overload
    def pack(self, inputs: Mapping[str, Inputs]) -> dict[str, Inputs]: ...

    @overload
    def pack(self, inputs: Sequence[Inputs]) -> list[Inputs]: ...

    def pack(self, inputs: Mapping[str, Inputs] | Sequence[Inputs]) -> Any:
        """Gather the rows that are present, of all modalities in one launch: {modality: [sizes[m], …]}, or a list for a sequence.

        inputs: for each column of ``present`` a tensor [N, …], by name or in order; shapes and dtypes may differ. A modality may
        have several tensors, in tuples, lists or dicts, and gets the same back, in as many launches as one has tensors. What
        absent rows hold is not read. Differentiable; the padding of a padded plan is zeros.
        """
        values = self._of_all_samples("inputs", inputs)
        return _like(inputs, self._pack(values) if all(isinstance(x, Tensor) for x in values) else self._pack_trees(values))

    def _pack(self, tensors: list[Tensor]) -> list[Tensor]:
        return _pack_rows.apply(self.backend, tensors, self.rows, self.offsets, self.slot, list(self.sizes))

    def _pack_trees(self, trees: list[Inputs]) -> list[Inputs]:
        """The first tensors of all modalities, then the second ones; one that has no more takes part with rows of nothing."""
        nothing = self.present.new_empty(self.N, 0)
        levels = itertools.zip_longest(*map(leaves, trees), fillvalue=nothing)
        packed = zip(*(self._pack(list(level)) for level in levels), strict=True)
        return [tree_map(functools.partial(next, iter(own)), tree) for tree, own in zip(trees, packed, strict=True)]

    def pack_features(self, features: Mapping[str, Tensor] | Sequence[Tensor]) -> tuple[Any, Any]:
        """Return (what ``pack`` gives, x̄ of every modality), for features of frozen encoders say; the CPU reads each row once.

        features: floating tensors [N, …] as for ``pack``; widths may differ. The means, {modality: […]} or a list, are float32
        or wider, zeros for a modality without rows. Differentiable.
        """
        tensors = self._of_all_samples("features", features)
        for name, x in self._named(tensors):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(f"features[{name!r}]: expected a floating tensor, got {describe(x)}")
        packed, means = self._pack_features(tensors)
        return _like(features, packed), _like(features, means)

    def _pack_features(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.backend == "cpp" and not self.present.is_cuda:  # reads what it packs once
            return _pack_features.apply("cpp", tensors, self.rows, self.offsets, self.slot, list(self.sizes))
        packed, begin = self._pack(tensors), self.offsets.new_zeros(2)
        flat = [x.reshape(len(x), x.shape[1:].numel()) for x in packed]
        counts = self._counts.split(1)
        means = [_segment_mean.apply(self.backend, x, begin, n)[0] for x, n in zip(flat, counts, strict=True)]
        return packed, [mean.view(x.shape[1:]) for mean, x in zip(means, packed, strict=True)]

    @overload
    def unpack(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    @overload
    def unpack(self, packed: Sequence[Tensor]) -> list[Tensor]: ...

    def unpack(self, packed: Mapping[str, Tensor] | Sequence[Tensor]) -> Any:
        """Return packed rows to their samples: [N, …] for each modality, zeros where it is absent. Differentiable."""
        tensors = self._in_order("packed", packed)
        for (name, x), size in zip(self._named(tensors), self.sizes, strict=True):
            self._check_tensor(f"packed[{name!r}]", x)
            if x.dim() == 0 or x.shape[0] != size:
                raise ValueError(f"packed[{name!r}]: expected [{size}, …], the rows that are present, got {list(x.shape)}")
        return _like(packed, _unpack_rows.apply(self.backend, tensors, self.slot, self.offsets))

    def fuse(self, logits: Tensor, seen: Tensor | None = None, *, backend: str = "auto") -> Fused:
        """Fuse packed logits [K, C] sample by sample (eqs. 6–8), as ``mla_fast.entropy_fusion`` does; differentiable once."""
        self._check_tensor("logits", logits)
        check_dtype(logits)
        K = sum(self.sizes)
        if logits.dim() != 2 or logits.shape[0] != K or logits.shape[1] == 0:
            raise ValueError(f"logits: expected [{K}, C], the packed rows, got {list(logits.shape)}")
        return fuse_packed(logits, self.slot, seen, backend)

    def segment_mean(self, features: Tensor) -> Tensor:
        """Return x̄ of every modality in one launch: features [K, s] → [M, s], in float32 or wider; zeros for one without rows."""
        self._check_tensor("features", features)
        K = sum(self.sizes)
        if features.dim() != 2 or features.shape[0] != K or not features.is_floating_point():
            raise ValueError(f"features: expected floating [{K}, s], the packed rows, got {describe(features)}")
        return _segment_mean.apply(self.backend, features, self.offsets, self._counts if self.padded else None)

    def _of_all_samples(self, label: str, values: Mapping[str, Inputs] | Sequence[Inputs]) -> list[Inputs]:
        """[N, …] for each column of ``present``."""
        values = self._in_order(label, values)
        for name, x in self._named(values):
            if sample_count(label, name, x) != self.N:
                raise ValueError(f"{label}[{name!r}]: expected [{self.N}, …] to match present, got {describe(x)}")
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


def _like(given: Mapping[str, Any] | Sequence[Any], results: list[Any]) -> Any:
    """The results by the names of what was given, or in order where that was."""
    return dict(zip(given, results, strict=True)) if isinstance(given, Mapping) else results


def dispatch(
    present: Tensor, modalities: Sequence[str] | None = None, *, padded: bool = False, backend: str = "auto"
) -> DispatchPlan:
    """Plan a batch in which samples miss modalities: present bool [N, M], one column for each modality.

    modalities: the columns' names, to check the dictionaries that are packed against. padded: every modality is packed into N
    rows, zeros behind those that are present, so that no shape depends on the mask (for CUDA graphs); sizes are then known
    without asking the device. backend: "auto", "reference" or "cpp" (compiled, for the CPU and for CUDA).

    Raises ValueError or TypeError that names the argument, what it was and what it should be.
    """
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        raise TypeError(f"present: expected a bool tensor, got {describe(present)}")
    if present.dim() != 2 or present.shape[1] == 0:
        raise ValueError(f"present: expected [N, M] (samples, modalities), got {list(present.shape)}")
    if modalities is not None and len(modalities) != present.shape[1]:
        raise ValueError(f"modalities: expected {present.shape[1]} names, one for each column of present, got {len(modalities)}")
    names = None if modalities is None else tuple(modalities)
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"modalities: expected names that differ, got {', '.join(names)}")
    return DispatchPlan(present, names, padded, _resolve(backend, present.device))

"""x̄, the mean of the features that go through a layer of the head, collected by hooks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mla_fast.alternation import Alternation


class FeatureMean:
    """Collect x̄ of one ``nn.Linear``: the mean of its input rows over every backward pass since ``take``.

    Rows are counted when their gradient comes back, not when the features go in, so a forward pass that is never differentiated
    (an evaluation, or a modality whose loss is still to come) leaves no trace.

    With a process group the mean is over the rows of all ranks. The sums travel while the backward pass continues through the
    encoder, and ``take`` waits for them. Every rank therefore makes the same backward passes through the head, with zero rows if
    it has none.
    """

    def __init__(self, name: str, in_features: int, dtype: torch.dtype, process_group: dist.ProcessGroup | str | None):
        self.name, self.in_features, self.dtype, self.process_group = name, in_features, dtype, process_group
        self.mean: Tensor | None = None
        self.rows = 0
        self.weights: Tensor | None = None  # [N] for features [N, …], with sum 1; None: every row counts alike
        self.alternation: Alternation | None = None  # what looks at the first steps
        self.in_flight: list[tuple[dist.Work, Tensor]] = []  # sums [s + 1] over the ranks, the number of rows last

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Looked up at each call: torch.distributed may be initialised after the optimizer was built."""
        return world() if isinstance(self.process_group, str) else self.process_group

    def watch(self, module: nn.Module) -> None:
        """Hook into `module`, in the place of any other FeatureMean."""
        remove_hooks(module)
        module.register_forward_pre_hook(self.check, with_kwargs=True)
        module.register_forward_hook(self.observe, with_kwargs=True)

    def check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features = args[0] if args else kwargs["input"]
        if features.shape[-1] != self.in_features:
            raise ValueError(
                f"features: expected [..., {self.in_features}] to match {self.name}.in_features, got {list(features.shape)}"
            )
        if not features.is_floating_point():
            raise TypeError(f"features: expected a floating dtype for {self.name}, got {features.dtype}")

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not output.requires_grad or torch.compiler.is_exporting():
            return
        features, looking = args[0] if args else kwargs["input"], self.alternation
        call = None if looking is None or torch.compiler.is_compiling() else looking.call(features)
        features = features.detach()
        if torch.compiler.is_compiling():  # tensor hooks do not survive compilation
            self._merge(*self._mean(features))
            return

        def count(_: Tensor) -> None:
            self.add(features)
            if looking is not None and call is not None:
                looking.add(call)

        output.register_hook(count)

    def add(self, features: Tensor) -> None:
        """Count features [..., s]."""
        self.add_mean(*self._mean(features))

    def add_mean(self, mean: Tensor, rows: int) -> None:
        """Count rows by their mean [s]."""
        self._merge(mean, rows)
        if self.group is not None:
            self._send()

    def _mean(self, features: Tensor) -> tuple[Tensor, int]:
        rows = features.reshape(-1, self.in_features)
        if self.weights is not None:
            by_sample = features.reshape(len(self.weights), -1, self.in_features).mean(1, dtype=self.dtype)
            return self.weights.to(self.dtype) @ by_sample, len(rows)
        return rows.mean(0, dtype=self.dtype) if len(rows) else rows.sum(0, dtype=self.dtype), len(rows)

    def _merge(self, mean: Tensor, rows: int) -> None:
        self.rows += rows
        self.mean = mean if self.mean is None else torch.lerp(self.mean, mean, rows / max(self.rows, 1))

    def _send(self) -> None:
        assert self.mean is not None
        sums = torch.cat([self.mean * self.rows, self.mean.new_full((1,), self.rows)])
        work = dist.all_reduce(sums, group=self.group, async_op=True)
        assert work is not None  # this rank is one of the group
        self.in_flight.append((work, sums))
        self.mean, self.rows = None, 0

    def take(self) -> tuple[Tensor | None, int | Tensor]:
        """Return (x̄ [s], the number of rows) and start anew; (None, 0) if no gradient came back. Over ranks the number is a 0-d
        tensor."""
        if self.group is not None and self.mean is not None:  # counted in the forward pass of a compiled head
            self._send()
        if self.in_flight:
            for work, _ in self.in_flight:
                work.wait()
            sums = torch.stack([sums for _, sums in self.in_flight]).sum(0)
            self.in_flight = []
            return sums[:-1] / sums[-1], sums[-1]
        collected = self.mean, self.rows
        self.mean, self.rows = None, 0
        return collected

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group not in ("auto", None):
            raise TypeError("process_group: an MLAOptimizer with a group of its own cannot be copied or pickled")
        # What has been collected stays behind: copied parameters have no gradients either.
        return {**self.__dict__, "mean": None, "rows": 0, "weights": None, "alternation": None, "in_flight": []}


def world() -> dist.ProcessGroup | None:
    """All processes, or None if this is the only one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def remove_hooks(module: nn.Module, features: FeatureMean | None = None) -> None:
    """Remove the hooks of `features`, or of every FeatureMean. A copied module has copies of hooks for which nobody holds a
    handle, so they are looked for where torch keeps them."""
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
        for key, owner in owners.items():
            if isinstance(owner, FeatureMean) and features in (None, owner):
                del hooks[key], with_kwargs[key]

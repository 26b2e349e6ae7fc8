"""What the head remembers of the other modalities: the projection P, its state and its step (eq. 5 and the window).

One object for each ``nn.Linear`` of the head. It is called once per step with that layer's G [C, s] (or update ΔW) and the
batch's x̄ [s], projects G in place and moves its state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_fast import ops, reference
from mla_fast.settings import Settings


class Projection:
    """No projection at all, and what all projections share: the count of steps and α on the device."""

    def __init__(self, settings: Settings, size: int, dtype: torch.dtype, device: torch.device, backend: str):
        self.settings = settings
        self.size = size
        self.backend = ops.resolve(backend, device)
        self.dtype = dtype
        self.step = 0
        self.modality: str | None = None  # of the last step
        # 1 until a step has been taken, where only the device knows which are and the first one is not projected.
        self.first: Tensor | None = None
        self.scheduled: dict[int, Tensor] = {}  # α by step, of those that a CUDA graph is being made of
        if isinstance(settings.alpha, Tensor) and settings.alpha.device != device:
            raise ValueError(f"alpha: expected a tensor on {device} like the head, got {settings.alpha.device}")
        self._alpha_value = settings.alpha_at(0)
        self._alpha = settings.alpha if isinstance(settings.alpha, Tensor) else ops.alpha_tensor(self._alpha_value, device)

    def alpha(self) -> Tensor:
        """Return α of the current step, 0-d float64 on the device."""
        if isinstance(self.settings.alpha, Tensor):
            return self._alpha
        if self.step in self.scheduled:
            return self.scheduled[self.step]
        value = self.settings.alpha_at(self.step)
        if value != self._alpha_value:
            self._alpha.fill_(value)
            self._alpha_value = value
        return self._alpha

    def schedule(self, count: int) -> Tensor | None:
        """Return where the next `count` steps find their α, for a CUDA graph of them; None where it does not depend on the step.
        ``fill`` writes there before each replay, and ``scheduled`` is emptied once they are captured."""
        if not callable(self.settings.alpha):
            return None
        alphas = torch.empty(count, dtype=torch.float64, device=self._alpha.device)
        self.scheduled = {self.step + i: alpha for i, alpha in enumerate(alphas.unbind())}
        return alphas

    def fill(self, alphas: Tensor | None) -> None:
        """Write α of the steps to come."""
        if alphas is not None:
            values = [self.settings.alpha_at(self.step + i) for i in range(len(alphas))]
            alphas.copy_(torch.tensor(values, dtype=torch.float64), non_blocking=True)

    def layout(self) -> tuple[int, ...]:
        """Return what of the state a captured step takes as given, beside the object itself."""
        return ()

    def __call__(self, grad: Tensor, x_bar: Tensor, modality: str | None, skip: Tensor | None) -> Tensor | None:
        """Project G [C, s], contiguous, in place. Returns partial sums that add up to ‖G P‖², or None where G is as it was.

        skip: float32 [1] on the device; where it is not 0 neither G nor a tensor of the state moves. The step is counted all the
        same.
        """
        squares = self._project(grad, x_bar, modality, skip)
        self.step, self.modality = self.step + 1, modality
        return squares

    def _project(self, grad: Tensor, x_bar: Tensor, modality: str | None, skip: Tensor | None) -> Tensor | None:
        return None

    def _identity(self) -> Tensor:
        return torch.eye(self.size, dtype=self.dtype, device=self._alpha.device)

    def matrix(self) -> Tensor:
        """Return P [s, s] as the next step of the same modality would find it."""
        return self._identity()

    def norm_and_trace(self) -> tuple[float, float]:
        """Return (‖P‖_F, trace P)."""
        return self.size**0.5, float(self.size)

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the tensors of the state, by names that do not change."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "modality": self.modality, "modalities": [], "tensors": self.tensors()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Raises ValueError and changes nothing if it does not fit."""
        tensors = state.get("tensors", {})  # torch.distributed.checkpoint leaves out what is empty
        self.check(tensors)
        self._load(tensors, state)
        self.step, self.modality = state["step"], state["modality"]

    def _load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        pass

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Raise ValueError unless `tensors` belong to a state of this projection."""
        if tensors:
            raise ValueError(f"state_dict: projection {self.settings.projection!r} keeps no tensors, got {', '.join(tensors)}")


class _MatrixProjection(Projection):
    """P as a matrix."""

    def __init__(self, settings: Settings, size: int, dtype: torch.dtype, device: torch.device, backend: str):
        super().__init__(settings, size, dtype, device, backend)
        self.P = self._identity()
        if settings.order == "update_first":
            self.first = torch.ones((), dtype=torch.float32, device=device)

    def _project(self, grad: Tensor, x_bar: Tensor, modality: str | None, skip: Tensor | None) -> Tensor | None:
        """Algorithm 1: the first step is neither projected nor enters P. On a device `skip` says so."""
        if skip is None and self.step == 0 and self.first is not None:
            self.first.zero_()
            return None
        return self._step(grad, x_bar, skip)

    def _step(self, grad: Tensor, x_bar: Tensor, skip: Tensor | None) -> Tensor:
        """G projected in place and P moved, neither where skip ≠ 0; the sum of squares of G P, or parts of it."""
        raise NotImplementedError

    @property
    def project_first(self) -> bool:
        return self.first is None

    def matrix(self) -> Tensor:
        return self.P

    def norm_and_trace(self) -> tuple[float, float]:
        P = self.matrix()
        return P.norm().item(), P.trace().item()

    def tensors(self) -> dict[str, Tensor]:
        return {"P": self.matrix().clone()}

    def _load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.P.copy_(tensors["P"])
        if self.first is not None:
            self.first.fill_(state["step"] == 0)

    def check(self, tensors: dict[str, Tensor]) -> None:
        P = tensors.get("P")
        if P is None or P.shape != self.P.shape or P.dtype != self.P.dtype:
            got = "none" if P is None else f"{P.dtype} {list(P.shape)}"
            raise ValueError(f"state_dict: expected P {self.P.dtype} {list(self.P.shape)}, got {got}")


class RLSProjection(_MatrixProjection):
    """Eq. 5. The last corrections wait in `pending` before they enter P, which is read once a step and written at most once.
    What of P is up to date is the backend's affair; ``matrix`` makes it whole."""

    def __init__(self, settings: Settings, size: int, dtype: torch.dtype, device: torch.device, backend: str):
        super().__init__(settings, size, dtype, device, backend)
        rows = ops.pending_rows(self.backend, size)
        self.pending = self.slot = None
        if rows:
            self.pending = torch.zeros(rows, size, dtype=dtype, device=device)
            self.slot = torch.zeros(2, dtype=torch.int32, device=device)

    def _identity(self) -> Tensor:
        return ops.identity(self.backend, self.size, self.dtype, self._alpha.device)

    def _step(self, grad: Tensor, x_bar: Tensor, skip: Tensor | None) -> Tensor:
        waiting = self.pending, self.slot
        return ops.rls_step_(self.backend, self.P, x_bar, grad, self.alpha(), *waiting, skip, self.project_first)

    def matrix(self) -> Tensor:
        if self.pending is not None:
            ops.rls_fold(self.backend, self.P, self.pending, self.slot)
        return self.P

    def _load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        super()._load(tensors, state)
        for waiting in (self.pending, self.slot):
            if waiting is not None:
                waiting.zero_()


class OfficialProjection(_MatrixProjection):
    """The released code's arithmetic, for comparing with its numbers; plain torch, never fast."""

    def _step(self, grad: Tensor, x_bar: Tensor, skip: Tensor | None) -> Tensor:
        updated = reference.official_update(self.P, x_bar, self.alpha().to(self.dtype))
        projected = reference.official_project(grad, self.P if self.project_first else updated)
        if skip is not None:
            updated, projected = torch.where(skip == 0, updated, self.P), torch.where(skip == 0, projected, grad)
        self.P.copy_(updated)  # a captured step finds it where it was
        return ops.square_sum(grad.copy_(projected))


class WindowProjection(Projection):
    """P from the latest x̄ of every other modality, built anew at each step; no s × s matrix.

    A modality keeps its row of `means` from its first step on, and the rows stay where they are, so that a captured step finds
    them; one that is new after the capture is not in it.
    """

    CAPACITY = 16  # rows at first

    def __init__(self, settings: Settings, size: int, dtype: torch.dtype, device: torch.device, backend: str):
        super().__init__(settings, size, dtype, device, backend)
        self._buffer = torch.zeros(self.CAPACITY, size, dtype=dtype, device=device)
        self._products = torch.zeros(self.CAPACITY, self.CAPACITY, dtype=torch.float64, device=device)
        self.rows: dict[str | None, int] = {}

    @property
    def means(self) -> Tensor:
        """The latest x̄ of each modality [K, s]."""
        return self._buffer[: len(self.rows)]

    @property
    def gram(self) -> Tensor:
        """Their products [K, K], where the backend keeps them."""
        return self._products[: len(self.rows), : len(self.rows)]

    def _row(self, modality: str | None) -> int:
        """Its row of `means`; a new one holds zeros, and a mean of zero projects nothing away."""
        if modality not in self.rows:
            if len(self.rows) == len(self._buffer):
                self._grow()
            self.rows[modality] = len(self.rows)
        return self.rows[modality]

    def _grow(self) -> None:
        rows = len(self._buffer)
        self._buffer = torch.nn.functional.pad(self._buffer, (0, 0, 0, rows))
        self._products = torch.nn.functional.pad(self._products, (0, rows, 0, rows))

    def _project(self, grad: Tensor, x_bar: Tensor, modality: str | None, skip: Tensor | None) -> Tensor | None:
        own = self._row(modality)
        return ops.window_step_(self.backend, self.means, self.gram, own, x_bar, grad, self.alpha(), skip)

    def layout(self) -> tuple[int, ...]:
        return len(self.rows), self._buffer.data_ptr()

    def _others(self) -> Tensor:
        return self.means[[row for name, row in self.rows.items() if name != self.modality]]

    def matrix(self) -> Tensor:
        return reference.window_projection(self._others(), self.alpha())

    def norm_and_trace(self) -> tuple[float, float]:
        # By Woodbury P = I − Xᵀ (α I + X Xᵀ)⁻¹ X: all but M − 1 of the eigenvalues are 1.
        X = self._others().double()
        kept = self.alpha() / (self.alpha() + torch.linalg.eigvalsh(X @ X.T))
        ones = self.size - len(kept)
        return (ones + kept.square().sum().item()) ** 0.5, ones + kept.sum().item()

    def tensors(self) -> dict[str, Tensor]:
        return {"means": self._buffer.clone()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "modalities": list(self.rows)}

    def _load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.rows = {name: row for row, name in enumerate(state["modalities"])}
        self._buffer = tensors["means"].to(self._buffer.device, copy=True)
        self._products = self._products.new_zeros(len(self._buffer), len(self._buffer))
        self.gram.copy_(ops.window_gram(self.backend, self.means))

    def check(self, tensors: dict[str, Tensor]) -> None:
        means = tensors.get("means")
        if means is None or means.dim() != 2 or means.shape[1] != self.size or means.dtype != self.dtype:
            got = "none" if means is None else f"{means.dtype} {list(means.shape)}"
            raise ValueError(f"state_dict: expected means {self.dtype} [rows, {self.size}], got {got}")


def make_projection(settings: Settings, size: int, dtype: torch.dtype, device: torch.device, backend: str) -> Projection:
    """Return the projection that `settings` asks for, for a layer of `size` input features (the bias's constant included)."""
    kind = {"rls": RLSProjection, "window": WindowProjection, "none": Projection, "official": OfficialProjection}
    return kind[settings.projection](settings, size, dtype, device, backend)

"""What the methods for missing modalities share: their networks, what is visible to them, and how they are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mla_fast.baselines.joint import JointModel, check_present
from mla_fast.baselines.missing.checks import (
    check_dtype,
    check_full,
    check_inputs,
    check_number,
    check_training,
    check_whole,
    check_widths,
)
from mla_fast.inputs import describe

FEATURES = 128
Inputs = Mapping[str, Tensor]
Adam = tuple[torch.optim.Adam, torch.optim.lr_scheduler.LRScheduler]


def mlp(in_features: int, out_features: int, hidden: Sequence[int] = (FEATURES, FEATURES), dropout: float = 0.0) -> nn.Sequential:
    """Return linear layers of the widths `hidden` and `out_features`; ReLU and dropout follow each but the last."""
    widths = [in_features, *hidden, out_features]
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def visible(
    widths: Mapping[str, int], inputs: Inputs, present: Tensor | None, dtype: torch.dtype | None = None, cast: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Return ({modality: x [N, d], zero where it is absent}, available bool [M, N]).

    widths: {modality: d}. inputs: {modality: [N, …] of d floating-point numbers a sample}, of one or more modalities; absent rows
    may hold anything. present: bool [N, M] in the order of `widths`. dtype: the model's; inputs in another are refused, or with
    `cast` brought into it.

    Raises ValueError for unknown modalities, other shapes and dtypes, and for NaN and Inf in a row that is not absent; TypeError
    for what is no tensor.
    """
    check_inputs(inputs, widths)
    first = next(iter(inputs.values()))
    N, M = len(first), len(widths)
    if present is not None and not isinstance(present, Tensor):
        raise TypeError(f"present: expected bool [{N}, {M}], got {describe(present)}")
    check_present(present, N, M)
    found: dict[str, Tensor] = {}
    available: list[Tensor] = []
    for m, (modality, d) in enumerate(widths.items()):
        here = torch.full((N,), modality in inputs, device=first.device)
        here = here if present is None else here & present[:, m]
        x = _rows(modality, inputs[modality], N, d, None if cast else dtype) if modality in inputs else first.new_zeros(N, d)
        x = x.to(dtype) if cast else x
        found[modality] = x.masked_fill(~here[:, None], 0)
        if not bool((finite := found[modality].isfinite().all(1)).all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(f"inputs[{modality!r}]: expected finite numbers in what is not missing, row {row} has others")
        available.append(here)
    return found, torch.stack(available)


def _rows(modality: str, x: Tensor, N: int, d: int, dtype: torch.dtype | None) -> Tensor:
    rows = x.flatten(1) if x.dim() > 1 else x
    if rows.shape != (N, d) or not rows.is_floating_point():
        expected = f"expected {N} samples of {d} floating-point numbers"
        raise ValueError(f"inputs[{modality!r}]: {expected}, got {x.dtype} {list(x.shape)}")
    if dtype is not None:
        check_dtype(modality, x, dtype)
    return rows


def masked_reconstruction(predicted: Iterable[Tensor], true: Iterable[Tensor], available: Tensor) -> Tensor:
    """Return Σ_m Σ_i ‖x̂_m − x_m‖² / d_m over the entries (i, m) that are missing: a sum over the batch, not a mean.

    predicted, true: M tensors [N, d_m]; available: bool [M, N].
    """
    each = zip(predicted, true, available, strict=True)
    return torch.stack([(p - x).square().mean(1).masked_fill(here, 0).sum() for p, x, here in each]).sum()


class MissingModel(JointModel):
    """Learn one joint classifier from features of which some are missing, at feature level as in the paper.

    widths: {modality: the numbers d_m that a sample has}; the encoders E_m are three linear layers of 128 with ReLU and dropout
        between them. What is missing is a vector of zeros, which is encoded, too.

    Trained by Adam at a rate that is constant for a fifth of the epochs and then falls linearly, the gradient of each encoder and
    of each other part clipped, unless a method says otherwise (GCNet: Lian, Chen, Sun, Liu and Tao, TPAMI 2023, whose code
    compares such methods; there each decoder is clipped by itself, here all of a method's are one part).
    Initial values are torch's, where GCNet draws N(0, 0.02²); the two have not been compared at equal length.

    needs_full: whether the loss needs the true values of what is masked in training, the argument `full`: inputs without
        anything masked. Where nothing is masked it may be left out. Data that really lack modalities cannot train such a method.
    """

    needs_full: ClassVar[bool] = True
    lr: ClassVar[float] = 1e-3
    betas: ClassVar[tuple[float, float]] = (0.5, 0.999)
    decay: ClassVar[float] = 0.0
    clip: ClassVar[float] = 5.0

    def __init__(self, widths: Mapping[str, int], classes: int, dropout: float = 0.5):
        check_widths(widths)
        check_whole("classes", classes)
        check_number("dropout", dropout, most=1)
        super().__init__({m: mlp(d, FEATURES, dropout=dropout) for m, d in widths.items()}, FEATURES)
        self.widths, self.classes, self.dropout = dict(widths), classes, dropout
        self.joined = FEATURES * len(self.widths)  # the width of h, all features side by side

    def embed(self, inputs: Inputs, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, available = self.visible(inputs, present)
        return self.encode(x), available

    def visible(self, inputs: Inputs, present: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return what ``visible`` does of inputs in the model's dtype; raises as it does."""
        return visible(self.widths, inputs, present, next(self.parameters()).dtype)

    def encode(self, x: Inputs) -> Tensor:
        """Return features [M, N, 128] of inputs [N, d_m] of all modalities."""
        return torch.stack([self.encoders[modality](x[modality]) for modality in self.modalities])

    def true_values(self, inputs: Inputs, present: Tensor | None, full: Inputs | None) -> dict[str, Tensor]:
        """Return {modality: [N, d_m]} with nothing masked; raise ValueError where that is needed and not given.

        `full` has to be in the shapes and the dtypes of `inputs`.
        """
        name, (values, available) = type(self).__name__, self.visible(inputs, present)
        if full is None:
            if not bool(available.all()):
                expected = f"expected the true values of what is masked, from which {name} learns"
                raise ValueError(f"full: {expected}, got none; data that really lack modalities cannot train it")
            return values
        check_full(name, self.widths, inputs, full)
        return visible(self.widths, full, None)[0]

    def loss(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        index: Tensor | None = None,
        full: Inputs | None = None,
    ) -> Tensor:
        """Return the loss, a scalar.

        inputs, present: as for ``visible``; target: int64 [N]. index is not used. full: {modality: [N, d_m]}, the inputs with
        nothing masked, if ``needs_full`` and something is. Raises ValueError as ``visible`` and ``true_values``, for inputs in
        another dtype than the model's and for a target that is no classes, whose values are looked at on the CPU alone.
        """
        raise NotImplementedError

    def gradients(self, loss: Tensor) -> None:
        loss.backward()
        others = (module for name, module in self.named_children() if name != "encoders")
        for network in (*self.encoders.values(), *others):
            nn.utils.clip_grad_norm_(network.parameters(), self.clip)

    def optimizer(self, epochs: int, lr_factor: float = 1.0, weight_decay: float = 0.0) -> Adam:
        """Return Adam and its schedule by epoch; weight_decay: added to the method's own."""
        check_training(epochs, lr_factor, weight_decay)
        adam = torch.optim.Adam(
            self.parameters(), self.lr * lr_factor, self.betas, weight_decay=self.decay + weight_decay, fused=True
        )
        return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda epoch: rate(epoch, epochs))


def rate(epoch: int, epochs: int) -> float:
    """Return the factor of the learning rate in an epoch from 0: 1 for a fifth of the epochs, then linearly towards 0."""
    return 1 - max(0.0, epoch + 1 - 0.2 * epochs) / (0.8 * epochs + 1)


class Frozen:
    """A trained model in evaluation mode without gradients, which is no part of the one that learns from it."""

    def __init__(self, model: MissingModel):
        self.model = model.eval().requires_grad_(False)

    def beside(self, learner: nn.Module) -> MissingModel:
        """Return the model where `learner` is, in its dtype; it may have been moved since."""
        return self.model.to(next(learner.parameters()))


class TaughtModel(MissingModel):
    """Learn from a teacher that ``prepare`` trains and freezes; ValueError in ``loss`` without it.

    The teacher is no module of the model, which therefore neither trains nor clips it. A state dict keeps it under ``teacher``,
    if there is one, so that training goes on from what is loaded; predictions do not need it.
    """

    def __init__(self, widths: Mapping[str, int], classes: int, dropout: float):
        super().__init__(widths, classes, dropout)
        self.teacher: Frozen | None = None
        self.register_state_dict_post_hook(_save_teacher)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_teacher)  # type: ignore[no-untyped-call]

    def make_teacher(self) -> MissingModel:
        """Return a teacher that is not trained yet, where the model is and in its dtype."""
        raise NotImplementedError


def _save_teacher(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(model, TaughtModel)
    if model.teacher is not None:
        state.update({f"{prefix}teacher.{name}": value for name, value in model.teacher.model.state_dict().items()})


def _load_teacher(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the teacher out of a state that is about to be loaded; a model keeps its own where there is none."""
    assert isinstance(model, TaughtModel)
    start = f"{prefix}teacher."
    found = {name.removeprefix(start): state.pop(name) for name in list(state) if name.startswith(start)}
    if found:
        with torch.random.fork_rng(devices=[]):  # who loads a model draws no random numbers
            teacher = model.make_teacher()
        teacher.load_state_dict(found)
        model.teacher = Frozen(teacher)

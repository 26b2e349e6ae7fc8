"""The interaction head: what is in no modality alone, learned beside MLA without touching what MLA protects."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.inputs import describe

GRADIENTS = ("encoders", "detached")
IGNORED = -100  # the label that cross-entropy leaves out


class Interaction(nn.Module):
    """Correct the fused logits by a low-rank product of all modalities' features.

        r(h) = O ( ⊙_m tanh(A_m h_m + a_m) )            O = 0 at the start: training begins exactly at MLA
        L_r  = CE( sg(mean_m z_m) + r, y )              its gradient moves r and the encoders, never the shared head
        prediction: the fused logits + r

        model = mla.MultimodalModel(encoders, head, interaction=mla.Interaction(512, 6, ("audio", "image")))

    The product is over the modalities that a sample has; with fewer than two r = 0, and what absent entries hold has no
    influence. Computed in float32 or wider, autocast or not.

    Args:
        features: s, or {modality: s} where encoders differ in it.
        classes: C.
        modalities: their names, at least two.
        rank: R, the length of the product.
        gradient: ``"encoders"``: L_r trains the encoders, too · ``"detached"``: r alone, on the features that MLA learns.

    In a loop of your own add ``interaction.loss(features, logits, target)`` (see there).

    Raises ValueError that names the argument, what it was and what it should be.
    """

    def __init__(
        self,
        features: int | Mapping[str, int],
        classes: int,
        modalities: Sequence[str],
        rank: int = 128,
        *,
        gradient: str = "encoders",
    ):
        super().__init__()
        if isinstance(modalities, str) or len(set(modalities)) != len(modalities) or len(modalities) < 2:
            raise ValueError(f"modalities: expected at least two different names, got {modalities!r}")
        widths = dict(features) if isinstance(features, Mapping) else dict.fromkeys(modalities, features)
        if set(widths) != set(modalities):
            raise ValueError(f"features: expected a width for each of {', '.join(modalities)}, got {', '.join(widths)}")
        for name, value in (("rank", rank), ("classes", classes), *((f"features[{m!r}]", s) for m, s in widths.items())):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient: expected one of {', '.join(GRADIENTS)}, got {gradient!r}")
        self.modalities, self.gradient = tuple(modalities), gradient
        self.widths: dict[str, int] = {m: widths[m] for m in modalities}
        self.factors = nn.ModuleList(nn.Linear(widths[m], rank) for m in modalities)
        self.out = nn.Linear(rank, classes, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, features: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Return r [N, C] for features {modality: [N, s]} of at least one modality; present: bool [N, M'] over these."""
        self._check(features, present)
        with torch.autocast(self.out.weight.device.type, enabled=False):
            return self._product(features, present)

    def _check(self, features: Mapping[str, Tensor], present: Tensor | None) -> None:
        if not features or any(m not in self.modalities for m in features):
            names = ", ".join(features) or "none"
            raise ValueError(f"features: expected modalities among {', '.join(self.modalities)}, got {names}")
        N = len(next(iter(features.values())))
        for m, h in features.items():
            if h.shape != (N, self.widths[m]):
                raise ValueError(f"features[{m!r}]: expected [{N}, {self.widths[m]}], got {list(h.shape)}")
        if present is not None and (present.dtype != torch.bool or present.shape != (N, len(features))):
            expected = f"bool [{N}, {len(features)}] (samples, {', '.join(features)})"
            raise ValueError(f"present: expected {expected}, got {present.dtype} {list(present.shape)}")

    def _product(self, features: Mapping[str, Tensor], present: Tensor | None) -> Tensor:
        product: Tensor | None = None
        for i, (modality, h) in enumerate(features.items()):
            layer = self.factors[self.modalities.index(modality)]
            h = h.to(torch.promote_types(self.out.weight.dtype, torch.float32))
            if present is not None:  # what is absent must not reach a weight's gradient either
                h = torch.where(present[:, i, None], h, 0)
            factor = layer(h).tanh()
            if present is not None:
                factor = torch.where(present[:, i, None], factor, 1)
            product = factor if product is None else product * factor
        assert product is not None  # there are features
        r: Tensor = self.out(product)
        if present is not None:
            return torch.where(paired(present)[:, None], r, 0)
        return r if len(features) > 1 else torch.zeros_like(r)

    def loss(
        self,
        features: Mapping[str, Tensor],
        logits: Mapping[str, Tensor],
        target: Tensor,
        present: Tensor | None = None,
        total: Tensor | float | None = None,
    ) -> Tensor:
        """Return L_r, the mean cross-entropy of sg(mean_m z_m) + r over the samples with at least two modalities (over `total`).

            z = {m: model.head(h) for m, h in features.items()}
            interaction.loss(features, z, target).backward()    # with gradient="detached" the features stay out of it

        features {modality: [N, s]}, logits {modality: z_m [N, C]} and target, int64 [N], are of all N samples; present as in
        ``forward``. Raises TypeError or ValueError that names the argument.
        """
        if self.gradient == "detached":
            features = {modality: h.detach() for modality, h in features.items()}
        if missing := [m for m in features if m not in logits]:
            raise ValueError(f"logits: expected those of {', '.join(features)}, got none of {', '.join(missing)}")
        r = self(features, present)
        if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != r.shape[:1]:
            raise TypeError(f"target: expected int64 [{len(r)}], got {describe(target)}")
        return corrected_loss(torch.stack([logits[modality] for modality in features]), r, target, present, total)

    @torch.no_grad()
    def gradients(
        self, features: Mapping[str, Tensor], z: Tensor, target: Tensor, total: Tensor | float
    ) -> tuple[dict[Tensor, Tensor], dict[str, Tensor]]:
        """Return ∂L_r of the parameters and of the features, in closed form: autograd takes twice as long on a small model.

            δ = (softmax(mean_m z_m + r) − onehot(y)) / total;   ∂O = δᵀ p,   p = ⊙_m t_m,   t_m = tanh(A_m h_m + a_m)
            u_m = (δ O) ⊙_{j≠m} t_j (1 − t_m²);                  ∂A_m = u_mᵀ h_m,   ∂a_m = Σ u_m,   ∂h_m = u_m A_m

        For samples that have all of `features`, at least two; z [M, N, C] as in ``loss``.
        """
        out = self.out.weight
        wide = torch.promote_types(out.dtype, torch.float32)
        layers = {m: tuple(self.factors[self.modalities.index(m)].parameters()) for m in features}  # (A_m, a_m)
        with torch.autocast(out.device.type, enabled=False):
            h = {m: x.to(wide) for m, x in features.items()}
            t = {m: F.linear(x, *layers[m]).tanh_() for m, x in h.items()}
            others = {m: functools.reduce(torch.mul, [t[j] for j in t if j != m]) for m in t}
            first = next(iter(t))
            product = t[first] * others[first]
            log_p = torch.addmm(z.mean(0, dtype=wide), product, out.T).log_softmax(1)
            delta = log_p.exp_().scatter_add_(1, target[:, None], log_p.new_full((len(target), 1), -1.0)).div_(total)
            own, of_features, back = {out: delta.T @ product}, {}, delta @ out
            for m, (weight, bias) in layers.items():
                u = torch.addcmul(back, back, t[m] * t[m], value=-1).mul_(others[m])
                own |= {weight: u.T @ h[m], bias: u.sum(0)}
                if self.gradient == "encoders":
                    of_features[m] = (u @ weight).to(features[m].dtype)
        return own, of_features

    def extra_repr(self) -> str:
        return f"modalities={', '.join(self.modalities)}, gradient={self.gradient!r}"


def check_fits(interaction: Any, modalities: tuple[str, ...], classes: int | None, head: nn.Module) -> None:
    """Raise TypeError or ValueError unless it is an interaction of a model with these modalities, classes and head."""
    if not isinstance(interaction, Interaction):
        raise TypeError(f"interaction: expected a mla_fast.Interaction or None, got {type(interaction).__name__}")
    if interaction.modalities != modalities:
        raise ValueError(
            f"interaction: expected the model's modalities {', '.join(modalities)} in that order, "
            f"got {', '.join(interaction.modalities)}"
        )
    if classes not in (None, interaction.out.out_features):
        raise ValueError(f"interaction: expected {classes} classes like the head, got {interaction.out.out_features}")
    widths = set(interaction.widths.values())
    if isinstance(head, nn.Linear) and widths != {head.in_features}:
        raise ValueError(f"interaction: expected features={head.in_features} like head.in_features, got {sorted(widths)}")


def corrected_loss(
    logits: Tensor, r: Tensor, target: Tensor, present: Tensor | None, total: Tensor | float | None = None
) -> Tensor:
    """Return L_r for logits [M, N, C], which get no gradient, and r [N, C]: of samples with two modalities, over `total`."""
    z = logits.detach().to(r.dtype)
    if present is None:
        loss = F.cross_entropy(z.mean(0) + r, target, reduction="mean" if total is None else "sum")
        return loss if total is None else loss / total
    mean = present_mean(z, present)
    both = paired(present) & (target != IGNORED)
    losses = torch.where(both, F.cross_entropy(mean + r, target, reduction="none"), 0)
    return losses.sum() / (both.sum().clamp(min=1) if total is None else total)


def present_mean(z: Tensor, present: Tensor | None) -> Tensor:
    """Return the mean [N, C] of logits [M, N, C] over the modalities that each sample has."""
    if present is None:
        return z.mean(0)
    return torch.where(present.T[..., None], z, 0).sum(0) / present.sum(1, keepdim=True).clamp(min=1)


def paired(present: Tensor) -> Tensor:
    """Return which samples have at least two modalities, bool [N], for present bool [N, M]."""
    return present.sum(1) > 1

"""The interaction head: what is in no modality alone, learned beside MLA without touching what MLA protects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRADIENTS = ("encoders", "detached")


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
        if unknown := [m for m in features if m not in self.modalities]:
            raise ValueError(f"features: expected modalities among {', '.join(self.modalities)}, got {', '.join(unknown)}")
        with torch.autocast(self.out.weight.device.type, enabled=False):
            return self._product(features, present)

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
        if product is None:
            raise ValueError("features: expected at least one modality, got none")
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

        features {modality: [N, s]}, logits {modality: z_m [N, C]} and target [N] are of all N samples; present as in ``forward``.
        """
        if self.gradient == "detached":
            features = {modality: h.detach() for modality, h in features.items()}
        r = self(features, present)
        return corrected_loss(torch.stack([logits[modality] for modality in features]), r, target, present, total)

    def extra_repr(self) -> str:
        return f"modalities={', '.join(self.modalities)}, gradient={self.gradient!r}"


def corrected_loss(
    logits: Tensor, r: Tensor, target: Tensor, present: Tensor | None, total: Tensor | float | None = None
) -> Tensor:
    """Return L_r for logits [M, N, C], which get no gradient, and r [N, C]: of samples with two modalities, over `total`."""
    z = logits.detach().to(r.dtype)
    if present is None:
        return F.cross_entropy(z.mean(0) + r, target, reduction="sum") / (len(target) if total is None else total)
    mean = torch.where(present.T[..., None], z, 0).sum(0) / present.sum(1, keepdim=True).clamp(min=1)
    both = paired(present)
    losses = torch.where(both, F.cross_entropy(mean + r, target, reduction="none"), 0)
    return losses.sum() / (both.sum().clamp(min=1) if total is None else total)


def paired(present: Tensor) -> Tensor:
    """Return which samples have at least two modalities, bool [N], for present bool [N, M]."""
    return present.sum(1) > 1

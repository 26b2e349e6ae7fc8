"""AE and CRA: imagine what is missing by an autoencoder of all features, and classify what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mla_fast.baselines.missing.checks import check_number, cross_entropy
from mla_fast.baselines.missing.parts import Inputs, MissingModel, masked_reconstruction, mlp


class AE(MissingModel):
    """Reconstruct missing modalities from a bottleneck: Bengio, Lamblin, Popovici and Larochelle, NeurIPS 2006.

        h = [E_1(x_1); …; E_M(x_M)],  r = autoencoder(h),  z = K(r),  x̂_m = D_m(r)
        L = CE(z, y) + w Σ_m Σ_{i without m} ‖x̂_m − x_m‖² / d_m

    The autoencoder has widths 128 M → 256 → 128 → 256 → 128 M, LeakyReLU after each layer and ReLU after the last; K and D_m are
    three linear layers of 128. The sum is over the missing entries of the batch, so that w does not depend on its size.
    """

    grid = {"weight": (0.2, 0.01, 0.8)}

    def __init__(self, widths: Mapping[str, int], classes: int, weight: float = 0.2, dropout: float = 0.5):
        super().__init__(widths, classes, dropout)
        check_number("weight", weight)
        self.weight = weight
        self.autoencoder = self.make_autoencoder()
        self.classifier = mlp(self.joined, classes, dropout=dropout)
        self.decoders = nn.ModuleList(mlp(self.joined, d, dropout=dropout) for d in widths.values())

    def make_autoencoder(self) -> nn.Module:
        return nn.Sequential(*_stack([self.joined, 256, 128, 256, self.joined], nn.LeakyReLU), nn.ReLU())

    def complete(self, h: Tensor) -> Tensor:
        """Return r [N, 128 M] of features h [M, N, 128]."""
        r: Tensor = self.autoencoder(side_by_side(h))
        return r

    def fuse(self, h: Tensor, available: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.complete(h))
        return logits

    def loss(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        index: Tensor | None = None,
        full: Inputs | None = None,
    ) -> Tensor:
        h, available = self.embed(inputs, present)
        true = self.true_values(inputs, present, full)
        r = self.complete(h)
        reconstruction = masked_reconstruction([decoder(r) for decoder in self.decoders], true.values(), available)
        return cross_entropy(self.classifier(r), target) + self.weight * reconstruction


class CRA(AE):
    """Reconstruct by a cascade of residual autoencoders: Tran, Liu, Zhou and Jin, CVPR 2017.

    As ``AE``, with ``ResidualAutoencoder`` of two blocks 128 M → 256 → 128 → 256 → 128 M in place of the autoencoder.
    """

    grid = {"weight": (0.8, 0.02, 0.2)}

    def __init__(self, widths: Mapping[str, int], classes: int, weight: float = 0.8, dropout: float = 0.5):
        super().__init__(widths, classes, weight, dropout)

    def make_autoencoder(self) -> nn.Module:
        return ResidualAutoencoder(self.joined, (256, 128), 2)

    def complete(self, h: Tensor) -> Tensor:
        r: Tensor = self.autoencoder(side_by_side(h))[0]
        return r


class ResidualAutoencoder(nn.Module):
    """Add up what B autoencoders φ_i find missing in the sum so far.

        x_1 = h,  Δ_i = φ_i(x_i),  x_{i+1} = x_i + Δ_i,  out = Linear(ReLU(Linear(x_B + Δ_B)))

    Returns out [N, width] and the codes of all φ_i [N, B · layers[-1]]. LeakyReLU stands between the layers of an encoder, ReLU
    between those of a decoder.
    """

    def __init__(self, width: int, layers: Sequence[int], blocks: int):
        super().__init__()
        down, up = [width, *layers], [*reversed(layers), width]
        self.encoders = nn.ModuleList(_stack(down, nn.LeakyReLU) for _ in range(blocks))
        self.decoders = nn.ModuleList(_stack(up, nn.ReLU) for _ in range(blocks))
        self.transition = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        codes, x = [], h
        for encoder, decoder in zip(self.encoders, self.decoders, strict=True):
            codes.append(encoder(x))
            x = x + decoder(codes[-1])
        return self.transition(x), torch.cat(codes, 1)


def side_by_side(h: Tensor) -> Tensor:
    """Return features [M, N, s] as [N, M s]."""
    return h.transpose(0, 1).flatten(1)


def _stack(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])

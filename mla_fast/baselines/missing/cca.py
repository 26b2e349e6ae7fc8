"""CCA, canonical correlation analysis, and deep CCA: learn what modalities have in common, without labels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.baselines.missing.checks import check_training, check_whole
from mla_fast.baselines.missing.fitted import FittedModel, MeanImputation, check_fitted, fit_svc, unfitted
from mla_fast.baselines.missing.parts import Inputs

RIDGE = 1e-4  # of CCA's covariances
DEEP_RIDGE, FLOOR = 1e-3, 1e-3  # of DCCA's covariances, and beside the squared correlations
HIDDEN, BATCH = (256, 256, 256), 1024
RECONSTRUCTION = 1e-3


class CCA(FittedModel):
    """Project each pair of modalities on its k most correlated directions: Hotelling, 1936.

        S_11 = X̄ᵀX̄ / (N − 1) + 1e-4 I, S_22 alike, S_12 = X̄ᵀȲ / (N − 1),  U D Vᵀ = S_11^{−½} S_12 S_22^{−½}
        W_1 = S_11^{−½} U[:, :k],  W_2 = S_22^{−½} V[:, :k]

    What is missing is the mean of what is visible in training. A ``LinearSVC`` classifies the projections of all pairs; the
    projections see no labels. No encoder and no epochs: it is solved at once.

    k: at most 20 directions by default (GCNet's code has 2 and searches up to 20), fewer where a modality has fewer numbers.
    """

    grid = {"k": (20, 10, 5)}

    def __init__(self, widths: Mapping[str, int], classes: int, k: int = 20):
        super().__init__(widths, classes)
        check_whole("k", k)
        self.imputation = MeanImputation(widths)
        self.pairs = list(itertools.combinations(range(len(widths)), 2))
        sizes = list(widths.values())
        self.k = [min(k, sizes[a], sizes[b]) for a, b in self.pairs]
        shapes = [(sizes[m], n) for pair, n in zip(self.pairs, self.k, strict=True) for m in pair]
        self.directions = nn.ParameterList(nn.Parameter(torch.zeros(shape), requires_grad=False) for shape in shapes)
        self.classifier = unfitted(2 * sum(self.k), classes)

    def begin(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        *,
        epochs: int = 100,
        lr_factor: float = 1.0,
        weight_decay: float = 0.0,
    ) -> int:
        check_training(epochs, lr_factor, weight_decay)
        self.check(inputs, target, present)
        self.training_set, self.passes = (inputs, target.long(), present), 1
        return 1

    def train_epoch(self, epoch: int) -> None:
        self.check_begun()
        inputs, target, present = self.training_set
        self.imputation.learn(inputs, present)
        x = self.centred(inputs, present)
        for i, ((a, b), k) in enumerate(zip(self.pairs, self.k, strict=True)):
            found = canonical_directions(x[a].double(), x[b].double(), k)
            for side, W in enumerate(found):
                self.directions[2 * i + side].data = W.to(x[a])
        fit_svc(self.classifier, self.project(inputs, present), target)

    def centred(self, inputs: Inputs, present: Tensor | None) -> list[Tensor]:
        """Return M tensors [N, d_m], imputed, less the means of training."""
        return [x - mean for x, mean in zip(self.imputation(inputs, present), self.imputation.means, strict=True)]

    def project(self, inputs: Inputs, present: Tensor | None) -> Tensor:
        """Return the projections [N, 2k, for each pair]."""
        x = self.centred(inputs, present)
        ends = [m for pair in self.pairs for m in pair]
        return torch.cat([x[m] @ W for m, W in zip(ends, self.directions, strict=True)], 1)

    def forward(self, inputs: Inputs, present: Tensor | None = None) -> Tensor:
        projected = self.project(inputs, present)
        check_fitted(self, self.classifier)
        logits: Tensor = self.classifier(projected)
        return logits


class DCCA(FittedModel):
    """Learn networks whose outputs are correlated: Andrew, Arora, Bilmes and Livescu, ICML 2013.

        L = −Σ over pairs of corr(f_a(x_a), f_b(x_b)),  corr = Σ_i sqrt(σ_i² + 1e-3),  σ the singular values of
        S_11^{−½} S_12 S_22^{−½} with covariances plus 1e-3 I

    f_m has widths d_m → 256 → 256 → 256 → k, BatchNorm and ReLU after all but the last. Mean imputation and ``LinearSVC`` as in
    ``CCA``; no labels before it. Adam, 1e-3, decay 1e-4, batches of up to 1024, for covariances need many samples. GCNet's code
    sends the third modality through the second's network; here each has its own.
    """

    grid = {"k": (20, 10, 5)}
    reconstruction = 0.0

    def __init__(self, widths: Mapping[str, int], classes: int, k: int = 20):
        super().__init__(widths, classes)
        check_whole("k", k)
        self.imputation = MeanImputation(widths)
        self.encoders = nn.ModuleList(_normalized(d, k) for d in widths.values())
        self.classifier = unfitted(k * len(widths), classes)
        self.eval()  # as fit leaves it, so that a model that is loaded predicts alike

    def begin(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        *,
        epochs: int = 100,
        lr_factor: float = 1.0,
        weight_decay: float = 0.0,
    ) -> int:
        check_training(epochs, lr_factor, weight_decay)
        self.check(inputs, target, present)
        self.imputation.learn(inputs, present)
        self.training_set, self.passes = (inputs, target.long(), present), epochs
        networks = [p for name, p in self.named_parameters() if not name.startswith(("imputation", "classifier"))]
        self.adam = torch.optim.Adam(networks, 1e-3 * lr_factor, weight_decay=1e-4 + weight_decay, fused=True)
        return epochs

    def train_epoch(self, epoch: int) -> None:
        self.check_begun()
        inputs, target, present = self.training_set
        filled = self.imputation(inputs, present)
        self.train()
        order = torch.randperm(len(target), device=target.device)
        for rows in order.tensor_split(-(-len(order) // BATCH)):
            self.adam.zero_grad()
            self.loss([x[rows] for x in filled]).backward()
            self.adam.step()
        self.eval()
        with torch.no_grad():
            fit_svc(self.classifier, self.encode(filled), target)

    def loss(self, x: list[Tensor]) -> Tensor:
        """Return the loss, a scalar, of M imputed inputs [N, d_m]."""
        z = [encoder(values) for encoder, values in zip(self.encoders, x, strict=True)]
        return -torch.stack([correlation(a, b) for a, b in itertools.combinations(z, 2)]).sum()

    def encode(self, x: list[Tensor]) -> Tensor:
        """Return all features side by side, [N, M k], of M imputed inputs [N, d_m]."""
        return torch.cat([encoder(values) for encoder, values in zip(self.encoders, x, strict=True)], 1)

    def forward(self, inputs: Inputs, present: Tensor | None = None) -> Tensor:
        filled = self.imputation(inputs, present)
        check_fitted(self, self.classifier)
        logits: Tensor = self.classifier(self.encode(filled))
        return logits


class DCCAE(DCCA):
    """Reconstruct the inputs as well: L = L_DCCA + 0.001 Σ_m MSE(g_m(f_m(x_m)), x_m); Wang, Arora, Livescu and Bilmes, ICML 2015.

    g_m mirrors f_m. What it reconstructs is the imputed input, so that no true value of what is masked is needed.
    """

    def __init__(self, widths: Mapping[str, int], classes: int, k: int = 20):
        super().__init__(widths, classes, k)
        self.decoders = nn.ModuleList(_normalized(k, d) for d in widths.values())
        self.eval()

    def loss(self, x: list[Tensor]) -> Tensor:
        z = [encoder(values) for encoder, values in zip(self.encoders, x, strict=True)]
        correlations = torch.stack([correlation(a, b) for a, b in itertools.combinations(z, 2)]).sum()
        errors = [F.mse_loss(decoder(code), values) for decoder, code, values in zip(self.decoders, z, x, strict=True)]
        return RECONSTRUCTION * torch.stack(errors).sum() - correlations


def canonical_directions(x: Tensor, y: Tensor, k: int, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Return W_1 [d_1, k] and W_2 [d_2, k] of ``CCA``, of centred samples x [N, d_1] and y [N, d_2]."""
    n = max(len(x) - 1, 1)
    roots = [_inverse_root(v.T @ v / n + ridge * torch.eye(v.shape[1]).to(v)) for v in (x, y)]
    U, _, Vh = torch.linalg.svd(roots[0] @ (x.T @ y / n) @ roots[1])
    return roots[0] @ U[:, :k], roots[1] @ Vh.T[:, :k]


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return corr of ``DCCA`` of samples a and b [N, k], computed in float64.

    By Cholesky factors in place of the roots of the covariances: the singular values are the same, and their gradient does not
    divide by differences of eigenvalues.
    """
    n = max(len(a) - 1, 1)
    x, y = (v.double() - v.double().mean(0) for v in (a, b))
    S_11, S_22 = (torch.linalg.cholesky(v.T @ v / n + DEEP_RIDGE * torch.eye(v.shape[1]).to(v)) for v in (x, y))
    half = torch.linalg.solve_triangular(S_11, x.T @ y / n, upper=False)
    T = torch.linalg.solve_triangular(S_22, half.T, upper=False)
    total: Tensor = (torch.linalg.svdvals(T).square() + FLOOR).sqrt().sum()
    return total.to(a)


def _inverse_root(S: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(S)
    root: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return root


def _normalized(in_features: int, out_features: int) -> nn.Sequential:
    widths = [in_features, *HIDDEN]
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.BatchNorm1d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], out_features))

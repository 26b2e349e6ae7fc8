"""Data sets that need no download: scikit-learn's digits in three views, and synthetic data of modality competition."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_fast.data.dataset import MultimodalDataset
from mla_fast.data.missing import draw_present
from mla_fast.data.splits import random_split
from mla_fast.data.standardization import standardize


def digits(seed: int = 0, test_fraction: float = 0.25) -> tuple[MultimodalDataset, MultimodalDataset]:
    """Return (train, test) of scikit-learn's 1,797 handwritten digits, 8 × 8 pixels, as three standardised views.

    ``pixels`` [N, 64]; ``fourier`` [N, 40], the magnitudes of the 2-D real Fourier transform; ``profile`` [N, 46], the sums over
    rows, columns and the diagonals in both directions. The digits are part of scikit-learn: nothing is downloaded.

    Raises ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn, which is missing: pip install "mla_fast[demo]"') from error
    bundled = load_digits()
    images = torch.from_numpy(bundled.images).float()  # [N, 8, 8]
    sides = [images.sum(2), images.sum(1)]
    both = (images, images.flip(2))
    diagonals = [side.diagonal(k, 1, 2).sum(1, keepdim=True) for side in both for k in range(-7, 8)]
    views = {
        "pixels": images.flatten(1),
        "fourier": torch.fft.rfft2(images).abs().flatten(1),
        "profile": torch.cat(sides + diagonals, 1),
    }
    train, test = random_split(MultimodalDataset(views, torch.from_numpy(bundled.target)), test_fraction, seed)
    (train, test), _ = standardize(train, test, per="array")
    return train, test


def sparse_coding_directions(seed: int) -> Tensor:
    """Draw M^r [2, 100, 10] of ``sparse_coding``: ten orthonormal columns for each of two modalities, from a QR."""
    return _draw_directions(torch.Generator().manual_seed(seed))


def _draw_directions(generator: torch.Generator) -> Tensor:
    Q: Tensor = torch.linalg.qr(torch.randn(2, 100, 10, generator=generator)).Q
    return Q


def sparse_coding(samples: int, mu: float, seed: int, *, directions: Tensor | None = None) -> MultimodalDataset:
    """Draw the sparse-coding data of Huang et al., "Modality competition", ICML 2022.

        x^r = M^r z^r + 0.1 N(0, I)        z_y ~ U[1, 1.5] where modality r is sufficient, else 0
                                           z_j ~ Bernoulli(2/K) · U[0, 0.3] for j ≠ y

    The class y is uniform. Each modality is sufficient, that is, shows the class, with probability 1 − mu; where none would be,
    one of them, drawn uniformly, is. Joint training learns only one modality for each class of this data.

    directions: M^r [M, d, K], by default ``sparse_coding_directions(seed)``. Pass those of the training data for test data.

    Returns inputs ``r0``, ``r1``, … [N, d] in float32, with a field ``sufficient``, bool [N, M]. Raises ValueError for arguments
    out of range.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if not 0 <= mu <= 1:
        raise ValueError(f"mu: expected a probability, got {mu!r}")
    generator = torch.Generator().manual_seed(seed)
    if directions is None:
        directions = _draw_directions(generator)
    if directions.dim() != 3:
        raise ValueError(f"directions: expected [M, d, K], got {list(directions.shape)}")
    M, d, K = directions.shape
    y = torch.randint(K, (samples,), generator=generator)
    sufficient = draw_present(samples, M, mu, generator)  # [N, M]
    inputs = {}
    for r in range(M):
        z = 0.3 * torch.rand(samples, K, generator=generator) * (torch.rand(samples, K, generator=generator) < 2 / K)
        z[torch.arange(samples), y] = sufficient[:, r] * (1 + 0.5 * torch.rand(samples, generator=generator))
        inputs[f"r{r}"] = z @ directions[r].T + 0.1 * torch.randn(samples, d, generator=generator)
    return MultimodalDataset(inputs, y, {"sufficient": sufficient.numpy()})

"""Multimodal data sets held in memory: files, splits, standardisation, and the two data sets of the demo."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

Index = int | slice | Sequence[int] | Tensor | np.ndarray


class MultimodalDataset(Dataset):
    """N samples, each with its modalities and a class.

    inputs: modality → tensor [N, ...] of any dtype; target: integer tensor [N], classes from 0, kept as int64; fields: name →
    numpy array [N, ...], whatever else is known of a sample (its speaker, say), to split by; present: bool [N, M], which
    modality each sample has, in the order of inputs (None: all). What absent entries of inputs hold does not matter.

    Raises ValueError or TypeError that names the argument, what it was and what it should be.
    """

    def __init__(
        self,
        inputs: dict[str, Tensor],
        target: Tensor,
        fields: dict[str, np.ndarray] | None = None,
        present: Tensor | None = None,
    ):
        if not inputs:
            raise ValueError("inputs: expected at least one modality, got none")
        self.target = _checked_target(target)
        self.inputs = dict(inputs)
        self.fields = {name: np.asarray(column) for name, column in (fields or {}).items()}
        N = len(self.target)
        for modality, x in self.inputs.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"inputs[{modality!r}]: expected a tensor [{N}, ...], got {type(x).__name__}")
        for kind, columns in (("inputs", self.inputs), ("fields", self.fields)):
            for name, column in columns.items():
                if column.ndim == 0 or column.shape[0] != N:
                    raise ValueError(f"{kind}[{name!r}]: expected [{N}, ...] to match target, got {list(column.shape)}")
        if present is not None and (present.dtype != torch.bool or present.shape != (N, len(self.inputs))):
            got = f"{present.dtype} {list(present.shape)}"
            raise ValueError(f"present: expected bool [{N}, {len(self.inputs)}] (samples, modalities), got {got}")
        self.present = present

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    @property
    def classes(self) -> int:
        """The highest class plus one; a class may have no sample here."""
        return int(self.target.max()) + 1

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: Index) -> tuple:
        """(modality → x[index], target[index]), and present[index] if there is a mask: one sample for an int; a batch for a
        slice, indices or a bool mask [N]."""
        index = _as_index(index)
        sample = {modality: x[index] for modality, x in self.inputs.items()}, self.target[index]
        return sample if self.present is None else (*sample, self.present[index])

    def subset(self, mask_or_indices: Index) -> MultimodalDataset:
        """The samples that a bool mask [N], indices or a slice select, with their fields. At least one, or ValueError."""
        index = _as_index(mask_or_indices)
        index = index.cpu() if isinstance(index, Tensor) else index
        if isinstance(index, Tensor) and index.dtype == torch.bool and index.shape != (len(self),):
            raise ValueError(f"mask_or_indices: expected a mask [{len(self)}], got {list(index.shape)}")
        rows = torch.arange(len(self))[index].reshape(-1)
        if not len(rows):
            raise ValueError("mask_or_indices: expected to select at least one sample, got none")
        inputs, target, *present = self[rows]
        return MultimodalDataset(inputs, target, {name: column[rows.numpy()] for name, column in self.fields.items()}, *present)

    def rows(self, modality: str) -> Tensor:
        """The samples of `modality` that are there [K, ...]."""
        x = self.inputs[modality]
        return x if self.present is None else x[self.present[:, self.modalities.index(modality)]]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(x.shape[1:])}" for name, x in self.inputs.items())
        fields = f", fields {', '.join(self.fields)}" if self.fields else ""
        missing = "" if self.present is None else f", {1 - self.present.float().mean():.0%} missing"
        return f"MultimodalDataset({len(self)} samples, {self.classes} classes, {shapes}{fields}{missing})"


def _as_index(index: Index) -> int | slice | Tensor:
    if isinstance(index, (int, slice, Tensor)):
        return index
    # A list indexes each tensor anew, slowly; an empty one would become a tensor of floats, which is no index.
    return torch.as_tensor(index) if len(index) else torch.empty(0, dtype=torch.long)


def _checked_target(target: Tensor) -> Tensor:
    """int64 [N], or an error that says what was wrong with it."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected an integer tensor [N], got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target: expected an integer tensor [N], got {target.dtype}")
    if target.dim() != 1 or not len(target):
        raise ValueError(f"target: expected [N] with at least one sample, got {list(target.shape)}")
    target = target.long()
    if (lowest := int(target.min())) < 0:
        raise ValueError(f"target: expected classes from 0, got {lowest}")
    return target


def loader(dataset: MultimodalDataset, batch_size: int, *, shuffle: bool = False) -> DataLoader:
    """Batches (inputs, target) of `batch_size` samples, the last one shorter; shuffled anew in each epoch by torch's generator.

    The data set is indexed once per batch; DataLoader's own way, sample by sample, costs more than a small model's step.
    """
    sampler = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    return DataLoader(dataset, sampler=BatchSampler(sampler, batch_size, drop_last=False), batch_size=None)


def load_npz(path: str | Path, modalities: Sequence[str], label: str = "label") -> MultimodalDataset:
    """The data set in a NumPy ``.npz`` file: arrays `modalities` [N, ...] and `label` [N]; any other [N, ...] becomes a field,
    but for ``present``, bool [N, M], which says what each sample has: its columns are those that an array ``modalities`` of M
    names says, or without one `modalities` in their order.

    uint8 modalities (images, spectrograms) are divided by 255; other numbers become float32 as they are. Nothing is unpickled.

    Raises FileNotFoundError, or ValueError with the path and the array: a foreign or truncated file, a missing key, arrays of
    unlike N, a modality that is not numeric, labels that are not integers from 0.
    """
    if isinstance(modalities, str):
        raise TypeError(f"modalities: expected a sequence of names, got the string {modalities!r}")
    if not modalities:
        raise ValueError(f"modalities: expected at least one key of {path}, got none")
    if len(set(modalities)) != len(modalities):
        raise ValueError(f"modalities: expected each once, got {', '.join(modalities)}")
    if label in modalities:
        raise ValueError(f"label: expected another key than the modalities {', '.join(modalities)}, got {label!r}")
    arrays = _read_npz(path)
    wanted = [*modalities, label]
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise ValueError(f"{path}: no array {', '.join(map(repr, missing))}; there are: {', '.join(arrays) or 'none'}")
    sizes = {key: arrays[key].shape[0] if arrays[key].ndim else None for key in wanted}
    if len(set(sizes.values())) > 1 or None in sizes.values():
        lengths = ", ".join(f"{key} {list(arrays[key].shape)}" for key in wanted)
        raise ValueError(f"{path}: expected arrays of one length N in the first dimension, got {lengths}")
    N = sizes[label]
    present = _present(path, arrays, N, modalities) if "present" in arrays and "present" not in wanted else None
    columns = [None] * len(modalities) if present is None else present.T
    inputs = {m: _as_float(path, m, arrays[m], here) for m, here in zip(modalities, columns, strict=True)}
    target = _as_target(path, label, arrays[label])
    fields = {key: a for key, a in arrays.items() if key not in wanted and a.ndim and a.shape[0] == N}
    return MultimodalDataset(inputs, target, fields, present)


def _present(path: str | Path, arrays: dict[str, np.ndarray], N: int, modalities: Sequence[str]) -> Tensor:
    """Takes the mask out of `arrays`, and its columns' names, if it has any; bool [N, M] in the order of `modalities`."""
    mask, names = arrays.pop("present"), list(modalities)
    said = arrays.get("modalities")
    if said is not None and "modalities" not in names and said.ndim == 1 and said.dtype.kind == "U":
        names = arrays.pop("modalities").tolist()
    if mask.dtype != np.bool_ or mask.shape != (N, len(names)):
        raise ValueError(
            f"{path}: expected present to be bool [{N}, {len(names)}] (samples, {', '.join(names)}), "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if unknown := [m for m in modalities if m not in names]:
        raise ValueError(f"{path}: present has columns for {', '.join(names)}, and none for {', '.join(unknown)}")
    return torch.from_numpy(mask[:, [names.index(m) for m in modalities]])


def _read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of the file, each read and checked against its checksum; damage of any kind is a ValueError."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a .npz file, or cut short (expected a zip archive of NumPy arrays)")
    with np.load(path, allow_pickle=False) as archive:
        return {key: _read_array(path, archive, key) for key in archive.files}


def _read_array(path: str | Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        array = archive[key]
    except (ValueError, EOFError, OSError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path}: cannot read array {key!r}: {error}") from error
    if not isinstance(array, np.ndarray):  # a member that is no .npy comes back as its bytes
        raise ValueError(f"{path}: {key!r} is not a NumPy array")
    return array


def _as_float(path: str | Path, key: str, array: np.ndarray, here: Tensor | None) -> Tensor:
    """float32 [N, ...]; rows that are not `here` may hold anything."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {key!r}: expected numbers, got dtype {array.dtype}")
    x = torch.from_numpy(array.astype(np.float32))
    finite = torch.isfinite(x).view(len(x), math.prod(x.shape[1:])).all(1)
    if here is not None:
        finite |= ~here
    if not finite.all():
        raise ValueError(f"{path}: {key!r}: expected finite values, row {int(finite.logical_not().nonzero()[0])} has others")
    return x.div_(255) if array.dtype == np.uint8 else x


def _as_target(path: str | Path, key: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ValueError(f"{path}: {key!r}: expected integers, got dtype {array.dtype}")
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{path}: {key!r}: expected [N] with at least one sample, got {list(array.shape)}")
    if (lowest := array.min()) < 0:
        raise ValueError(f"{path}: {key!r}: expected classes from 0, got {lowest}")
    return torch.from_numpy(array.astype(np.int64))


def split_where(dataset: MultimodalDataset, where: str) -> tuple[MultimodalDataset, MultimodalDataset]:
    """(train, test) by a field: ``"speaker=2,4"`` takes the samples whose field `speaker` is 2 or 4 for testing.

    The field is [N], of integers or strings. Raises ValueError for a malformed expression, an unknown field, a value that no
    sample has, and when nothing is left to train on.
    """
    held_out = rows_where(dataset, where)
    if held_out.all():
        raise ValueError(f"where: {where!r} selects all {len(dataset)} samples for testing, none is left to train on")
    return dataset.subset(~held_out), dataset.subset(held_out)


def rows_where(dataset: MultimodalDataset, where: str) -> Tensor:
    """Which samples ``split_where`` takes for testing, bool [N]; all of them will do."""
    name, equals, listed = where.partition("=")
    name, values = name.strip(), [value.strip() for value in listed.split(",")]
    if not (name and equals and all(values)):
        raise ValueError(f'where: expected "field=value" or "field=value,value", got {where!r}')
    if name not in dataset.fields:
        raise ValueError(f"where: no field {name!r}; there are: {', '.join(dataset.fields) or 'none'}")
    column = dataset.fields[name]
    if column.ndim != 1 or column.dtype.kind not in "biuU":
        raise ValueError(f"where: expected a field [N] of integers or strings, {name!r} is {column.dtype} {list(column.shape)}")
    found, rows = np.unique(column, return_inverse=True)
    found = found.astype(str)
    for value in values:
        if value not in found:
            some = ", ".join(found[:20]) + (", …" if len(found) > 20 else "")
            raise ValueError(f"where: no sample has {name}={value}; {name} is one of: {some}")
    return torch.from_numpy(np.isin(found, values)[rows])


def random_split(dataset: MultimodalDataset, test_fraction: float, seed: int) -> tuple[MultimodalDataset, MultimodalDataset]:
    """(train, test), at random but with each class in its proportion; `test_fraction` of the samples, rounded, for testing.

    Raises ValueError when either side would be empty.
    """
    N = len(dataset)
    held_out = round(N * test_fraction) if 0 < test_fraction < 1 else 0
    if not 0 < held_out < N:
        raise ValueError(f"test_fraction: expected to leave samples on both sides of {N}, got {test_fraction!r}")
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    order = order[dataset.target[order].argsort(stable=True)]
    # Evenly spaced places in a list sorted by class give every class its share, to within one sample.
    places = ((torch.arange(held_out, dtype=torch.float64) + 0.5) * (N / held_out)).long()
    mask = torch.zeros(N, dtype=torch.bool)
    mask[order[places]] = True
    return dataset.subset(~mask), dataset.subset(mask)


Statistics = dict[str, tuple[float, float]]


def missing_mask(N: int, M: int, rate: float, seed: int) -> Tensor:
    """present bool [N, M] of the paper's protocol (§4.2): each modality of each sample is missing with probability `rate`.

    Every sample keeps at least one: where all would go, one of them, drawn evenly, stays; so fewer are missing than `rate` says,
    with M = 2 rate − rate² / 2 of them.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a probability in [0, 1), got {rate}")
    if N < 0 or M < 1:
        raise ValueError(f"N, M: expected samples and at least one modality, got {N} and {M}")
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(N, M, generator=generator) >= rate
    kept = torch.randint(M, (N,), generator=generator)
    present[torch.arange(N), kept] |= ~present.any(1)
    return present


def with_missing(dataset: MultimodalDataset, rate: float, seed: int) -> MultimodalDataset:
    """The same samples with modalities taken away by ``missing_mask``; raises ValueError if some are missing already."""
    if dataset.present is not None:
        raise ValueError("dataset: expected one without missing modalities, got a mask")
    present = missing_mask(len(dataset), len(dataset.modalities), rate, seed)
    return MultimodalDataset(dataset.inputs, dataset.target, dataset.fields, present)


def statistics(dataset: MultimodalDataset) -> Statistics:
    """Modality → (mean, standard deviation) over all entries of the samples that have it; a constant's deviation counts as 1, and
    a modality that none has as (0, 1)."""
    result = {}
    for modality in dataset.modalities:
        x = dataset.rows(modality).double()
        if not x.numel():
            result[modality] = (0.0, 1.0)
            continue
        mean, std = x.mean().item(), x.std(correction=0).item()
        # Rounding leaves a constant with a deviation of some 1e-17 of itself: no scale to divide by.
        result[modality] = (mean, std if std > 1e-12 * abs(mean) else 1.0)
    return result


def apply_statistics(dataset: MultimodalDataset, statistics: Statistics) -> MultimodalDataset:
    """Each modality minus its mean, divided by its deviation: a new data set, in float32 (float64 stays).

    Raises ValueError if a modality has no statistics.
    """
    missing = [modality for modality in dataset.modalities if modality not in statistics]
    if missing:
        raise ValueError(f"statistics: expected those of {', '.join(dataset.modalities)}, got {', '.join(statistics) or 'none'}")
    inputs = {}
    for modality, x in dataset.inputs.items():
        mean, std = statistics[modality]
        inputs[modality] = ((x.double() - mean) / std).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return MultimodalDataset(inputs, dataset.target, dataset.fields, dataset.present)


def standardize(train: MultimodalDataset, *others: MultimodalDataset) -> tuple[list[MultimodalDataset], Statistics]:
    """([train, *others], statistics of train): all of them standardised by the mean and deviation of `train`."""
    of_train = statistics(train)
    return [apply_statistics(dataset, of_train) for dataset in (train, *others)], of_train


def digits(seed: int = 0, test_fraction: float = 0.25) -> tuple[MultimodalDataset, MultimodalDataset]:
    """(train, test) of scikit-learn's 1,797 real handwritten digits, 8 × 8, as three views of the pixels, standardised.

    ``pixels`` [N, 64]; ``fourier`` [N, 40], the magnitudes of the 2-D real Fourier transform; ``profile`` [N, 46], the sums over
    rows, columns and the diagonals of both directions. Nothing is downloaded: scikit-learn brings the digits along.

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
    (train, test), _ = standardize(train, test)
    return train, test


def competition_directions(seed: int) -> Tensor:
    """M^r of ``competition``, [2, 100, 10]: for each modality ten orthonormal columns, Q of the QR of N(0, 1)^{100 × 10}."""
    return _draw_directions(torch.Generator().manual_seed(seed))


def _draw_directions(generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(2, 100, 10, generator=generator)).Q


def competition(samples: int, mu: float, seed: int, *, directions: Tensor | None = None) -> MultimodalDataset:
    """Data on which joint training learns one modality per class only, after Huang et al., "Modality competition", ICML 2022.

        x^r = M^r z^r + 0.1 N(0, I)        z_y ~ U[1, 1.5] where modality r is sufficient, else 0
                                           z_j ~ Bernoulli(2/K) · U[0, 0.3] for j ≠ y

    The class y is uniform; each modality is sufficient, it shows the class, with probability 1 − mu. Where none would be, one
    of them is, at random. directions: M^r [M, d, K]; ``competition_directions(seed)`` unless given, which test data must be,
    to share the train data's.

    Inputs ``r0``, ``r1``, … [N, d] float32; field ``sufficient`` bool [N, M].
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
    sufficient = torch.rand(samples, M, generator=generator) >= mu  # [N, M]
    chosen = torch.randint(M, (samples,), generator=generator)
    sufficient[torch.arange(samples), chosen] |= ~sufficient.any(1)
    inputs = {}
    for r in range(M):
        z = 0.3 * torch.rand(samples, K, generator=generator) * (torch.rand(samples, K, generator=generator) < 2 / K)
        z[torch.arange(samples), y] = sufficient[:, r] * (1 + 0.5 * torch.rand(samples, generator=generator))
        inputs[f"r{r}"] = z @ directions[r].T + 0.1 * torch.randn(samples, d, generator=generator)
    return MultimodalDataset(inputs, y, {"sufficient": sufficient.numpy()})

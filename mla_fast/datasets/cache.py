"""A folder of decoded samples, which reads many times faster than files are decoded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mla_fast.datasets.files import DecodeError
from mla_fast.datasets.readers import Reader
from mla_fast.files import replacing

if TYPE_CHECKING:
    from mla_fast.datasets.lazy import LazyDataset

SETTINGS = "readers.json"
FAILURES = "failures.json"


class Cache:
    """Read what ``prepare`` has written; raise ValueError if it was with other readers, FileNotFoundError if there is none."""

    def __init__(self, folder: Path, readers: Mapping[str, Reader]):
        self.folder = folder
        if not (folder / SETTINGS).exists():
            raise FileNotFoundError(f"cache: expected a folder written by mla-fast prepare, got {folder}")
        _check_readers(folder, readers)
        failures = folder / FAILURES
        self.failures: dict[str, list[str]] = json.loads(failures.read_text()) if failures.exists() else {}

    def read(self, modality: str, id: str) -> Tensor | None:
        """Return a decoded sample, None if it has not been prepared; raise DecodeError where decoding it failed."""
        if (failed := self.failures.get(f"{modality}/{id}")) is not None:
            raise DecodeError(*failed)
        path = _path(self.folder, modality, id)
        return torch.from_numpy(np.load(path)) if path.exists() else None


class _Decoding(Dataset[tuple[int, dict[str, list[str]]]]):
    """Decode and write a sample in the worker; return how many of its modalities were, and what failed."""

    def __init__(self, dataset: LazyDataset, folder: Path):
        self.dataset, self.folder = dataset, folder

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, dict[str, list[str]]]:
        written, failures, entry = 0, {}, self.dataset.entries[index]
        for modality, source in entry.sources.items():
            path = _path(self.folder, modality, entry.id)
            if source is None or path.exists():
                continue
            try:
                decoded = self.dataset.decode(index, modality)
            except DecodeError as error:
                failures[f"{modality}/{entry.id}"] = [error.path, error.reason]
                continue
            if decoded is not None:
                with replacing(path, "wb", per_process=True) as file:
                    np.save(file, decoded.numpy())
                written += 1
        return written, failures


def prepare(dataset: LazyDataset, folder: str | Path, *, workers: int = 0, progress: bool = True) -> dict[str, Any]:
    """Decode all of a data set into `folder`, skipping what is there already; what failed before is tried again.

    Parts of a data set may share a folder. Every file is whole or not there, so that a run that was killed can be repeated.

    Returns {"samples": N, "written": files, "failed": {"modality/id": [path, reason]}}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SETTINGS).exists():
        _check_readers(folder, dataset.readers)
    else:
        (folder / SETTINGS).write_text(json.dumps(_described(dataset.readers)))
    for modality in dataset.readers:
        (folder / modality).mkdir(exist_ok=True)
    path = folder / FAILURES
    failed: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    for entry in dataset.entries:
        for modality in dataset.readers:
            failed.pop(f"{modality}/{entry.id}", None)
    written, own = 0, {}
    batches = DataLoader(_Decoding(dataset, folder), batch_size=None, num_workers=workers)
    for count, failures in tqdm(batches, total=len(dataset), desc=dataset.name, disable=None if progress else True):
        written += count
        own.update(failures)
    with replacing(path, "w") as file:
        json.dump({**failed, **own}, file, indent=1)
    return {"samples": len(dataset), "written": written, "failed": own}


def _described(readers: Mapping[str, Reader]) -> dict[str, str]:
    return {modality: repr(reader) for modality, reader in readers.items()}


def _check_readers(folder: Path, readers: Mapping[str, Reader]) -> None:
    there, wanted = json.loads((folder / SETTINGS).read_text()), _described(readers)
    for modality, reader in wanted.items():
        if there.get(modality) != reader:
            raise ValueError(f"cache: expected {folder} to be prepared with {modality}={reader}, got {there.get(modality)}")


def _path(folder: Path, modality: str, id: str) -> Path:
    return folder / modality / f"{id}.npy"

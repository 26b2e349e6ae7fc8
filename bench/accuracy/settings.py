"""What the accuracy bench trains on: a data set, how it is prepared and split, and the budget that every method gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mla_fast import data
from mla_fast.compare import task
from mla_fast.data import MultimodalDataset

Parts = tuple[MultimodalDataset, MultimodalDataset]
DEFAULT = "default"
SPEAKERS = ("2,4", "0,3", "1,5")


@dataclass(frozen=True)
class Setting:
    """A task under a budget.

    data, config: how records name it, a file by its stem; prepare: seed → (train, test), not yet standardised; epochs: of SGD
    with momentum 0.9 on batches of 64, at the rate lr and, after 70 % of the epochs, a tenth of it.
    """

    data: str
    config: str
    prepare: Callable[[int], Parts]
    epochs: int = 20
    lr: float = 0.03

    def parts(self, seed: int, missing: float = 0.0) -> Parts:
        """(train, test), standardised; `missing` of the modalities' entries taken away in both, by the paper's protocol."""
        parts = self.prepare(seed)
        if missing:
            parts = [data.with_missing(part, missing, 2 * seed + i) for i, part in enumerate(parts)]
        (train, test), _ = data.standardize(*parts, per="array")
        return train, test


def setting(
    source: str,
    config: str | None = None,
    *,
    modalities: Sequence[str] = (),
    label: str = "label",
    test_where: str | None = None,
    epochs: int | None = None,
) -> Setting:
    """``"digits"``, ``"competition"``, or the path of an .npz: with a `config` of avdigits, or with its `modalities`.

    Without `test_where` a quarter of an .npz is held out at random. Raises ValueError or FileNotFoundError for what is not there.
    """
    budget = {} if epochs is None else {"epochs": epochs}
    if source in BUILT_IN:
        if config is not None:
            raise ValueError(f"config: expected none for {source}, got {config!r}")
        return Setting(source, DEFAULT, BUILT_IN[source], **budget)
    if not Path(source).exists():
        cure = "" if config is None else "; python -m bench.make_avdigits makes avdigits.npz of two public data sets"
        raise FileNotFoundError(f"data: expected {', '.join(BUILT_IN)} or an .npz, and there is no file {source}{cure}")
    if config is not None:
        if config not in AVDIGITS:
            raise ValueError(f"config: expected one of {', '.join(AVDIGITS)}, got {config!r}")
        prepare, options = AVDIGITS[config]
        return Setting(Path(source).stem, config, partial(prepare, source), **{**options, **budget})
    if not modalities:
        raise ValueError(f"modalities: expected names of arrays in {source}, or a config of {', '.join(AVDIGITS)}, got neither")
    prepare = partial(any_npz, source, modalities=modalities, label=label, test_where=test_where)
    config = " ".join(filter(None, (",".join(modalities), label, test_where)))
    return Setting(Path(source).stem, config, prepare, **budget)


def unheard(path: str, seed: int) -> Parts:
    """Which digit is it? Noisy images, and speakers in the test data who were never heard before: neither modality is enough.

    2,000 samples to train on and 1,000 of two other speakers.
    """
    dataset = avdigits(path)
    noise = np.random.RandomState(1000 + seed).randn(*dataset.inputs["image"].shape)
    dataset.inputs["image"] += 0.3 * torch.from_numpy(noise).float()
    return data.split_where(dataset, f"speaker={SPEAKERS[seed % 3]}")


def sums(path: str, seed: int) -> Parts:
    """What is the sum of a spoken and a written digit? 19 classes; either modality alone tells next to nothing of it.

    2,000 clips and images to train on, of all speakers, and 1,000 others; each clip four times, with images drawn at random.
    """
    return tuple(_added(part, 2 * seed + i) for i, part in enumerate(data.random_split(avdigits(path), 1 / 3, seed)))


def _added(dataset: MultimodalDataset, seed: int, times: int = 4) -> MultimodalDataset:
    generator = torch.Generator().manual_seed(seed)
    clips = torch.arange(len(dataset)).repeat(times)
    images = torch.cat([torch.randperm(len(dataset), generator=generator) for _ in range(times)])
    inputs = {"audio": dataset.inputs["audio"][clips], "image": dataset.inputs["image"][images]}
    return MultimodalDataset(inputs, dataset.target[clips] + dataset.target[images])


def avdigits(path: str) -> MultimodalDataset:
    """Spoken digits [16, 16] with handwritten ones [14, 14] and the index of the speaker, halved in size.

    3,000 clips of the Free Spoken Digit Dataset as log-mel spectrograms [32, 32], each paired by label with an MNIST test image
    [28, 28].
    """
    whole = data.load_npz(path, ["audio", "image"])
    halved = {name: nn.functional.avg_pool2d(x.unsqueeze(1), 2).squeeze(1) for name, x in whole.inputs.items()}
    return MultimodalDataset(halved, whole.target, whole.fields)


def any_npz(path: str, seed: int, *, modalities: Sequence[str], label: str, test_where: str | None) -> Parts:
    dataset = data.load_npz(path, modalities, label)
    return data.random_split(dataset, 0.25, seed) if test_where is None else data.split_where(dataset, test_where)


def remainders(seed: int, modulus: int = 4, times: int = 6) -> Parts:
    """Two of scikit-learn's digits, drawn independently, and the remainder of their sum, of which one digit tells nothing.

    Each image of the training part stands `times` times on the left, with others on the right.
    """
    parts = []
    for i, part in enumerate(data.digits(seed)):
        generator = torch.Generator().manual_seed(2 * seed + i)
        left = torch.arange(len(part)).repeat(times)
        right = torch.randint(len(part), (len(left),), generator=generator)
        pixels = part.inputs["pixels"]
        target = (part.target[left] + part.target[right]) % modulus
        parts.append(MultimodalDataset({"left": pixels[left], "right": pixels[right]}, target))
    return parts[0], parts[1]


BUILT_IN: dict[str, Callable[[int], Parts]] = {**task.BUILT_IN, "remainders": remainders}
# B: trained jointly, the image is learned and drowns the audio. C: what must be learned is in no modality alone.
AVDIGITS: dict[str, tuple[Callable[[str, int], Parts], dict]] = {"B": (unheard, {}), "C": (sums, {"epochs": 10})}

"""Modality competition on real data: ``python -m bench.avdigits --data avdigits.npz [--seeds 0,1,2]``.

3,000 clips of the Free Spoken Digit Dataset as log-mel spectrograms [32, 32], each paired by label with an MNIST test image
[28, 28], and the index of the speaker; tested on speakers never heard in training, with noise on the images, so that neither
modality is enough. Joint training lets the image drown the audio. Every method has the same
encoders, batches and budget and sees each modality once per batch.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mla_fast as mla
from mla_fast import data
from mla_fast.baselines import JointModel, fit_joint, joint_accuracy
from mla_fast.data import MultimodalDataset
from mla_fast.encoders import SmallCNN

SPEAKERS = ("2,4", "0,3", "1,5")
FEATURES, CLASSES, BATCH, EPOCHS, DROP = 64, 10, 64, 20, 14
MLA: dict[str, dict[str, Any]] = {
    "MLA none": {"projection": "none"},
    "MLA rls": {"projection": "rls"},
    "MLA window": {"projection": "window", "target": "update"},
}
METHODS = ("joint sum", "joint concat", *MLA)


def prepare(path: Path, seed: int) -> tuple[MultimodalDataset, MultimodalDataset]:
    """(train, test): halved in size, noise on the images, standardised, two speakers held out."""
    whole = data.load_npz(path, ["audio", "image"])
    pooled = {name: _halved(x) for name, x in whole.inputs.items()}
    noise = np.random.RandomState(1000 + seed).randn(*pooled["image"].shape)
    pooled["image"] = pooled["image"] + 0.3 * torch.from_numpy(noise).float()
    dataset = MultimodalDataset(pooled, whole.target, whole.fields)
    (train, test), _ = data.standardize(*data.split_where(dataset, f"speaker={SPEAKERS[seed % 3]}"))
    return train, test


def _halved(x: Tensor) -> Tensor:
    """Mean over 2 × 2 pixels: [N, H, W] → [N, H/2, W/2]."""
    return nn.functional.avg_pool2d(x.unsqueeze(1), 2).squeeze(1)


def run(path: Path, method: str, seed: int, *, epochs: int = EPOCHS) -> dict[str, float]:
    """Test accuracies of one run: ``joint``, or each modality alone, ``average`` and ``fused``."""
    train, test = prepare(path, seed)
    torch.manual_seed(seed)
    encoders = {name: SmallCNN(x.shape[1:], FEATURES) for name, x in train.inputs.items()}
    batches, held_out = data.loader(train, BATCH, shuffle=True), data.loader(test, 1000)
    joint = method.startswith("joint")
    if joint:
        model: nn.Module = JointModel(encoders, CLASSES, FEATURES, fusion=method.split()[1])
    else:
        model = mla.MultimodalModel(encoders, nn.Linear(FEATURES, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    if not joint:
        optimizer = mla.MLAOptimizer(optimizer, model.head, **MLA[method])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(DROP * epochs / EPOCHS)])
    if joint:
        fit_joint(model, optimizer, batches, epochs, scheduler=scheduler)
        return joint_accuracy(model, held_out)
    trainer = mla.Trainer(model, optimizer, scheduler=scheduler, progress=False)
    trainer.fit(batches, epochs)
    return trainer.evaluate(held_out)["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description="joint training and MLA on spoken and handwritten digits")
    parser.add_argument("--data", type=Path, required=True, help="avdigits.npz")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # encoders this small only wait for each other on more
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    columns = ("audio", "image", "average", "fused", "joint")
    print("| method | seed | " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) + 1))
    for method in METHODS:
        results = [run(arguments.data, method, seed) for seed in seeds]
        for seed, result in zip(seeds, results, strict=True):
            print(_row(method, str(seed), [result.get(c) for c in columns]), flush=True)
        means = [statistics.mean(r[c] for r in results) if c in results[0] else None for c in columns]
        print(_row(f"**{method}**", "mean", means), flush=True)


def _row(method: str, seed: str, values: list[float | None]) -> str:
    return f"| {method} | {seed} | " + " | ".join("" if v is None else f"{100 * v:.1f}" for v in values) + " |"


if __name__ == "__main__":
    main()

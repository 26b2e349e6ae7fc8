"""A model is deployed on images; later sounds arrive, with labels of their own, and the images it learned from are gone.

    python examples/add_modality.py

On synthetic data: the class of a sample shows in three columns of each modality, and the sounds are of four of the six classes.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mla_fast as mla

CLASSES, FEATURES, EPOCHS = 6, 32, 10


def samples(width: int, classes: int, seed: int, count: int = 600) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(count) % classes
    means = 1.5 * torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(width))
    return means[target] + 2 * torch.randn(count, width, generator=generator), target


def loader(x: Tensor, target: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(x, target), batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(0))


def encoder(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU())


def first_trainer() -> mla.Trainer:
    model = mla.MultimodalModel({"image": encoder(12)}, head=nn.Linear(FEATURES, CLASSES))
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    # These settings keep what the head has learned when something else is learned through it.
    optimizer = mla.MLAOptimizer(sgd, model.head, projection="rls", target="update", bias="project")
    return mla.Trainer(model, optimizer, seed=0, progress=False)


def main() -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    checkpoint = Path(tempfile.mkdtemp()) / "images.pt"
    images, sounds = (samples(width, CLASSES, seed=1) for width in (12, 8))
    test = [({"image": images[0], "sound": sounds[0]}, images[1])]

    # A year ago, somewhere else
    trainer = first_trainer()
    trainer.fit({"image": loader(*samples(12, CLASSES, seed=0))}, EPOCHS, checkpoint=checkpoint)
    before = trainer.evaluate([({"image": images[0]}, images[1])])["accuracy"]

    # Today: the file is all there is of the images
    trainer = first_trainer()
    trainer.resume(checkpoint)
    trainer.add_modality("sound", encoder(8))
    trainer.fit({"sound": loader(*samples(8, 4, seed=0))}, trainer.epoch + EPOCHS)
    after = trainer.evaluate(test)["accuracy"]
    print(f"image alone  {before['image']:.1%} before, {after['image']:.1%} after")
    print(f"sound alone  {after['sound']:.1%}, of which four of the six classes were seen")
    print(f"fused        {after['fused']:.1%}; the plain mean of both {after['average']:.1%}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()

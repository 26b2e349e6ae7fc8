"""What the examples train on: scikit-learn's handwritten digits, cut into an upper and a lower half. Nothing is downloaded."""

import itertools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset

CLASSES, WIDTH, MODALITIES = 10, 32, ("upper", "lower")


class Halves(torch.utils.data.Dataset):
    """Digits as ({"upper": [32], "lower": [32]}, label)."""

    def __init__(self):
        digits = load_digits()
        halves = torch.from_numpy(digits.data).float().div_(16).split(WIDTH, 1)
        self.inputs, self.target = dict(zip(MODALITIES, halves, strict=True)), torch.from_numpy(digits.target)

    def __len__(self):
        return len(self.target)

    def __getitem__(self, i):
        return {modality: x[i] for modality, x in self.inputs.items()}, self.target[i]


def loaders(size=None, batch_size=32):
    """Return loaders of every third sample held out and of the others, of the first `size` samples."""
    dataset = Halves()
    rows = range(size or len(dataset))
    train, held_out = [i for i in rows if i % 3], [i for i in rows if not i % 3]
    return DataLoader(Subset(dataset, train), batch_size, shuffle=True), DataLoader(Subset(dataset, held_out), 256)


def grouped(loader, count):
    """Yield lists of `count` batches, the last one maybe shorter: what is accumulated for a step."""
    batches = iter(loader)
    while group := list(itertools.islice(batches, count)):
        yield group


def make_model(features=64):
    """Return a MultimodalModel of two small encoders."""
    import mla_fast as mla

    torch.manual_seed(0)
    encoders = {m: nn.Sequential(nn.Linear(WIDTH, features), nn.ReLU()) for m in MODALITIES}
    return mla.MultimodalModel(encoders, nn.Linear(features, CLASSES))


def accuracy(model, loader):
    """Return the share of samples whose fused prediction is right."""
    right = total = 0
    for inputs, target in loader:
        right, total = right + (model.predict(inputs).logits.argmax(1).cpu() == target.cpu()).sum().item(), total + len(target)
    return right / total

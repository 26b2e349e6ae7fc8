"""A batch in which samples lack modalities: present, bool [N, M], says which. What absent entries hold is never read."""

import torch
from halves import MODALITIES, Halves, make_model
from torch.utils.data import DataLoader, Dataset, Subset

import mla_fast as mla
from mla_fast.data import missing_mask


class Incomplete(Dataset):
    def __init__(self, rate=0.3):
        self.whole = Halves()
        self.present = missing_mask(len(self.whole), len(MODALITIES), rate, seed=0)

    def __len__(self):
        return len(self.whole)

    def __getitem__(self, i):
        inputs, target = self.whole[i]
        there = dict(zip(MODALITIES, self.present[i].tolist(), strict=True))
        inputs = {modality: x if there[modality] else torch.full_like(x, float("nan")) for modality, x in inputs.items()}
        return inputs, target, self.present[i]


def main(epochs=10, size=None):
    dataset = Incomplete()
    rows = range(size or len(dataset))
    train = DataLoader(Subset(dataset, [i for i in rows if i % 3]), 32, shuffle=True)
    held_out = DataLoader(Subset(dataset, [i for i in rows if not i % 3]), 256)
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mla.MLAOptimizer(sgd, model.head, projection="window", target="update")
    trainer = mla.Trainer(model, optimizer, seed=0, progress=False)
    trainer.fit(train, epochs)
    return trainer.evaluate(held_out)["accuracy"]["fused"]


if __name__ == "__main__":
    print(f"fused accuracy {100 * main():.1f} %")

"""The whole of MLA in a loop of one's own."""

import torch
import torch.nn.functional as F
from halves import accuracy, loaders, make_model

import mla_fast as mla


def main(epochs=10, size=None):
    train, held_out = loaders(size)
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mla.MLAOptimizer(sgd, model.head, projection="window", target="update")
    for _ in range(epochs):
        for inputs, target in train:
            for modality, x in inputs.items():  # one modality a step
                optimizer.zero_grad()
                F.cross_entropy(model({modality: x})[modality], target).backward()
                optimizer.step(modality=modality)
    return accuracy(model, held_out)


if __name__ == "__main__":
    print(f"fused accuracy {100 * main():.1f} %")

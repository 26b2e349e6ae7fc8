"""Accelerate with accumulation: inside of a modality's turn, the loss divided, since accumulate() counts batches, not turns."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from halves import accuracy, grouped, loaders, make_model

import mla_fast as mla


def main(epochs=10, size=None):
    train, held_out = loaders(size)
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mla.MLAOptimizer(sgd, model.head, projection="window", target="update")
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model, prepared, train = accelerator.prepare(model, optimizer, train)
    modalities = accelerator.unwrap_model(model).modalities
    for _ in range(epochs):
        for batches in grouped(train, 2):
            for modality in modalities:
                prepared.zero_grad()
                for inputs, target in batches:
                    loss = F.cross_entropy(model({modality: inputs[modality]})[modality], target)
                    accelerator.backward(loss / len(batches))
                optimizer.modality = modality  # the prepared optimizer's step takes none
                prepared.step()
    return accuracy(accelerator.unwrap_model(model), held_out)


if __name__ == "__main__":
    print(f"fused accuracy {100 * main():.1f} %")

"""Lightning Fabric around each part of the model, and Trainer over it."""

import torch
from halves import accuracy, loaders, make_model
from lightning_fabric import Fabric

import mla_fast as mla


def main(epochs=10, size=None):
    train, held_out = loaders(size)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    bare = make_model()
    parts = {modality: fabric.setup_module(encoder) for modality, encoder in bare.encoders.items()}
    model = mla.MultimodalModel(parts, fabric.setup_module(bare.head))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mla.MLAOptimizer(sgd, model.head, projection="window", target="update")
    trainer = mla.Trainer(model, optimizer, backward=fabric.backward, device=fabric.device, progress=False)
    trainer.fit(fabric.setup_dataloaders(train), epochs)
    return accuracy(bare, held_out)


if __name__ == "__main__":
    print(f"fused accuracy {100 * main():.1f} %")

"""Train a classifier of digits whose upper and lower halves are two modalities."""

import torch
import torch.nn.functional as F
from halves import CLASSES, WIDTH, grouped, loaders
from torch import nn

import mla_fast as mla

MODALITIES = ("upper", "lower")


class Classifier(nn.Module):
    def __init__(self, features=64):
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Sequential(nn.Linear(WIDTH, features), nn.ReLU()) for m in MODALITIES})
        self.head = nn.Linear(features, CLASSES)

    def forward(self, inputs):
        return {m: self.head(self.encoders[m](x)) for m, x in inputs.items()}


def step(model, optimizer, batches, modality):
    optimizer.zero_grad()
    for inputs, target in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model({modality: inputs[modality]})[modality], target)
        (loss / len(batches)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step(modality=modality)


@torch.no_grad()
def accuracy(model, loader):
    right = total = 0
    for inputs, target in loader:
        logits = mla.entropy_fusion(list(model(inputs).values())).logits
        right, total = right + (logits.argmax(1) == target).sum().item(), total + len(target)
    return right / total


def main(epochs=10, size=None, checkpoint="checkpoint.pt"):
    torch.manual_seed(0)
    train, held_out = loaders(size)
    model = Classifier()
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = mla.MLAOptimizer(adamw, model.head, projection="window", target="update")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best = 0.0
    for epoch in range(epochs):
        for batches in grouped(train, 2):
            for modality in MODALITIES:
                step(model, optimizer, batches, modality)
        scheduler.step()
        reached = accuracy(model, held_out)
        print(f"epoch {epoch + 1}: validation accuracy {100 * reached:.1f} %")
        if reached > best:
            best = reached
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    return best


if __name__ == "__main__":
    main()

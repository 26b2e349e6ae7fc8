"""Train a classifier of digits whose upper and lower halves are two modalities."""

import torch
import torch.nn.functional as F
from halves import CLASSES, WIDTH, grouped, loaders
from torch import nn

MODALITIES = ("upper", "lower")


class Classifier(nn.Module):
    def __init__(self, features=64):
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Sequential(nn.Linear(WIDTH, features), nn.ReLU()) for m in MODALITIES})
        self.head = nn.Linear(len(MODALITIES) * features, CLASSES)

    def forward(self, inputs):
        return self.head(torch.cat([self.encoders[m](inputs[m]) for m in MODALITIES], 1))


def step(model, optimizer, batches):
    optimizer.zero_grad()
    for inputs, target in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(inputs), target)
        (loss / len(batches)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()


@torch.no_grad()
def accuracy(model, loader):
    right = total = 0
    for inputs, target in loader:
        logits = model(inputs)
        right, total = right + (logits.argmax(1) == target).sum().item(), total + len(target)
    return right / total


def main(epochs=10, size=None, checkpoint="checkpoint.pt"):
    torch.manual_seed(0)
    train, held_out = loaders(size)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best = 0.0
    for epoch in range(epochs):
        for batches in grouped(train, 2):
            step(model, optimizer, batches)
        scheduler.step()
        reached = accuracy(model, held_out)
        print(f"epoch {epoch + 1}: validation accuracy {100 * reached:.1f} %")
        if reached > best:
            best = reached
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    return best


if __name__ == "__main__":
    main()

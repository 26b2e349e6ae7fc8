"""Lightning with manual optimization: every batch takes a step of each modality."""

import lightning
import torch
import torch.nn.functional as F
from halves import accuracy, loaders, make_model

import mla_fast as mla


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.automatic_optimization = make_model(), False

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return mla.MLAOptimizer(sgd, self.model.head, projection="window", target="update")

    def training_step(self, batch, _):
        inputs, target = batch
        optimizer = self.optimizers()
        for modality, x in inputs.items():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.model({modality: x})[modality], target))
            optimizer.step(modality=modality)


def main(epochs=10, size=None):
    train, held_out = loaders(size)
    classifier = Classifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **quiet).fit(classifier, train)
    return accuracy(classifier.model, held_out)


if __name__ == "__main__":
    print(f"fused accuracy {100 * main():.1f} %")

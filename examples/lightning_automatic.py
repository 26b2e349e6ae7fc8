"""Lightning with automatic optimization: step t is of modality t mod M, so that M epochs show every sample in every modality."""

import lightning
import torch
import torch.nn.functional as F
from halves import MODALITIES, accuracy, loaders, make_model

import mla_fast as mla


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return mla.MLAOptimizer(sgd, self.model.head, projection="window", target="update")

    def training_step(self, batch, _):
        inputs, target = batch
        modality = MODALITIES[self.global_step % len(MODALITIES)]
        self.optimizers().optimizer.modality = modality
        return F.cross_entropy(self.model({modality: inputs[modality]})[modality], target)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        """Leave the features that the training step has just collected: Lightning calls this after it, before backward."""
        with self.optimizers().optimizer.keep_features():
            optimizer.zero_grad()


def main(epochs=10, size=None):
    train, held_out = loaders(size)
    classifier = Classifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=len(MODALITIES) * epochs, accelerator="cpu", devices=1, **quiet)
    trainer.fit(classifier, train)
    return accuracy(classifier.model, held_out)


if __name__ == "__main__":
    print(f"fused accuracy {100 * main():.1f} %")

"""Hugging Face's Trainer: its step t is of modality t mod M, so that M epochs show every sample in every modality."""

import torch
import torch.nn.functional as F
from halves import MODALITIES, accuracy, loaders, make_model
from transformers import Trainer, TrainingArguments

import mla_fast as mla


class MLATrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        modality = MODALITIES[self.state.global_step % len(MODALITIES)]  # one for all batches accumulated for a step
        self.mla.modality = modality
        logits = model({modality: inputs[modality]})[modality]
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, logits) if return_outputs else loss


def collate(samples):
    inputs, target = torch.utils.data.default_collate(samples)
    return {**inputs, "labels": target}


def main(epochs=10, size=None, output="hf"):
    train, held_out = loaders(size)
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mla.MLAOptimizer(sgd, model.head, projection="window", target="update")
    settings = TrainingArguments(
        output,
        num_train_epochs=len(MODALITIES) * epochs,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    trainer = MLATrainer(model, settings, data_collator=collate, train_dataset=train.dataset, optimizers=(optimizer, constant))
    trainer.mla = optimizer
    trainer.train()
    return accuracy(model, held_out)


if __name__ == "__main__":
    print(f"fused accuracy {100 * main():.1f} %")

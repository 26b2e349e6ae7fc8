"""Text and images by two models of transformers, BERT and ViT: tiny and of random weights here, from_pretrained in earnest."""

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import mla_fast as mla

CLASSES, FEATURES, WORDS = 4, 32, 40


class Text(nn.Module):
    """What a tokenizer returns, {"input_ids", "attention_mask"} [N, T], to features [N, s]."""

    def __init__(self):
        super().__init__()
        shape = {"hidden_size": FEATURES, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        self.bert = BertModel(BertConfig(vocab_size=WORDS, **shape))

    def forward(self, tokens):
        return self.bert(**tokens).last_hidden_state[:, 0]


class Image(nn.Module):
    """Pixels [N, 3, 16, 16] to features [N, s]."""

    def __init__(self):
        super().__init__()
        shape = {"hidden_size": FEATURES, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        self.vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **shape))

    def forward(self, pixels):
        return self.vit(pixel_values=pixels).last_hidden_state[:, 0]


def samples(count, generator):
    """Make posts of four classes, each with words of its own and a colour and corner of its own."""
    for _ in range(count):
        label = int(torch.randint(CLASSES, (), generator=generator))
        words = torch.randint(CLASSES, WORDS, (8,), generator=generator)
        words[0], words[3] = label, label
        mask = torch.ones(8, dtype=torch.long)
        pixels = 0.5 * torch.randn(3, 16, 16, generator=generator)
        pixels[:, 8 * (label // 2) :][:, :8, 8 * (label % 2) :][:, :, :8] += 1
        yield {"text": {"input_ids": words, "attention_mask": mask}, "image": pixels}, label


def main(epochs=6, size=400):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(list(samples(size, generator)), 32, shuffle=True)
    held_out = DataLoader(list(samples(200, generator)), 100)
    model = mla.MultimodalModel({"text": Text(), "image": Image()}, nn.Linear(FEATURES, CLASSES))
    adamw = torch.optim.AdamW(model.parameters(), lr=2e-3)
    optimizer = mla.MLAOptimizer(adamw, model.head, projection="window", target="update")
    trainer = mla.Trainer(model, optimizer, seed=0, progress=False)
    trainer.fit(train, epochs)
    return trainer.evaluate(held_out)["accuracy"]["fused"]


if __name__ == "__main__":
    print(f"fused accuracy {100 * main():.1f} %")

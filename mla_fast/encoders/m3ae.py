"""M3AE's encoder: Geng et al., Multimodal masked autoencoders learn transferable representations, 2022."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mla_fast.encoders.transformer import Block, initialize, positions_1d, positions_2d
from mla_fast.inputs import describe

SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, depth, heads
TOWERS = ("image", "text", "both")
PATCH_ORDERS = ("pretrained", "official")
PATCH = 16


class M3AE(nn.Module):
    """Map images or texts to features [N, width]: the mean over the tokens after M3AE's transformer and last LayerNorm.

    Images are floats [N, 3, image_size, image_size]. Texts are token numbers, int64 or int32 [N, T] with T ≤ `tokens`, where 0 is
    padding; or a mapping with ``input_ids`` and ``attention_mask`` (1 = a token), as a tokenizer returns it. Padding is masked in
    attention and, as in the paper, counts in the mean: pad to one length. A text of padding alone is what the CLS token says.

    tower: "image", "text", or "both", which takes either and shares the transformer, as in pretraining. MLA's code has
        one copy for each modality.
    size: "small", "base", "large" (features 384, 768, 1024), or (width, depth, heads).
    vocabulary: of the tokenizer, by default bert-base-uncased, of which M3AE takes no special tokens.
    patch_order: "pretrained" flattens a patch by (row, column, channel), as M3AE's weights expect. "official" is what MLA's
        released code does, (channel, row, column), which scrambles what those weights see.
    gelu: "tanh", as in pretraining, or "none" for the exact one, as in MLA's port.

    Raises ValueError or TypeError for other arguments and inputs.
    """

    image_positions: Tensor
    text_positions: Tensor

    def __init__(
        self,
        tower: str = "both",
        size: str | tuple[int, int, int] = "base",
        *,
        vocabulary: int = 30522,
        image_size: int = 256,
        tokens: int = 256,
        patch_order: str = "pretrained",
        gelu: str = "tanh",
    ):
        super().__init__()
        if isinstance(size, str) and size not in SIZES:
            raise ValueError(f"size: expected {', '.join(SIZES)} or (width, depth, heads), got {size!r}")
        for name, value, choices in (("tower", tower, TOWERS), ("patch_order", patch_order, PATCH_ORDERS)):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if image_size < PATCH or image_size % PATCH:
            raise ValueError(f"image_size: expected a multiple of {PATCH}, got {image_size}")
        width, depth, heads = SIZES[size] if isinstance(size, str) else size
        if width % 4:
            raise ValueError(f"size: expected a width divisible by 4, got {width}")
        self.tower, self.patch_order, self.image_size = tower, patch_order, image_size
        self.out_features = width
        self.cls_token = _type_embedding(width)
        if tower != "text":
            side = image_size // PATCH
            self.image_embedding = nn.Linear(3 * PATCH * PATCH, width)
            self.encoder_image_type_embedding = _type_embedding(width)
            self.register_buffer("image_positions", positions_2d(side, side, width), persistent=False)
        if tower != "image":
            self.text_embedding = nn.Embedding(vocabulary, width)
            self.encoder_text_type_embedding = _type_embedding(width)
            self.register_buffer("text_positions", positions_1d(torch.arange(tokens), width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, 1e-6, gelu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.apply(initialize)

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        if isinstance(x, Tensor) and x.is_floating_point():
            tokens, visible = self._image_tokens(x), None
        else:
            tokens, visible = self._text_tokens(x)
        h = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)  # [N, 1 + T, width]
        for block in self.blocks:
            h = block(h, visible)
        features: Tensor = self.norm(h).mean(1)
        return features

    def _image_tokens(self, x: Tensor) -> Tensor:
        side = self.image_size
        if self.tower == "text" or x.shape[1:] != (3, side, side):
            expected = f"images [N, 3, {side}, {side}]" if self.tower == "image" else self._expected()
            raise ValueError(f"x: expected {expected}, got {describe(x)}")
        patches = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [N, 3, rows, columns, PATCH, PATCH]
        order = (0, 2, 3, 4, 5, 1) if self.patch_order == "pretrained" else (0, 2, 3, 1, 4, 5)
        flat = patches.permute(order).flatten(3).flatten(1, 2)  # [N, rows · columns, 768]
        tokens: Tensor = self.image_embedding(flat) + self.image_positions + self.encoder_image_type_embedding
        return tokens

    def _text_tokens(self, x: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return tokens [N, T, width], and which of CLS and tokens are visible, bool [N, 1 + T]."""
        ids = x if isinstance(x, Tensor) else x["input_ids"]
        mask = ids != 0 if isinstance(x, Tensor) else x["attention_mask"].bool()
        good = self.tower != "image" and ids.dtype in (torch.int64, torch.int32) and ids.dim() == 2 and mask.shape == ids.shape
        if not good or ids.shape[1] > len(self.text_positions):
            raise ValueError(f"x: expected {self._expected()}, got {describe(ids)}")
        tokens = self.text_embedding(ids) + self.text_positions[: ids.shape[1]] + self.encoder_text_type_embedding
        return tokens, torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)

    def _expected(self) -> str:
        images = f"images, floats [N, 3, {self.image_size}, {self.image_size}]" if self.tower != "text" else ""
        texts = f"tokens, int64 [N, T] with T ≤ {len(self.text_positions)}" if self.tower != "image" else ""
        return " or ".join(filter(None, (images, texts)))


def _type_embedding(width: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(1, 1, width))

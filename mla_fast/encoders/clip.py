"""CLIP's encoders, by way of ``transformers``: Radford et al., ICML 2021."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

TOWERS = ("image", "text")


class CLIP(nn.Module):
    """Map images [N, 3, 224, 224], or tokens [N, T ≤ 77], to CLIP's projected embeddings [N, 512], which are not normalised.

    Tokens are int64, or a mapping with ``input_ids`` and ``attention_mask``; attention is causal, so that padding after the end
    of a text counts for nothing.

    tower: "image" or "text".
    model: a name or a folder that ``from_pretrained`` takes, or a ``CLIPVisionConfig`` or ``CLIPTextConfig`` for random weights.

    Raises ImportError without ``transformers``, which the extra ``mla_fast[paper]`` installs, and ValueError for another tower.
    """

    def __init__(self, tower: str, model: Any = "openai/clip-vit-base-patch32"):
        super().__init__()
        if tower not in TOWERS:
            raise ValueError(f"tower: expected one of {', '.join(TOWERS)}, got {tower!r}")
        try:
            from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
        except ImportError as error:
            raise ImportError(f"CLIP needs transformers: pip install 'mla_fast[paper]' ({error})") from error
        kind: Any = CLIPVisionModelWithProjection if tower == "image" else CLIPTextModelWithProjection
        self.tower = tower
        self.model = kind.from_pretrained(model) if isinstance(model, str) else kind(model)
        self.out_features: int = self.model.config.projection_dim

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        if self.tower == "image":
            images: Tensor = self.model(pixel_values=x).image_embeds
            return images
        inputs = {"input_ids": x} if isinstance(x, Tensor) else dict(x)
        texts: Tensor = self.model(**inputs).text_embeds
        return texts

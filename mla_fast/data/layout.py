"""What the axes of a modality mean: given by the user, or found from its dtype and shape where these leave no doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mla_fast.data.dataset import MultimodalDataset

LAYOUTS = {
    "features": ("[N] or [N, F]", (1, 2)),
    "tokens": ("integers [N, T]", (2,)),
    "sequence": ("[N, T, F]", (3,)),
    "image": ("[N, H, W] or [N, C, H, W]", (3, 4)),
    "channels_last": ("[N, H, W, C]", (4,)),
}
MAX_VOCABULARY = 10**7


def find_layouts(dataset: MultimodalDataset, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the layout of each modality, one of `LAYOUTS`: those `given`, and for the others what dtype and shape say.

    [N] and [N, F] are features, [N, H, W] and [N, C, H, W] images. Only rows that are present count.

    Raises ValueError for other shapes, and where there is a choice: integers [N, T] that may be tokens (none negative, some
    above 1), and images whose channels seem to be last.
    """
    given = given or {}
    if unknown := [modality for modality in given if modality not in dataset.modalities]:
        raise ValueError(f"layout: expected modalities among {', '.join(dataset.modalities)}, got {', '.join(unknown)}")
    if wrong := [layout for layout in given.values() if layout not in LAYOUTS]:
        raise ValueError(f"layout: expected {', '.join(LAYOUTS)}, got {wrong[0]!r}")
    return {m: given.get(m) or _find(dataset, m) for m in dataset.modalities}


def _find(dataset: MultimodalDataset, modality: str) -> str:
    x = dataset.inputs[modality]
    dim, choice = x.dim(), ""
    if dim == 2 and x.shape[1] > 1 and is_integer(x.dtype) and _may_be_tokens(dataset, modality):
        choice = "tokens [N, T] (--layout {0}=tokens) or features [N, F] (--layout {0}=features)"
    if dim == 4 and looks_channels_last(x.shape[1:]):
        choice = "images [N, H, W, C] (--layout {0}=channels_last) or [N, C, H, W] (--layout {0}=image)"
    if choice:
        raise ValueError(f"{modality!r}: {x.dtype} {list(x.shape)} may be {choice.format(modality)}; say which")
    if dim in (1, 2):
        return "features"
    if dim in (3, 4):
        return "image"
    raise ValueError(f"{modality!r}: expected [N], [N, F], [N, H, W] or [N, C, H, W], got {list(x.shape)}")


def looks_channels_last(shape: Sequence[int]) -> bool:
    """Whether a sample of three axes seems to be [H, W, C]: its last one is the shortest, or as long as colours are many."""
    first, second, last = shape
    return last < min(first, second) or (last in (1, 3, 4) and first not in (1, 3, 4))


def is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _may_be_tokens(dataset: MultimodalDataset, modality: str) -> bool:
    low, high = _extremes(dataset, modality) or (0, 0)
    return dataset.inputs[modality].dtype != torch.uint8 and low >= 0 and high > 1


def _extremes(dataset: MultimodalDataset, modality: str) -> tuple[int, int] | None:
    """Return the lowest and highest of integers over the rows that are present, None without any."""
    found = [x.aminmax() for x in dataset.chunks(modality) if x.numel()]
    return (min(int(low) for low, _ in found), max(int(high) for _, high in found)) if found else None


def arrange(dataset: MultimodalDataset, layouts: Mapping[str, str]) -> MultimodalDataset:
    """Return the samples as the encoders of ``encoder_for`` take them: features [N, F], tokens int64, channels first.

    Raises ValueError for a modality that does not have its layout's shape, or has no values, and for tokens that are not
    integers from 0.
    """
    return dataset.then({m: partial(_arranged, modality=m, layout=layouts[m]) for m in dataset.modalities})


def _arranged(x: Tensor, here: Tensor | None, modality: str, layout: str) -> Tensor:
    shape, dims = LAYOUTS[layout]
    if x.dim() not in dims or 0 in x.shape[1:]:
        raise ValueError(f"{modality!r}: expected {shape} as {layout}, with at least one value, got {list(x.shape)}")
    if layout == "channels_last":
        return x.movedim(3, 1).contiguous()
    if layout != "tokens":
        return x.unsqueeze(1) if x.dim() == 1 else x
    if not is_integer(x.dtype):
        raise ValueError(f"{modality!r}: expected integers as tokens, got {x.dtype}")
    rows = x if here is None else x[here]
    if len(rows) and (rows.min() < 0 or rows.max() >= MAX_VOCABULARY):
        low, high = int(rows.min()), int(rows.max())
        raise ValueError(
            f"{modality!r}: expected tokens from 0 (padding) to {MAX_VOCABULARY - 1}, got {low if low < 0 else high}"
        )
    return x.long()


def vocabulary(dataset: MultimodalDataset, layouts: Mapping[str, str]) -> dict[str, int]:
    """Return the highest token plus one of each modality of tokens, over the rows that are present, all of which are read."""
    tokens = [m for m in dataset.modalities if layouts[m] == "tokens"]
    return {m: (_extremes(dataset, m) or (0, 0))[1] + 1 for m in tokens}

"""Weights of M3AE and CAV-MAE, read from the files that their authors and MLA's released."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mla_fast.encoders.cavmae import PATCH, CAVMAEAudio
from mla_fast.encoders.m3ae import M3AE

# Layers of a Block as the files call them: in Flax, in MLA's port of M3AE to torch, and in CAV-MAE.
FLAX = {
    "norm1": "LayerNorm_0",
    "qkv": "Attention_0/Dense_0",
    "proj": "Attention_0/Dense_1",
    "norm2": "LayerNorm_1",
    "fc1": "TransformerMLP_0/fc1",
    "fc2": "TransformerMLP_0/fc2",
}
PORT = {
    "norm1": "layer_norm1",
    "qkv": "attention.qkv_linear",
    "proj": "attention.fc",
    "norm2": "layer_norm2",
    "fc1": "transformer_mlp.fc1",
    "fc2": "transformer_mlp.fc2",
}
TIMM = {"norm1": "norm1", "qkv": "attn.qkv", "proj": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
HEAD_WIDTH = 64  # of every released size


def load_m3ae(path: str | Path, tower: str = "both", *, prefix: str = "", **settings: Any) -> M3AE:
    """Return an ``M3AE`` of the size and with the weights of a file.

    path: ``.npz`` or ``.safetensors`` with Flax's names joined by "/", as ``encoders/convert_m3ae.py`` writes them; or a ``.pth``
        of MLA's port, on its own or under "model", with or without "module." before its names. The released pickle of M3AE has
        to be converted first.
    prefix: of the names, where a checkpoint has M3AE as a part of a model.
    settings: of ``M3AE``, such as ``patch_order="official"``.

    All parameters of the tower must be there; what else is in the file, such as the decoder, is left. Raises ValueError that
    names the first parameter that is missing or has another shape, and ImportError for a ``.safetensors`` without safetensors.
    """
    found = {name[len(prefix) :]: t for name, t in _read(path).items() if name.startswith(prefix)}
    flax = "encoder/LayerNorm_0/scale" in found or any("/" in name for name in found)
    start, separator = ("encoder/Block_", "/") if flax else ("encoder.blocks.", ".")
    width, depth = _get(path, found, "cls_token").shape[-1], _count(found, start, separator)
    vocabulary = _shape(found, "text_embedding/embedding" if flax else "text_embedding.weight", 0, 30522)
    size = (width, depth, max(1, width // HEAD_WIDTH))
    encoder = M3AE(tower, size, **{"vocabulary": vocabulary, **settings})
    names = {name: _flax_name(name) if flax else _port_name(name) for name, _ in encoder.named_parameters()}
    _load(path, encoder, found, names)
    return encoder


def load_cavmae(path: str | Path) -> CAVMAEAudio:
    """Return a ``CAVMAEAudio`` with the weights of a released ``.pth``, with or without "module." before its names.

    All parameters of the audio branch must be there; what else is in the file is left. Raises ValueError as ``load_m3ae`` does.
    """
    found = _read(path)
    positions = _get(path, found, "pos_embed_a")
    own = _count(found, "blocks_a.", ".")
    width = positions.shape[-1]
    encoder = CAVMAEAudio(positions.shape[-2] * PATCH // 8, (width, own + 1, max(1, width // HEAD_WIDTH)))
    names = {name: _cavmae_name(name, own) for name, _ in encoder.named_parameters()}
    _load(path, encoder, found, names)
    return encoder


def _flax_name(name: str) -> str:
    first, *rest = name.split(".")
    if not rest:
        return name
    if first == "text_embedding":
        return "text_embedding/embedding"
    layer, kind = rest[-2] if len(rest) > 1 else first, rest[-1]
    leaf = "bias" if kind == "bias" else "scale" if layer.startswith("norm") else "kernel"
    if first == "blocks":
        return f"encoder/Block_{rest[0]}/{FLAX[layer]}/{leaf}"
    return f"encoder/LayerNorm_0/{leaf}" if first == "norm" else f"{first}/{leaf}"


def _port_name(name: str) -> str:
    first, *rest = name.split(".")
    if first == "blocks":
        return f"encoder.blocks.{rest[0]}.{PORT[rest[1]]}.{rest[2]}"
    return f"encoder.layer_norm.{rest[0]}" if first == "norm" else name


def _cavmae_name(name: str, own: int) -> str:
    first, *rest = name.split(".")
    if first != "blocks":
        renamed = {"patch_embed": "patch_embed_a.proj", "norm": "norm_a", "modality": "modality_a", "pos_embed": "pos_embed_a"}
        return ".".join([renamed[first], *rest])
    index, layer, kind = int(rest[0]), rest[1], rest[2]
    if index < own:
        return f"blocks_a.{index}.{TIMM[layer]}.{kind}"
    return f"blocks_u.{index - own}.{TIMM[layer]}{'_a' if layer.startswith('norm') else ''}.{kind}"


def _read(path: str | Path) -> dict[str, Tensor]:
    path = Path(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{path} needs safetensors: pip install 'mla_fast[paper]' ({error})") from error
        return load_file(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        advice = "M3AE's released pickle has to be converted first, by mla_fast/encoders/convert_m3ae.py"
        raise ValueError(f"{path}: expected tensors alone, as torch.save writes them; {advice} ({error})") from None
    saved = saved.get("model", saved) if isinstance(saved, Mapping) else saved
    if not isinstance(saved, Mapping):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(saved).__name__}")
    return {name.removeprefix("module."): t for name, t in saved.items() if isinstance(t, Tensor)}


def _load(path: str | Path, encoder: nn.Module, found: dict[str, Tensor], names: dict[str, str]) -> None:
    """Copy found[names[p]] to each parameter p; check all before the first."""
    weights = {}
    for name, parameter in encoder.named_parameters():
        t = _get(path, found, names[name])
        t = t.mT if names[name].endswith("/kernel") and t.dim() == 2 else t  # Flax has [in, out]
        if t.shape != parameter.shape:
            raise ValueError(f"{path}: {names[name]}: expected {list(parameter.shape)}, got {list(t.shape)}")
        weights[name] = t
    encoder.load_state_dict(weights)


def _get(path: str | Path, found: dict[str, Tensor], name: str) -> Tensor:
    if name not in found:
        near = difflib.get_close_matches(name, found, 1)
        got = f"the nearest name is {near[0]}" if near else f"names are {', '.join(list(found)[:4])}, …"
        raise ValueError(f"{path}: expected {name}, which is not there; {got}")
    return found[name]


def _count(found: Mapping[str, Tensor], start: str, separator: str) -> int:
    numbers = {name[len(start) :].split(separator)[0] for name in found if name.startswith(start)}
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=1)


def _shape(found: Mapping[str, Tensor], name: str, axis: int, otherwise: int) -> int:
    return found[name].shape[axis] if name in found and found[name].dim() > axis else otherwise

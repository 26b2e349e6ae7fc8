"""The encoders of a run: those of the package by the shape of a sample, or of one's own by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mla_fast.encoders import encoder_for
from mla_fast.parts import evaluating


def check_names(option: str, names: Iterable[str], modalities: Sequence[str]) -> None:
    """Raise ValueError for a name that is no modality."""
    for name in names:
        if name not in modalities:
            raise ValueError(f"--{option}: expected modalities among {', '.join(modalities)}, got {name!r}")


def own_encoder(modality: str, path: str) -> nn.Module:
    """Return what a class or function of one's own, ``package.module:Encoder``, makes when it is called without arguments.

    The folder that the command is typed in is searched, too. Raises ValueError that names --encoder.
    """
    module, _, name = path.rpartition(":" if ":" in path else ".")
    sys.path.insert(0, "")  # a file beside the one who types
    try:
        encoder = getattr(importlib.import_module(module), name)()
    except (ValueError, AttributeError, ImportError, TypeError) as error:
        expected = f"{modality}=package.module:Encoder, which is called without arguments"
        raise ValueError(f"--encoder: expected {expected}, got {path!r} ({error})") from error
    finally:
        sys.path.remove("")
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"--encoder: expected an nn.Module from {path!r}, got {type(encoder).__name__}")
    return encoder


def width_of(modality: str, encoder: nn.Module, sample: torch.Tensor) -> int:
    """Return s of the features [1, s] that an encoder makes of a sample [1, …]; raise ValueError for any other result."""
    try:
        with torch.no_grad(), evaluating(encoder):
            features: Any = encoder(sample)
    except Exception as error:  # anything may go wrong in code of one's own
        expected = f"{modality}'s to take {sample.dtype} {list(sample.shape)}"
        raise ValueError(f"--encoder: expected {expected}, got {type(error).__name__}: {error}") from error
    if not isinstance(features, torch.Tensor) or features.dim() != 2 or len(features) != 1:
        got = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(f"--encoder: expected features [N, s] of {modality}, got {got} for one sample")
    return features.shape[1]


def one_width(widths: Mapping[str, int]) -> int:
    """Return the width that all have; raise ValueError if they differ."""
    if len(set(widths.values())) > 1:
        raise ValueError(f"--encoder: expected features of one width, got {dict(widths)}")
    return next(iter(widths.values()))


def make_encoders(config: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, nn.Module], int]:
    """Return the encoders of these names that a run's config describes, and the width of their features: that of one's own where
    there are."""
    check_names("encoder", config["encoder"], list(config["encoders"]))
    own = {name: own_encoder(name, path) for name, path in config["encoder"].items() if name in names}
    samples = {name: torch.zeros(1, *config["encoders"][name]) for name in own}
    samples = {name: x.long() if config["layouts"][name] == "tokens" else x for name, x in samples.items()}
    features = one_width({n: width_of(n, e, samples[n]) for n, e in own.items()}) if own else config["features"]
    encoders = {
        name: own[name] if name in own else encoder_for(shape, features, config["layouts"][name], config["vocabulary"].get(name))
        for name, shape in config["encoders"].items()
        if name in names
    }
    return encoders, features

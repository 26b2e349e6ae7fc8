"""Options of the command line: the types of all, those that several commands have, and what --device and --amp mean."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from mla_fast import data, ops
from mla_fast.settings import BIASES, PROJECTIONS, TARGETS, Settings

AMP = {"bf16": torch.bfloat16}
Number = TypeVar("Number", int, float)


def number(kind: Callable[[str], Number], expected: str, accepts: Callable[[Number], bool]) -> Callable[[str], Number]:
    """Return the type of an option whose text `kind` reads as a number that `accepts` takes; others are not `expected`."""

    def parse(text: str) -> Number:
        with contextlib.suppress(ValueError):
            if accepts(value := kind(text)):
                return value
        raise _refused(expected, text)

    return parse


def _refused(expected: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


# Every comparison with NaN is false, so that none of these accepts it.
positive = number(int, "a whole number of at least 1", lambda n: n >= 1)
count = number(int, "a whole number of at least 0", lambda n: n >= 0)
seed = number(int, "a whole number of 64 bits", lambda n: -(2**63) <= n < 2**63)
above_zero = number(float, "a number above 0", lambda x: 0 < x < math.inf)
at_least_zero = number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
below_one = number(float, "a number in [0, 1)", lambda x: 0 <= x < 1)
fraction = number(float, "a fraction in (0, 1)", lambda x: 0 < x < 1)
fraction_or_rows = number(float, "a fraction in (0, 1) or FIELD=VALUES", lambda x: 0 < x < 1)


def held_out(text: str) -> str:
    """Return a fraction or FIELD=VALUES as it was typed."""
    if "=" not in text:
        fraction_or_rows(text)
    return text


def seeds(text: str) -> list[int]:
    """Return [0, 1, 2, 5] for ``"0-2,5"``."""
    found: list[int] = []
    for first, dash, last in (part.partition("-") for part in text.split(",") if part):
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise _refused('seeds as "0-5" or "0,2,7"', text)
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise _refused("at least one seed", text)
    return list(dict.fromkeys(found))


def rates(text: str) -> list[float]:
    """Return 0.1, 0.3, 0.5, 0.7 for ``"0.1:0.7"``, ``"0.1:0.7:0.1"`` in steps of 0.1; and for ``"0.2,0.5"`` these."""
    try:
        if ":" in text:
            low, high, step = (float(part) for part in (text if text.count(":") > 1 else f"{text}:0.2").split(":"))
            found = [round(low + step * i, 3) for i in range(math.floor((high - low) / step + 1e-9) + 1)]
        else:
            found = [float(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise _refused('rates as "0.1:0.7" or "0.1,0.5"', text) from None
    if not found or not all(0 <= rate < 1 for rate in found):
        raise _refused("rates in [0, 1)", text)
    return found


def names(text: str) -> list[str]:
    """Return the names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def pairs(text: str, expected: str = "MODALITY=VALUE, several with commas between") -> dict[str, str]:
    """Return {"audio": "a", "text": "b"} for ``"audio=a,text=b"``."""
    found = [(name.strip(), value.strip()) for name, _, value in (pair.partition("=") for pair in text.split(","))]
    if not all(name and value for name, value in found) or len(dict(found)) < len(found):
        raise _refused(expected, text)
    return dict(found)


def layouts(text: str) -> dict[str, str]:
    """Return {"text": "tokens"} for ``"text=tokens"``."""
    expected = f"NAME=LAYOUT with a layout of {', '.join(data.LAYOUTS)}"
    found = pairs(text, expected)
    if not set(found.values()) <= set(data.LAYOUTS):
        raise _refused(expected, text)
    return found


def add(p: Any, flag: str, kind: Callable[[str], Any], default: Any, help: str, **how: Any) -> None:
    """Add an option to a parser, with its default at the end of its help where that is a number, a name or a path."""
    shown = isinstance(default, (int, float, str, Path)) and default != ""
    p.add_argument(flag, type=kind, default=default, help=f"{help} (default: %(default)s)" if shown else help, **how)


def add_training_options(p: argparse.ArgumentParser, defaults: Mapping[str, Any], falls: str) -> None:
    """Add the settings of SGD; falls: after what the learning rate falls to a tenth."""
    add(p, "--epochs", positive, defaults["epochs"], "passes over the training part")
    add(p, "--seed", seed, defaults["seed"], "seed of the initial parameters and of all random draws")
    add(p, "--batch-size", positive, defaults["batch_size"], "samples in a batch")
    add(p, "--lr", above_zero, defaults["lr"], f"learning rate of SGD, which falls to a tenth after {falls}")
    add(p, "--momentum", below_one, defaults["momentum"], "momentum of SGD")
    add(p, "--weight-decay", at_least_zero, defaults["weight_decay"], "weight decay of SGD")


def add_projection_options(p: argparse.ArgumentParser) -> None:
    """Add the settings of the head's projection, the paper's by default."""
    help = "projection of the head's step: rls, recursive least squares, the paper's; window, by the other modalities' latest "
    help += "mean features alone; official, the released code's arithmetic; or none"
    add(p, "--projection", str, Settings.projection, help, choices=PROJECTIONS)
    help = "whether P takes in a batch's mean feature before the batch's step is projected, as in Algorithm 1, or after"
    add(p, "--order", str, Settings.order, help, choices=ops.ORDERS)
    help = "what is projected: the head's gradient (eq. 3), or the optimizer's update, with its momentum and weight decay"
    add(p, "--target", str, Settings.target, help, choices=TARGETS)
    help = "whether the head's bias is left free or is projected, as one more column of the weight"
    add(p, "--bias", str, Settings.bias, help, choices=BIASES)
    help = "α of P⁺ = P − k kᵀ / (α + x̄ᵀk), above 0: the larger, the less is projected away"
    add(p, "--alpha", above_zero, Settings.alpha, help)


def add_amp_option(p: argparse.ArgumentParser, default: str = "none") -> None:
    """Add --amp; default: what happens without it."""
    p.add_argument("--amp", choices=AMP, help=f"data type of autocast in the forward passes (default: {default})")


def add_device_option(p: argparse.ArgumentParser, default: str = "auto") -> None:
    """Add --device."""
    add(p, "--device", str, default, "cpu, cuda or another device of torch; auto takes a GPU where there is one")


def add_config_option(p: argparse.ArgumentParser) -> None:
    """Add --config, which ``cli_config`` reads before the command line is parsed."""
    help = "settings as TOML, such as the run.toml of another run; options on the command line override them"
    p.add_argument("--config", type=Path, help=help)


def add_rerun_options(p: argparse.ArgumentParser) -> None:
    """Add --resume and --overwrite, for an output folder that has a run already."""
    again = p.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --output, to more --epochs if you like")
    again.add_argument("--overwrite", action="store_true", help="delete the run in --output and begin anew")


def device(name: str) -> torch.device:
    """Return the device that --device names; raise ValueError where torch cannot use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected auto or an available device, got {name!r} ({reason})") from None


def autocast_dtype(name: str | None) -> torch.dtype | None:
    """Return the data type that --amp names; None for none."""
    return None if name is None else AMP[name]

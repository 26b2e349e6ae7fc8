"""The installed versions, the devices, and which backends run."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from mla_fast import ops

PACKAGES = ("mla_fast", "torch", "triton", "numpy", "scikit-learn", "matplotlib")


def report() -> list[tuple[str, str]]:
    """Return (name, state) of Python, packages, devices and backends; for an inactive backend, the state says why."""
    lines = [("python", f"{platform.python_version()} on {platform.platform()}")]
    lines += [(name, _version(name)) for name in PACKAGES]
    lines.append(("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            lines.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, CUDA {torch.version.cuda}"))
    else:
        lines.append(("cuda", "no device" if torch.version.cuda else "this torch was built without it"))
    for name, missing in ops.MISSING.items():
        lines.append((f"backend {name}", "active" if missing is None else f"not available: {missing}"))
    if ops.MISSING["cpp"] is not None:
        lines.append(
            ("NOTE", "the compiled operators are missing: all that they do runs in plain torch, more slowly (see above)")
        )
    return lines


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

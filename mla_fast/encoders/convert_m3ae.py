"""Convert M3AE's released pickle to .npz, once, where jax, flax and m3ae are installed; torch and mla_fast need not be.

    python convert_m3ae.py m3ae_base.pkl m3ae_base.npz

The pickle is a dict with ``state`` (a Flax TrainState) and ``variant``. Unpickling runs code that is in the file: convert only
files that you trust. ``mla_fast.encoders.load_m3ae`` reads the result, which is arrays alone.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("encoder/Block_0/LayerNorm_0/scale", array) of a nested dict."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value)


def convert(source: str, target: str) -> None:
    """Write the encoder's parameters of the pickle `source` to `target`, an .npz."""
    with open(source, "rb") as file:
        saved = pickle.load(file)
    state = saved["state"]
    params = state["params"] if isinstance(state, Mapping) else state.params
    params = params.get("params", params)
    arrays = {name: a for name, a in flatten(params) if not name.startswith("decoder") and "mask_embedding" not in name}
    np.savez(target, **arrays)
    print(f"wrote {target}: {len(arrays)} arrays")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python convert_m3ae.py SOURCE.pkl TARGET.npz")
    convert(sys.argv[1], sys.argv[2])

"""What bench.tune tries: the rows of kernels/launch.json, the values of their parameters, and the sizes to measure them at."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path

# The table in use, which in a checkout installed with pip -e is kernels/launch.json. Found without loading triton.
_kernels = find_spec("mla_fast.kernels")
PATH = (Path(_kernels.origin).parent if _kernels else Path(__file__).resolve().parents[1] / "kernels") / "launch.json"
# Groups of parameters that are varied together, and their values.
AXES: dict[str, list[tuple[tuple[str, ...], list[tuple[int, ...]]]]] = {
    "rls_read": [
        (("BLOCK_J", "BLOCK_I"), [*product((8, 16, 32, 64, 128), (16, 32, 64, 128, 256))]),
        (("num_warps",), [(2,), (4,), (8,)]),
        (("STAGES",), [(2,), (3,), (4,)]),
        (("programs",), [(64,), (128,), (256,), (512,), (1024,)]),
    ],
    "rls_finish": [(("BLOCK", "BLOCK_C", "num_warps"), [*product((64, 128, 256), (4, 8, 16), (2, 4, 8))])],
    "rls_fold": [(("BLOCK_ROWS", "BLOCK_COLS", "num_warps"), [*product((32, 64, 128), (32, 64, 128), (4, 8))])],
    "window": [(("BLOCK", "num_warps"), [*product((128, 256, 512, 1024, 2048), (2, 4, 8))])],
    "entropy_fusion": [
        (("elements", "num_warps"), [*product((256, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16))]),
        (("maxnreg",), [(64,), (128,), (255,)]),
    ],
}
AXES["entropy_fusion_backward"] = AXES["entropy_fusion"]
# What the rows are measured at: each at the first of these sizes that it serves.
SIZES = {
    "rls_read": [{"s": s, "C": C} for s in (1024, 4096, 8192) for C in (6, 16, 31, 101)],
    "rls_finish": [{"s": 1024}, {"s": 4096}],
    "rls_fold": [{"s": 4096}],
    "window": [{"s": s, "J": 2} for s in (1024, 8192)],
    "entropy_fusion": [{"C": C} for C in (101, 1000, 4096, 8192, 32000)],
}
SIZES["entropy_fusion_backward"] = SIZES["entropy_fusion"]
DEFERRED_SIZES = (1024, 2048, 3072, 4096, 6144, 8192)
DEFERRED_ROWS = (2, 4)  # with more waiting, P in float32 drifts beyond 1e-3 at ‖x̄‖²/α of 2.6e5


def dump(table: dict) -> str:
    """The table as kernels/launch.json has it: one row to a line."""
    parts = []
    for name, rows in table.items():
        body = json.dumps(rows)
        if isinstance(rows, list):
            body = "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]"
        parts.append(f'  "{name}": {body}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def representative(table: dict, op: str, index: int) -> dict[str, int]:
    """The size at which the row is measured."""
    for size in SIZES[op]:
        fits = (all(size[name] <= bound for name, bound in row["up_to"].items()) for row in table[op])
        if next(i for i, fit in enumerate(fits) if fit) == index:
            return size
    raise ValueError(f"launch.json: no size in bench/tune.py is served by row {index} of {op}")


def variants(op: str, row: dict, axis: int) -> Iterator[dict]:
    """The row with other values of one group of parameters; registers as many as so many warps can have."""
    names, values = AXES[op][axis]
    for chosen in values:
        other = copy.deepcopy(row)
        for name, value in zip(names, chosen, strict=True):
            (other if name == "programs" else other["config"])[name] = value
        if "maxnreg" in other["config"]:
            other["config"]["maxnreg"] = min(other["config"]["maxnreg"], 65536 // (32 * other["config"]["num_warps"]), 255)
        if other != row:
            yield other


def deferred_from(times: dict[int, tuple[float, float]]) -> int:
    """From times (lazy, deferred) by s: the least s from which on the deferred form is always the faster one."""
    start = 2 * max(times)  # nowhere that was measured
    for s in sorted(times, reverse=True):
        lazy, deferred = times[s]
        if deferred >= lazy:
            break
        start = s
    return start

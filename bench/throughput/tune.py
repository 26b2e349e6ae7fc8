"""Measures alternatives to every row of kernels/launch.json on this GPU and rewrites it: ``python -m bench.throughput.tune``.

Each row at one size that it serves, its operator in a CUDA graph, so that what is compared is what the GPU does. One group of
parameters is varied at a time and the best kept, `--sweeps` times over. A configuration has to be right before it is timed, and
in the end to beat the old one side by side, by more than the noise. Then from which s on the deferred form pays. Bounds
(``up_to``) stay as they are. Afterwards `make kernels-check` says whether the new rows suit the other GPUs as well.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

import mla_fast as mla
from bench.throughput.problems import RLS, Fusion, Window
from bench.throughput.providers import Step, capture, captured, check, random
from bench.throughput.timing import interleave
from mla_fast import ops, reference
from mla_fast.ops.softmax import softmax_delta_, softmax_sums

# The table in use, which in a checkout installed with pip -e is kernels/launch.json. Found without loading triton.
_kernels = find_spec("mla_fast.kernels")
PATH = (Path(_kernels.origin).parent if _kernels else Path(__file__).resolve().parents[2] / "kernels") / "launch.json"
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
AXES |= dict.fromkeys(
    ("softmax_sums", "softmax_delta_"), [(("BLOCK", "num_warps"), [*product((1024, 2048, 4096, 8192), (2, 4, 8, 16))])]
)
# What the rows are measured at: each at the first of these sizes that it serves.
SIZES = {
    "rls_read": [{"s": s, "C": C} for s in (1024, 4096, 8192) for C in (6, 16, 31, 101)],
    "rls_finish": [{"s": 1024}, {"s": 4096}],
    "rls_fold": [{"s": 4096}],
    "window": [{"s": s, "J": 2} for s in (1024, 8192)],
    "entropy_fusion": [{"C": C} for C in (101, 1000, 4096, 8192, 32000)],
}
SIZES["entropy_fusion_backward"] = SIZES["entropy_fusion"]
SIZES |= dict.fromkeys(("softmax_sums", "softmax_delta_"), [{"C": 32768}])
DEFERRED_SIZES = (1024, 2048, 3072, 4096, 6144, 8192)
DEFERRED_ROWS = (2, 4)  # with more waiting, P in float32 drifts beyond 1e-3 at ‖x̄‖²/α of 2.6e5
Start = Callable[[], tuple[Step, Callable[[], None]]]
GAIN = 0.98  # of the old time; a smaller gain may be noise
CLASSES, MODALITIES = 101, 3


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
    raise ValueError(f"launch.json: no size in bench/throughput/tune.py is served by row {index} of {op}")


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


def install(launch, op: str, index: int, row: dict) -> None:
    launch.TABLE[op][index] = row
    launch.forget()


def problem(op: str, size: dict[str, int], device: torch.device) -> Start:
    """Gives the operator's step in a graph, with whatever configuration is installed then, and its gate."""
    if op in ("rls_read", "rls_finish"):
        rls = RLS(size["s"], size.get("C", CLASSES), device, size.get("R"))
        return functools.partial(rls.start, captured(rls.ours), rls.rows)
    if op == "rls_fold":
        return functools.partial(start_fold, size["s"], device)
    if op == "window":
        window = Window(size["s"], CLASSES, size["J"], device)
        return functools.partial(window.start, captured(window.ours))
    if op.startswith("softmax"):
        return functools.partial(start_softmax, size["C"], device)
    N = min(4096 if size["C"] <= 128 else 2**24, 2**24 // size["C"])
    fusion = Fusion(MODALITIES, N, size["C"], False, device)
    if op == "entropy_fusion":
        return functools.partial(fusion.start, captured(functools.partial(fusion.step, mla.entropy_fusion)))
    return start_backward(fusion, device)


def start_fold(s: int, device: torch.device, R: int = 4) -> tuple[Step, Callable[[], None]]:
    """Folding all rows of a full `pending`, which is filled again before."""
    U = torch.randn(R, s, device=device, generator=random(device)) / s
    P, pending, backend = torch.empty(s, s, device=device), torch.empty_like(U), ops.resolve("auto", device)
    slot, full = (torch.tensor([0, R], dtype=torch.int32, device=device) for _ in range(2))

    def step():
        pending.copy_(U), slot.copy_(full)
        ops.rls_fold(backend, P, pending, slot)

    def gate():
        P.zero_().diagonal().fill_(1)
        folded()
        check("P", P, torch.eye(s, dtype=torch.float64, device=device) - U.double().T @ U.double(), 1e-6)

    folded = capture(step)
    return folded, gate


def start_softmax(C: int, device: torch.device, N: int = 128) -> tuple[Step, Callable[[], None]]:
    """Both passes over logits that become their gradient."""
    logits, target = torch.randn(N, C, device=device, generator=random(device)), torch.arange(N, device=device)
    z, share, backend = torch.empty_like(logits), torch.full((N,), 1 / N, device=device), ops.resolve("auto", device)

    def step():
        z.copy_(logits)
        top, log_S, *_ = softmax_sums(backend, z, target, None, False)
        softmax_delta_(backend, z, target, top, log_S, share, share, share, None, False)
        return z

    taken = capture(step)
    expected = (logits.double().softmax(1) - torch.nn.functional.one_hot(target, C)) / N
    return taken, lambda: check("gradient", taken(), expected, 1e-5)


def start_backward(fusion: Fusion, device: torch.device) -> Start:
    (z,), g = fusion.arguments, torch.randn(fusion.N, fusion.C, device=device, generator=random(device))
    _, weights, entropy = mla.entropy_fusion(z)
    with torch.enable_grad():
        z64 = z.double().requires_grad_()
        (expected,) = torch.autograd.grad(reference.entropy_fusion(z64)[0], z64, g.double())

    def start():
        step = capture(lambda: torch.ops.mla_fast.entropy_fusion_backward([z], None, weights, entropy, g, None, None, None)[0])
        return step, lambda: check("gradient", step(), expected, 1e-5)

    return start


def prepared(start: Start, seconds: float, device: torch.device) -> tuple[Step | None, float]:
    """The step and its median in µs; none and infinity where it does not run or is wrong."""
    try:
        step, gate = start()
        gate()
        return step, interleave({"it": step}, seconds=seconds, device=device)["it"].median
    except Exception as error:
        print(f"    left out: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
        return None, math.inf


def tune_row(launch, op: str, index: int, device: torch.device, seconds: float, sweeps: int) -> dict:
    """The best row found; the old one where nothing is faster."""
    old, size = launch.TABLE[op][index], representative(launch.TABLE, op, index)
    start = problem(op, size, device)
    old_step, old_us = prepared(start, seconds, device)
    best, best_step, best_us, seen = old, old_step, old_us, [old]
    for _, axis in product(range(sweeps), range(len(AXES[op]))):
        for row in variants(op, best, axis):
            if row not in seen:
                seen.append(row)
                install(launch, op, index, row)
                step, us = prepared(start, seconds, device)
                if us < best_us:
                    best, best_step, best_us = row, step, us
    if best is not old and old_step is not None:  # which was measured long ago
        times = interleave({"old": old_step, "best": best_step}, seconds=4 * seconds, device=device)
        old_us, best_us = times["old"].median, times["best"].median
        if best_us > GAIN * old_us:
            best, best_us = old, old_us
    install(launch, op, index, best)
    chosen = "as it was" if best is old else json.dumps(best)
    print(f"{op:24} {size!s:22} {old_us:9.1f} → {best_us:9.1f} µs  {chosen}", flush=True)
    return best


def tune_deferred(device: torch.device, seconds: float) -> dict[str, int]:
    """How many rows should wait, by the largest s, and from which s on."""
    found: dict[int, dict[int, float]] = {}
    for s in DEFERRED_SIZES:
        steps = {}
        for R in (1, *DEFERRED_ROWS):
            rls = RLS(s, CLASSES, device, R)
            step, _ = prepared(functools.partial(rls.start, captured(rls.ours), R), seconds, device)
            if step is not None:
                steps[str(R)] = step
        times = interleave(steps, seconds=4 * seconds, periods={R: int(R) for R in steps}, device=device)
        found[s] = {int(R): t.median for R, t in times.items()}
        print(f"s = {s}: " + ", ".join(f"R = {R} {us:.1f} µs" for R, us in found[s].items()), flush=True)
    largest = found[max(found)]
    rows = min((R for R in largest if R > 1), key=largest.get)
    return {"from_s": deferred_from({s: (times[1], times.get(rows, math.inf)) for s, times in found.items()}), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="measure launch configurations and rewrite kernels/launch.json")
    parser.add_argument("--only", default=",".join([*AXES, "deferred"]), help="tables to measure")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing per configuration")
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--output", type=Path, default=PATH)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("nothing to tune: torch sees no GPU, and only one can say which configuration is fastest")
    if ops.MISSING["triton"] is not None:
        raise SystemExit(f"nothing to tune: {ops.MISSING['triton']}")
    from mla_fast.kernels import launch

    torch.manual_seed(0)
    device, only = torch.device("cuda"), arguments.only.split(",")
    with torch.no_grad():
        for op in (op for op in (*AXES, "deferred") if op in only):
            if op == "deferred":
                launch.TABLE[op] = tune_deferred(device, arguments.seconds)
            else:
                for index in range(len(launch.TABLE[op])):
                    tune_row(launch, op, index, device, arguments.seconds, arguments.sweeps)
            arguments.output.write_text(dump(launch.TABLE))  # what is done so far
    print(f"written to {arguments.output}; make kernels-check compiles it for every GPU that is served")


if __name__ == "__main__":
    main()

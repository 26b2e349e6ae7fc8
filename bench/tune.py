"""Measures the alternatives to every row of kernels/launch.json on the GPU at hand and rewrites it: ``python -m bench.tune``.

Each row at one size that it serves, its operator in a CUDA graph, so that what is compared is what the GPU does. One group of
parameters is varied at a time and the best kept, `--sweeps` times over. A configuration has to be right before it is timed, and
in the end to beat the old one side by side, by more than the noise. Then from which s on the deferred form pays. Bounds
(``up_to``) stay as they are. Afterwards `make kernels-check` says whether the new rows suit the other GPUs as well.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

import mla_fast as mla
from bench.candidates import AXES, DEFERRED_ROWS, DEFERRED_SIZES, PATH, deferred_from, dump, representative, variants
from bench.problems import RLS, Fusion, Window
from bench.providers import Step, capture, captured, check, random
from bench.timing import interleave
from mla_fast import ops, reference

Start = Callable[[], tuple[Step, Callable[[], None]]]
GAIN = 0.98  # of the old time; a smaller gain may be noise
CLASSES, MODALITIES = 101, 3


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

"""The largest RLS step that the GPU's memory holds, and its time: ``python -m bench.throughput.largest [--output out.jsonl]``.

s comes down from what P alone would need until two steps run. They start from P = I and must agree with float64, for which
P = I − Xᵀ (α I + X Xᵀ)⁻¹ X needs no matrix of that size.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.throughput import forms
from bench.throughput.forms import ALPHA
from bench.throughput.problems import State
from bench.throughput.providers import check, random
from bench.throughput.timing import interleave, write_jsonl
from mla_fast import ops, reference

CUDA = torch.device("cuda")
STRIDE = 4096  # between the sizes that are tried


def ours(s: int, x: Tensor, G: Tensor) -> Callable[[], Tensor]:
    state, alpha = State("triton", s, ops.pending_rows("triton", s), CUDA), ops.alpha_tensor(ALPHA, CUDA)
    grad = G.clone()

    def step():
        ops.rls_step_("triton", state.P, x, grad.copy_(G), alpha, state.pending, state.slot, None, False)
        return grad

    return step


def eager(s: int, x: Tensor, G: Tensor) -> Callable[[], Tensor]:
    P = torch.eye(s, device=CUDA)
    return lambda: forms.update_first_device(P, x, G)


def released(s: int, x: Tensor, G: Tensor) -> Callable[[], Tensor]:
    P = [torch.eye(s, device=CUDA)]

    def step():
        P[0] = reference.official_update(P[0], x, ALPHA)
        return reference.official_project(G, P[0])

    return step


def checked(make: Callable, s: int, C: int) -> Callable[[], Tensor]:
    """The step, after two that were right; the released arithmetic is another, and only runs."""
    source = {"device": CUDA, "generator": random(CUDA)}
    means, G = torch.rand(2, s, **source) / s**0.5, torch.randn(C, s, **source)
    x = means[0].clone()
    step = make(s, x, G)
    step()
    x.copy_(means[1])
    projected = step()
    if make is not released:  # cuBLAS sums so many numbers with twice the error of ours
        X, exact = means.double(), G.double()
        A = X @ X.T + ALPHA * torch.eye(2, device=CUDA, dtype=torch.float64)
        check("G P", projected, exact - torch.linalg.solve(A, X @ exact.T).T @ X, 2e-6 if make is ours else 1e-5)
    torch.cuda.synchronize()
    return step


def largest(make: Callable, C: int) -> tuple[int, Callable[[], Tensor]]:
    """(s, the step)."""
    s = int((torch.cuda.mem_get_info()[0] / 4) ** 0.5) // STRIDE * STRIDE
    while True:
        try:
            return s, checked(make, s, C)
        except torch.OutOfMemoryError:
            s -= STRIDE
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description="the largest RLS step that fits in the GPU's memory")
    parser.add_argument("--classes", type=int, default=101)
    parser.add_argument("--output", type=Path, help="append JSONL here")
    arguments = parser.parse_args()
    with torch.no_grad():
        for make in (ours, eager, released):
            s, step = largest(make, arguments.classes)
            t = interleave({"step": step}, seconds=1.0, rounds=(3, 10), device=CUDA)["step"]
            share = 4 * s * s / torch.cuda.get_device_properties(CUDA).total_memory
            print(f"{make.__name__:9} s={s}: P takes {share:.0%} of the memory; {t.median / 1e3:.1f} ms a step", flush=True)
            if arguments.output:
                times = {f"{name}_us": us for name, us in t._asdict().items()}
                record = {"op": "largest", "case": f"C={arguments.classes}", "provider": make.__name__, "s": s, "share": share}
                write_jsonl(arguments.output, [record | times], CUDA)
            del step
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

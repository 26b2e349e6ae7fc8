"""What each kernel takes on the GPU, by torch's profiler: ``python -m bench.kernel_times [--output out.jsonl]``.

An operator is one number in bench.ops; here its launches stand apart (reading, finishing, folding), and "in a graph" is a call
among others in a CUDA graph. ``hot``: the same tensors at every call, so that what fits stays in the L2 cache. ``cold``: as many
copies of P in turn as are larger than it together. A kernel that is launched before the one it waits for has ended, as the
finishing one is, counts from its launch.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import mla_fast as mla
from bench.providers import capture, random
from bench.timing import copy_bandwidth, interleave, write_jsonl
from mla_fast import ops

CUDA = torch.device("cuda")
CALLS = 40
COLD_BYTES = 256 << 20  # several times the L2 cache of any GPU today


def rls(s: int, C: int, cold: bool) -> Callable[[], object]:
    """A step of the RLS projection, as the optimizer takes it."""
    source = {"device": CUDA, "generator": random(CUDA)}
    copies = max(COLD_BYTES // (4 * s * s), 2) if cold else 1
    R, alpha = ops.pending_rows("triton", s), ops.alpha_tensor(1.0, CUDA)
    x, G = torch.rand(s, **source) / s**0.5, torch.randn(C, s, **source)
    states = [
        (torch.eye(s, device=CUDA), torch.zeros(R, s, device=CUDA), torch.zeros(2, dtype=torch.int32, device=CUDA))
        for _ in range(copies)
    ]
    turns = itertools.cycle(states)

    def step():
        P, pending, slot = next(turns)
        return ops.rls_step("triton", P, x, G, alpha, pending, slot)

    return step


def window(s: int, C: int, M: int) -> Callable[[], object]:
    source = {"device": CUDA, "generator": random(CUDA)}
    means, x, G = torch.rand(M, s, **source) / s**0.5, torch.rand(s, **source) / s**0.5, torch.randn(C, s, **source)
    alpha, gram = ops.alpha_tensor(1.0, CUDA), ops.window_gram("triton", means)
    return lambda: ops.window_step_("triton", means, gram, 0, x, G, alpha)


def fusion(M: int, N: int, C: int) -> Callable[[], object]:
    z = 3 * torch.randn(M, N, C, device=CUDA, generator=random(CUDA))
    return lambda: mla.entropy_fusion(z)


def fusion_backward(M: int, N: int, C: int) -> Callable[[], object]:
    z = (3 * torch.randn(M, N, C, device=CUDA, generator=random(CUDA))).requires_grad_()
    g = torch.randn(N, C, device=CUDA, generator=random(CUDA))

    def step():
        with torch.enable_grad():
            return torch.autograd.grad(mla.entropy_fusion(z).logits, z, g)

    return step


def head(C: int, N: int = 64, s: int = 512) -> Callable[[], object]:
    features, weight = (torch.randn(rows, s, device=CUDA, generator=random(CUDA)) for rows in (N, C))
    target = torch.randint(C, (N,), device=CUDA, generator=random(CUDA))
    return lambda: ops.linear_cross_entropy(features, target, weight, None, N)


def cases() -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """(name, what makes the step)."""
    for s, C in itertools.product((512, 1024, 4096, 8192), (6, 101)):
        for cold in (False, True):
            yield f"rls s={s} C={C} {'cold' if cold else 'hot'}", lambda s=s, C=C, cold=cold: rls(s, C, cold)
    for s in (512, 1024, 4096, 8192):
        yield f"window s={s} C=101 M=3", lambda s=s: window(s, 101, 3)
    for shape in ((2, 64, 6), (3, 64, 101), (3, 4096, 101), (3, 65536, 1000)):
        yield f"fusion {list(shape)}", lambda shape=shape: fusion(*shape)
        yield f"fusion backward {list(shape)}", lambda shape=shape: fusion_backward(*shape)
    for C in (6, 101):
        yield f"head C={C}", lambda C=C: head(C)


def measure(step: Callable[[], object]) -> dict[str, list[float]]:
    """Microseconds of every launch by kernel."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(CALLS):
            step()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[short(event.name)].append(event.time_range.elapsed_us())
    return times


def in_a_graph(step: Callable[[], object], calls: int = 8) -> dict:
    """A call's share of a CUDA graph of several."""
    replay = capture(lambda: [step() for _ in range(calls)])
    t = interleave({"it": replay}, seconds=0.03, device=CUDA)["it"]
    return {"kernel": "in a graph", "median_us": t.median / calls, "p20_us": t.p20 / calls, "p80_us": t.p80 / calls}


def short(name: str) -> str:
    """A kernel's name without its template arguments."""
    found = re.search(r"(\w+)(?:<|\(|$)", name)
    return found[1] if found else name[:60]


def record(case: str, kernel: str, times: list[float]) -> dict:
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 2
    return {
        "case": case, "kernel": kernel, "launches_a_call": len(times) / CALLS, "median_us": statistics.median(times),
        "p20_us": fifths[0], "p80_us": fifths[-1], "mean_a_call_us": sum(times) / CALLS,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="the time of each kernel, by the profiler")
    parser.add_argument("--output", type=Path, help="append JSONL here")
    parser.add_argument("--only", default="", help="cases whose names match this regular expression")
    parser.add_argument("--plain", action="store_true", help="only call each case twice, for another profiler to watch")
    arguments = parser.parse_args()
    chosen = [(case, make) for case, make in cases() if re.search(arguments.only, case)]
    if arguments.plain:
        with torch.no_grad():
            for _, make in chosen:
                step = make()
                step(), step()
        torch.cuda.synchronize()
        return
    copy = copy_bandwidth(CUDA)
    print(f"copy bandwidth {copy:.0f} GB/s", flush=True)
    for case, make in chosen:
        try:
            with torch.no_grad():
                step = make()
                found = [record(case, kernel, times) for kernel, times in measure(step).items()]
                found.append({"case": case, "launches_a_call": 0, **in_a_graph(step)})
                found[-1]["mean_a_call_us"] = found[-1]["median_us"]
        except Exception as error:
            print(f"{case}: FAILED {type(error).__name__}: {error}", flush=True)
            continue
        for r in found:
            print(f"{case:32} {r['kernel']:40} {r['launches_a_call']:5.2f} × {r['median_us']:8.2f} µs "
                  f"({r['p20_us']:.2f}–{r['p80_us']:.2f}), {r['mean_a_call_us']:.2f} a call", flush=True)  # fmt: skip
        if arguments.output:
            write_jsonl(arguments.output, [{**r, "op": "kernel", "copy_gb_per_s": copy} for r in found], CUDA)


if __name__ == "__main__":
    main()

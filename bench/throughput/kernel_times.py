"""What each kernel takes on the GPU, by torch's profiler: ``python -m bench.throughput.kernel_times [--output out.jsonl]``.

An operator is one number in ``ops``; here its launches stand apart (reading, finishing, folding), and "in a graph" is a call
among others in a CUDA graph. ``hot``: the same tensors at every call, so that what fits stays in the L2 cache. ``cold``: as many
copies of P in turn as are larger than it together. A kernel that is launched before the one it waits for has ended, as the
finishing one is, counts from its launch.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import mla_fast as mla
from bench.throughput.problems import RLS, Fusion, State, Window
from bench.throughput.providers import capture, random
from bench.throughput.timing import Timing, copy_bandwidth, interleave, summary, write_jsonl

CUDA = torch.device("cuda")
CALLS = 40
COLD_BYTES = 256 << 20  # several times the L2 cache of any GPU today


def rls(s: int, C: int, cold: bool) -> Callable[[], object]:
    """A step of the RLS projection, as the optimizer takes it."""
    problem, copies = RLS(s, C, CUDA), max(COLD_BYTES // (4 * s * s), 2) if cold else 1
    x, G = problem.steps[0]
    problem.x.copy_(x), problem.G.copy_(G)
    turns = itertools.cycle([problem.ours(State(problem.backend, s, problem.rows, CUDA)) for _ in range(copies)])
    return lambda: next(turns)()


def window(s: int, C: int, M: int) -> Callable[[], object]:
    problem = Window(s, C, M, CUDA)
    return problem.ours(problem.means)


def fusion(M: int, N: int, C: int) -> Callable[[], object]:
    return Fusion(M, N, C, False, CUDA).step(mla.entropy_fusion)


def fusion_backward(M: int, N: int, C: int) -> Callable[[], object]:
    (z,) = Fusion(M, N, C, False, CUDA).arguments
    z.requires_grad_()
    g = torch.randn(N, C, device=CUDA, generator=random(CUDA))

    def step():
        with torch.enable_grad():
            return torch.autograd.grad(mla.entropy_fusion(z).logits, z, g)

    return step


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


def in_a_graph(step: Callable[[], object], calls: int = 8) -> Timing:
    """A call's share of a CUDA graph of several."""
    replay = capture(lambda: [step() for _ in range(calls)])
    return Timing(*(us / calls for us in interleave({"it": replay}, seconds=0.03, device=CUDA)["it"]))


def short(name: str) -> str:
    """A kernel's name without its template arguments."""
    found = re.search(r"(\w+)(?:<|\(|$)", name)
    return found[1] if found else name[:60]


def record(case: str, kernel: str, t: Timing, launches_a_call: float, mean_a_call_us: float) -> dict:
    times = {f"{name}_us": us for name, us in t._asdict().items()}
    return {"case": case, "kernel": kernel, "launches_a_call": launches_a_call, **times, "mean_a_call_us": mean_a_call_us}


def records(case: str, step: Callable[[], object]) -> Iterator[dict]:
    """Each of its launches by itself, and the whole in a graph."""
    for kernel, times in measure(step).items():
        several = times if len(times) > 1 else 2 * times  # one has no percentiles
        yield record(case, kernel, summary(several), len(times) / CALLS, sum(times) / CALLS)
    t = in_a_graph(step)
    yield record(case, "in a graph", t, 0, t.median)


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
                found = list(records(case, make()))
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

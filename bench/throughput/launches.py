"""What launching the kernels costs the host: ``python -m bench.throughput.launches [--seconds 2]``. Needs triton.

Without a GPU the operators' launchers run on CPU tensors, with a driver that launches nothing: what is timed is all that happens
before the driver. Beside it the same through Triton's own way at every call, and on a GPU one launch of torch's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "0"

import torch  # noqa: E402
from triton.runtime import driver  # noqa: E402

from bench.throughput.aot import TARGETS, Driver  # noqa: E402
from bench.throughput.timing import sample, summary  # noqa: E402
from mla_fast import kernels  # noqa: E402

ON_GPU = torch.cuda.is_available()


def calls(s: int = 512, C: int = 31, N: int = 64, M: int = 3) -> dict[str, tuple[int, Callable[[], object]]]:
    """(launches, call) by operator."""
    P, x, G, alpha = torch.empty(s, s), torch.empty(s), torch.empty(C, s), torch.ones((), dtype=torch.float64)
    pending, means, logits = torch.empty(1, s), torch.empty(M, s), [torch.empty(N, C) for _ in range(M)]
    gram = torch.empty(M, M, dtype=torch.float64)
    return {
        "rls_project_": (2, lambda: kernels.rls_project_(P, x, G, alpha, pending)),
        "window_step_": (1, lambda: kernels.window_step_(means, gram, 1, x, G, alpha)),
        "entropy_fusion": (1, lambda: kernels.entropy_fusion(logits)),
    }


def through_triton(call: Callable[[], object]) -> Callable[[], object]:
    """The call with no variant remembered."""

    def slow():
        launch = kernels.launch.Launch
        remembers, launch.__call__ = launch.__call__, lambda self, grid, *args: self.kernel[grid](*args, **self.constants)
        try:
            return call()
        finally:
            launch.__call__ = remembers

    return slow


def enqueued(functions: dict[str, Callable[[], object]], seconds: float, several: int = 20) -> dict[str, list[float]]:
    """Host µs a call, of several at a time that the GPU is done with before the next are timed."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or len(next(iter(samples.values()))) < 10:
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(several):
                function()
            samples[name].append((time.perf_counter_ns() - start) / 1e3 / several)
    return {name: times[3:] for name, times in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="what launching the kernels costs the host")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per operator")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    if ON_GPU:
        torch.set_default_device("cuda")
        t = torch.zeros(512)
        print(f"one torch addition: {statistics.median(enqueued({'add': lambda: t.add_(1)}, 0.3)['add']):.1f} µs")
    else:
        driver.set_active(Driver(TARGETS["sm_90"], lambda *args: None))
    print("| operator | launches | host, µs | through Triton, µs | ratio |\n|---|---:|---:|---:|---:|")
    for name, (launches, call) in calls().items():
        both = {"ours": call, "triton": through_triton(call)}
        samples = enqueued(both, seconds) if ON_GPU else sample(both, seconds=seconds, rounds=(50, 500), host_us=1000.0)
        ours, triton = summary(samples["ours"]), summary(samples["triton"])
        spread = f"{ours.median:.1f} ({ours.p20:.1f}–{ours.p80:.1f}) | {triton.median:.1f} ({triton.p20:.1f}–{triton.p80:.1f})"
        print(f"| {name} | {launches} | {spread} | {triton.median / ours.median:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""A head of many classes, forward and backward: ``python -m bench.throughput.large_head [--device cuda] [--output out.jsonl]``.

Time and peak memory of the cross-entropy of a linear head with all of its gradients, beside plain ``linear`` + ``cross_entropy``
+ ``backward``, eager and compiled. Memory is what is in use at the peak beyond the features and the weight; and once more without
the gradients, which every way has to have in the end. Each is held to twice the plain way's error against float64 first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import mla_fast as mla
from bench.throughput.cases import CPU_OR_GPU
from bench.throughput.timing import interleave, write_jsonl

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, weight), target)


def ours(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return mla.linear_cross_entropy(features, weight, None, target)


class Head:
    """A head and a batch; amp: autocast to bfloat16."""

    def __init__(self, N: int, s: int, C: int, device: torch.device, amp: bool):
        generator = torch.Generator(device).manual_seed(0)
        self.features = torch.randn(N, s, device=device, generator=generator, requires_grad=True)
        self.weight = (torch.randn(C, s, device=device, generator=generator) / s**0.5).requires_grad_()
        self.target = torch.randint(C, (N,), device=device, generator=generator)
        self.device, self.amp = device, amp

    def step(self, loss: Loss) -> Callable[[], Tensor]:
        def step() -> Tensor:
            self.features.grad = self.weight.grad = None
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                value = loss(self.features, self.weight, self.target)
            value.backward()
            return value.detach()

        return step

    def error(self, loss: Loss, samples: int = 4096) -> tuple[float, float]:
        """Return the largest errors of ∂L/∂H and of some rows of G against float64, relative to the largest entry."""
        self.step(loss)()
        own, rows = (self.features.grad, self.weight.grad), torch.arange(0, len(self.weight), -(-len(self.weight) // samples))
        rows = torch.cat([rows.to(self.device), self.target]).unique()
        of_features, of_rows = self.exact(rows)
        assert own[0] is not None and own[1] is not None
        return relative(own[0], of_features), relative(own[1][rows], of_rows)

    @torch.no_grad()
    def exact(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """∂L/∂H and the rows of G in float64, some samples at a time."""
        weight, of_features = self.weight.double(), []
        of_rows = torch.zeros(len(rows), weight.shape[1], dtype=torch.float64, device=self.device)
        for h, y in zip(self.features.double().split(32), self.target.split(32), strict=True):
            delta = (h @ weight.T).softmax(1).div_(len(self.target))
            delta.scatter_add_(1, y[:, None], delta.new_full((len(y), 1), -1 / len(self.target)))
            of_features.append(delta @ weight)
            of_rows += delta[:, rows].T @ h
        return torch.cat(of_features), of_rows


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).abs().max() / right.abs().max())


def peak(step: Callable[[], object], device: torch.device) -> float:
    """Return the MiB in use at the step's peak beyond what was in use before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # what is kept for later would not show
        libc.malloc_trim(0)
    before, most, running = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not running.is_set():
            most[0] = max(most[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    running.set()
    watcher.join()
    return most[0] - before


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def measure(N: int, s: int, C: int, device: torch.device, amp: bool, seconds: float, compiled: bool) -> list[dict]:
    head = Head(N, s, C, device, amp)
    ways: dict[str, Loss] = {"ours": ours, "plain": plain}
    if compiled:
        ways["plain, compiled"] = torch.compile(plain)
    errors = {name: head.error(loss) for name, loss in ways.items()}
    for of, mine, theirs in zip(("features", "weight"), errors["ours"], errors["plain"], strict=True):
        assert mine <= 2 * theirs, f"gradient of {of}: error {mine:.2e} where the plain way has {theirs:.2e}"
    steps = {name: head.step(loss) for name, loss in ways.items()}
    gradients = (head.features.numel() + head.weight.numel()) * 4 / 2**20
    memory = {}
    for name, step in steps.items():
        head.features.grad = head.weight.grad = None
        memory[name] = peak(step, device)
    times = interleave(steps, seconds=seconds, rounds=(3, 50), device=device)
    common = {"op": "large_head", "case": f"N={N} s={s} C={C}{' bf16' if amp else ''}", "N": N, "s": s, "C": C, "amp": amp}
    return [
        {**common, "provider": name, "peak_mb": memory[name], "gradients_mb": gradients, "errors": list(errors[name])}
        | {f"{key}_us": us for key, us in times[name]._asdict().items()}
        for name in ways
    ]


def report(records: list[dict]) -> None:
    base = next(r for r in records if r["provider"] == "plain")
    print(f"\n{base['case']}: {'':14} {'ms':>9} {'× plain':>8} {'peak MiB':>9} {'× plain':>8} {'without gradients':>18}   errors")
    for r in records:
        own, theirs = (x["peak_mb"] - x["gradients_mb"] for x in (r, base))
        print(
            f"{r['provider']:32} {r['median_us'] / 1e3:9.2f} {r['median_us'] / base['median_us']:8.2f} {r['peak_mb']:9.0f} "
            f"{r['peak_mb'] / base['peak_mb']:8.2f} {own / theirs:18.2f}   " + ", ".join(f"{e:.1e}" for e in r["errors"]),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="the cross-entropy of a head of many classes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=CPU_OR_GPU.type)
    parser.add_argument("--classes", type=lambda text: [int(c) for c in text.split(",")], default=[32768, 262144])
    parser.add_argument("--rows", type=int, default=512, help="N")
    parser.add_argument("--features", type=int, default=512, help="s")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing per case")
    parser.add_argument("--compile", action="store_true", help="torch.compile as one more rival")
    parser.add_argument("--output", type=Path, help="append JSONL here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for C in arguments.classes:
        for amp in (False, True) if device.type == "cuda" else (False,):
            records = measure(arguments.rows, arguments.features, C, device, amp, arguments.seconds, arguments.compile)
            report(records)
            if arguments.output:
                write_jsonl(arguments.output, records, device)


if __name__ == "__main__":
    main()

"""The operators side by side with their rivals: ``python -m bench.throughput.ops [--device cuda] [--output out.jsonl]``.

Every provider is checked against the reference in float64 before any time is taken. Ratios are against the *best* eager form of
the case, the released code's arithmetic and the best that torch.compile made. bench/README.md says how each number is made.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.throughput import plot
from bench.throughput.cases import CPU_OR_GPU, OPS, Case, Spec, build, prepared, specs
from bench.throughput.timing import Timing, copy_bandwidth, interleave, write_jsonl

HEADER = f"{'case':29} {'provider':31} {'µs':>10} {'20–80 %':>19} {'× eager':>8} {'× rel.':>7} {'× comp.':>7}"
HEADER += f" {'MB':>9} {'GB/s':>7} {'% copy':>6}"


def best(times: dict[str, Timing], prefix: str) -> float | None:
    """The shortest median among the providers whose names begin so."""
    return min((t.median for name, t in times.items() if name.startswith(prefix)), default=None)


def rows(case: Case, times: dict[str, Timing], copy: float, device: torch.device) -> list[dict]:
    """One record per provider; speedup is how many times as fast as the best eager form."""
    eager, spec, records = best(times, "eager"), case.spec, []
    for name, t in times.items():
        traffic = case.traffic[name]
        record = {"case": case.name, "provider": name, "median_us": t.median, "p20_us": t.p20, "p80_us": t.p80}
        record |= {"speedup": None if eager is None else eager / t.median, "op": spec.op, "s": spec.s, "C": spec.C, "M": spec.M}
        record |= {"N": spec.N, "masked": spec.masked, "device": device.type, "copy_gb_per_s": copy}
        record |= {"form": None, "bytes": None, "gb_per_s": None}
        if traffic is not None:
            record |= {"form": traffic.form, "bytes": traffic.bytes, "gb_per_s": traffic.bytes / t.median / 1e3}
        records.append(record)
    return records


def line(record: dict, times: dict[str, Timing]) -> str:
    """A row of the report."""
    median = record["median_us"]
    rivals = [best(times, prefix) for prefix in ("eager", "released", "compile")]
    ratios = ["" if rival is None else f"{rival / median:.2f}" for rival in rivals]
    text = f"{record['case']:29} {record['provider']:31} {median:10.1f} {record['p20_us']:9.1f}–{record['p80_us']:<9.1f} "
    text += f"{ratios[0]:>8} {ratios[1]:>7} {ratios[2]:>7}"
    if record["bytes"] is not None:
        share = 100 * record["gb_per_s"] / record["copy_gb_per_s"]
        text += f" {record['bytes'] / 1e6:9.2f} {record['gb_per_s']:7.1f} {share:6.1f}"
    return text


def measure(spec: Spec, device: torch.device, arguments: argparse.Namespace, copy: float) -> tuple[list[dict], list[str]]:
    """Builds, checks, times, prints and writes one case: its records, and what of ours failed."""
    case = build(spec, device, arguments.compile)
    failed = [f"{case.name}: {name}: {reason}" for name, reason in case.failed.items()]
    if not case.providers:
        return [], failed
    times = interleave(case.providers, seconds=arguments.seconds, periods=case.periods, device=device)
    records = rows(case, times, copy, device)
    for record in records:
        print(line(record, times), flush=True)
    if arguments.output:
        write_jsonl(arguments.output, records, device)
    return records, failed


def measure_all(todo: list[Spec], device: torch.device, arguments: argparse.Namespace, copy: float) -> tuple[list, list]:
    """All cases that the budget has time for; one that breaks does not keep the others from being measured."""
    deadline = time.monotonic() + arguments.budget
    records, failed = [], []
    for i, spec in enumerate(todo):
        if time.monotonic() > deadline:
            print(f"{arguments.budget:.0f} s are over: {len(todo) - i} of {len(todo)} cases are skipped", file=sys.stderr)
            break
        try:
            found, wrong = measure(spec, device, arguments, copy)
        except Exception as error:
            print(f"{spec.name} is not measured: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            found, wrong = [], [f"{spec.name}: {type(error).__name__}: {error}"]
        records += found
        failed += wrong
        gc.collect()  # what torch.compile made refers to itself
    return records, failed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="operators beside their rivals")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=CPU_OR_GPU.type)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per case")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which the remaining cases are skipped")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile as one more rival; by default on a GPU alone"
    )
    parser.add_argument("--sizes", type=integers, default=(), help="s of the RLS and window steps, as in 512,1024")
    parser.add_argument("--classes", type=integers, default=(), help="C, as in 6,101")
    parser.add_argument("--only", type=_operators, default=OPS, help="of " + ",".join(OPS))
    parser.add_argument("--output", type=Path, help="append JSONL here")
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib")
    arguments = parser.parse_args(argv)
    if arguments.compile is None:
        arguments.compile = arguments.device == "cuda"
    return arguments


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _operators(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := set(chosen) - set(OPS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(OPS)}, got {','.join(sorted(unknown))}")
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = prepared(arguments)
    torch.manual_seed(0)
    copy = copy_bandwidth(device)
    print(f"copy bandwidth of {arguments.device}, {arguments.threads} thread(s): {copy:.1f} GB/s\n{HEADER}", flush=True)
    with torch.no_grad():
        todo = specs(device, arguments.sizes, arguments.classes, arguments.only)
        records, failed = measure_all(todo, device, arguments, copy)
    if arguments.plot:
        plot.draw(records, arguments.plot)
    if failed:
        raise SystemExit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()

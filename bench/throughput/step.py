"""Whole training steps side by side: ``python -m bench.throughput.step [--threads 2] [--output out.jsonl] [--quick]``.

Every way to train has to agree with float64 before any time is taken. All of them take turns, and what is compared is compared
within each round. bench/README.md says what each row is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.throughput.cases import CPU_OR_GPU, Case, admit, prepared
from bench.throughput.timing import sample, summary, write_jsonl
from bench.throughput.training import Training, WithoutEncoders, Workload, workloads

KINDS = ("mlps", "resnets")
PLAIN = "plain loop"
SAMPLE_US = 3e4  # several of the operating system's time slices, which a busy machine gives to others
RESAMPLED = 2000
COMPARED = (
    ("ours in turn rls", PLAIN),
    ("ours in turn window", PLAIN),
    ("ours rls", PLAIN),
    ("ours window", PLAIN),
    ("ours in turn rls", "ours rls"),
    ("ours in turn window", "ours window"),
    ("ours interaction window", "ours window"),
    ("ours graph interaction window", "ours graph window"),
    ("ours rls", "ours streams rls"),
    ("ours rls", "joint concat"),
    ("ours window", "joint concat"),
    ("ours graph rls", "ours rls"),
    ("ours graph rls", "joint concat"),
    ("ours graph window", "joint concat"),
    ("ours graph rls", "graph joint concat"),
    ("ours graph rls", "graph plain loop"),
    ("released", "ours rls"),
)
AT_MOST = {
    ("resnets", "ours in turn rls", PLAIN): 1.03,
    ("resnets", "ours in turn window", PLAIN): 1.01,
    ("resnets", "ours rls", "joint concat"): 1.05,
    ("resnets", "ours graph rls", "joint concat"): 1.0,
    ("mlps", "ours graph rls", "joint concat"): 1.0,
    ("mlps", "ours interaction window", "ours window"): 1.1,
    ("resnets", "ours interaction window", "ours window"): 1.02,
}
AT_LEAST = {("mlps", "ours in turn rls", "ours rls"): 1.3}


class Ratio(NamedTuple):
    """What one way takes for another's 1: of the medians, in 95 % of samples like this one between `low` and `high`; and the 20th
    and 80th percentiles of the rounds' ratios."""

    value: float
    low: float
    high: float
    p20: float
    p80: float


class Comparison(NamedTuple):
    name: str
    ratio: Ratio
    target: str
    verdict: str  # met, missed, or unclear where the target lies between low and high

    def line(self) -> str:
        value, low, high, p20, p80 = (f"{x:.4f}" for x in self.ratio)
        return f"| {self.name} | {value} | {low}–{high} | {p20}–{p80} | {self.target} | {self.verdict} |"


def build(workload: Workload, device: torch.device, ways: Sequence[str] = ()) -> Case:
    """The case with every way to train, or those of these names, that runs and is right."""
    case = Case(workload, {}, {}, {}, {})
    providers = [provider for kind in (Training, WithoutEncoders) for provider in kind(workload, device).providers()]
    if unknown := set(ways) - {provider.name for provider in providers}:
        names = ",".join(provider.name for provider in providers)
        raise SystemExit(f"--ways: expected some of {names}, got {','.join(sorted(unknown))}")
    for provider in providers:
        if not ways or provider.name in ways:
            admit(case, provider)
    return case


def compare(kind: str, samples: dict[str, list[float]]) -> list[Comparison]:
    """Of whole batches; and overheads once more, as what is added to a batch without its encoders over the whole batch."""
    found = []
    for over, under in COMPARED:
        bare = [over + WithoutEncoders.suffix, under + WithoutEncoders.suffix, under]
        for of, parts, suffix in ((_quotient, [over, under], ""), (_with_added, bare, ", by what is added")):
            if all(part in samples for part in parts):
                ratio = estimate(of, *(samples[part] for part in parts))
                found.append(Comparison(f"{over} / {under}{suffix}", ratio, *target(kind, over, under, ratio)))
    return found


def _quotient(a, b):
    return a / b


def _with_added(a, b, batch):
    return 1 + (a - b) / batch


def estimate(of: Callable, *samples: list[float]) -> Ratio:
    """`of` the samples' medians; between which values it lies by the bootstrap over rounds, whose samples stay together."""
    rounds = np.array(samples)  # [ways, rounds]
    drawn = np.random.default_rng(0).integers(rounds.shape[1], size=(RESAMPLED, rounds.shape[1]))
    low, high = np.quantile(of(*np.median(rounds[:, drawn], axis=-1)), (0.025, 0.975))
    _, p20, p80 = summary(of(*rounds).tolist())
    return Ratio(*map(float, (of(*np.median(rounds, axis=-1)), low, high, p20, p80)))


def target(kind: str, over: str, under: str, ratio: Ratio) -> tuple[str, str]:
    """(as text, the verdict)."""
    key = kind, over, under
    if key not in AT_MOST and key not in AT_LEAST:
        return "", ""
    limit, sign = (AT_MOST[key], "≤") if key in AT_MOST else (AT_LEAST[key], "≥")
    if ratio.low <= limit <= ratio.high:
        verdict = "unclear"
    else:
        verdict = "met" if (ratio.high < limit) == (key in AT_MOST) else "missed"
    return f"{sign} {limit:.2f}", verdict


def records(workload: Workload, samples: dict[str, list[float]], device: torch.device) -> list[dict]:
    """One per way to train."""
    common = {"case": workload.name, "op": "step", "s": workload.s, "C": workload.C, "M": len(workload.shapes), "N": workload.N}
    common |= {"masked": False, "device": device.type}
    return [
        {**common, "provider": provider, "rounds": len(times)} | {f"{k}_us": us for k, us in summary(times)._asdict().items()}
        for provider, times in samples.items()
    ]


def compared_records(name: str, compared: list[Comparison], device: torch.device) -> list[dict]:
    common = {"case": name, "device": device.type}
    return [
        {**common, "comparison": c.name, "ratio": c.ratio.value, "target": c.target, "verdict": c.verdict}
        | {end: getattr(c.ratio, end) for end in ("low", "high", "p20", "p80")}
        for c in compared
    ]


def measure(workload: Workload, device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """Builds, checks, times, prints and writes one workload; what of ours failed."""
    case = build(workload, device, arguments.ways)
    failed = [f"{case.name}: {name}: {reason}" for name, reason in case.failed.items()]
    if not case.providers:
        return failed
    rounds, seconds = ((3, 1000), 2.0) if arguments.quick else ((16, 1000), arguments.seconds)
    samples = sample(case.providers, seconds=seconds, rounds=rounds, device=device, host_us=SAMPLE_US)
    times, compared = records(workload, samples, device), compare(workload.kind, samples)
    print_times(case.name, times)
    print_comparisons(case.name, compared)
    if arguments.output:
        write_jsonl(arguments.output, times + compared_records(case.name, compared, device), device)
    return failed


def print_times(name: str, found: list[dict]) -> None:
    print(f"\n| {name} | ms | 20–80 % | rounds |\n|---|---:|---:|---:|")
    for r in found:
        low, high = r["p20_us"] / 1e3, r["p80_us"] / 1e3
        print(f"| {r['provider']} | {r['median_us'] / 1e3:.3f} | {low:.3f}–{high:.3f} | {r['rounds']} |", flush=True)


def print_comparisons(name: str, compared: list[Comparison]) -> None:
    print(f"\n| {name}, compared | time / time | 95 % interval | 20–80 % of rounds | target | |\n|---|---:|---:|---:|---:|---|")
    print("\n".join(c.line() for c in compared), flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="whole training steps beside each other")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=CPU_OR_GPU.type)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing per workload")
    parser.add_argument("--quick", action="store_true", help="three rounds of slow steps, two seconds of others")
    parser.add_argument("--only", choices=KINDS, help="one of the workloads")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=(), help="to train, by name; all of them otherwise")
    parser.add_argument("--output", type=Path, help="append JSONL here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = prepared(arguments)
    print(f"{arguments.device}, {arguments.threads} thread(s)", file=sys.stderr)
    failed = []
    for workload in workloads(device):
        if arguments.only in (None, workload.kind):
            failed += measure(workload, device, arguments)
    if failed:
        raise SystemExit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()

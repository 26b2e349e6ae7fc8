"""The cases, those that say most first, and the admission of their providers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bench.throughput.inference import Dispatch, Infer, Predict
from bench.throughput.problems import RLS, Fusion, Window
from bench.throughput.providers import Provider, Step
from bench.throughput.roofline import Traffic
from mla_fast import ops

CPU_OR_GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = ("rls", "window", "fusion", "infer", "dispatch", "predict")
BATCH = 64  # samples of which x̄ is the mean; the RLS and window steps cost the same for any


def missing(device: torch.device) -> str | None:
    """Why there is nothing of ours to measure on the device, or None."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return ops.MISSING["triton" if device.type == "cuda" else "cpp"]


def prepared(arguments: argparse.Namespace) -> torch.device:
    """The device of ``--device``, with ``--threads``; SystemExit if there is nothing to measure."""
    device = torch.device(arguments.device)
    if (reason := missing(device)) is not None:
        raise SystemExit(f"nothing to measure: {reason}")
    torch.set_num_threads(arguments.threads)
    return device


class Spec(NamedTuple):
    """One case: the RLS step has s and C, the window step M as well, the fusion [M, N, C], inference [M, N, s]
    and C, dispatch N, prediction N and C."""

    op: str
    C: int | None = None
    s: int | None = None
    M: int | None = None
    N: int = BATCH
    masked: bool = False
    means: bool = False

    @property
    def name(self) -> str:
        if self.op in ("dispatch", "predict"):
            return f"{self.op} N={self.N}{' means' if self.means else ''}"
        if self.op == "fusion":
            return f"fusion [{self.M}, {self.N}, {self.C}]{' masked' if self.masked else ''}"
        if self.op == "infer":
            return f"infer [{self.M}, {self.N}, {self.s}] C={self.C}{' masked' if self.masked else ''}"
        return f"{self.op} s={self.s} C={self.C}{'' if self.M is None else f' M={self.M}'}"


class Case(NamedTuple):
    """The providers that passed their gates, by name; `failed`: those of ours that did not, and why."""

    spec: Spec
    providers: dict[str, Step]
    traffic: dict[str, Traffic | None]
    periods: dict[str, int]
    failed: dict[str, str]

    @property
    def name(self) -> str:
        return self.spec.name


def specs(device: torch.device, sizes: Sequence[int] = (), classes: Sequence[int] = (), only: Sequence[str] = OPS) -> list[Spec]:
    """All cases of the operators `only`; on the CPU few, unless sizes or classes are asked for."""
    on_gpu = device.type == "cuda"
    few = not on_gpu and not classes
    sizes = sizes or ((128, 512, 768, 1024, 2048, 4096, 8192) if on_gpu else (128, 512, 1024))
    classes = classes or ((6, 31, 101, 1000) if on_gpu else (6, 101))
    shapes = [(2, 64, 6), (3, 64, 101)] if few else [(M, BATCH, C) for M in (2, 3, 6) for C in classes]
    shapes += [(3, 4096, 101), (3, 65536, 1000)] if on_gpu else [(3, 4096, 101)]
    widest = max((C for C in classes if C <= 101), default=min(classes))  # more classes change little but the bytes
    found = [Spec("rls", C, s) for s in sizes for C in classes]
    found += [Spec("fusion", C, None, M, N, masked) for M, N, C in shapes for masked in (False, True)]
    found += [Spec("window", widest, s, M) for s in (sizes if on_gpu else sizes[-1:]) for M in ((2, 3, 6) if on_gpu else (3,))]
    heads = [(2, BATCH, 6), (3, BATCH, 101), (3, 16384 if on_gpu else 1024, 101)]
    found += [Spec("infer", C, 512, M, N, masked) for M, N, C in heads for masked in (False, True)]
    # Of N samples half are packed: with three modalities 5 N KB.
    found += [Spec("dispatch", N=N, means=means) for N in ((64, 20480) if on_gpu else (64, 4096)) for means in (False, True)]
    found += [Spec("predict", 101, N=N) for N in (128, 512)]
    return sorted((spec for spec in found if spec.op in only), key=lambda spec: not _says_most(spec))


def _says_most(spec: Spec) -> bool:
    if spec.op == "fusion":
        return (spec.M, spec.N, spec.C) in ((3, 64, 101), (3, 65536, 1000))
    if spec.op in ("infer", "dispatch", "predict"):
        return True
    return spec.s in (512, 1024, 4096) and (spec.C in (6, 101) if spec.op == "rls" else spec.M == 3)


def build(spec: Spec, device: torch.device, compiled: bool = False) -> Case:
    """The case with every provider that runs and is right."""
    if compiled:
        torch.compiler.reset()  # else earlier cases count, as recompilations and as a reason for dynamic shapes
    if spec.op == "rls":
        problem = RLS(spec.s, spec.C, device)
    elif spec.op == "window":
        problem = Window(spec.s, spec.C, spec.M, device)
    elif spec.op == "dispatch":
        problem = Dispatch(spec.N, spec.means, device)
    elif spec.op == "infer":
        problem = Infer(spec.M, spec.N, spec.s, spec.C, spec.masked, device)
    elif spec.op == "predict":
        problem = Predict(spec.N, spec.C, device)
    else:
        problem = Fusion(spec.M, spec.N, spec.C, spec.masked, device)
    case = Case(spec, {}, {}, {}, {})
    for provider in problem.providers(compiled):
        admit(case, provider)
    return case


def admit(case: Case, provider: Provider) -> None:
    """Takes the provider into the case; one that does not run or is wrong stays out, with its reason on stderr."""
    try:
        step, gate = provider.start()
        gate()
    except Exception as error:
        reason = " ".join([f"{type(error).__name__}:", *str(error).split("\n")[:2]])  # compilers' errors begin with a headline
        print(f"{case.name}: {provider.name} is left out: {reason}", file=sys.stderr, flush=True)
        if provider.name.startswith("ours"):
            case.failed[provider.name] = reason
        return
    case.providers[provider.name] = step
    case.traffic[provider.name] = provider.traffic
    case.periods[provider.name] = provider.period

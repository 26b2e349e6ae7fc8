"""The operators side by side with their rivals: ``python -m bench.ops [--threads 1] [--compile] [--output results.jsonl]``.

A case is a dictionary of providers that compute the same thing. Each is checked against the reference in float64 before any
time is taken; a provider that fails stops the run. Ratios are against the *best* eager form of the case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mla_fast as mla
from bench.timing import Timing, interleave, write_jsonl
from mla_fast import ops, reference

ALPHA = 1.0


class Case(NamedTuple):
    """Providers by name. Those named "eager …" are rivals of which the best counts; "released" is the released code's way."""

    name: str
    providers: dict[str, Callable[[], object]]


def eager_addr(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """Eager with P updated in place and no s × s temporary; the scalar goes through the host, which is free on the CPU."""
    k = torch.mv(P, x)
    c = -1 / (ALPHA + torch.dot(x, k).item())
    projected = torch.mm(G, P).addr_(torch.mv(G, k), k, alpha=c)
    P.addr_(k, k, alpha=c)
    return projected


def eager_addr_device(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """The same without the host."""
    k = torch.mv(P, x)
    u = k * torch.rsqrt(ALPHA + torch.dot(x, k))
    projected = torch.mm(G, P).addr_(torch.mv(G, u), u, alpha=-1)
    P.addr_(u, u, alpha=-1)
    return projected


def eager_update_first(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """As Algorithm 1 reads: update P, then multiply."""
    k = torch.mv(P, x)
    P.addr_(k, k, alpha=-1 / (ALPHA + torch.dot(x, k).item()))
    return torch.mm(G, P)


def plain_rls(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    """What torch.compile is given."""
    k = P @ x
    u = k * torch.rsqrt(ALPHA + x @ k)
    projected = G @ P - torch.outer(G @ u, u)
    P.sub_(torch.outer(u, u))
    return projected


def released(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
    updated = reference.official_update(P, x, ALPHA)
    P.copy_(updated)
    return reference.official_project(G, updated)


def rls_case(s: int, C: int, compiled: bool) -> Case:
    """One RLS step; every provider has a P of its own, which the others push out of the cache as training does."""
    x, G = torch.rand(s) / s**0.5, torch.randn(C, s)
    alpha = ops.alpha_tensor(ALPHA, x.device)
    pending = torch.zeros(s)

    def ours(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
        return ops.rls_step("cpp", P, x, G, alpha, pending, None, False)

    def functional(P: Tensor, x: Tensor, G: Tensor) -> Tensor:
        return mla.rls_project_(P, x, G, ALPHA)

    steps = {"ours": ours, "ours functional": functional, "eager addr": eager_addr, "eager device": eager_addr_device}
    steps["eager update first"] = eager_update_first
    if compiled:
        steps["compile"] = torch.compile(plain_rls)
    _, expected = reference.rls_project(torch.eye(s, dtype=torch.float64), x.double(), G.double(), ALPHA)
    for name, step in steps.items():
        check(f"rls {name}", step(torch.eye(s), x, G), expected, 2e-6)
    pending.zero_()
    steps["released"] = released
    return Case(f"rls s={s} C={C}", {name: _bound(step, torch.eye(s), x, G) for name, step in steps.items()})


def window_case(s: int, C: int, compiled: bool) -> Case:
    """One step of the window (two other modalities) beside the eager forms of the RLS step that it replaces."""
    means, x, G = torch.rand(2, s) / s**0.5, torch.rand(s) / s**0.5, torch.randn(C, s)
    alpha = ops.alpha_tensor(ALPHA, x.device)
    ours = ops.window_step("cpp", means, G, alpha)
    check("window", ours, reference.project(G.double(), reference.window_projection(means.double(), ALPHA)), 2e-6)
    providers = {"ours": lambda: ops.window_step("cpp", means, G, alpha)}
    for name, step in (("eager rls addr", eager_addr), ("eager rls device", eager_addr_device)):
        providers[name] = _bound(step, torch.eye(s), x, G)
    return Case(f"window s={s} C={C}", providers)


def eager_fusion(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p = z.log_softmax(-1)
    e = -(log_p.exp() * log_p).sum(-1)
    w = (-e).softmax(0)
    return torch.einsum("mn,mnc->nc", w, z), w, e


def eager_fusion_broadcast(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p = z.log_softmax(-1)
    e = -(log_p.exp() * log_p).sum(-1)
    w = (-e).softmax(0)
    return (w[..., None] * z).sum(0), w, e


def eager_fusion_masked(z: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    here = present.T
    z = z.masked_fill(~here[..., None], 0)
    log_p = z.log_softmax(-1)
    e = -(log_p.exp() * log_p).sum(-1)
    w = (-e).masked_fill(~here, -1e30).softmax(0) * here
    return (w[..., None] * z).sum(0), w, e * here


def fusion_case(M: int, N: int, C: int, masked: bool, compiled: bool) -> Case:
    z = 3 * torch.randn(M, N, C)
    present = torch.rand(N, M) > 0.3 if masked else None
    if masked:
        rivals = {"eager masked": lambda: eager_fusion_masked(z, present)}
        plain = torch.compile(eager_fusion_masked) if compiled else None
    else:
        rivals = {"eager einsum": lambda: eager_fusion(z), "eager broadcast": lambda: eager_fusion_broadcast(z)}
        plain = torch.compile(eager_fusion_broadcast) if compiled else None
    if plain is not None:
        rivals["compile"] = lambda: plain(z, present) if masked else plain(z)
    providers = {"ours": lambda: mla.entropy_fusion(z, present), **rivals}
    expected, _, _ = reference.entropy_fusion(z.double(), present)
    for name, run in providers.items():
        check(f"fusion {name}", run()[0], expected, 5e-6)
    return Case(f"fusion [{M}, {N}, {C}]{' masked' if masked else ''}", providers)


def check(name: str, got: Tensor, expected: Tensor, bound: float) -> None:
    """The correctness gate: the error relative to float64 stays under the bound, or nothing is timed."""
    error = ((got.double() - expected).norm() / expected.norm()).item()
    if not error <= bound:
        raise SystemExit(f"{name}: relative error {error:.1e} against float64, more than {bound:.0e}; not timed")


def _bound(step: Callable[[Tensor, Tensor, Tensor], Tensor], P: Tensor, x: Tensor, G: Tensor) -> Callable[[], Tensor]:
    return lambda: step(P, x, G)


def cases(
    compiled: bool = False, sizes: tuple[int, ...] = (128, 512, 1024), classes: tuple[int, ...] = (6, 101)
) -> Iterator[Case]:
    """All cases, built one at a time: their matrices need not be in memory together."""
    for s in sizes:
        for C in classes:
            yield rls_case(s, C, compiled)
    yield window_case(1024, 101, compiled)
    for shape in ((2, 64, 6), (3, 64, 101), (3, 4096, 101)):
        for masked in (False, True):
            yield fusion_case(*shape, masked, compiled)


def best_eager(times: dict[str, Timing]) -> float:
    return min(t.median for name, t in times.items() if name.startswith("eager"))


def rows(case: Case, times: dict[str, Timing]) -> list[dict]:
    """One record per provider; speedup is how many times as fast as the best eager form."""
    best = best_eager(times)
    return [
        {"case": case.name, "provider": name, "median_us": t.median, "p20_us": t.p20, "p80_us": t.p80, "speedup": best / t.median}
        for name, t in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="operators beside the best eager forms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument("--compile", action="store_true", help="torch.compile as one more rival (compiles for minutes)")
    parser.add_argument("--output", type=Path, help="append JSONL here")
    arguments = parser.parse_args()
    if ops.CPP_MISSING is not None:
        raise SystemExit(f"nothing to measure: {ops.CPP_MISSING}")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{'case':28} {'provider':20} {'µs':>10} {'20–80 %':>19} {'× best eager':>13}")
    with torch.no_grad():
        for case in cases(arguments.compile):
            records = rows(case, interleave(case.providers, seconds=arguments.seconds))
            for r in records:
                spread = f"{r['p20_us']:.1f}–{r['p80_us']:.1f}"
                print(f"{r['case']:28} {r['provider']:20} {r['median_us']:10.1f} {spread:>19} {r['speedup']:13.2f}", flush=True)
            if arguments.output:
                write_jsonl(arguments.output, records)


if __name__ == "__main__":
    main()

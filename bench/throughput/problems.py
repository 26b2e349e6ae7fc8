"""The three problems, their float64 answers, and every provider of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import mla_fast as mla
from bench.throughput import forms, roofline
from bench.throughput.forms import ALPHA
from bench.throughput.providers import GateError, Provider, Step, captured, check, compilations, compile_step, random
from mla_fast import ops, reference


class State:
    """P = I and, with rows, the corrections that wait to enter it."""

    def __init__(self, backend: str, s: int, rows: int, device: torch.device):
        self.backend = backend
        self.P = torch.empty(s, s, device=device)
        self.pending = torch.empty(rows, s, device=device) if rows else None
        self.slot = torch.empty(2, dtype=torch.int32, device=device) if rows else None
        self.grad: Tensor | None = None  # of a step that works in place
        self.reset()

    def reset(self) -> None:
        self.P.zero_().diagonal().fill_(1)
        for t in (self.pending, self.slot):
            if t is not None:
                t.zero_()

    def true_P(self) -> Tensor:
        if self.pending is None:
            return self.P
        P, pending = self.P.clone(), self.pending.clone()
        ops.rls_fold(self.backend, P, pending, self.slot.clone())
        return P


class RLS:
    """One RLS step. Each provider has a P of its own, which the others push out of the cache as training does.

    rows: how many corrections wait in "ours", by default as many as for ``RLSProjection``.
    """

    def __init__(self, s: int, C: int, device: torch.device, rows: int | None = None):
        self.s, self.C, self.device = s, C, device
        self.backend = ops.resolve("auto", device)
        self.rows = ops.pending_rows(self.backend, s) if rows is None else rows
        self.x, self.G = torch.empty(s, device=device), torch.empty(C, s, device=device)
        self.alpha = ops.alpha_tensor(ALPHA, device)
        # Enough steps to fold all that waits and go on, and for reduce-overhead to warm up, record and replay.
        count, source = max(self.rows + 1, 3), {"device": device, "generator": random(device)}
        self.steps = [(torch.rand(s, **source) / s**0.5, torch.randn(C, s, **source)) for _ in range(count)]

    @functools.cached_property
    def expected(self) -> tuple[list[Tensor], Tensor]:
        """G P⁺ of every step and the last P, in float64."""
        return self._recursion(reference.rls_update, reference.project)

    @functools.cached_property
    def expected_official(self) -> tuple[list[Tensor], Tensor]:
        return self._recursion(reference.official_update, reference.official_project)

    def _recursion(self, update: Callable, project: Callable) -> tuple[list[Tensor], Tensor]:
        P, projected = torch.eye(self.s, dtype=torch.float64, device=self.device), []
        for x, G in self.steps:
            P = update(P, x.double(), ALPHA)
            projected.append(project(G.double(), P))
        return projected, P

    def start(self, make: Callable[[State], Step], rows: int = 0, official: bool = False) -> tuple[Step, Callable[[], None]]:
        """The step that `make` gives for a state of its own; at its gate every projected gradient, and the P in the end.

        The released arithmetic is held to less: a norm over s² numbers in float32 goes into every one of its P.
        """
        state = State(self.backend, self.s, rows, self.device)
        step = make(state)

        def gate():
            (expected, expected_P), slack = (self.expected_official, 1000) if official else (self.expected, 1)
            state.reset()
            for (x, G), right in zip(self.steps, expected, strict=True):
                self.x.copy_(x), self.G.copy_(G)
                if state.grad is not None:
                    state.grad.copy_(G)
                check("G P", step(), right, slack * 2e-6)
            check("P", state.true_P(), expected_P, slack * 1e-6)

        return step, gate

    def ours(self, state: State) -> Step:
        """As the optimizer takes it: on a GPU in place, of G's again and again."""
        if self.device.type != "cuda":
            return lambda: ops.rls_step(self.backend, state.P, self.x, self.G, self.alpha, state.pending, state.slot)
        state.grad = self.G.clone()

        def step():
            ops.rls_step_(self.backend, state.P, self.x, state.grad, self.alpha, state.pending, state.slot, None, False)
            return state.grad

        return step

    def functional(self, state: State) -> Step:
        return lambda: mla.rls_project_(state.P, self.x, self.G, ALPHA)

    def released(self, state: State) -> Step:
        def step():
            state.P = reference.official_update(state.P, self.x, ALPHA)
            return reference.official_project(self.G, state.P)

        return step

    def rival(self, run: Callable, state: State) -> Step:
        return lambda: run(state.P, self.x, self.G)

    def compiled(self, function: Callable, mode: str | None, state: State) -> Step:
        return compile_step(function, mode, state.P, self.x, self.G)

    def providers(self, compiled: bool) -> Iterator[Provider]:
        s, C, R, on_gpu = self.s, self.C, self.rows, self.device.type == "cuda"

        def provider(name, make, traffic=None, rows=0, official=False):
            return Provider(name, functools.partial(self.start, make, rows, official), traffic, max(rows, 1))

        ours = roofline.ours_rls(self.backend, s, C, R)
        yield provider("ours", self.ours, ours, R)
        yield provider("ours functional", self.functional, roofline.ours_rls(self.backend, s, C, 0))
        if on_gpu:
            yield provider("ours graph", captured(self.ours), ours, R)
        for name, form in forms.RLS.items():
            make = functools.partial(self.rival, form.run)
            if not (on_gpu and form.host):
                yield provider(name, make, form.traffic(s, C))
                if on_gpu:
                    yield provider(f"graph {name}", captured(make), form.traffic(s, C))
        yield provider("released", self.released, roofline.released(s, C), official=True)
        for name, function, mode in compilations(compiled, on_gpu, forms.plain, forms.plain_stacked):
            yield provider(name, functools.partial(self.compiled, function, mode))


class Window:
    """One step of the window on M modalities, and eager forms of the RLS step that it takes the place of ("rls eager …")."""

    def __init__(self, s: int, C: int, M: int, device: torch.device):
        self.s, self.C, self.M, self.device = s, C, M, device
        self.backend = ops.resolve("auto", device)
        source = {"device": device, "generator": random(device)}
        self.means, self.x = torch.rand(M, s, **source) / s**0.5, torch.rand(s, **source) / s**0.5
        self.G = torch.randn(C, s, **source)
        self.grad = self.G.clone()  # of a step that works in place
        self.alpha = ops.alpha_tensor(ALPHA, device)

    @functools.cached_property
    def expected(self) -> Tensor:
        return reference.project(self.G.double(), reference.window_projection(self.means[1:].double(), ALPHA))

    def start(self, make: Callable[[Tensor], Step]) -> tuple[Step, Callable[[], None]]:
        means = self.means.clone()
        self.grad.copy_(self.G)
        step = make(means)

        def gate():
            for _ in range(3):
                means[0].zero_()
                self.grad.copy_(self.G)
                check("G P", step(), self.expected, 2e-6)
                if not torch.equal(means[0], self.x):
                    raise GateError("x̄ was not remembered; not timed")

        return step, gate

    def ours(self, means: Tensor) -> Step:
        gram = ops.window_gram(self.backend, means)

        def step():
            ops.window_step_(self.backend, means, gram, 0, self.x, self.grad, self.alpha)
            return self.grad

        return step

    def functional(self, means: Tensor) -> Step:
        def step():
            projected = mla.window_project(means[1:], self.G, ALPHA)
            means[0].copy_(self.x)
            return projected

        return step

    def rival(self, run: Callable, means: Tensor) -> Step:
        return lambda: run(means, 0, self.x, self.G)

    def compiled(self, function: Callable, mode: str | None, means: Tensor) -> Step:
        return compile_step(function, mode, means, 0, self.x, self.G)

    def providers(self, compiled: bool) -> Iterator[Provider]:
        s, C, J, on_gpu = self.s, self.C, self.M - 1, self.device.type == "cuda"

        def provider(name, make, traffic=None):
            return Provider(name, functools.partial(self.start, make), traffic)

        yield provider("ours", self.ours, roofline.window(s, C, J))
        yield provider("ours functional", self.functional, roofline.window(s, C, J))
        if on_gpu:
            yield provider("ours graph", captured(self.ours), roofline.window(s, C, J))
        for name, form in forms.WINDOW.items():
            make = functools.partial(self.rival, form.run)
            yield provider(name, make, form.traffic(s, C, J))
            if on_gpu and form.run is forms.window_sequential:  # a library's solver is not for capturing
                yield provider(f"graph {name}", captured(make), form.traffic(s, C, J))
        for name, function, mode in compilations(compiled, on_gpu, forms.window_plain):
            yield provider(name, functools.partial(self.compiled, function, mode))
        rls = RLS(s, C, self.device)
        for name in ("eager update first device", "eager stacked"):
            form = forms.RLS[name]
            start = functools.partial(rls.start, functools.partial(rls.rival, form.run))
            yield Provider(f"rls {name}", start, form.traffic(s, C))


class Fusion:
    """Entropy-weighted fusion; an absent modality's logits are NaN."""

    def __init__(self, M: int, N: int, C: int, masked: bool, device: torch.device):
        self.M, self.N, self.C, self.masked, self.on_gpu = M, N, C, masked, device.type == "cuda"
        source = {"device": device, "generator": random(device)}
        z, self.rows = 3 * torch.randn(M, N, C, **source), M * N
        self.arguments = (z,)
        if masked:
            present = torch.rand(N, M, **source) > 0.3
            self.arguments = (z.masked_fill_(~present.T[..., None], torch.nan), present)
            self.rows = int(present.sum())

    @functools.cached_property
    def expected(self) -> tuple[Tensor, ...]:
        z, *present = self.arguments
        return reference.entropy_fusion(z.double(), *present)

    @functools.cached_property
    def expected_official(self) -> tuple[Tensor, ...]:
        return reference.official_fusion(self.arguments[0].double())

    def start(self, make: Callable[[], Step], official: bool = False) -> tuple[Step, Callable[[], None]]:
        step = make()

        def gate():
            names, expected = ("fused logits", "weights", "entropies"), self.expected_official if official else self.expected
            for _ in range(3):
                for name, got, right in zip(names, step(), expected, strict=False):
                    check(name, got, right, 5e-6)

        return step, gate

    def step(self, run: Callable) -> Step:
        return lambda: run(*self.arguments)

    def providers(self, compiled: bool) -> Iterator[Provider]:
        M, N, C = self.M, self.N, self.C

        def provider(name, make, traffic=None, official=False):
            return Provider(name, functools.partial(self.start, make, official), traffic)

        ours, traffic = functools.partial(self.step, mla.entropy_fusion), roofline.fusion_one_read(self.rows, M, N, C)
        yield provider("ours", ours, traffic)
        if self.on_gpu:
            yield provider("ours graph", captured(ours), traffic)
        for name, form in forms.FUSION.items():
            make = functools.partial(self.step, form.run)
            yield provider(name, make, form.traffic(M, N, C, self.masked))
            if self.on_gpu:
                yield provider(f"graph {name}", captured(make), form.traffic(M, N, C, self.masked))
        if not self.masked:
            released = functools.partial(self.step, reference.official_fusion)
            yield provider("released", released, roofline.fusion_released(M, N, C), official=True)
        for name, function, mode in compilations(compiled, self.on_gpu, forms.fusion_broadcast):
            yield provider(name, functools.partial(compile_step, function, mode, *self.arguments))

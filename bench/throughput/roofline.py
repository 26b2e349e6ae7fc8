"""Bytes moved, launches and least time of every form: ``python -m bench.throughput.roofline [--classes 101]``.

Counted in float32. Each launch reads each of its inputs once and writes each of its outputs once; what a launch reads again is
taken to come from a cache, but for the two forms of the fusion that are named for their second reading. Vectors of s numbers
(x̄, k, one u) and scalars are left out. What a form of eager torch costs is counted in the same way, temporaries included.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

FLOAT = 4
# Above these many classes an RLS step of ours goes over P twice: csrc's GEMM_CLASSES, and MAX_BLOCK_C of kernels/launch.py.
CPP_ONE_PASS, TRITON_ONE_PASS = 20, 128
GPUS = {"H100": (3000.0, 50e6), "H200": (4300.0, 60e6)}  # GB/s of a copy, and bytes of the L2 cache


class Traffic(NamedTuple):
    """What one call of a form moves. launches: None where a library's solver has its own number of them."""

    form: str
    bytes: int
    launches: int | None

    def floor_us(self, gb_per_s: float) -> float:
        return self.bytes / gb_per_s / 1e3


def _floats(form: str, count: float, launches: int | None) -> Traffic:
    return Traffic(form, round(FLOAT * count), launches)


def released(s: int, C: int) -> Traffic:
    """k = P x̄ (1 s²), two outer products (2), α + (2), the division (3), P − (3), ‖P‖ (1), P / ‖P‖ (2), G Pᵀ (1)."""
    return _floats("released", 15 * s * s + 2 * C * s, 9)


def eager_addr(s: int, C: int) -> Traffic:
    """P x̄ (1 s²), G P (1), P.addr_ (2); G read for G P and for G u, G P written and corrected."""
    return _floats("eager addr", 4 * s * s + 5 * C * s, 9)


def eager_update_first(s: int, C: int) -> Traffic:
    """P x̄ (1 s²), P.addr_ (2), G P (1)."""
    return _floats("eager update first", 4 * s * s + 2 * C * s, 7)


def eager_stacked(s: int, C: int) -> Traffic:
    """[G; x̄] P (1 s²), P.addr_ (2); G copied beside x̄, G P written, read for (G P) x̄ and corrected."""
    return _floats("eager stacked", 3 * s * s + 7 * C * s, 10)


def at_once(s: int, C: int, passes: float = 1) -> Traffic:
    """P read (`passes` times), then read and written; G read, G P written and read, the result written."""
    return _floats("at once", (passes + 2) * s * s + 4 * C * s, 4)


def lazy(s: int, C: int, passes: int = 1) -> Traffic:
    """P read and written; `passes` 2: read once more. G read, G P written and read, the result written."""
    return _floats("lazy", (passes + 1) * s * s + 4 * C * s, 1 + passes)


def half(s: int, C: int) -> Traffic:
    """The upper triangle of P read and written; G as above."""
    return _floats("half", s * s + 4 * C * s, 1)


def deferred(s: int, C: int, R: int) -> Traffic:
    """P read, and written in one step of R (with more classes than one pass takes, after a reading of its own); on average R/2
    waiting rows; G read once more, for U Gᵀ."""
    passes, launches = (1 + 1 / R, 2) if C <= TRITON_ONE_PASS else (2 + 2 / R, 3)
    return _floats(f"deferred R={R}", passes * s * s + 5 * C * s + R * s / 2, launches)


def ours_rls(backend: str, s: int, C: int, R: int) -> Traffic:
    """The form that R places for waiting rows stand for."""
    if backend == "cpp":
        if R == 0:
            return at_once(s, C, 0.5 if C <= CPP_ONE_PASS else 1.5)  # first a triangle
        return half(s, C) if C <= CPP_ONE_PASS else lazy(s, C, 2)
    passes = 2 if C > TRITON_ONE_PASS else 1
    if R == 0:
        return at_once(s, C, passes)
    return lazy(s, C, passes) if R == 1 else deferred(s, C, R)


def window(s: int, C: int, J: int) -> Traffic:
    """J means and G read, G P and one mean written."""
    return _floats("window", 2 * C * s + (J + 2) * s, 1)


def window_eager(s: int, C: int, J: int) -> Traffic:
    """G read for G Uᵀ, copied and corrected; U written and read. 4 launches for each u, 3 before each but the first, 4 after."""
    return _floats("eager sequential", 5 * C * s + (3 * J + 2) * s, 7 * J + 1)


def window_solved(s: int, C: int, J: int) -> Traffic:
    """The same reading of G, and a solver."""
    return _floats("eager woodbury", 5 * C * s + (3 * J + 2) * s, None)


def fusion_one_read(rows: int, M: int, N: int, C: int) -> Traffic:
    """`rows` ≤ M N logits rows that are present, read; fused logits, weights and entropies written."""
    return _floats("one read", rows * C + N * C + 2 * N * M, 1)


def fusion_two_reads(rows: int, M: int, N: int, C: int) -> Traffic:
    return _floats("two reads", 2 * rows * C + N * C + 2 * N * M, 1)


def fusion_backward(rows: int, M: int, N: int, C: int, reads: int = 1) -> Traffic:
    """Logits and the fused logits' gradient read once (long rows: twice), weights and entropies once; M N rows of gradients
    written."""
    return _floats("backward" if reads == 1 else "backward, two reads", (reads * (rows + N) + M * N) * C + 2 * N * M, 1)


def fusion_einsum(M: int, N: int, C: int, masked: bool = False) -> Traffic:
    """In M N C: log_softmax 2, exp 2, product 3, sum 1, einsum 1; masked_fill 2 more."""
    return _floats("eager einsum", (11 if masked else 9) * M * N * C + N * C, 13 if masked else 7)


def fusion_broadcast(M: int, N: int, C: int, masked: bool = False) -> Traffic:
    """As above with w z written and read again."""
    return _floats("eager broadcast", (13 if masked else 11) * M * N * C + N * C, 14 if masked else 8)


def fusion_entr(M: int, N: int, C: int, masked: bool = False) -> Traffic:
    """In M N C: softmax 2, entr 2, sum 1, addcmul 1 (with the sum read and written M − 1 times); masked_fill 2 more."""
    return _floats("eager entr", (8 if masked else 6) * M * N * C + (2 * M - 1) * N * C, M + (12 if masked else 6))


def fusion_released(M: int, N: int, C: int) -> Traffic:
    """In M N C: softmax 2, entr 2, sum 1, einsum 1."""
    return _floats("released", 6 * M * N * C + N * C, 7)


def dispatch(N: int, M: int, packed: int, means: bool) -> Traffic:
    """The mask, and an int64 for each pair in rows and in slot; `packed` bytes read and written, and read again for means that
    are launches of their own."""
    return Traffic("dispatch", 17 * N * M + (3 if means else 2) * packed, 3 + M if means else 2)


RLS_FORMS = {
    "released": released,
    "eager addr": eager_addr,
    "eager update first": eager_update_first,
    "eager stacked": eager_stacked,
    "at once": at_once,
    "lazy": lazy,
    "deferred R=4": lambda s, C: deferred(s, C, 4),
    "eager sequential window, M=3": lambda s, C: window_eager(s, C, 2),
    "window, M=3": lambda s, C: window(s, C, 2),
}
FUSION_FORMS = {
    "released": fusion_released,
    "eager einsum": fusion_einsum,
    "eager broadcast": fusion_broadcast,
    "eager entr": fusion_entr,
    "one read": lambda M, N, C: fusion_one_read(M * N, M, N, C),
    "two reads": lambda M, N, C: fusion_two_reads(M * N, M, N, C),
    "backward": lambda M, N, C: fusion_backward(M * N, M, N, C),
}


def tables(C: int) -> str:
    """bench/README.md's tables of floors, in markdown."""
    sizes, shapes = (512, 1024, 4096, 8192), ((3, 64, 101), (3, 4096, 101), (3, 65536, 1000))
    rls = [(name, [form(s, C) for s in sizes]) for name, form in RLS_FORMS.items()]
    fusion = [(name, [form(*shape) for shape in shapes]) for name, form in FUSION_FORMS.items()]
    parts = (
        _table(f"C = {C}", [f"s = {s}" for s in sizes], rls),
        _table("fusion", [str(list(shape)) for shape in shapes], fusion),
    )
    return "\n\n".join(parts)


def _table(head: str, columns: list[str], rows: list[tuple[str, list[Traffic]]]) -> str:
    lines = [f"| {head} | launches | " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) + 1)]
    for name, traffic in rows:
        floors = " | ".join(" / ".join(_floor(t, *gpu) for gpu in GPUS.values()) for t in traffic)
        lines.append(f"| {name} | {traffic[0].launches} | {floors} |")
    return "\n".join(lines)


def _floor(traffic: Traffic, gb_per_s: float, cache: float) -> str:
    """In parentheses where all of it fits in the L2 cache and may not go to memory at all."""
    us = traffic.floor_us(gb_per_s)
    text = f"{us:.2f}" if us < 10 else f"{us:.0f}"
    return f"({text})" if traffic.bytes < cache else text


def main() -> None:
    parser = argparse.ArgumentParser(
        description="least times of every form in µs, computed from its bytes, on " + " / ".join(GPUS)
    )
    parser.add_argument("--classes", type=int, default=101)
    print(tables(parser.parse_args().classes))


if __name__ == "__main__":
    main()

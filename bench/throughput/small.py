"""One small case of each kernel, each by itself: ``python -m bench.throughput.small``, which ``compute-sanitizer`` can watch.

A case that fails is reported and does not keep the others from running. The exit status says whether all ran.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator

import torch

import mla_fast as mla
from mla_fast import ops


def rls(s: int, C: int, R: int) -> None:
    alpha = torch.tensor(1.0, dtype=torch.float64)
    P, pending, slot = torch.eye(s), torch.zeros(R, s), torch.zeros(2, dtype=torch.int32)
    for _ in range(R + 2):
        ops.rls_step("triton", P, torch.rand(s), torch.randn(C, s), alpha, pending, slot)
    ops.rls_step("triton", P, torch.rand(s), torch.randn(C, s), alpha, pending, slot, torch.ones(1))
    ops.rls_fold("triton", P, pending, slot)
    mla.rls_project_(P, torch.rand(s), torch.randn(C, s).bfloat16(), 1.0)


def window(K: int, s: int) -> None:
    means, alpha = torch.rand(K, s), torch.tensor(1.0, dtype=torch.float64)
    ops.window_step_("triton", means, ops.window_gram("triton", means), 1, torch.rand(s), torch.randn(6, s), alpha)


def fusion(*shape: int) -> None:
    logits = torch.randn(shape, requires_grad=True)
    present = torch.rand(*shape[:2]).T > 0.3
    mla.entropy_fusion(logits, present, backend="triton").logits.sum().backward()


def dispatch(*shape: int) -> None:
    logits = torch.randn(shape, requires_grad=True)
    present = torch.rand(*shape[:2]).T > 0.3
    plan = mla.dispatch(present)
    packed = torch.randn(sum(plan.counts), shape[2], requires_grad=True)
    plan.fuse(packed).logits.sum().backward()
    plan.segment_mean(packed)
    for padded in (False, True):
        plan = mla.dispatch(present, padded=padded)
        rows, means = plan.pack_features(list(logits))
        sum(t.sum() for t in (*rows, *means, *plan.unpack(rows))).backward()


def large_head(N: int, s: int, C: int) -> None:
    h, W, b = (torch.randn(*shape, requires_grad=True) for shape in ((N, s), (C, s), (C,)))
    for options in ({}, {"label_smoothing": 0.1, "class_weight": torch.rand(C)}):
        mla.linear_cross_entropy(h, W, b, torch.randint(C, (N,)), **options).backward()


def cases() -> Iterator[tuple[Callable[..., None], tuple]]:
    yield from ((rls, sizes) for sizes in ((33, 6, 1), (65, 130, 1), (33, 6, 2), (512, 6, 1), (512, 101, 1), (1024, 101, 4)))
    yield from ((window, sizes) for sizes in ((3, 33), (9, 33), (3, 2100)))
    yield from ((large_head, sizes) for sizes in ((5, 7, 33), (3, 8, 9001)))
    for case in (fusion, dispatch):
        yield from ((case, shape) for shape in ((3, 5, 7), (2, 3, 9001), (3, 64, 101)))


def main() -> None:
    failed = 0
    for case, arguments in cases():
        try:
            with torch.device("cuda"):
                case(*arguments)
            torch.cuda.synchronize()
            print(f"{case.__name__}{arguments}: ran", flush=True)
        except Exception:
            failed += 1
            print(f"{case.__name__}{arguments}: FAILED\n{traceback.format_exc(limit=-4)}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

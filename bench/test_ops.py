"""``pytest bench --benchmark-only``: each operator timed by pytest-benchmark, its rivals interleaved with it in extra_info."""

import pytest
import torch

from bench.ops import Case, best_eager, cases
from bench.timing import interleave
from mla_fast import ops

pytestmark = pytest.mark.skipif(ops.CPP_MISSING is not None, reason=str(ops.CPP_MISSING))


@pytest.mark.parametrize("case", list(cases()) if ops.CPP_MISSING is None else [], ids=lambda case: case.name)
def test_operator(benchmark, case: Case):
    torch.set_num_threads(1)
    with torch.no_grad():
        times = interleave(case.providers, seconds=0.3)
        benchmark.extra_info["interleaved_us"] = {name: round(t.median, 1) for name, t in times.items()}
        benchmark.extra_info["times_best_eager"] = round(best_eager(times) / times["ours"].median, 2)
        benchmark.group = case.name
        benchmark(case.providers["ours"])

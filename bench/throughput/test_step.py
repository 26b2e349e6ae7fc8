"""``pytest bench --benchmark-only``: whole training steps timed by pytest-benchmark, the rivals interleaved in extra_info."""

import pytest
import torch

from bench.throughput.cases import CPU_OR_GPU
from bench.throughput.step import PLAIN, build
from bench.throughput.test_ops import MISSING, waited_for
from bench.throughput.timing import interleave
from bench.throughput.training import workloads

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.mark.parametrize("workload", workloads(CPU_OR_GPU), ids=lambda workload: workload.name)
def test_step(benchmark, workload):
    torch.set_num_threads(1)
    case = build(workload, CPU_OR_GPU)
    assert not case.failed
    times = interleave(case.providers, seconds=0.3, rounds=(3, 200), device=CPU_OR_GPU)
    benchmark.extra_info["interleaved_us"] = {name: round(t.median, 1) for name, t in times.items()}
    benchmark.extra_info["times_plain_loop"] = round(times[PLAIN].median / times["ours rls"].median, 2)
    benchmark.group = case.name
    benchmark(waited_for(case.providers["ours rls"]))

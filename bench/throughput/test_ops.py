"""``pytest bench --benchmark-only``: each operator timed by pytest-benchmark, its rivals interleaved with it in extra_info.

pytest-benchmark's own median leaves out the folds of a deferred step, of which there are few; extra_info has them.
"""

import pytest
import torch

from bench.throughput.cases import CPU_OR_GPU, Spec, build, missing, specs
from bench.throughput.ops import best
from bench.throughput.timing import interleave

MISSING = missing(CPU_OR_GPU)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.mark.parametrize("spec", specs(CPU_OR_GPU), ids=lambda spec: spec.name)
def test_operator(benchmark, spec: Spec):
    torch.set_num_threads(1)
    with torch.no_grad():
        case = build(spec, CPU_OR_GPU)
        assert not case.failed
        times = interleave(case.providers, seconds=0.3, periods=case.periods, device=CPU_OR_GPU)
        benchmark.extra_info["interleaved_us"] = {name: round(t.median, 1) for name, t in times.items()}
        benchmark.extra_info["times_best_eager"] = round(best(times, "eager") / times["ours"].median, 2)
        benchmark.group = case.name
        benchmark(waited_for(case.providers["ours"]))


def waited_for(step):
    """pytest-benchmark has the host's clock alone."""
    if CPU_OR_GPU.type == "cpu":
        return step

    def waiting():
        step()
        torch.cuda.synchronize()

    return waiting

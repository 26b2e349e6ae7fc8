import os

import pytest
import torch

# Without a GPU the Triton kernels are interpreted, which must be said before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mla_fast import ops, threads  # noqa: E402

if ops.INTERPRETED and ops.TRITON_MISSING is None:
    from mla_fast.kernels import launch

    launch.MAX_SPLITS = 2  # interpreted programs run one after another, and two shares of a sum say as much as sixteen


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems run faster on one thread, and far faster where the cores are shared."""
    with threads.one_thread():
        yield


def unless_missing(name):
    reason = ops.MISSING[name]
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


@pytest.fixture(params=["reference", unless_missing("cpp"), unless_missing("triton")])
def backend(request):
    """Each backend by name. With a GPU, what a test makes for "triton" lies there; without, the kernels are interpreted, and
    tests of thousands of launches (marked `many_launches`) are for a GPU."""
    if request.param != "triton":
        yield request.param
    elif request.node.get_closest_marker("host_path"):
        pytest.skip("what the host decides on the CPU; test_device_path_… has what a GPU does")
    elif ops.INTERPRETED:
        if request.node.get_closest_marker("many_launches"):
            pytest.skip("thousands of launches: too slow to interpret")
        yield request.param
    else:
        with torch.device("cuda"):
            yield request.param

import pytest
import torch

from mla_fast import ops


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems run faster on one thread, and far faster where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    params=["reference", pytest.param("cpp", marks=pytest.mark.skipif(ops.CPP_MISSING is not None, reason=str(ops.CPP_MISSING)))]
)
def backend(request):
    return request.param

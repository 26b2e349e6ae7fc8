import pytest

from mla_fast import competition, ops


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems run faster on one thread, and far faster where the cores are shared."""
    with competition.one_thread():
        yield


@pytest.fixture(
    params=["reference", pytest.param("cpp", marks=pytest.mark.skipif(ops.CPP_MISSING is not None, reason=str(ops.CPP_MISSING)))]
)
def backend(request):
    return request.param

import os
import secrets
import zlib

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads, which wait by spinning; torch's are the fixture's below

import numpy as np  # noqa: E402
import torch  # noqa: E402

# Without a GPU the Triton kernels are interpreted, which must be said before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mla_fast import ops, threads  # noqa: E402

if ops.INTERPRETED and ops.available("triton"):
    from mla_fast.kernels import launch

    # Interpreted programs run one after another, and take long whatever their size: few and large ones say as much as many.
    launch.MAX_SPLITS = 2
    for row in launch.TABLE["rls_read"]:
        row["config"]["BLOCK_J"] = max(row["config"]["BLOCK_J"], 32)
    for row in launch.TABLE["rls_finish"]:
        row["config"]["BLOCK_C"] = 16
    for op in ("entropy_fusion", "entropy_fusion_backward"):
        launch.TABLE[op][0]["config"]["elements"] = 1024


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its option and pytest-xdist starts workers, which inherit it
def pytest_configure(config):
    seed = os.environ.setdefault("MLA_FAST_TEST_SEED", secrets.token_hex(4))
    if config.getoption("--hypothesis-seed", None) is None:
        config.option.hypothesis_seed = seed


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"MLA_FAST_TEST_SEED={os.environ['MLA_FAST_TEST_SEED']} draws these inputs again")


@pytest.hookimpl(tryfirst=True)  # before a fixture draws
def pytest_runtest_setup(item):
    """A test's inputs follow from its name and the run's seed, whatever ran before it in the same process."""
    seed = zlib.crc32(f"{os.environ['MLA_FAST_TEST_SEED']} {item.nodeid}".encode())
    torch.manual_seed(seed)
    np.random.seed(seed)


@pytest.hookimpl(tryfirst=True)  # before -m looks
def pytest_collection_modifyitems(items):
    """``exhaustive("triton")`` is so only of kernels that are interpreted: the other backends, and a GPU, take no time for it."""
    for item in items:
        interpreted = ops.INTERPRETED and item.callspec.params.get("backend") == "triton" if hasattr(item, "callspec") else False
        marks = [mark for mark in item.own_markers if mark.name != "exhaustive" or not mark.args or interpreted]
        item.own_markers[:] = marks


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

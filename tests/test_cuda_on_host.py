"""The CUDA dispatch operators run where there is no GPU: the very sources, compiled by g++ with tests/cuda_on_host.h."""

import ctypes
import importlib.machinery
import importlib.util
import mmap
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers import exhaustive

from mla_fast import reference
from mla_fast.ops.backend import SCHEMAS

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
FLOATING = DTYPES[:4]
# What g++ cannot read, and how it stands in cuda_on_host.h.
AS_ON_HOST = {
    r"(\w+(?:<[^<>;]+>)?)<<<(.+), (\w+), 0, stream>>>\((.+)\);": r"cuda_on_host::launch(\2, \3, [=] { \1(\4); });",
    r"__shared__ (\w+) (\w+)((?:\[[^]]+\])*);": r"static \1 \2\3; cuda_on_host::shared(\2);",
}
libraries = []


def on_host(folder, name, change=str):
    """The operators as library `name`, from sources as `change` makes them; compiled, unless they are in `folder` already."""
    if sys.platform != "linux" or shutil.which("g++") is None or not (ROOT / "setup.py").exists():
        pytest.skip("needs Linux, g++ and the source tree")
    module = folder / f"{name}.so"
    if not module.exists():
        compile_on_host(folder, name, change, module)
    library = torch.library.Library(name, "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    libraries.append(library)
    loader = importlib.machinery.ExtensionFileLoader("_C_cuda", str(module))
    loader.exec_module(importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader)))
    return getattr(torch.ops, name)


def compile_on_host(folder, name, change, module):
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
    from torch.utils.cpp_extension import include_paths, library_paths

    for header in ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h"):  # what they declare is in cuda_on_host.h
        (folder / header).touch()
    # A vector's address must be a multiple of its size, as on a GPU; one that is not ends the process.
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-w"]
    flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    flags += [f"-D{macro}={value}" for macro, value in (*build["MACROS"], ("mla_fast", name))]
    flags += ["-include", ROOT / "tests/cuda_on_host.h", f"-I{folder}", f"-I{ROOT / 'csrc/cuda'}"]
    flags += [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    compilers = []
    for source in build["CUDA_SOURCES"]:
        text = change((ROOT / "csrc/cuda" / source).read_text())
        for cuda, host in AS_ON_HOST.items():
            text = re.sub(cuda, host, text)
        assert "<<<" not in text and "__shared__" not in text
        (folder / f"{source}.cpp").write_text(text)
        compilers.append(subprocess.Popen(["g++", "-c", *flags, f"{source}.cpp", "-o", f"{source}.o"], cwd=folder))
    assert not any([compiler.wait() for compiler in compilers])
    linked = [*(f"{source}.o" for source in build["CUDA_SOURCES"]), *(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    subprocess.run(["g++", "-shared", *linked, "-o", module], cwd=folder, check=True)


@pytest.fixture(scope="module")
def op(tmp_path_factory):
    """One process compiles for all, which are in folders side by side."""
    import fcntl  # which only POSIX has

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cuda_on_host"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return on_host(folder, "mla_fast_on_host")


@pytest.fixture(autouse=True)
def poisoned():
    """What is not written holds NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def at_the_edge(t):
    """`t` in memory behind which nothing may be read: that would end the process."""
    if not t.numel():
        return t
    base = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    pages = -(-base.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=t.dtype, count=len(base), offset=pages - base.nbytes)
    return copy.copy_(base).as_strided(t.shape, t.stride(), t.storage_offset())


def mask(N, M):
    """present [N, M], which begins at a multiple of 16 bytes, or does not."""
    return at_the_edge((torch.rand(N + 1, M) > 0.4)[torch.randint(2, ()) :][:N])


def check_plan(op, present, padded):
    want = reference.dispatch_plan(present, padded)
    for name, got, expected in zip(("rows", "offsets", "counts", "slot"), op.dispatch_plan(present, padded), want, strict=True):
        assert torch.equal(got, expected), name
    return want


def equal(got, want):
    return all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("N,M", [(0, 2), (1, 1), (7, 3), (63, 64), (300, 17), (1025, 3), (5000, 5)])
def test_plan_pack_and_unpack(op, N, M, padded):
    rows, offsets, counts, slot = check_plan(op, mask(N, M), padded)
    sizes = [N] * M if padded else counts.tolist()
    widths = (3, 1025 if N < 2000 else 65, 8, 1, 0)
    whole = [(100 * torch.randn(N, widths[m % 5] + m % 2)).to(DTYPES[m % 7]) for m in range(M)]
    inputs = [at_the_edge(x[:, m % 2 :]) for m, x in enumerate(whole)]
    packed = reference.pack_rows(inputs, rows, offsets, sizes)
    assert equal(op.pack_rows(inputs, rows, offsets, slot, sizes), packed)
    packed = [at_the_edge(x) for x in packed]
    assert equal(op.unpack_rows(packed, slot, offsets), reference.unpack_rows(packed, slot, offsets))


@pytest.mark.parametrize("N,M", [(140_000, 2), *exhaustive((720_000, 3))])
def test_plan_of_many_samples(op, N, M):
    """Several groups of samples for each block; more pairs than a byte counts in one round."""
    check_plan(op, torch.rand(N, M) > 0.4, False)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("s,first", [(1, 0), (8, 0), (8, 1), (8, 4), (63, 8), (513, 8), *exhaustive((2048, 8))])
@pytest.mark.parametrize("padded", [False, True])
def test_segment_means(op, s, first, dtype, padded):
    """first: the column that features begin with, whose address decides how wide they can be read."""
    N, M = 300 if s < 2048 else 20, 4
    present = mask(N, M)
    present[:, 2] = False
    rows, offsets, counts, _ = reference.dispatch_plan(present, padded)
    features = (1 + torch.randn(N * M if padded else int(offsets[-1]), s + first)).to(dtype)[:, first:]
    if padded:
        features[rows < 0] = torch.nan
    features, counts = at_the_edge(features), counts if padded else None
    got, want = op.segment_mean(features, offsets, counts), reference.segment_mean(features.double(), offsets, counts)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)
    assert torch.equal(got, op.segment_mean(features, offsets, counts)), "the threads' order decided"


def test_no_row_that_is_not_there(op):
    """Indices on a GPU cannot be checked by the host: rows that do not exist count as absent."""
    rows, offsets, counts, slot = reference.dispatch_plan(mask(50, 2), False)
    inputs, sizes = [torch.randn(50, 5), torch.randn(50, 3)], counts.tolist()
    for nowhere in (rows + 50, rows - 51, rows + (1 << 60)):
        assert not any(x.any() for x in op.pack_rows(inputs, nowhere, offsets, slot, sizes))
    packed = reference.pack_rows(inputs, rows, offsets, sizes)
    for nowhere in (slot + 200, slot - 300):
        assert not any(x.any() for x in op.unpack_rows(packed, nowhere, offsets))
    assert not any(x.any() for x in op.pack_rows(inputs, rows, offsets + 100, slot, sizes))
    assert not op.segment_mean(packed[0], offsets + 200, None).any()


def test_bad_arguments_are_named(op):
    rows, offsets, counts, slot = reference.dispatch_plan(mask(5, 2), False)
    x, sizes = torch.randn(5, 3), counts.tolist()
    for name, call in (
        ("present", lambda: op.dispatch_plan(x)),
        ("present", lambda: op.dispatch_plan(torch.ones(2, 65, dtype=torch.bool))),
        ("sizes", lambda: op.pack_rows([x, x], rows, offsets, slot, [-1, 2])),
        ("inputs", lambda: op.pack_rows([x, x[:4]], rows, offsets, slot, sizes)),
        ("rows", lambda: op.pack_rows([x, x], rows[1:], offsets, slot, sizes)),
        ("offsets", lambda: op.unpack_rows([x, x], slot, offsets.int())),
        ("slot", lambda: op.unpack_rows([x], slot, offsets)),
        ("features", lambda: op.segment_mean(torch.ones(5, 3, dtype=torch.int64), offsets)),
        ("counts", lambda: op.segment_mean(x, offsets, counts[:1])),
    ):
        with pytest.raises(RuntimeError, match=f": {name}"):
            call()


@pytest.mark.exhaustive
def test_a_missing_barrier_shows(tmp_path):
    """What the tests above would see: segment_mean whose warps do not wait for each other."""
    op = on_host(
        tmp_path, "mla_fast_hasty", lambda source: re.sub(r"__syncthreads\(\);\n  if \(t < columns", "if (t < columns", source)
    )
    features, offsets = torch.randn(1000, 64), torch.tensor([0, 1000])
    assert not all(torch.allclose(op.segment_mean(features, offsets)[0], features.mean(0), atol=1e-3) for _ in range(10))

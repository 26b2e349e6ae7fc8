"""The CUDA module where there is no GPU: it compiles for every architecture without spilling, registers its operators, and its
kernels' index arithmetic is right at every size. test_cuda_on_host.py runs the kernels."""

import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHS = {"75", "80", "90", "100", "120"}
OPERATORS = {"dispatch_plan", "pack_rows", "unpack_rows", "segment_mean"}


@pytest.fixture
def flags(monkeypatch):
    """What setup.py defines, for a build of both modules."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLA_FAST_BUILD", "cuda")
    monkeypatch.setenv("MLA_FAST_CUDA_ARCHS", " ".join(sorted(ARCHS, key=int)))  # whatever GPU is here
    flags = runpy.run_path("setup.py", run_name="flags")
    if flags["find_nvcc"]() is None:
        pytest.skip("needs nvcc")
    return flags


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cuobjdump():
    """CUDA's, or the one within triton."""
    triton = Path(sysconfig.get_path("purelib"), "triton/backends/nvidia/bin/cuobjdump")
    return shutil.which("cuobjdump") or (triton if triton.exists() else None)


LOADS = """
import importlib.machinery, importlib.util, sys
import torch

library = torch.library.Library("mla_fast", "FRAGMENT")
for name in sys.argv[2:]:
    library.define(name + "() -> ()")
loader = importlib.machinery.ExtensionFileLoader("mla_fast._C_cuda", sys.argv[1])
loader.exec_module(importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader)))
print(*(name for name in sys.argv[2:] if torch._C._dispatch_has_kernel_for_dispatch_key("mla_fast::" + name, "CUDA")))
"""


@pytest.mark.exhaustive
def test_module_compiles_for_every_architecture(flags, tmp_path):
    extension = next(e for e in flags["extensions"]() if e.name == "mla_fast._C_cuda")
    module = tmp_path / "_C_cuda.abi3.so"
    run(*flags["nvcc_command"](extension, str(module), [sysconfig.get_path("include")]))

    assert set(run(sys.executable, "-c", LOADS, module, *sorted(OPERATORS)).split()) == OPERATORS
    if (tool := cuobjdump()) is None:
        pytest.skip("registers and spills need cuobjdump")
    usage = run(tool, "-res-usage", module)
    assert set(re.findall(r"arch = sm_(\d+)", usage)) == ARCHS
    kernels = re.findall(r"Function (\S+):\s*REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    for name in ("dispatch_plan_kernel", "copy_rows_kernel", "segment_mean_kernel"):
        assert sum(name in kernel for kernel, _, _ in kernels) >= len(ARCHS), name
    assert not [kernel for kernel, stack, local in kernels if stack != "0" or local != "0"], usage
    assert "sm_120.ptx" in run(tool, "-lptx", module)


ARITHMETIC = r"""
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include "arithmetic.h"
using namespace mla_fast::cuda;

#define CHECK(condition, ...) \
  if (!(condition)) return std::printf("line %d: " #condition ": ", __LINE__), std::printf(__VA_ARGS__), 1

struct Item {
  int64_t first_tile;
};

int main() {
  // Blocks share the samples out without gap or overlap, in whole groups, however many there are.
  for (int64_t N : {0l, 1l, 7l, 1023l, 1024l, 1025l, 65535l, 65536l, 131072l, 131073l, 10000019l, 1l << 40}) {
    const int64_t tile = plan_tile(N), blocks = plan_blocks(N);
    CHECK(tile % PLAN_GROUP == 0 && tile > 0 && 1 <= blocks && blocks <= PLAN_BLOCKS, "N = %ld", N);
    CHECK(blocks * tile >= N && (N == 0 || (blocks - 1) * tile < N), "N = %ld", N);
  }
  for (int M = 1; M <= MAX_MODALITIES; ++M) {
    const int threads = counting_threads(M);
    CHECK(threads % M == 0 && threads > PLAN_THREADS - M && threads <= PLAN_THREADS, "M = %d", M);
    CHECK(31l * 8 * 16 * threads < 1l << 31 && 31 * 8 <= 255, "M = %d", M);  // count()'s round: an int, and no byte overflows
  }
  for (uint32_t x = 0; x < 1 << 16; ++x)
    for (uint32_t at : {0, 8, 16}) {
      uint32_t expected = 0;
      for (int b = 0; b < 32; b += 8) expected |= ((x << at) >> b & 255 ? 1u : 0u) << b;
      CHECK(set_bytes(x << at) == expected, "x = %x", x << at);
    }

  for (uint64_t from : {0, 1, 2, 4, 6, 8, 12, 16, 48})
    for (uint64_t to : {0, 8, 16, 512})
      for (uint64_t stride : {0, 2, 16, 24, 404, 4096})
        for (uint64_t bytes : {1, 3, 4, 16, 20, 404, 4096}) {
          const int width = width_log2(from, to, stride, bytes);
          for (int wider = 0; wider <= 4; ++wider) {
            const uint64_t w = 1 << wider;
            const bool fits = from % w == 0 && to % w == 0 && stride % w == 0 && bytes % w == 0;
            CHECK(fits == (wider <= width), "%lu %lu %lu %lu: %d", from, to, stride, bytes, width);
          }
        }

  // Every vector of a tile, at every column that a tile can begin in, for rows shorter and longer than a tile.
  for (int64_t vectors = 1; vectors < 3 * COPY_TILE; vectors += vectors < COPY_TILE + 4 ? 1 : 97) {
    const uint32_t magic = row_magic(vectors);
    for (int64_t column = 0; column < vectors; column += vectors < 64 ? 1 : 61)
      for (int step = 0; step < COPY_TILE; ++step) {
        const Cell cell = advance(5, column, step, vectors, magic);
        CHECK(
            cell.row == 5 + (column + step) / vectors && cell.column == (column + step) % vectors, "%ld %ld %d", vectors, column,
            step);
      }
  }
  const int64_t huge = 1l << 41;
  for (int64_t column : {0l, huge - COPY_TILE, huge - 1})
    for (int step : {0, 1, COPY_TILE - 1}) {
      const Cell cell = advance(huge, column, step, huge, row_magic(huge));
      CHECK(cell.row == huge + (column + step) / huge && cell.column == (column + step) % huge, "%ld %d", column, step);
    }

  const Item items[] = {{0}, {0}, {3}, {3}, {3}, {7}, {8}};  // the first, third, fourth and, of 8 tiles, the last have none
  const int expected[] = {1, 1, 1, 4, 4, 4, 4, 5};
  for (int tile = 0; tile < 8; ++tile) CHECK(item_of(items, 7, tile) == expected[tile], "tile %d", tile);

  for (int64_t row_bytes : {2, 4, 12, 32, 256, 2048, 4096, 1 << 20})
    for (int64_t segments : {1, 2, 3, 8, 64})
      for (int vector_bytes : {2, 4, 8, 16}) {
        const int lanes = mean_lanes(row_bytes, segments, vector_bytes);
        CHECK(lanes >= 1 && lanes <= 32 && (lanes & (lanes - 1)) == 0, "%d", lanes);
        CHECK(32 <= lanes * vector_bytes && lanes * vector_bytes <= 128, "%d of %d bytes", lanes, vector_bytes);
      }
  return 0;
}
"""


def test_index_arithmetic_on_the_host(flags, tmp_path):
    (tmp_path / "arithmetic.cu").write_text(ARITHMETIC)
    nvcc = flags["find_nvcc"]()
    program = tmp_path / "arithmetic"
    run(nvcc, "-std=c++17", "-O1", "-I", ROOT / "csrc/cuda", "-o", program, tmp_path / "arithmetic.cu")
    run(program)

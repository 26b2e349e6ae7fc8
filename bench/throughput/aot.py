"""Compiles every kernel and shipped configuration without a GPU: ``python -m bench.throughput.aot [--targets sm_90,…]``.

The launchers themselves run, on tensors without storage and with a driver that names the target but launches nothing: what is
compiled is what they would launch. Asserts that nothing spills, that shared memory fits, and that no row of launch.json was left
out; prints for each configuration what bounds it. Not in an interpreted process.
"""

import argparse
import collections
import contextlib
import functools
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from mla_fast.kernels import launch
from mla_fast.kernels.fusion import entropy_fusion, entropy_fusion_backward
from mla_fast.kernels.head_step import head_check_, head_restore_
from mla_fast.kernels.rls import rls_fold_, rls_project_
from mla_fast.kernels.softmax import softmax_delta_, softmax_sums
from mla_fast.kernels.window import window_project, window_step_
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a block may use
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LIKELY = DTYPES[:2] + DTYPES[3:]  # float16 is compiled as bfloat16 is, but where tensor cores take it


class Compiled(NamedTuple):
    """One kernel for one target: bytes of spilled registers and of shared memory; where they are known, registers a thread and
    the warp instructions of the longest loop (of the kernel, if it has none) for each KB that they load.

    first: the first case to use some row of launch.json.
    """

    kernel: str
    case: str
    first: bool
    spill: int
    shared: int
    warps: int
    registers: int | None
    per_kb: float | None

    @property
    def programs(self) -> int | None:
        """How many an SM of Hopper has room for: 64 K registers, 227 KB of shared memory (1 KB more for each), 64 warps."""
        if self.registers is None:
            return None
        granted = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(65536 // granted, 227 * 1024 // (self.shared + 1024), 64 // self.warps, 32)


def check(target: str, only: str = "") -> list[Compiled]:
    """Compiles all cases for the target, or those whose names match. Raises AssertionError if one spills or does not fit."""
    results, compiled, used = [], [], set()
    with _compiling_for(target, compiled, used):
        for name, case in _cases():
            if not re.search(only, name):
                continue
            compiled.clear()
            before = len(used)
            case()
            for kernel, binary in compiled:
                meta = binary.metadata
                first = len(used) > before or kernel not in {r.kernel for r in results}
                registers, per_kb = _evidence(binary) if first and target == "sm_90" else (None, None)
                spill = _spilled(target, binary)
                results.append(Compiled(kernel, name, first, spill, meta.shared, meta.num_warps, registers, per_kb))
    # A float64 P is for comparing, not for speed; Triton 3.6 spills its products on sm_100.
    fast = [r for r in results if not (r.kernel.startswith("rls") and "float64" in r.case)]
    wrong = [f"{r.kernel} for {r.case} spills {r.spill} bytes" for r in fast if r.spill]
    limit = SHARED_LIMIT[target]
    wrong += [f"{r.kernel} for {r.case} needs {r.shared} of {limit} bytes of shared memory" for r in results if r.shared > limit]
    assert not wrong, f"{target}: " + "; ".join(wrong)
    if only:
        return results
    rows = {(op, i) for op, table in launch.TABLE.items() if isinstance(table, list) for i in range(len(table))}
    assert rows == used, f"rows of launch.json that no case compiles: {sorted(rows - used)}"
    return results


def _cases():
    """(name, call) for every configuration, dtype and option that is shipped, on tensors without storage."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    alpha, found_inf = empty(dtype=torch.float64), empty(1)

    def rls(s, C, R, dtype, **options):
        state_dtype = torch.promote_types(dtype, torch.float32)
        x, G, P = empty(s, dtype=state_dtype), empty(C, s, dtype=dtype), empty(s, launch.padded(s), dtype=state_dtype)[:, :s]
        pending = empty(R, s, dtype=state_dtype) if R else None
        return functools.partial(rls_project_, P, x, G, alpha, pending, empty(2, dtype=torch.int32), **options)

    for s in (1024, 4096, 8192):
        for C in (6, 16, 31, 101) if s > 1024 else (6, 31, 101, 1000):
            yield f"rls s={s} C={C}", rls(s, C, launch.pending_rows(s), torch.float32)
    for s, C, R in ((513, 6, 1), (513, 101, 1), (2056, 101, 1), (8193, 101, 1), (1, 1, 1)):
        yield f"rls s={s} C={C}, unaligned", rls(s, C, R, torch.float32, found_inf=found_inf)
    for dtype in DTYPES[1:]:
        for s, R, C in ((768, 1, 6), (768, 1, 101), (8192, 4, 101)):
            yield f"rls s={s} C={C} {dtype}", rls(s, C, R, dtype, project_first=True, found_inf=found_inf)
    yield "rls without pending", rls(768, 31, 0, torch.float32)
    P, x, G = empty(64, 64, dtype=torch.float64), empty(64), empty(6, 64, dtype=torch.bfloat16)
    yield "rls float64 of bfloat16", functools.partial(rls_project_, P, x, G, alpha, empty(1, 64, dtype=torch.float64))
    yield "fold", functools.partial(rls_fold_, empty(768, 768), empty(1, 768), empty(2, dtype=torch.int32))
    for dtype in LIKELY:
        for J, s in ((1, 1), (2, 768), (5, 8192), (9, 513)):
            means = empty(J, s, dtype=torch.promote_types(dtype, torch.float32))
            G = empty(6, s, dtype=dtype)
            yield f"window J={J} s={s} {dtype}", functools.partial(window_project, means, G, alpha)
            gram, step = empty(J, J, dtype=torch.float64), f"window step K={J} s={s} {dtype}"
            yield step, functools.partial(window_step_, means, gram, 0, means[0], G, alpha, found_inf)
    for dtype in LIKELY:
        for C, s, layers, states in ((6, 512, 1, 0), (101, 513, 1, 1), (1000, 8192, 2, 2)):
            yield from _head_steps(empty, C, s, layers, states, dtype)
    for C in (1, 6, 101, 1000, 4096, 8192, 32000):
        for dtype in LIKELY:
            yield from _fusions(empty, C, dtype)
    for C in (6, 1000):
        yield from _fusions(empty, C, torch.float32, launch.UNROLLED)
    for C, dtype in ((31, torch.float32), *((32768, dtype) for dtype in LIKELY)):
        yield from _softmaxes(empty, C, dtype)


def _head_steps(empty, C, s, layers, states, dtype):
    """states: tensors of the optimizer's for each parameter; 0: it is fused, and nothing is kept."""
    account, one, wide = empty(2, dtype=torch.int32), empty(1), torch.promote_types(dtype, torch.float32)
    looked_at = layers * [empty(C, s, dtype=wide), empty(s, dtype=wide)] + layers * [empty(C, dtype=dtype)]
    kept = (1 + states) * layers * [empty(C, s, dtype=dtype), empty(C, dtype=dtype)] if states else []
    first, found_inf = ([], one) if states == 1 else (layers * [one], None)
    name = f"head step C={C} s={s} {dtype}, {layers} layers, {len(kept)} kept"
    yield name, functools.partial(head_check_, looked_at, layers, account, first, found_inf, kept, kept)
    if kept:
        yield name, functools.partial(head_restore_, kept, kept[: 2 * layers], one)


def _fusions(empty, C, dtype, M=3):
    N = 64
    z, packed = [empty(N, C, dtype=dtype) for _ in range(M)], [empty(2 * N, C, dtype=dtype)]
    present, slot = empty(N, M, dtype=torch.bool), empty(N, M, dtype=torch.int64)
    masks = {"": (z, None, None), "present": (z, present, None), "slot": (packed, None, slot)}
    if dtype != torch.float32 or C not in (6, 1000, 32000):
        del masks["present"], masks["slot"]
    small = empty(N, M, dtype=torch.promote_types(dtype, torch.float32))
    for mask, (logits, present, slot) in masks.items():
        name = f"fusion M={M} C={C} {dtype} {mask}"
        yield name, functools.partial(entropy_fusion, logits, present, slot)
        grads = (small, small, empty(N, C, dtype=dtype), *([small, small] if mask else [None, None]))
        yield name, functools.partial(entropy_fusion_backward, logits, present, *grads, slot=slot)


def _softmaxes(empty, C, dtype, N=128):
    z, target = empty(N, C, dtype=dtype), empty(N, dtype=torch.int64)
    rows = [empty(N, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(5)]
    for class_weight, smoothed in ((None, False), (None, True), (empty(C), True)):
        name = f"softmax C={C} {dtype}{' smoothed' if smoothed else ''}{'' if class_weight is None else ' weighted'}"
        yield name, functools.partial(softmax_sums, z, target, class_weight, smoothed)
        yield name, functools.partial(softmax_delta_, z, target, *rows, class_weight, smoothed)


class Driver:
    """Names the target; there is no device. What is launched is given to `launch`: grid, stream, function, … and arguments."""

    def __init__(self, target: GPUTarget, launch: Callable[..., None] | None = None):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: list(TARGETS.values()).index(target)  # triton remembers the target by device
        self.get_current_stream = lambda device=None: 0
        self.launcher_cls = lambda source, metadata: launch
        self.utils = self

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spills, threads to a block)."""
        return name, (name, hash(binary)), 0, 0, 1024

    @staticmethod
    def get_device_properties(device: int) -> dict:
        return {"max_shared_mem": max(SHARED_LIMIT.values())}


@contextlib.contextmanager
def _compiling_for(target: str, compiled: list, used: set):
    """Launches become compilations that are noted in `compiled`, rows of the table that are taken in `used`."""
    before, run, row, hip = driver._active, JITFunction.run, launch._row, launch.HIP

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    def noted_row(op, **sizes):
        found = row(op, **sizes)
        used.add((op, launch.TABLE[op].index(found)))
        return found

    driver.set_active(Driver(TARGETS[target]))
    JITFunction.run, launch._row = compile_only, noted_row
    launch.HIP = TARGETS[target].backend == "hip"
    launch.forget()
    try:
        yield
    finally:
        driver._active, JITFunction.run, launch._row, launch.HIP = before, run, row, hip


def _spilled(target: str, binary) -> int:
    """Bytes of vector registers that went to memory."""
    if "amdgcn" in binary.asm:  # scalar registers go to lanes of vector registers
        return 4 * sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", binary.asm["amdgcn"]))
    if "STACK:0 " in _of_cubin(binary, "cuobjdump", "-res-usage"):  # where spilled registers live, among other things
        return 0
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        ptx.write_text(binary.asm["ptx"])
        options = ["-v", f"--gpu-name={re.search(r'[.]target ([a-z0-9_]+)', binary.asm['ptx'])[1]}", ptx, "-o", cubin]
        # Triton ships several, of which one knows this version of PTX.
        tries = [subprocess.run([tool, *options], capture_output=True, text=True) for tool in sorted(TOOLS.glob("ptxas*"))]
        report = next((done.stderr for done in tries if done.returncode == 0), None)
        if report is None:
            raise RuntimeError(f"no ptxas of triton's takes its PTX: {tries[0].stderr.strip()}")
        return sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


def _of_cubin(binary, tool: str, option: str) -> str:
    """What one of the tools that Triton ships says of the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        return subprocess.run([TOOLS / tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _evidence(binary) -> tuple[int, float | None]:
    """(registers a thread, warp instructions for each KB loaded) by the machine code."""
    usage, lines = _of_cubin(binary, "cuobjdump", "-res-usage"), _of_cubin(binary, "nvdisasm", "-c").splitlines()
    labels = {found[1]: at for at, line in enumerate(lines) if (found := re.match(r"([.]L_x_\d+):", line))}
    branches = ((re.search(r"BRA.*`[(]([.]L_x_\d+)[)]", line), at) for at, line in enumerate(lines))
    loops = [lines[labels[b[1]] : at + 1] for b, at in branches if b and labels.get(b[1], at) < at]
    names = (
        re.search(r"/[*][0-9a-f]{4,5}[*]/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", line)
        for line in max(loops, key=len, default=lines)
    )
    count = collections.Counter(name[1] for name in names if name)
    loads = {name: n for name, n in count.items() if name.startswith(("LDG.", "LDGSTS"))}
    kb = sum(n * 32 * next((b / 8 for b in (128, 64) if f".{b}" in name), 4) for name, n in loads.items()) / 1024
    return int(re.search(r"REG:(\d+)", usage)[1]), count.total() / kb if kb else None


def table(results: list[Compiled]) -> str:
    """What bounds the first launch that uses each configuration."""
    lines = ["| kernel | case | registers | programs/SM | shared, B | instructions/KB |", "|---|---|---:|---:|---:|---:|"]
    for r in (r for r in results if r.first and r.registers is not None):
        per_kb = "" if r.per_kb is None else f"{r.per_kb:.0f}"
        lines.append(f"| {r.kernel} | {r.case} | {r.registers} | {r.programs} | {r.shared} | {per_kb} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every kernel and shipped configuration, without a GPU")
    parser.add_argument("--targets", default=",".join(TARGETS), help="of " + ", ".join(TARGETS))
    parser.add_argument("--only", default="", help="cases whose names match this regular expression")
    arguments = parser.parse_args()
    for target in arguments.targets.split(","):
        start = time.perf_counter()
        results = check(target, arguments.only)
        shared = max(results, key=lambda r: r.shared)
        kernels = len({r.kernel for r in results})
        print(
            f"{target}: {kernels} kernels in {len(results)} launches, 0 bytes spilled, "
            f"at most {shared.shared} bytes of shared memory ({shared.kernel}, {shared.case}), "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if target == "sm_90":
            print(table(results), flush=True)


if __name__ == "__main__":
    main()

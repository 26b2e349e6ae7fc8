"""Launch configurations by size, read from launch.json: no autotuning, so the first step is as fast as the thousandth; and
launches that cost the host little.

An op's rows are tried in order; the first one whose bounds (``up_to``, inclusive) all hold is taken.
``python -m bench.throughput.tune`` measures the alternatives on the GPU at hand and rewrites the file.
"""

import functools
import json
from pathlib import Path

import torch
import triton

TABLE = json.loads(Path(__file__).with_name("launch.json").read_text())
# fma(−u_i, u_j, p) is the same for (i, j) and (j, i), so fusing multiplications with additions keeps P symmetric.
OPTIONS = {"enable_fp_fusion": True}
HIP = torch.version.hip is not None
INTERPRETED = triton.knobs.runtime.interpret
MAX_BLOCK_C = 128
MAX_SPLITS = 16
UNROLLED = 8  # modalities that entropy fusion goes through; of more it would keep some in memory


_remembered = []


def remembered(function):
    """Calls `function` once for the same arguments."""
    cached = functools.lru_cache(maxsize=1024)(function)
    _remembered.append(cached)
    return cached


def forget() -> None:
    """Drops what was worked out; for whoever changes the table or the limits above."""
    for cached in _remembered:
        cached.cache_clear()


class Launch:
    """A kernel with its constants, on one device, for arguments whose dtypes are always the same.

    Triton takes the host some nine µs to find the variant of a kernel that a call wants. Here it does so once for arguments of
    each kind; later calls go straight to the variant that was found. Whoever changes Triton's knobs calls ``forget`` afterwards.
    """

    def __init__(self, kernel, **constants):
        self.kernel, self.constants = kernel, {**OPTIONS, **constants}
        self.variants = {}

    def __call__(self, grid: tuple[int, ...], *args):
        kind = _kind(args)
        if (variant := self.variants.get(kind)) is not None:
            compiled, constexprs = variant
            compiled[grid](*args, *constexprs)
            return
        compiled = self.kernel[grid](*args, **self.constants)
        if compiled is not None:  # which it is where kernels are interpreted
            compiled = compiled.result() if hasattr(compiled, "result") else compiled  # it may be compiled in the background
            self.variants[kind] = compiled, [self.constants[p.name] for p in self.kernel.params if p.is_constexpr]


def _kind(args, kind: int = 1) -> int:
    """By what Triton tells arguments apart beside dtypes: which are None, which addresses and integers are multiples of 16, which
    integers are 1 or have more than 31 bits (AMD: which tensors are in more than 2 GiB)."""
    for a in args:
        if isinstance(a, torch.Tensor):
            kind = 8 * kind + (a.data_ptr() & 15 == 0) + 2 * (HIP and a.untyped_storage().size() >> 31 > 0)
        elif isinstance(a, tuple):
            kind = _kind(a, kind)
        elif isinstance(a, int):
            kind = 8 * kind + (a == 1) + 2 * (a & 15 == 0) + 4 * (a >> 31 > 0)
        else:
            kind = 8 * kind + 7 * (a is None)
    return kind


def alignment(C: int, *tensors: torch.Tensor) -> int:
    """The bytes, a power of two up to 16, that divide the address of every row of C: what the compiler cannot see in C = 1000."""
    address = C * tensors[0].element_size()
    for t in tensors:
        address |= t.data_ptr() | t.stride(0) * t.element_size()
    return min(address & -address, 16)


def padded(length: int) -> int:
    """The next multiple of 16, by which Triton knows that rows are aligned."""
    return triton.cdiv(length, 16) * 16


def dtypes(*tensors: torch.Tensor | None) -> tuple:
    """By which variants of a kernel differ; None for a tensor that is not given."""
    return tuple(None if t is None else t.dtype for t in tensors)


def _row(op: str, **sizes: int) -> dict:
    return next(row for row in TABLE[op] if all(sizes[name] <= bound for name, bound in row["up_to"].items()))


def _config(row: dict) -> dict:
    """For the compiler: AMD's knows no limit on registers."""
    return {name: value for name, value in row["config"].items() if not (HIP and name == "maxnreg")}


def _fitted(op: str, length: int, **sizes: int) -> dict:
    """The configuration, its block no longer than what it goes along."""
    config = _config(_row(op, **sizes))
    return {**config, "BLOCK": min(config["BLOCK"], triton.next_power_of_2(length))}


def pending_rows(s: int) -> int:
    """How many steps' corrections wait before P is written: one (lazy), or more where P is several times the L2 cache. One where
    rows are not aligned, whose addresses leave no registers for the others."""
    return TABLE["deferred"]["rows"] if s >= TABLE["deferred"]["from_s"] and s == padded(s) else 1


def block_c(C: int) -> int:
    """Rows of G that one program multiplies on tensor cores, which want 16 at least."""
    return min(max(triton.next_power_of_2(C), 16), MAX_BLOCK_C)


def rls_read_config(s: int, C: int, itemsize: int) -> tuple[dict, bool, int, int]:
    """(configuration, whether x̄ is one more of few rows of G, columns of P to a split, splits): enough programs to occupy the
    GPU, whole blocks of columns in each split."""
    row = _row("rls_read", s=s, C=C)
    few, config = row.get("few", False), _config(row)
    config["BLOCK_C"] = triton.next_power_of_2(C + 1) if few else block_c(C)
    if itemsize > 4 or HIP:  # twice the shared memory, or a third of it
        config["STAGES"] = 2
    if s < padded(s) and not few:  # G's numbers are loaded one by one, each with an address of its own in a register
        config |= {"BLOCK_I": 16, "STAGES": 2}
    if config["BLOCK_C"] > 64 and not (few or hopper()):  # without Hopper's products operands take more registers
        config["num_warps"] = 8
    blocks = triton.cdiv(s, config["BLOCK_J"]) * max(triton.cdiv(C, config["BLOCK_C"]), 1)
    wanted = min(max(row["programs"] // blocks, 1), MAX_SPLITS)
    split_cols = triton.cdiv(triton.cdiv(s, wanted), config["BLOCK_I"]) * config["BLOCK_I"]
    return config, few, split_cols, triton.cdiv(s, split_cols)


def rls_finish_config(s: int) -> dict:
    return _fitted("rls_finish", s, s=s)


def rls_fold_config(s: int) -> tuple[dict, int]:
    """(configuration, programs)."""
    row = _row("rls_fold", s=s)
    config = _config(row)
    tiles = triton.cdiv(s, config["BLOCK_ROWS"]) * triton.cdiv(s, config["BLOCK_COLS"])
    return config, min(tiles, row["programs"])


def window_config(s: int, J: int, itemsize: int) -> dict:
    """Blocks by s alone, and up to four means at a time: products of means must not depend on how many there are."""
    config, J_PAD = _fitted("window", s, s=s), triton.next_power_of_2(max(J, 1))
    BLOCK = max(config.pop("BLOCK") * 4 // itemsize, 1)
    return {"J_PAD": J_PAD, "J_TILE": min(J_PAD, 4), "BLOCK": BLOCK, "ONE_READ": s <= BLOCK and J_PAD <= 4, **config}


def fusion_config(op: str, C: int, M: int, itemsize: int) -> dict:
    """Several short rows to a program (no more than it has threads), or one row in one or more blocks; `itemsize` bytes to a
    number as it is computed. A row that is longer than its block is read twice, one modality after another; a shorter one is
    kept, so the blocks of all modalities may take half of the registers that a thread can have, and are halved until they do."""
    row = _row(op, C=C)
    config, kept = _config(row), (row["config"]["maxnreg"] + 1) // 2 * 32 * row["config"]["num_warps"]
    elements = min(config.pop("elements"), kept // triton.next_power_of_2(M)) * 4 // itemsize
    BLOCK_C = min(triton.next_power_of_2(C), elements)
    return {"BLOCK_C": BLOCK_C, "BLOCK_N": min(elements // BLOCK_C, 32 * config["num_warps"]), **config}


def softmax_config(op: str, C: int) -> dict:
    return _fitted(op, C, C=C)


def splits_tf32(dtype: torch.dtype) -> bool:
    """Whether a product in this dtype is made of three in TF32, which AMD's tensor cores do not have."""
    return dtype == torch.float32 and not HIP


def hopper() -> bool:
    """Whether it is an NVIDIA GPU from Hopper on: kernels may be launched early, and four warps multiply as one."""
    return not HIP and not INTERPRETED and triton.runtime.driver.active.get_current_target().arch >= 90

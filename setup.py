"""The extension build, and nothing else; everything else is in pyproject.toml.

MLA_FAST_BUILD chooses it: ``auto`` (the default: compile what there is a compiler for, with torch's headers, for CUDA if this
torch is, and install without the rest), ``cpu`` (compile for the CPU alone, or fail), ``cuda`` (for both, or fail), ``none`` (do
not compile).
MLA_FAST_CUDA_ARCHS names GPU architectures ("80 90"), by default those of the GPUs at hand, or ARCHS where there is none.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

MODE = os.environ.get("MLA_FAST_BUILD", "auto")
if MODE not in ("auto", "cpu", "cuda", "none"):
    sys.exit(f"MLA_FAST_BUILD: expected auto, cpu, cuda or none, got {MODE!r}")

# libtorch's stable ABI as of 2.10 and CPython's as of 3.10: one binary serves every later release of both.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030A0000")]
SOURCES = ["registration.cpp", "cross_entropy.cpp", "rls.cpp", "window.cpp", "fusion.cpp", "dispatch.cpp"]
CUDA_SOURCES = ["operators.cpp", "dispatch_plan.cu", "copy_rows.cu", "segment_mean.cu"]
CUDA_HEADERS = ["arithmetic.h", "kernels.h"]
CUDA_FLAGS = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
ARCHS = ["75", "80", "90", "100", "120"]


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = (shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes)
    return next(filter(None, found), None) or shutil.which("nvcc")


def say(message):
    """pip hides what a build that succeeds prints, so say it to the terminal, too, if there is one."""
    print(f"\n*** mla_fast: {message}\n", file=sys.stderr, flush=True)
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"\n*** mla_fast: {message}\n")
    except OSError:
        pass


def archs_at_hand():
    """The architectures of this machine's GPUs, as nvidia-smi says."""
    try:
        asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    caps = {line.strip().replace(".", "") for line in found.stdout.splitlines()} if found.returncode == 0 else set()
    return sorted((cap for cap in caps if cap.isdecimal()), key=int)


def architecture_flags(nvcc):
    archs = os.environ.get("MLA_FAST_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    if not archs:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        here = [arch for arch in archs_at_hand() if f"sm_{arch}" in known]
        archs = here or [arch for arch in ARCHS if f"sm_{arch}" in known] or ARCHS
        whose = "the GPUs at hand" if here else "any GPU, there is none here: it takes minutes"
        say(
            f"compiling the CUDA module for {' '.join(archs)} ({whose}); "
            "MLA_FAST_CUDA_ARCHS names others, MLA_FAST_BUILD=cpu leaves it out"
        )
    targets = [(arch, f"sm_{arch}") for arch in archs] + [(archs[-1], f"compute_{archs[-1]}")]
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets]


def nvcc_command(ext, target, include_dirs):
    """Compiles and links `ext`; nvcc knows where its own runtime is, and links it statically."""
    return [
        find_nvcc(),
        "-shared",
        *ext.extra_compile_args,
        *(f"-D{name}={value}" for name, value in ext.define_macros),
        *(f"-I{path}" for path in [*ext.include_dirs, *include_dirs]),
        *ext.sources,
        *(f"-L{path}" for path in ext.library_dirs),
        *(f"-l{name}" for name in ext.libraries),
        "-o",
        target,
    ]


class BuildExtension(build_ext):
    """With nvcc for the CUDA module: torch's own CUDAExtension refuses to work with a torch for the CPU alone."""

    def build_extension(self, ext):
        if ext.name != "mla_fast._C_cuda":
            self.compiler.compile = _in_parallel(self.compiler.compile)
            return super().build_extension(ext)
        target = self.get_ext_fullpath(ext.name)
        if self.force or newer_group(ext.sources + ext.depends, target):
            self.mkpath(os.path.dirname(target))
            self.spawn(nvcc_command(ext, target, self.include_dirs))


def _in_parallel(compile):
    """A compiler's ``compile`` that runs one process for each source: torch's headers take most of the time of each."""

    def compile_all(sources, **options):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = pool.map(lambda source: compile([source], **options), sources)
            return [path for paths in objects for path in paths]

    return compile_all


def extensions():
    if MODE == "none":
        return []
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        if MODE != "auto":
            sys.exit(f"MLA_FAST_BUILD={MODE} needs torch in the build environment: pip install --no-build-isolation")
        say(
            "NO TORCH IN THE BUILD ENVIRONMENT, installing WITHOUT the compiled operators, which are several times as fast; with "
            'them: pip install torch "setuptools>=77" && pip install --no-build-isolation .'
        )
        return []
    common = dict(
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=MACROS,
        py_limited_api=True,
        optional=MODE == "auto",
    )
    cpu = Extension(
        "mla_fast._C",
        [f"csrc/{name}" for name in SOURCES],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"],
        depends=["csrc/ops.h", "csrc/simd.h", "setup.py"],
        **common,
    )
    nvcc = find_nvcc()
    if MODE == "cuda" and nvcc is None:
        sys.exit("MLA_FAST_BUILD=cuda needs nvcc, in CUDA_HOME or on the PATH")
    if MODE == "cpu" or nvcc is None or (MODE == "auto" and torch.version.cuda is None):
        return [cpu]
    cuda = Extension(
        "mla_fast._C_cuda",
        [f"csrc/cuda/{name}" for name in CUDA_SOURCES],
        extra_compile_args=[*CUDA_FLAGS, *architecture_flags(nvcc)],
        depends=[*(f"csrc/cuda/{name}" for name in CUDA_HEADERS), "setup.py"],
        **common,
    )
    return [cpu, cuda]


if __name__ == "__main__":  # which it is when it builds; tests/test_cuda_build.py asks for the flags
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if MODE != "none" else {},
    )

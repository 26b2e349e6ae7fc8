"""The extension build, and nothing else; everything else is in pyproject.toml.

MLA_FAST_BUILD chooses it: ``auto`` (the default: compile if a compiler and torch's headers are there, else install without),
``cpu`` (compile or fail), ``none`` (do not compile).
"""

import os
import sys

from setuptools import Extension, setup

MODE = os.environ.get("MLA_FAST_BUILD", "auto")
if MODE not in ("auto", "cpu", "none"):
    sys.exit(f"MLA_FAST_BUILD: expected auto, cpu or none, got {MODE!r}")

# libtorch's stable ABI as of 2.10 and CPython's as of 3.10: one binary serves every later release of both.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030A0000")]
SOURCES = ["registration.cpp", "rls_project.cpp", "window_project.cpp", "entropy_fusion.cpp"]


def extensions():
    if MODE == "none":
        return []
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        if MODE == "cpu":
            sys.exit("MLA_FAST_BUILD=cpu needs torch in the build environment: pip install --no-build-isolation")
        print("mla_fast: no torch in the build environment, installing without the compiled operators", file=sys.stderr)
        return []
    return [
        Extension(
            "mla_fast._C",
            [f"csrc/{name}" for name in SOURCES],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            define_macros=MACROS,
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"],
            depends=["csrc/ops.h", "csrc/simd.h", "setup.py"],
            py_limited_api=True,
            optional=MODE == "auto",
        )
    ]


setup(
    ext_modules=extensions(),
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if MODE != "none" else {},
)

"""The C++ extension of csrc/, on libtorch's stable ABI: one binary for every Python from 3.10 and every torch from 2.11
on. All else about the package is in pyproject.toml.

COVGRPO_BUILD_CPP says whether it is built: 1, and then a failure is an error; 0; or auto, the default: where there are
torch and a compiler. Without it everything works, on the plain PyTorch backend. COVGRPO_CXXFLAGS adds flags.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

VARIABLE = "COVGRPO_BUILD_CPP"
PYTHON_API = "0x030A0000"  # 3.10
TORCH_API = "0x020B000000000000"  # 2.11
# Without errno and floating-point traps, which nobody reads; NaN and inf stay what they are.
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi", "-g0"]


def torch_folder() -> Path | None:
    """Where torch lies, without importing it. pip's isolated builds hide it from the path, not from the folder that
    packages are installed to."""
    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    installed = [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    return next((folder for folder in found + installed if (folder / "include/torch/csrc/stable").is_dir()), None)


def extensions() -> list[Extension]:
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"{VARIABLE} must be 0, 1 or auto, got {wanted!r}")
    torch = None if wanted == "0" or sys.platform == "win32" else torch_folder()
    if torch is None:
        if wanted == "1":
            sys.exit(f"{VARIABLE}=1 needs torch to build against, and a system other than Windows")
        if wanted == "auto" and sys.platform != "win32":
            print(
                "covgrpo-kernels: WITHOUT its C++ backend, since torch is not installed where this is built for. On a "
                "CPU it will run on plain PyTorch. To have it: install torch, then this again (with uv, whose builds "
                "do not see it: uv pip install --no-build-isolation).",
                file=sys.stderr,
            )
        return []
    return [
        Extension(
            "covgrpo_kernels._cpp",
            ["csrc/bindings.cpp"],
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            include_dirs=["csrc"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_API), ("Py_LIMITED_API", PYTHON_API)],
            libraries=["torch_cpu"],
            library_dirs=[str(torch / "lib")],
            extra_compile_args=[
                *FLAGS, "-isystem", str(torch / "include"), *os.environ.get("COVGRPO_CXXFLAGS", "").split(),
            ],
            extra_link_args=os.environ.get("COVGRPO_LDFLAGS", "").split(),
            py_limited_api=True,
            optional=wanted == "auto",
            language="c++",
        )
    ]  # fmt: skip


setup(ext_modules=extensions(), options={"bdist_wheel": {"py_limited_api": "cp310"}})

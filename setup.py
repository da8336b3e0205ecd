"""The C++ extension of csrc/, on libtorch's stable ABI; metadata lives in pyproject.toml.

COVGRPO_BUILD_CPP says whether it is built: 1, and then a failure is an error; 0; or auto, the default: where there are
torch and a compiler. Without it everything works on the plain PyTorch backend.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

VARIABLE = "COVGRPO_BUILD_CPP"
WANTED = os.environ.get(VARIABLE, "auto")
LIMITED_API = "0x030A0000"  # of Python 3.10
TARGET_TORCH = "0x020B000000000000"  # 2.11
# Errors of the arithmetic are not trapped, which is all that these two give up; NaN and inf are kept as they are.
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi"]


def torch_folder() -> Path | None:
    """Where torch lies, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def extensions() -> list[Extension]:
    if WANTED not in ("0", "1", "auto"):
        sys.exit(f"{VARIABLE} must be 0, 1 or auto, got {WANTED!r}")
    torch = torch_folder()
    if WANTED == "0" or sys.platform == "win32" or torch is None:
        if WANTED == "1":
            sys.exit(f"{VARIABLE}=1, but there is no torch here to build against, or this is Windows")
        return []
    library = torch / "lib"
    extension = Extension(
        "covgrpo_kernels._cpp",
        ["csrc/bindings.cpp"],
        depends=[str(path) for path in Path("csrc").glob("*.h")],
        include_dirs=["csrc", str(torch / "include")],
        define_macros=[("TORCH_TARGET_VERSION", TARGET_TORCH), ("Py_LIMITED_API", LIMITED_API)],
        libraries=["torch_cpu"],
        library_dirs=[str(library)],
        extra_compile_args=[*FLAGS, *os.environ.get("COVGRPO_CXXFLAGS", "").split()],
        py_limited_api=True,
        optional=WANTED == "auto",
        language="c++",
    )
    return [extension]


setup(ext_modules=extensions(), options={"bdist_wheel": {"py_limited_api": "cp310"}})

"""A copy of the Triton kernels with a fault in it, for tests that show that others can fail."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

PACKAGE = "covgrpo_kernels.kernels.triton"
COPY = "covgrpo_kernels.kernels.faulty"


class KernelFault(NamedTuple):
    module: str  # of covgrpo_kernels.kernels.triton
    old: str  # all its occurrences in the source are replaced
    new: str


NO_FAULT = KernelFault("numerics", "tanh", "tanh")


def faulty_kernels(fault: KernelFault, folder: Path) -> ModuleType:
    """The package, imported as `COPY` from a copy of its sources in ``folder``."""
    for path in Path(importlib.import_module(PACKAGE).__file__).parent.glob("*.py"):
        (folder / path.name).write_text(path.read_text())
    changed = folder / f"{fault.module}.py"
    assert fault.old in changed.read_text(), f"{fault.old!r} is no longer in {changed.name}"
    changed.write_text(changed.read_text().replace(fault.old, fault.new))
    for module in [module for module in sys.modules if module.startswith(COPY)]:
        del sys.modules[module]
    spec = importlib.util.spec_from_file_location(COPY, folder / "__init__.py")
    faulty = sys.modules[COPY] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    return faulty

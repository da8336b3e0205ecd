"""Every Triton kernel compiles ahead of time for every architecture, within its registers and shared memory."""

import copy
import json
import os
import subprocess
import sys

import pytest

from bench import compiled

pytest.importorskip("triton")
TABLE = json.loads(compiled.GOLDEN.read_text())["table"]


def test_every_kernel_on_every_architecture() -> None:
    """In a process of its own: here the kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "bench", "compiled"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for case in compiled.CASES:
        for architecture in compiled.SHARED_LIMIT:
            assert f"| {case.name} | {architecture} |" in result.stdout


def test_interpreted_kernels_are_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "bench", "compiled"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 1
    assert "TRITON_INTERPRET must not be set" in result.stderr


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("registers", 1, "registers grew"),
        ("shared", 1, "shared grew"),
        ("shared", 1 << 20, "over the limit"),
        ("spills", 4, "are spilled"),
    ],
)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_growth_is_a_fault(key: str, change: int, message: str, architecture: str) -> None:
    table = copy.deepcopy(TABLE)
    assert not compiled.faults(table, TABLE)
    table["fold"][architecture][key] += change
    assert any(message in fault and f"fold on {architecture}" in fault for fault in compiled.faults(table, TABLE))


def test_a_missing_instruction_or_kernel_is_a_fault() -> None:
    golden = copy.deepcopy(TABLE)
    golden["fold"]["sm_90"]["wgmma.mma_async"] = 1
    golden["another"] = golden["fold"]
    del golden["grad to bf16"]["sm_80"]
    assert compiled.faults(TABLE, golden) == [
        "fold on sm_90: no wgmma.mma_async any more",
        "grad to bf16 on sm_80: not in the committed table",
        "another: no longer compiled",
    ]


def outside_the_interpreter(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_number_and_alignment_of_rows_compile_nothing_anew() -> None:
    """What Triton keys its compiled kernels by is the same for 1 and for 4,096 rows that start anywhere."""
    code = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from covgrpo_kernels.tiles.triton.fold import fold_kernel
from covgrpo_kernels.tiles.triton.grad import grad_kernel

backend = make_backend(GPUTarget("cuda", 90, 32))
for kernel, names in (
    (fold_kernel, ("maximum", "total", "moment", "target")),
    (grad_kernel, ("maximum", "log_total", "at_target", "logprob_grad", "entropy_grad", "entropy")),
):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def key(rows, first, offset, width=2048):
        tile, row = torch.empty(rows, width), torch.empty(rows + offset)[offset:]
        targets = torch.zeros(rows + offset).long()[offset:]
        found = targets.int()
        arguments = dict.fromkeys(names, row) | dict(tile=tile, out=tile, targets=targets)
        arguments |= dict(bias=None, temperature=row, n_rows=rows, width=width, first=first, SCALE=1.0, CAP=None)
        arguments |= dict(threshold=row, found=found, entries=found, logits=row, CAPACITY=64)
        arguments |= dict(rows=targets, log_min_prob=0.0, TAILS=0, ENTROPY=True, B_R=1, B_C=1024)
        return bind(**{n: arguments[n] for n in kernel.arg_names})[1]

    assert key(1, 1, 1) == key(17, 1024, 3) == key(4096, 0, 0), kernel
    assert key(1, 1, 1) != key(1, 1, 1, width=77), "the key tells nothing"
"""
    result = outside_the_interpreter(code)
    assert result.returncode == 0, result.stderr


def test_a_search_is_made_only_when_it_is_asked_for() -> None:
    code = """
from triton.runtime import Autotuner
from covgrpo_kernels.tiles.triton import configs
from covgrpo_kernels.tiles.triton.fold import fold_kernel
from covgrpo_kernels.tiles.triton.grad import grad_kernel
kernels = [fold_kernel, grad_kernel]
print([isinstance(kernel, Autotuner) for kernel in kernels])
if configs.AUTOTUNE:
    for name, kernel in zip(("fold", "grad"), kernels):
        assert [c.kwargs | {"num_warps": c.num_warps} for c in kernel.configs] == configs.SEARCH[name]
"""
    assert outside_the_interpreter(code, COVGRPO_AUTOTUNE="0").stdout.strip() == "[False, False]"
    result = outside_the_interpreter(code, COVGRPO_AUTOTUNE="1")
    assert result.stdout.strip() == "[True, True]", result.stderr


@pytest.mark.deep
def test_every_cut_of_a_search_compiles() -> None:
    result = outside_the_interpreter("from bench.compiled import check_search; check_search()")
    assert result.returncode == 0, result.stderr

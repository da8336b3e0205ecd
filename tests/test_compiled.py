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

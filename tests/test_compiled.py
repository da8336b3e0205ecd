"""Every Triton kernel compiles ahead of time for every architecture, within its registers and shared memory."""

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import compiled

pytest.importorskip("triton")
TABLE = json.loads(compiled.GOLDEN.read_text())["table"]


# One of NVIDIA's and AMD's; the others are compiled by `make test-deep`.
QUICK = ("sm_90", "gfx942")


@pytest.mark.parametrize(
    "architecture", [a if a in QUICK else pytest.param(a, marks=pytest.mark.deep) for a in compiled.SHARED_LIMIT]
)
def test_every_kernel(architecture: str) -> None:
    """In a process of its own: here the kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "compiled", "--workers", "1", "--architectures", architecture]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for case in compiled.CASES:
        assert f"| {case.name} | {architecture} |" in result.stdout


@pytest.mark.parametrize(
    ("capability", "cuts"),
    [((8, 6), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((11, 0), "sm_100"), ((12, 0), "sm_80")],
)
def test_a_gpu_gets_cuts_that_fit_into_its_shared_memory(
    capability: tuple[int, int], cuts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs of 12.x are newer than 10.x and have less than half of its shared memory."""
    from covgrpo_kernels.kernels.triton import configs

    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert configs.architecture.__wrapped__(torch.device("cuda")) == cuts


def test_a_search_restores_what_a_run_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is not there: candidates are None in most forwards."""
    from covgrpo_kernels.kernels.triton import configs

    hooks = {}
    monkeypatch.setattr(configs, "AUTOTUNE", True)
    monkeypatch.setattr(configs.triton, "autotune", lambda *_, **given: hooks.update(given) or (lambda kernel: kernel))
    configs.tuned("online_softmax", key=["width"], restored=["maximum", "found"])(None)
    arguments = dict(maximum=torch.ones(3), found=None, tile=torch.ones(2))
    hooks["pre_hook"](arguments)
    arguments["maximum"].zero_()
    hooks["pre_hook"](arguments, reset_only=True)
    hooks["post_hook"](arguments, None)
    assert arguments["maximum"].tolist() == [1, 1, 1]


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
    table["online softmax"][architecture][key] += change
    assert any(
        message in fault and f"online softmax on {architecture}" in fault for fault in compiled.faults(table, TABLE)
    )


def test_a_missing_instruction_or_kernel_is_a_fault() -> None:
    golden = copy.deepcopy(TABLE)
    golden["online softmax"]["sm_90"]["wgmma.mma_async"] = 1
    golden["another"] = golden["online softmax"]
    del golden["dlogits to bf16"]["sm_80"]
    assert compiled.faults(TABLE, golden) == [
        "online softmax on sm_90: no wgmma.mma_async any more",
        "dlogits to bf16 on sm_80: not in the committed table",
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
from covgrpo_kernels.kernels.triton.online_softmax import online_softmax_kernel
from covgrpo_kernels.kernels.triton.dlogits import dlogits_kernel

backend = make_backend(GPUTarget("cuda", 90, 32))
for kernel, names in (
    (online_softmax_kernel, ("maximum", "sums", "entropy_sum", "target")),
    (dlogits_kernel, ("maximum", "log_sum", "at_target", "logprob_grad", "entropy_grad", "entropy")),
):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def key(rows, first, offset, width=2048):
        tile, row = torch.empty(rows, width), torch.empty(rows + offset)[offset:]
        targets = torch.zeros(rows + offset).long()[offset:]
        found = targets.int()
        arguments = dict.fromkeys(names, row) | dict(tile=tile, out=tile, targets=targets)
        arguments |= dict(bias=None, temperature=row, n_rows=rows, width=width, first=first, SCALE=1.0, CAP=None)
        arguments |= dict(min_logits=row, found=found, vocab_ids=found, logits=row, CAPACITY=64)
        arguments |= dict(rows=targets, log_floor=row, log_min_prob=0.0, TAILS=0, ENTROPY=True, B_R=1, B_C=1024)
        return bind(**{n: arguments[n] for n in kernel.arg_names})[1]

    assert key(1, 1, 1) == key(17, 1024, 3) == key(4096, 0, 0), kernel
    assert key(1, 1, 1) != key(1, 1, 1, width=77), "the key tells nothing"
"""
    result = outside_the_interpreter(code)
    assert result.returncode == 0, result.stderr


def test_a_batch_compiles_no_kernel_of_the_forward_anew() -> None:
    """Whatever its number of tokens, of scored rows and of chunks, and wherever its tensors start."""
    code = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from covgrpo_kernels.kernels.triton.collect import (
    count_kernel, ends_kernel, limits_kernel, list_kernel, products_kernel,
)
from covgrpo_kernels.kernels.triton.forward import forward_kernel, merge_kernel
from covgrpo_kernels.kernels.triton.select_rows import gather_rows_kernel, select_rows_kernel

backend = make_backend(GPUTarget("cuda", 90, 32))
of_the_batch = dict.fromkeys(("n_tokens", "first", "room", "splits"))
of_the_model = dict(
    depth=4096, vocab=128256, tiles=501, padded=4096, hidden_stride=4096, weight_stride=4096, row_stride=4096,
    column_stride=1, ignore_index=-100,
)
matrices = ("hidden", "weight", "out", "vocab_ids", "logits")
for kernel in (
    select_rows_kernel, gather_rows_kernel, forward_kernel, merge_kernel, limits_kernel, count_kernel, ends_kernel,
    list_kernel, products_kernel,
):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def key(number, offset, **model):
        arguments = dict.fromkeys(of_the_batch, number) | of_the_model | model
        for parameter in kernel.params:
            if parameter.name == "bias":
                arguments["bias"] = None
            elif parameter.name in matrices:
                arguments[parameter.name] = torch.empty(64, 64)
            elif parameter.name not in arguments:
                arguments[parameter.name] = 1 if parameter.is_constexpr else torch.empty(64)[offset:]
        return bind(**{name: arguments[name] for name in kernel.arg_names})[1]

    assert key(1, 1) == key(17, 3) == key(4096, 0) == key(0, 0), kernel
    if "depth" in kernel.arg_names:
        assert key(1, 1) != key(1, 1, depth=77), "the key tells nothing"
"""
    result = outside_the_interpreter(code)
    assert result.returncode == 0, result.stderr


def test_number_and_alignment_of_tokens_compile_nothing_anew() -> None:
    """Of tensors in a tuple Triton always looks at the alignment: `aligned` sees to it that there is one."""
    code = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from covgrpo_kernels.kernels.triton.configs import aligned
from covgrpo_kernels.kernels.triton.token_terms import token_terms_kernel
from covgrpo_kernels.token_terms import TokenInputs, TokenTerms

kernel = token_terms_kernel
bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))

def key(tokens, offset, prepare=aligned):
    x = torch.empty(tokens + offset)[offset:]
    inputs = TokenInputs._make([prepare(x)] * 12 + [None, prepare(torch.ones(2)[1])])
    new = torch.empty(max(tokens, 18))  # as the launcher makes them
    arguments = dict(inputs=inputs, out=TokenTerms._make([None, *[new] * 4, None]), to_sort=new, partial=new)
    arguments |= dict(n_tokens=tokens, beta=0.5, entropy_coef=0.0, OPTIONS=None, B_T=256)
    return bind(**{name: arguments[name] for name in kernel.arg_names})[1]

assert key(1, 0) == key(1, 1) == key(16, 3) == key(4096, 2)
assert key(16, 0, lambda x: x) != key(16, 1, lambda x: x), "the key tells nothing"
"""
    result = outside_the_interpreter(code)
    assert result.returncode == 0, result.stderr


def test_a_search_is_made_only_when_it_is_asked_for() -> None:
    code = """
from triton.runtime import Autotuner
from covgrpo_kernels.kernels.triton import configs
from covgrpo_kernels.kernels.triton.online_softmax import online_softmax_kernel
from covgrpo_kernels.kernels.triton.dlogits import dlogits_kernel
kernels = [online_softmax_kernel, dlogits_kernel]
print([isinstance(kernel, Autotuner) for kernel in kernels])
if configs.AUTOTUNE:
    for name, kernel in zip(("online_softmax", "dlogits"), kernels):
        assert [c.kwargs | {"num_warps": c.num_warps} for c in kernel.configs] == configs.SEARCH[name]
"""
    assert outside_the_interpreter(code, COVGRPO_AUTOTUNE="0").stdout.strip() == "[False, False]"
    result = outside_the_interpreter(code, COVGRPO_AUTOTUNE="1")
    assert result.stdout.strip() == "[True, True]", result.stderr


@pytest.mark.deep
def test_every_cut_of_a_search_compiles() -> None:
    result = outside_the_interpreter("from bench.compiled import check_search; check_search()")
    assert result.returncode == 0, result.stderr

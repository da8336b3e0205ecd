"""Ours and what a user would take instead, behind one interface, each at its own best settings."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from covgrpo_kernels import operators
from covgrpo_kernels.benchmark import Contender, Eager, Ours, Outputs, Problem, eager_logprob
from covgrpo_kernels.config import IGNORE_INDEX

# ------------------------------------------------------------------------------------------------------------ ours


@contextmanager
def certificates() -> Iterator[list[dict[str, Any]]]:
    """What ours said of what they left out, and how many rows they treat how: when this closes, one entry for each
    backward."""
    planned: list[operators.Planned] = []
    found: list[dict[str, Any]] = []
    make_plan = operators.plan

    def spy(*arguments: Any, **options: Any) -> operators.Planned:
        planned.append(make_plan(*arguments, **options))
        return planned[-1]

    with mock.patch.object(operators, "plan", spy):
        yield found
    # Not before: it waits for the device.
    for plan, _ in planned:
        rows = {name: getattr(plan, name).double().mean().item() for name in ("dense", "sparse")}
        found.append(dict(error_bound=plan.error_bound.item(), rows=rows))


# ----------------------------------------------------------------------------------------------------------- peers


class CompiledEager(Eager):
    name = "eager (compiled)"
    compiles = True
    function = staticmethod(torch.compile(eager_logprob, fullgraph=True, dynamic=False))


class TRL(Contender):
    """`trl.kernels.ChunkedLogProbFunction`, the trainer's default path."""

    name = "TRL"
    entropy = softcap = True

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        from trl.kernels import ChunkedLogProbFunction

        # The trainer's slices are of 32768 entries, and with Triton it scores valid rows alone; CPUs prefer 8192.
        on_gpu = hidden.device.type == "cuda"
        valid = problem.targets != IGNORE_INDEX if on_gpu else None
        h, targets = (hidden, problem.labels) if valid is None else (hidden[valid], problem.targets[valid])
        outputs = ("entropy",) if problem.entropy_grad is not None else ()
        chunk = 32768 if on_gpu else 8192
        out = ChunkedLogProbFunction.apply(h, weight, None, targets, 1.0, chunk, problem.softcap, 1.0, outputs)[:2]
        return Outputs(
            *(x if x is None or valid is None else x.new_zeros(len(hidden)).masked_scatter(valid, x) for x in out)
        )


class LigerGRPO(Contender):
    """`LigerFusedLinearGRPOLoss`. Its gradient is that of its own loss, made in its forward: a response of one token
    with the advantage -g, ratios of 1 and no division give the coefficients g. It scores in `chunk_forward`."""

    name = "Liger GRPO"
    pure_forward = False

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction, LigerFusedLinearGRPOLoss

        h, targets = hidden.unsqueeze(1), problem.labels.unsqueeze(1)
        if not problem.backward:
            return Outputs(LigerFusedLinearGRPOFunction.chunk_forward(h, weight, targets).squeeze(1))
        # All rows at once: it slices the vocabulary and the rows itself.
        module = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, chunk_size=len(hidden))
        mask = (problem.targets != IGNORE_INDEX).float().unsqueeze(1)
        return Outputs(None, loss=module(h, weight, targets, mask, -problem.logprob_grad, num_items_in_batch=1)[0])


class LigerScaledCE(Contender):
    """`LigerFusedLinearScaledCrossEntropyFunction`: CuTe kernels on an H100, chunks of 512 rows elsewhere."""

    name = "Liger scaled CE"
    entropy = True

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        with_entropy = problem.entropy_grad is not None
        function = LigerFusedLinearScaledCrossEntropyFunction
        out = function.apply(hidden, weight, problem.targets, 1.0, IGNORE_INDEX, 1, with_entropy)
        return Outputs(-out[0], out[1]) if with_entropy else Outputs(-out)


class PyTorch(Contender):
    """`F.linear_cross_entropy`. The chunk that it chooses itself has four rows where a vocabulary is large: a hundred
    times slower on a CPU. There the accurate policy is the documented one for 16 bit."""

    name = "PyTorch"

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        on_cpu = hidden.device.type == "cpu"
        options = nn.LinearCrossEntropyOptions(
            chunking_method=None,
            batch_chunk_size=256 if on_cpu else 1024,
            acc_policy="accurate" if on_cpu and hidden.itemsize == 2 else "auto",
        )
        function = nn.functional.linear_cross_entropy
        return Outputs(-function(hidden, weight, problem.targets, reduction="none", options=options))


class Verl(Contender):
    """`FusedLinearForPPO` at its own chunk of 512 rows. Its package is never imported: its file is."""

    name = "verl"
    entropy = True

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        module = verl_module("utils/experimental/torch_functional")
        return Outputs(*module.FusedLinearForPPO()(hidden, weight, problem.labels, 1.0))


class VerlTriton(Contender):
    """`linear_cross_entropy`, verl's Triton kernel."""

    name = "verl (Triton)"
    entropy = True

    def why_not(self, problem: Problem) -> str | None:
        return "needs a GPU" if problem.hidden.device.type != "cuda" else super().why_not(problem)

    def around(self) -> AbstractContextManager[Any]:
        return _verl_kernels()

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        function = verl_module("utils/kernel/linear_cross_entropy").linear_cross_entropy
        return Outputs(*function(hidden, weight, problem.labels, 1.0, "none", None))


@functools.cache
def verl_module(path: str) -> Any:
    """One file of the installed distribution. Raises ImportError where there is none."""
    try:
        file = importlib.metadata.distribution("verl").locate_file(f"verl/{path}.py")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("verl is not installed (pip install --no-deps verl)") from error
    name = f"verl.{path.replace('/', '.')}"
    spec = importlib.util.spec_from_file_location(name, str(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _verl_kernels() -> Iterator[None]:
    """Its forward and its backward import the file of kernels from the package, and that one asks the package which
    device there is. The package itself can't be imported without ray: while this is open, modules with these two files
    alone stand in its place."""
    device = types.ModuleType("verl.utils.device")
    device.is_cuda_available = True  # type: ignore[attr-defined]
    device.get_device_name = lambda: "cuda"  # type: ignore[attr-defined]
    device.get_torch_device = lambda: torch.cuda  # type: ignore[attr-defined]
    device.get_device_capability = torch.cuda.get_device_capability  # type: ignore[attr-defined]
    packages = {name: types.ModuleType(name) for name in ("verl", "verl.utils", "verl.utils.kernel")}
    for package in packages.values():
        package.__path__ = []
    with mock.patch.dict(sys.modules, packages | {"verl.utils.device": device}):
        kernels = verl_module("utils/kernel/kernels")
        sys.modules["verl.utils.kernel.kernels"] = kernels
        packages["verl.utils.kernel"].kernels = kernels  # type: ignore[attr-defined]
        yield


class CutCrossEntropy(Contender):
    """On a GPU its own kernels, elsewhere what its package has for that: the logits under `torch.compile`."""

    name = "cut-cross-entropy"
    softcap = True

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        return not torch.cuda.is_available()

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if hidden.device.type == "cuda" else "torch_compile"
        options: dict[str, Any] = dict(softcap=problem.softcap, reduction="none", impl=impl)
        return Outputs(-linear_cross_entropy(hidden, weight, problem.targets, **options))


EAGER = Eager()
CONTENDERS: list[Contender] = [
    Ours(),
    Ours("ours (exact)", grad_tol=0.0),
    Ours("ours (PyTorch kernels)", backend="eager"),
    EAGER,
    CompiledEager(),
    TRL(),
    LigerGRPO(),
    LigerScaledCE(),
    PyTorch(),
    Verl(),
    VerlTriton(),
    CutCrossEntropy(),
]

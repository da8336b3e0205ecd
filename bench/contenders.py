"""Ours and what a user would take instead, behind one interface, each at its own best settings."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from covgrpo_kernels import kernels, linear_logprob, operators
from covgrpo_kernels.config import IGNORE_INDEX
from covgrpo_kernels.inputs import resolve_grad_tol

from .measure import Problem, eager_logprob


class Outputs(NamedTuple):
    logprob: Tensor | None  # [N]; None: only the loss comes out
    entropy: Tensor | None = None  # [N]
    loss: Tensor | None = None  # []; of a contender whose own loss has the problem's coefficients


class Contender:
    """Stateless, so that a fresh process can be given one."""

    name: str
    ours = False
    entropy = False  # has a gradient for entropies
    softcap = False
    compiles = False  # for each shape, and takes seconds to
    pure_forward = True  # its forward is not already half of its backward

    def why_not(self, problem: Problem) -> str | None:
        """Why it does not solve the problem where that is known beforehand. What is found out by trying is an
        exception of `forward`."""
        if problem.entropy_grad is not None and not self.entropy:
            return "has no gradient for entropies"
        if problem.softcap is not None and not self.softcap:
            return "has no softcap"
        return None

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        raise NotImplementedError

    def around(self) -> AbstractContextManager[Any]:
        """What a step runs in."""
        return nullcontext()

    def tolerance(self, dtype: torch.dtype) -> float:
        """What ours may leave out of dZ, as a share."""
        return 0.0


# ------------------------------------------------------------------------------------------------------------ ours


class Ours(Contender):
    ours = entropy = softcap = True

    def __init__(self, name: str = "ours", grad_tol: float | str = "auto", backend: str | None = None) -> None:
        self.name, self.grad_tol, self.backend = name, grad_tol, backend

    def why_not(self, problem: Problem) -> str | None:
        if self.backend == "eager" and kernels.describe(problem.hidden.device) == "eager":
            return "is the default backend here"
        return None

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        entropy, softcap = problem.entropy_grad is not None, problem.softcap
        options: dict[str, Any] = dict(entropy=entropy, softcap=softcap, grad_tol=self.grad_tol)
        return Outputs(*linear_logprob(hidden, weight, problem.targets, **options))

    def around(self) -> AbstractContextManager[Any]:
        # Forward and backward are two operators, and each looks which backend is meant.
        return mock.patch.dict(os.environ, {kernels.VARIABLE: self.backend} if self.backend else {})

    def tolerance(self, dtype: torch.dtype) -> float:
        return resolve_grad_tol(self.grad_tol, dtype)


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


class Eager(Contender):
    name = "eager"
    entropy = softcap = True
    function = staticmethod(eager_logprob)

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        entropy = problem.entropy_grad is not None
        return Outputs(*self.function(hidden, weight, problem.labels, problem.softcap, entropy))


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

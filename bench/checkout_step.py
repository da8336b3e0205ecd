"""The process of `python -m bench host` and `python -m bench against`: measures steps of whichever checkout PYTHONPATH
names, and prints JSON as the last line.

It stands alone and uses public functions only, so that it runs beside checkouts of other times:

    export PYTHONPATH=CHECKOUT
    python checkout_step.py time INPUTS.pt REPEATS DTYPE,...
    TRITON_INTERPRET=1 COVGRPO_BACKEND=triton python checkout_step.py host INPUTS.pt REPEATS [ENGINE]
"""

from __future__ import annotations

import collections
import contextlib
import gc
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from covgrpo_kernels import covgrpo_loss, linear_logprob

# Marks, in a profile, what stands in for work of the device.
_DEVICE = "the device's work"


class Launches:
    """Launches of a step, recorded once and then replayed: what a launch left in its tensors is copied to those that
    have their place now, and the time of that is subtracted. Times are the processor's for this thread, so that other
    processes on the machine do not count."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.recorded: list[tuple[str, list[Tensor]]] = []
        self.recording = True
        self.next = 0
        self.seconds = 0.0  # of the copies
        self.kernels: collections.Counter[str] = collections.Counter()
        self._read_only = {x.untyped_storage().data_ptr() for x in inputs}

    def start(self, recording: bool) -> None:
        """A step begins."""
        self.recording, self.next, self.seconds = recording, 0, 0.0
        self.kernels.clear()
        if recording:
            self.recorded.clear()

    def __call__(self, name: str, tensors: list[Tensor], run: Callable[[], Any]) -> None:
        """Runs it, or leaves in the tensors what it left."""
        begin = time.thread_time()
        with record_function(_DEVICE) if torch.autograd._profiler_enabled() else contextlib.nullcontext():
            written = [_bytes(x) for x in tensors if x.untyped_storage().data_ptr() not in self._read_only]
            if self.recording:
                run()
                self.recorded.append((name, [x.clone() for x in written]))
            else:
                recorded, results = self.recorded[self.next]
                if recorded != name:
                    raise RuntimeError(f"launch {self.next} was {recorded} and is {name} now")
                for x, result in zip(written, results, strict=True):
                    x.copy_(result)
        self.next += 1
        self.seconds += time.thread_time() - begin


def _bytes(x: Tensor) -> Tensor:
    """All of its storage."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


@contextlib.contextmanager
def replaced(launches: Launches) -> Iterator[None]:
    """Triton kernels and matrix products are launches, and nothing else of them is left."""
    import triton.runtime.interpreter as interpreter

    launch = interpreter.InterpretedFunction.__getitem__

    def getitem(kernel: Any, grid: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            values = [getattr(x, "base", x) for x in tree_leaves((arguments, options))]
            tensors = [x for x in values if isinstance(x, Tensor)]
            launches.kernels[kernel.fn.__name__] += 1
            launches(kernel.fn.__name__, tensors, lambda: launch(kernel, grid)(*arguments, **options))

        return run

    def mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        launches("mm", [out], lambda: out.copy_(torch.bmm(a[None], b[None])[0]))
        return out

    def addmm_out(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor) -> Tensor:
        launches("addmm", [out], lambda: out.copy_(beta * c + alpha * torch.bmm(a[None], b[None])[0]))
        return out

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return mm_out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))

    def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return addmm_out(c, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(), mock.patch.object(interpreter.InterpretedFunction, "__getitem__", getitem):
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid")
        for name, function in {"mm": mm, "mm.out": mm_out, "addmm": addmm, "addmm.out": addmm_out}.items():
            library.impl(name, function, "CPU")
        yield
    library._destroy()


# ----------------------------------------------------------------------------------------------------- the steps


class Step:
    """Forward and backward of a public function, each to be called once, in that order."""

    def __init__(
        self, inputs: dict[str, Any], loss: bool, *, dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> None:
        self.inputs, self.loss, self.options = inputs, loss, options
        self.hidden, self.weight = (inputs[n].to(dtype).requires_grad_() for n in ("hidden", "weight"))
        self.result: Any = None

    def forward(self) -> None:
        x = self.inputs
        self.hidden.grad = self.weight.grad = None
        if self.loss:
            names = ("advantages", "group_ids", "sequence_ids", "old_logprobs")
            options = {n: x[n] for n in names} | self.options
            self.result = covgrpo_loss(self.hidden, self.weight, x["targets"], mask=x["targets"] >= 0, **options).loss
        else:
            self.result = linear_logprob(self.hidden, self.weight, x["targets"], **self.options).logprob

    def backward(self) -> None:
        self.result.backward(None if self.loss else self.inputs["logprob_grad"])


def steps(inputs: dict[str, Any]) -> dict[str, Step]:
    return {
        "linear_logprob": Step(inputs, loss=False),
        "linear_logprob, exact": Step(inputs, loss=False, grad_tol=0.0),
        "covgrpo_loss": Step(inputs, loss=True, metrics=False),
        "covgrpo_loss, metrics": Step(inputs, loss=True, metrics=True),
    }


# ----------------------------------------------------------------------------------------------- launches and waits

# Operators that read the device: the host waits for all that was launched.
_WAITS = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal",
)  # fmt: skip
# Operators that start no kernel, beside views: allocations, questions, and reads that are waits.
_FREE = (
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_", "set_", "result_type",
    "_local_scalar_dense", "lift_fresh", "is_nonzero", "item",
    "_unsafe_view", "detach_", "squeeze_", "unsqueeze_", "t_", "transpose_",
)  # fmt: skip


def _is_view(name: str) -> bool:
    """Of any overload: whether results are views of arguments."""
    schemas = torch._C._jit_get_schemas_for_operator(name)
    return any(r.alias_info and not r.alias_info.is_write for s in schemas for r in s.returns)


def count(run: Callable[[], None], launches: Launches) -> dict[str, int]:
    """``operators`` of PyTorch that would start a kernel, those inside of others included; Triton ``kernels``; and
    ``waits`` of the host for the device."""
    before = launches.kernels.copy()
    found: collections.Counter[str] = collections.Counter()

    def tolist(x: Tensor) -> Any:  # no operator on a CPU
        found["waits"] += 1
        return Tensor.numpy(x.detach()).tolist()

    with mock.patch.object(Tensor, "tolist", tolist), profile(activities=[ProfilerActivity.CPU]) as result:
        run()

    def walk(event: Any) -> None:
        if event.name == _DEVICE:
            return
        inner = [x for x in event.cpu_children if x.name.startswith("aten::")]
        if event.name.startswith("aten::"):
            name = event.name.removeprefix("aten::")
            found["waits"] += name in _WAITS
            is_leaf = not any(x.name != _DEVICE for x in inner)
            found["operators"] += is_leaf and name not in _FREE and not _is_view(event.name)
        for x in event.cpu_children:
            walk(x)

    for event in result.events():
        if event.cpu_parent is None:
            walk(event)
    kernels = sum(launches.kernels.values()) - sum(before.values())
    return dict(operators=found["operators"], kernels=kernels, waits=found["waits"])


def measure(step: Step, launches: Launches, repeats: int) -> dict[str, Any]:
    launches.start(recording=True)
    step.forward()
    step.backward()
    launches.start(recording=False)
    counts = {part: count(getattr(step, part), launches) for part in ("forward", "backward")}
    seconds: dict[str, list[float]] = dict(forward=[], backward=[])
    gc.collect()
    gc.disable()
    for _ in range(repeats):
        launches.start(recording=False)
        for part, kept in seconds.items():
            before = launches.seconds
            begin = time.thread_time()
            getattr(step, part)()
            kept.append(time.thread_time() - begin - (launches.seconds - before))
    gc.enable()
    return {part: dict(seconds=statistics.median(seconds[part]), **counts[part]) for part in seconds}


def _forced(engine: str) -> contextlib.AbstractContextManager[None]:
    """Raises ImportError where the checkout has no such engine."""
    from covgrpo_kernels import engines, kernels

    if engine == "chunked":
        return engines.use(engines.Chunked(kernels.select(torch.device("cpu"))))
    fused_gpu = importlib.import_module("covgrpo_kernels.engines.fused_gpu")
    return engines.use(fused_gpu.FusedGpu(torch.bfloat16))


def host(file: str, repeats: str, engine: str = "") -> dict[str, Any]:
    """The host's time of each step, its launches and its waits."""
    torch.set_num_threads(1)
    results = {}
    with _forced(engine) if engine else contextlib.nullcontext():
        for name, step in steps(torch.load(file, weights_only=True)).items():
            launches = Launches([step.hidden, step.weight])
            with replaced(launches):
                results[name] = measure(step, launches, int(repeats))
    return results


def timed(file: str, repeats: str, dtypes: str) -> dict[str, list[float]]:
    """Seconds of forward and backward together, by dtype, default and exact."""
    inputs = torch.load(file, weights_only=True)
    results: dict[str, list[float]] = {}
    wait = torch.cuda.synchronize if inputs["hidden"].is_cuda else lambda: None
    for dtype in dtypes.split(","):
        for name, options in (("default", {}), ("exact", dict(grad_tol=0.0))):
            step = Step(inputs, loss=False, dtype=getattr(torch, dtype), **options)
            seconds = results.setdefault(f"{dtype}, {name}", [])
            for _ in range(int(repeats) + 1):
                wait()
                begin = time.perf_counter()
                step.forward()
                step.backward()
                wait()
                seconds.append(time.perf_counter() - begin)
            del seconds[0]  # it warmed up
    return results


if __name__ == "__main__":
    measured: Callable[..., Any] = host if sys.argv[1] == "host" else timed
    print(json.dumps(measured(*sys.argv[2:])))

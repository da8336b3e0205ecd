"""Hypothesis profiles, the gpu marker, backends, threads that don't fight between pytest-xdist workers, and what a run
says at its end: on which instructions it ran, and which tests it left out."""

import functools
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import Phase
from torch.utils._pytree import tree_map

# Settled when the first kernel is defined. With a GPU the kernels are compiled, and run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from interpreter import fewer

from covgrpo_kernels import kernels

hypothesis.settings.register_profile(
    "suite", max_examples=60, deadline=None, derandomize=True, print_blob=True,
    # `backend` is set once for all examples of a test, as it should be.
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
hypothesis.settings.register_profile(
    "deep", hypothesis.settings.get_profile("suite"), max_examples=2000, derandomize=False
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "suite")
hypothesis.settings.load_profile(PROFILE)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
    if PROFILE != "deep":
        _thin(config, items)


def _thin(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the cases of a test that is marked `thinned(n)`, every n-th is kept for the interpreter."""
    seen: Counter[str] = Counter()
    left_out: set[pytest.Item] = set()
    for item in items:
        marker = item.get_closest_marker("thinned")
        if marker and isinstance(item, pytest.Function) and item.callspec.params["backend"] == "triton":
            test = item.nodeid.split("[")[0]
            if seen[test] % marker.args[0]:
                left_out.add(item)
            seen[test] += 1
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """The last lines of a run, after pytest's own: tests that were not run are counted by the reason why."""
    yield
    line = terminalreporter.write_line
    terminalreporter.section("where this ran")
    line(f"CPU: torch uses {torch.backends.cpu.get_cpu_capability()}, {_cpp_instructions()}")
    line(f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    line(f"Not run: {len(skipped)} tests" + (", because" if skipped else ""))
    for reason, count in reasons.most_common():
        line(f"{count:6d}  {reason}")


def _cpp_instructions() -> str:
    try:
        from covgrpo_kernels.kernels import cpp
    except ImportError:
        return "the C++ extension was not built"
    fused = "fused with" if cpp.can_multiply(torch.float32) else "apart from"
    return f"the C++ extension {cpp.isa()} (products {fused} the softmax)"


def moved(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function with its tensors on ``device``, for callers whose tensors are on the CPU; gradients go through."""

    def there(value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return torch.Generator(device).manual_seed(value.initial_seed())
        return value.to(device) if isinstance(value, torch.Tensor) else value

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(there, (args, kwargs))
        return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, function(*args, **kwargs))

    return wrapper


@pytest.fixture
def few_examples(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Gives a test of hypothesis `fewer` examples, for the length of the present test, and reports the first that fails
    as it is: making it smaller would take minutes."""

    def reduce(test: Callable[..., Any]) -> None:
        if getattr(test, "is_hypothesis_test", False):
            examples = fewer(hypothesis.settings().max_examples)
            settings = hypothesis.settings(max_examples=examples, phases=[Phase.explicit, Phase.generate])
            # Hypothesis has no public way to change the settings of a test that is decorated already.
            monkeypatch.setattr(test, "_hypothesis_internal_use_settings", settings)

    return reduce


@pytest.fixture(params=["eager", "cpp", "portable", "triton", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    few_examples: Callable[[Callable[..., Any]], None],
) -> str:
    """The tests of a module that uses this run once for each backend: on the CPU with plain PyTorch, with C++ for this
    processor and for any, and with the Triton kernels under the interpreter; and with both they and the eager baseline
    on a GPU."""
    if request.param == "eager":
        monkeypatch.setenv(kernels.VARIABLE, "eager")
    elif request.param in ("cpp", "portable"):
        if os.environ.get("COVGRPO_BUILD_CPP") != "1":  # else it has to be there
            pytest.importorskip("covgrpo_kernels.kernels.cpp", reason="the C++ extension was not built")
        monkeypatch.setenv(kernels.VARIABLE, "cpp")
        if request.param == "portable":
            monkeypatch.setenv("COVGRPO_CPU_ISA", "baseline")
    elif request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the kernels are compiled here, and tested on the GPU")
        monkeypatch.setenv(kernels.VARIABLE, "triton")
        few_examples(request.function)
    else:
        gpu, module = torch.device("cuda"), request.module
        monkeypatch.setattr(module, "DEVICE", gpu, raising=False)
        for name in ("linear_logprob", "covgrpo_loss", "covariance_weights"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, moved(getattr(module, name), gpu))
        if hasattr(module, "CovGRPOLoss"):
            create = module.CovGRPOLoss

            def on_gpu(*args: Any, **kwargs: Any) -> Any:
                loss = create(*args, **kwargs)
                loss.forward = moved(loss.forward, gpu)
                return loss

            monkeypatch.setattr(module, "CovGRPOLoss", on_gpu)
        if hasattr(module, "reference"):
            functions = inspect.getmembers(module.reference, inspect.isfunction)
            monkeypatch.setattr(module, "reference", SimpleNamespace(**{n: moved(f, gpu) for n, f in functions}))
    return request.param

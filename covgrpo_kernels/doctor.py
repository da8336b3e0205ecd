"""`covgrpo doctor`: versions, devices, backends, and a self-test of the numbers on every device."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch
from torch import Tensor

from . import __version__, benchmark, covgrpo_loss, kernels, linear_logprob, reference
from .config import CovGRPOConfig
from .grpo.config import usable_dtype
from .testing import ErrorBook, Results, check_draw, random_batch, random_head, run_logprob, run_loss


def how_to_install(extra: str) -> str:
    """No index has this package: it comes from a checkout, or from a wheel that was built of one."""
    return f"pip install '.[{extra}]' in a checkout, or pip install 'PATH.whl[{extra}]' with a wheel"


# Distributions, and how to get them where they are missing.
PACKAGES = {
    "torch": "",
    "triton": "optional: comes with torch's CUDA builds",
    "transformers": how_to_install("grpo"),
    "rich": how_to_install("bench"),
    "matplotlib": how_to_install("grpo"),
    "trl": how_to_install("trl"),
    "liger-kernel": how_to_install("bench"),
}
NAME = "covgrpo-kernels"
FOLDER = Path(__file__).parent  # of the package that is imported


class _Report:
    """Rows of sections, printed as they come; or all of them at the end, as JSON."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.sections: dict[str, dict[str, str]] = {}
        self.rows: dict[str, str] = {}  # of the section that is printed

    def section(self, name: str, title: str) -> None:
        self.sections[name] = self.rows = {}
        self._print(f"\n{title}")

    def row(self, name: str, what: str) -> None:
        self.rows[name] = what
        self._print(f"  {name:<22} {what}")

    def verdict(self, passed: bool, remark: str) -> int:
        self._print(f"\nself-test {'passed' if passed else 'FAILED'} ({remark})")
        if self.as_json:
            print(json.dumps(self.sections | {"passed": passed, "remark": remark}, indent=2))
        return 0 if passed else 1

    def _print(self, line: str) -> None:
        if not self.as_json:
            print(line, flush=True)


def main(as_json: bool = False) -> int:
    """Prints the report, or the same as one object of JSON. 0 when the self-test passed on every device, else 1."""
    report = _Report(as_json)
    report.section("versions", "versions")
    report.row(NAME, f"{__version__}, in {FOLDER}")
    report.row("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    for package, hint in PACKAGES.items():
        report.row(package, _version(package) or f"not installed ({hint})")

    report.section("devices", "devices")
    devices = _devices()
    for device, what in devices:
        report.row(str(device), what)
    if len(devices) == 1:
        report.row("cuda", _why_no_gpu())

    report.section("backends", "backends")
    for name, usable, why in kernels.report():
        report.row(name, f"{'usable' if usable else 'not usable'}: {why}")
        if name == "cpp" and not usable:
            for i, advice in enumerate(how_to_build()):
                report.row("" if i else "to have it", advice)

    report.section("benchmark", "beside eager PyTorch: forward and backward of log-probs")
    for what, result in beside_eager([device for device, _ in devices if device.type == "cuda"][:1]):
        report.row(what, result)

    report.section("self-test", "self-test: errors against float64, as multiples of eager PyTorch's in the same dtype")
    if not __debug__:
        return report.verdict(False, "python -O removes the assertions it is made of")
    start, passed = time.perf_counter(), True
    for device, _ in devices:
        for what, right, result in self_test(device):
            report.row(what, result)
            passed &= right
    return report.verdict(passed, f"{time.perf_counter() - start:.1f} s")


# ------------------------------------------------------------------------------------------- the C++ backend's absence


def how_to_build() -> Iterator[str]:
    """What to do where the C++ extension is not there: commands, and why an installed one may not be seen."""
    if sys.platform == "win32":
        yield "there is no C++ backend on Windows"
        return
    checkout = FOLDER.parent if (FOLDER.parent / "csrc").is_dir() else None
    if checkout is not None and (installed := _installed_elsewhere()):
        yield (
            f"this is the source folder, which hides the package in {installed}: call covgrpo, start Python in another "
            "folder, or build here"
        )
    where = checkout or _built_from()
    source = "FOLDER_OF_A_CHECKOUT" if where is None else shlex.quote(str(where))
    # The first time torch was not there, or no compiler. With 1 a build without them is an error that says so.
    editable = "-e " if checkout else ""
    # A build of uv's is isolated from the environment that it is for, and torch in it; one of pip's finds it.
    by_uv = f"uv pip install --no-build-isolation --reinstall-package {NAME}"
    command = by_uv if _noted("INSTALLER") == "uv" else "pip install"
    yield f"COVGRPO_BUILD_CPP=1 {command} {editable}{source}    (torch is there now; needs a compiler)"


def _installed_elsewhere() -> Path | None:
    """Another folder that has an installed copy of the package."""
    folders = (Path(str(d.locate_file(FOLDER.name))) for d in importlib.metadata.distributions(name=NAME))
    return next((folder for folder in folders if folder.is_dir() and folder.resolve() != FOLDER.resolve()), None)


def _built_from() -> Path | None:
    """The checkout that the installed package was built from, as pip notes it."""
    noted = _noted("direct_url.json")
    url = urlparse(json.loads(noted)["url"]) if noted else None
    folder = Path(unquote(url.path)) if url and url.scheme == "file" else None
    return folder if folder is not None and folder.is_dir() else None


def _noted(file: str) -> str | None:
    """What is in a file that the installer wrote about the package."""
    try:
        text = importlib.metadata.distribution(NAME).read_text(file)
    except importlib.metadata.PackageNotFoundError:
        return None
    return text.strip() if text else None


# ------------------------------------------------------------------------------------------------ what there is


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[torch.device, str]]:
    devices = [(torch.device("cpu"), benchmark.describe(torch.device("cpu")))]
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        devices.append((device, benchmark.describe(device)))
    return devices


def _why_no_gpu() -> str:
    build = torch.version.cuda or torch.version.hip
    return f"none found by torch, built for {build}" if build else "none: this torch build is for the CPU"


# ----------------------------------------------------------------------------------------------- the benchmark

SIZE = (2048, 2048, 128256)  # tokens, hidden size and vocabulary: a micro-batch of a model of a billion parameters


def beside_eager(devices: Sequence[torch.device], seconds: float = 2.0) -> Iterator[tuple[str, str]]:
    """(what was measured, the result in words), of a GPU. On a CPU it would take too long to be done unasked."""
    for device in devices:
        try:
            comparison = benchmark.compare(*SIZE, usable_dtype("auto", device), device, seconds)
        except Exception as error:  # a full GPU, say; what is wrong with a kernel the self-test says
            yield "failed", f"{type(error).__name__}: {error}"
            continue
        names, *rows = benchmark.cells(comparison)
        for who, *values in rows:
            yield who, ", ".join(f"{name} {value}" for name, value in zip(names[1:], values, strict=True))
        if remarks := [*benchmark.in_short(comparison), *comparison.remarks]:
            yield "in short", " ".join(remarks)
    yield "at your size", "covgrpo bench N D V (tokens, hidden size, vocabulary)"


# ----------------------------------------------------------------------------------------------- the self-test


def check_logprob(device: torch.device, dtype: torch.dtype) -> ErrorBook:
    """`linear_logprob` and its gradients over more than 1,000 tokens: the pooled rule of `testing.py` for the
    values, three times eager's error for the gradients."""
    head = random_head(0, tokens=1200, depth=16, vocab=1030, bias=True)
    exact = run_logprob(reference.linear_logprob, **_rounded(head, dtype), dtype=torch.float64)
    here = _to(head, device)
    eager = _to(run_logprob(reference.linear_logprob, **here, dtype=dtype), "cpu")
    ours = _to(run_logprob(linear_logprob, **here, dtype=dtype, entropy=True, grad_tol=0.0), "cpu")
    _book(ours, eager, {name: exact[name] for name in ("logprob", "entropy")}).check(dtype)
    check_draw(ours, eager, exact, dict.fromkeys(exact, 0.0))
    return _book(ours, eager, exact)


def check_loss(device: torch.device, dtype: torch.dtype) -> ErrorBook:
    """`covgrpo_loss` with covariance weights, clipping and KL: three times eager's error for everything that has
    many entries. (The loss is one number, and no statistic; its gradients are judged.)"""
    config = CovGRPOConfig(beta=0.04)
    batch = random_batch(0, groups=6, group_size=4, length=10, depth=16, vocab=64)
    exact = run_loss(reference.covgrpo_loss, _rounded(batch, dtype), config, dtype=torch.float64)
    del exact["loss"]
    here = _to(batch, device)
    eager = _to(run_loss(reference.covgrpo_loss, here, config, dtype=dtype), "cpu")
    ours = _to(run_loss(covgrpo_loss, here, config, dtype=dtype, grad_tol=0.0), "cpu")
    check_draw(ours, eager, exact, dict.fromkeys(exact, 0.0))
    return _book(ours, eager, exact)


CHECKS = {"log-prob": check_logprob, "loss": check_loss}


def self_test(device: torch.device) -> Iterator[tuple[str, bool, str]]:
    """(what was tested, whether it passed, the result in words) for each check."""
    for dtype in (torch.float32, torch.bfloat16):
        for what, check in CHECKS.items():
            try:
                ratios = check(device, dtype).ratios()
                passed, result = True, "passed: " + ", ".join(f"{name} {x:.2g}" for name, x in ratios.items())
            except Exception as error:  # whatever goes wrong on a device is what the doctor is asked for
                passed, result = False, f"FAILED: {type(error).__name__}: {error}"
            yield f"{device} {str(dtype).removeprefix('torch.')} {what}", passed, result


def _book(ours: Results, eager: Results, exact: Results) -> ErrorBook:
    book = ErrorBook()
    book.add(ours, eager, exact)
    return book


def _to(values: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}


def _rounded(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs as a run in ``dtype`` sees them, in float64: rounding them is nobody's error."""
    cast = {name: inputs[name].to(dtype).double() for name in ("hidden", "weight", "bias") if name in inputs}
    return inputs | cast

"""Installation without a compiler, imports without the optional packages, `covgrpo doctor`, the Makefile's set-up."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email import message_from_string
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import covgrpo_kernels
from covgrpo_kernels import doctor, kernels
from covgrpo_kernels.kernels import eager
from covgrpo_kernels.kernels.interface import OnlineSoftmax

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_INSTALLED = {"bench", "research", "tests"}
OPTIONAL = ("triton", "transformers", "trl", "liger_kernel", "matplotlib", "rich", "accelerate", "datasets")


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )


# ----------------------------------------------------------------------------------------------------- imports


def test_import_brings_no_optional_package() -> None:
    code = f"""
import sys
for module in ("covgrpo_kernels", "covgrpo_kernels.cli", "covgrpo_kernels.doctor"):
    __import__(module)
    print(module, [name for name in {OPTIONAL} if name in sys.modules])
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert [line.split(" ", 1)[1] for line in result.stdout.splitlines()] == ["[]"] * 3, result.stdout


def test_import_takes_no_longer_than_torch_and_a_fifth_of_a_second() -> None:
    """Measured after torch in the same process: the difference of two processes would mostly be their noise. Of the
    processor's time, which a busy machine only lengthens: the least of several is what the import takes."""
    code = "import time, torch; t = time.process_time(); import covgrpo_kernels; print(time.process_time() - t)"
    seconds: list[float] = []
    while len(seconds) < 5 and min(seconds, default=1.0) > 0.2:
        seconds.append(float(run_python("-c", code).stdout))
    assert min(seconds) <= 0.2, seconds


# --------------------------------------------------------------------------------------------------- packaging


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where there is no torch, from a copy of all that git has: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.so", "*.egg-info", "build", "runs", "site")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    backend = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    built = subprocess.run(
        [sys.executable, "-c", backend, str(folder)],
        cwd=folder / "source", env=os.environ | dict(COVGRPO_BUILD_CPP="0"), capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.tar.gz")
    return path


def test_sdist_holds_what_a_build_needs_and_nothing_else(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    made = {name for name in packed if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    needed = {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"}
    needed |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*")}
    needed |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("covgrpo_kernels/**/*.py")}
    assert packed - made == needed | {"covgrpo_kernels/py.typed"}
    assert sdist.stat().st_size < 1 << 20


def wheel_of(sdist: Path, folder: Path, **environment: str) -> zipfile.ZipFile:
    command = ["pip", "wheel", str(sdist), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    built = subprocess.run(
        [sys.executable, "-m", *command], env=os.environ | environment, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built where there is no compiler."""
    environment = dict(CC="/bin/false", CXX="/bin/false", CUDA_VISIBLE_DEVICES="", COVGRPO_BUILD_CPP="auto")
    return wheel_of(sdist, tmp_path_factory.mktemp("wheel"), **environment)


def test_wheel_without_the_extension_is_for_any_system(sdist: Path, tmp_path: Path) -> None:
    assert str(wheel_of(sdist, tmp_path, COVGRPO_BUILD_CPP="0").filename).endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_wheel_with_the_extension(sdist: Path, tmp_path: Path) -> None:
    """One for every Python, and its extension is loaded from there. Not optimised, which halves the time it takes."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    wheel = wheel_of(sdist, tmp_path, COVGRPO_BUILD_CPP="1", COVGRPO_CXXFLAGS="-O0")
    assert re.fullmatch(r"covgrpo_kernels-[\d.]+-cp310-abi3-\w+\.whl", Path(str(wheel.filename)).name)
    wheel.extractall(tmp_path / "site")
    code = "from covgrpo_kernels.kernels import cpp; print(cpp.isa(), cpp._cpp.__file__)"
    environment = os.environ | dict(PYTHONPATH=str(tmp_path / "site"))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "site") in result.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "covgrpo_kernels"
    sources = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    assert packed == sources | {"covgrpo_kernels/py.typed"}
    assert not {part for name in packed for part in Path(name).parts} & {"study", "recipe", *NOT_INSTALLED}


WITHOUT_TORCH = """
import importlib.util, runpy, sys, sysconfig
find_spec, get_path = importlib.util.find_spec, sysconfig.get_path
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
sysconfig.get_path = lambda kind, *rest: "nowhere" if kind in ("platlib", "purelib") else get_path(kind, *rest)
sys.argv = ["setup.py", "--name"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(("wanted", "said"), [("auto", "WITHOUT its C++ backend"), ("0", ""), ("1", "needs torch")])
def test_a_build_without_torch_says_so(wanted: str, said: str) -> None:
    result = run_python("-W", "ignore", "-c", WITHOUT_TORCH, env=os.environ | dict(COVGRPO_BUILD_CPP=wanted))
    assert (result.returncode != 0) == (wanted == "1")
    assert said in result.stderr
    assert bool(said) == ("torch" in result.stderr)


def test_no_code_comes_from_data() -> None:
    """What SECURITY.md says: no pickles, no code of a model's repository, nothing evaluated."""
    for path in [*ROOT.glob("covgrpo_kernels/**/*.py"), *ROOT.glob("research/**/*.py"), *ROOT.glob("bench/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), f"{path}:{node.lineno}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"
            assert keywords.get("weights_only", "True") == "True", f"{path}:{node.lineno}"


def test_package_imports_nothing_that_is_not_installed() -> None:
    for path in (ROOT / "covgrpo_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {name.split(".")[0] for name in names} & NOT_INSTALLED, path


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = message_from_string(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == covgrpo_kernels.__version__ == PROJECT["project"]["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    required = metadata.get_all("Requires-Dist")
    assert [r for r in required if "extra ==" not in r] == ["torch>=2.11"]
    assert {"grpo", "trl", "research", "bench", "docs", "dev"} == set(metadata.get_all("Provides-Extra"))
    assert "covgrpo = covgrpo_kernels.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_supported_python() -> None:
    """The lowest supported version parses every file, and is the one that ruff looks for."""
    lowest = re.fullmatch(r">=3\.(\d+)", PROJECT["project"]["requires-python"])
    assert lowest
    minor = int(lowest[1])
    assert sys.version_info >= (3, minor)
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{minor}"
    for path in (ROOT / "covgrpo_kernels").rglob("*.py"):
        ast.parse(path.read_text(), str(path), feature_version=(3, minor))


def test_lowest_torch() -> None:
    """The one that is required, built against by cibuildwheel, and promised to the compiler are the same."""
    [lowest] = re.findall(r"^torch>=(2\.\d+)$", "\n".join(PROJECT["project"]["dependencies"]), re.M)
    assert f" torch=={lowest}.0" in PROJECT["tool"]["cibuildwheel"]["before-build"]
    target = f"0x02{int(lowest.split('.')[1]):02X}000000000000"
    assert f'TORCH_API = "{target}"' in (ROOT / "setup.py").read_text()
    assert f"-DTORCH_TARGET_VERSION={target}" in (ROOT / "Makefile").read_text()


def test_every_python_torch_and_extra_is_installed_by_make_test_installation() -> None:
    """Each Python of the classifiers and each extra once, and the lowest torch with the lowest Python."""
    checked = runpy.run_path(str(ROOT / "tests" / "installation.py"))
    pythons = [version for version, _ in checked["COMBINATIONS"]]
    classifiers = "\n".join(PROJECT["project"]["classifiers"])
    assert pythons == re.findall(r"Python :: (3\.\d+)$", classifiers, re.M)
    assert checked["EXTRAS"].keys() == PROJECT["project"]["optional-dependencies"].keys()
    assert checked["COMBINATIONS"][0] == ("3.10", "2.11.0")
    assert {name for name in checked["TESTS"] if not (ROOT / "tests" / name).exists()} == set()


def test_the_workflow_installs_what_is_pinned() -> None:
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())["jobs"]
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    installed = re.findall(r"pip install -c constraints.txt (\w+)", "\n".join(commands))
    assert installed == ["cibuildwheel", "build"]
    pinned = (ROOT / "constraints.txt").read_text()
    assert not [name for name in installed if f"\n{name}==" not in pinned]


def test_pins_fit_the_extras() -> None:
    """Every package an extra names is pinned."""
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    named = {
        re.split(r"[\[<>=]", requirement)[0]
        for extra in PROJECT["project"]["optional-dependencies"].values()
        for requirement in extra
    }
    assert not named - pinned - {"covgrpo-kernels"}


# ------------------------------------------------------------------------------------------------------ doctor


def test_doctor() -> None:
    result = run_python("-m", "covgrpo_kernels", "doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for expected in (covgrpo_kernels.__version__, str(ROOT), torch.__version__, "cpu ", "eager", "self-test passed"):
        assert expected in result.stdout
    assert "FAILED" not in result.stdout


def test_doctor_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "self_test", lambda device: [(f"{device} test", False, "FAILED: no kernel image")])
    assert doctor.main(as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["backends"]) >= {"eager", "cpp", "triton"}
    assert report["self-test"]["cpu test"] == "FAILED: no kernel image"
    assert report["passed"] is False


def _package(folder: Path, *, csrc: bool) -> Path:
    (folder / "covgrpo_kernels").mkdir(parents=True)
    if csrc:
        (folder / "csrc").mkdir()
    return folder / "covgrpo_kernels"


def _installation(site: Path, url: str) -> Path:
    """Of a package that pip built from a folder."""
    info = site / "covgrpo_kernels-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: covgrpo-kernels\nVersion: 0.1.0\n")
    (info / "direct_url.json").write_text(json.dumps({"url": url, "dir_info": {}}))
    return _package(site, csrc=False)


def test_doctor_says_how_to_build_the_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an installed package from the folder that pip notes; in a checkout from the checkout, which hides it."""
    source, site = _package(tmp_path / "source code", csrc=True), tmp_path / "site"
    installed = _installation(site, (tmp_path / "source code").as_uri())
    monkeypatch.setattr(sys, "path", [str(site)])

    monkeypatch.setattr(doctor, "FOLDER", installed)
    [command] = doctor.how_to_build()
    assert command.startswith(f"COVGRPO_BUILD_CPP=1 pip install '{source.parent}' ")

    # A build of uv's does not see the environment's torch, unless it is told to.
    installer = site / "covgrpo_kernels-0.1.0.dist-info" / "INSTALLER"
    installer.write_text("uv")
    [command] = doctor.how_to_build()
    by_uv = "uv pip install --no-build-isolation --reinstall-package covgrpo-kernels"
    assert command.startswith(f"COVGRPO_BUILD_CPP=1 {by_uv} '{source.parent}' ")
    installer.write_text("pip\n")

    monkeypatch.setattr(doctor, "FOLDER", source)
    hidden, command = doctor.how_to_build()
    assert f"hides the package in {installed}" in hidden
    assert command.startswith(f"COVGRPO_BUILD_CPP=1 pip install -e '{source.parent}' ")

    monkeypatch.setattr(sys, "path", [])
    [command] = doctor.how_to_build()  # nothing is installed, and nothing is hidden
    assert f"-e '{source.parent}'" in command

    monkeypatch.setattr(doctor, "FOLDER", installed)
    [command] = doctor.how_to_build()
    assert "FOLDER_OF_A_CHECKOUT" in command


def test_doctor_gives_that_advice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.kernels, "report", lambda: [("cpp", False, "the C++ extension was not built")])
    monkeypatch.setattr(doctor, "self_test", lambda device: [])
    assert doctor.main() == 0
    assert re.search(r"to have it +.*COVGRPO_BUILD_CPP=1 pip install", capsys.readouterr().out, re.S)


def test_doctor_with_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optional packages that can't be imported and have no metadata."""
    code = f"""
import importlib.metadata, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
known = importlib.metadata.version
def version(name):
    if name not in ("torch", "covgrpo-kernels"):
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
from covgrpo_kernels.cli import main
sys.exit(main(["doctor"]))
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "transformers" in result.stdout
    assert f"not installed ({doctor.how_to_install('grpo')})" in result.stdout
    assert "pip install '.[grpo]' in a checkout" in result.stdout


def test_doctor_without_assertions_does_not_claim_success() -> None:
    result = run_python("-O", "-m", "covgrpo_kernels", "doctor")
    assert (result.returncode, "passed" in result.stdout) == (1, False)


def _scaled(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def faulty(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        if result is None:  # of dlogits, which writes to its last argument
            arguments[-1].mul_(factor)
            return None
        first, *others = result  # log-probs or weights come first
        return result._make([first * factor, *others])

    return faulty


@pytest.mark.parametrize(
    ("holder", "operation"), [(OnlineSoftmax, "stats"), (eager, "dlogits"), (eager, "covariance_weights")]
)
def test_doctor_sees_a_small_fault(
    holder: Any, operation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "eager")
    monkeypatch.setattr(holder, operation, _scaled(getattr(holder, operation), 1.001))
    assert doctor.main() == 1
    output = capsys.readouterr().out
    assert "FAILED: AssertionError" in output
    assert "self-test passed" not in output


@pytest.mark.parametrize("fault", [float("nan"), RuntimeError("no kernel image")])
def test_doctor_sees_nan_and_survives_an_error(
    fault: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **keywords: Any) -> Any:
        raise fault

    monkeypatch.setenv(kernels.VARIABLE, "eager")
    monkeypatch.setattr(eager, "dlogits", _scaled(eager.dlogits, fault) if isinstance(fault, float) else broken)
    assert doctor.main() == 1
    assert ("FAILED: RuntimeError: no kernel image" in capsys.readouterr().out) == isinstance(fault, RuntimeError)


def test_backend_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, missing, misspelt; without a name C++ on a CPU and Triton on a GPU, or plain PyTorch."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_import", lambda name: f"{kernels.MISSING[name]}: no such file")
    assert kernels.select(cpu) is eager
    with pytest.warns(RuntimeWarning, match="plain PyTorch instead of fused kernels on cuda: triton can't be imported"):
        assert kernels.select(gpu) is eager
    for name, device, why in (
        ("triton", gpu, "triton can't be imported"),
        ("cpp", cpu, "the C.. extension was not built"),
    ):
        monkeypatch.setenv(kernels.VARIABLE, name)
        with pytest.raises(RuntimeError, match=f"COVGRPO_BACKEND={name} can't run on {device}: {why}: no such file"):
            kernels.select(device)
    modules = {"cpp": ModuleType("cpp"), "triton": ModuleType("triton")}
    modules["triton"].INTERPRETED = False  # type: ignore[attr-defined]
    monkeypatch.setattr(kernels, "_import", modules.get)
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    kernels._is_too_old.cache_clear()
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    with pytest.warns(RuntimeWarning, match=r"need a GPU of compute capability 8\.0 or higher"):
        assert kernels.select(gpu) is eager
    capability = (8, 0)
    kernels._is_too_old.cache_clear()
    for name, device in (("cpp", cpu), ("triton", gpu)):
        for value in (name, "auto"):
            monkeypatch.setenv(kernels.VARIABLE, value)
            assert kernels.select(device) is modules[name]
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="COVGRPO_BACKEND=triton can't run on cpu: Triton kernels run on a GPU"):
        kernels.select(cpu)
    monkeypatch.setenv(kernels.VARIABLE, "cpp")
    with pytest.raises(RuntimeError, match=r"COVGRPO_BACKEND=cpp can't run on cuda: the C.. kernels run on the CPU"):
        kernels.select(gpu)
    kernels._is_too_old.cache_clear()
    monkeypatch.setenv(kernels.VARIABLE, "Triton")
    with pytest.raises(ValueError, match="COVGRPO_BACKEND must be 'auto', 'cpp', 'eager' or 'triton', got 'Triton'"):
        kernels.select(cpu)


def test_doctor_says_why_a_backend_is_not_usable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.kernels, "report", lambda: [("other", False, "its compiler is missing")])
    monkeypatch.setattr(doctor, "self_test", lambda device: [])
    assert doctor.main() == 0
    assert re.search(r"other +not usable: its compiler is missing", capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------- Makefile

# A Python that writes down what it is asked for; venv makes an environment with it, and pip can be made to fail.
FAKE_PYTHON = """#!/bin/sh
echo "COVGRPO_BUILD_CPP is $COVGRPO_BUILD_CPP: $*" | sed 's/^COVGRPO_BUILD_CPP is : //' >> {log}
if [ -e {broken} ]; then case "$*" in $(cat {broken})) exit 1;; esac; fi
case "$*" in
  "-m venv"*) for last; do :; done; mkdir -p "$last/bin"; touch "$last/pyvenv.cfg"
    for tool in python clang-format clang-tidy; do cp "$0" "$last/bin/$tool"; done;;
esac
"""


class Make:
    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.broken = folder, folder / "log", folder / "broken"
        for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        self.python = folder / "fake"
        self.python.write_text(FAKE_PYTHON.format(log=self.log, broken=self.broken))
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit status, and what Python was asked to do."""
        self.log.write_text("")
        settings = ("PYTHON", "VENV", "TORCH", "TRITON", "TORCH_INDEX", "VERL", "MAKEFLAGS", "MAKELEVEL")
        settings += ("COVGRPO_BUILD_CPP",)
        env = {k: v for k, v in os.environ.items() if k not in settings}
        result = subprocess.run(
            ["make", *arguments, f"PYTHON={self.python}"], cwd=self.folder, env=env, capture_output=True, text=True
        )
        self.said = result.stdout
        return result.returncode, self.log.read_text()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    return Make(tmp_path)


def test_make_installs_once(make: Make) -> None:
    status, log = make("test")
    assert status == 0
    assert log.count("pip install") == 4
    assert "-m venv .venv" in log
    assert log.splitlines()[-1].startswith("-m pytest")
    for target, command in (("test", "-m pytest"), ("demo", "-m covgrpo_kernels demo"), ("lint", "-m ruff")):
        status, log = make(target)
        assert (status, "pip" in log, "venv" in log) == (0, False, False)
        assert any(line.startswith(command) for line in log.splitlines())


def test_make_demo_installs_little_and_the_tests_add_to_it(make: Make) -> None:
    """Nothing is made twice, and the extension is built once: by whoever comes first."""
    status, log = make("demo")
    assert (status, "-e .[grpo]" in log, "[dev]" in log, "triton" in log) == (0, True, False, False)
    assert log.splitlines()[-1].startswith("-m covgrpo_kernels demo")
    status, log = make("test")
    assert (status, "-e .[dev]" in log, "[grpo]" in log, "venv" in log) == (0, True, False, False)
    assert "COVGRPO_BUILD_CPP is 0: -m pip" in log
    status, log = make("docs")
    assert (status, "-e .[docs]" in log, "[dev]" in log) == (0, True, False)
    assert log.splitlines()[-1].startswith("-m mkdocs build --strict")


def test_make_wheel_has_its_tools_in_an_environment_of_their_own(make: Make) -> None:
    status, log = make("test-installation")
    assert (status, "-m venv build/tools" in log, ".venv" in log) == (0, True, False)
    assert [line.split()[0] for line in log.splitlines()[-2:]] == ["tests/wheels.py", "tests/installation.py"]
    assert "pip" not in make("wheel")[1]


def test_make_says_what_it_is_doing(make: Make) -> None:
    make("test")
    said = [line for line in make.said.splitlines() if line.startswith("make: ")]
    assert len(said) == 3
    assert "torch==" in said[0]
    assert "C++" in said[1]


@pytest.mark.parametrize("extra", ["grpo", "dev"])
def test_make_never_trusts_a_half_made_environment(make: Make, extra: str) -> None:
    make.broken.write_text(f"*-e?.[[]{extra}[]]*")
    assert make("test")[0] != 0
    assert "-m pytest" not in make("test")[1]
    make.broken.unlink()
    status, log = make("test")
    assert (status, f"-e .[{extra}]" in log, "-m pytest" in log) == (0, True, True)


def test_make_begins_again_where_the_environment_is_not_of_this_build(make: Make) -> None:
    make("test")
    (make.folder / ".venv/.base").unlink()
    status, log = make("test")
    assert (status, "-m venv --clear .venv" in log, "-e .[dev]" in log) == (0, True, True)


def test_make_updates_where_the_project_changed(make: Make) -> None:
    make("test")
    later = (make.folder / ".venv/.small").stat().st_mtime + 10
    os.utime(make.folder / "pyproject.toml", (later, later))
    status, log = make("test")
    assert (status, "-e .[dev]" in log, "venv" in log) == (0, True, False)


def test_make_torch_build_is_a_variable(make: Make) -> None:
    _, log = make("test")
    assert log.count("torch==") > 1
    assert "triton==" in log
    status, log = make("test", "TORCH=torch==9.9", "TRITON=", "TORCH_INDEX=https://example.org/whl")
    assert (status, "-m venv --clear .venv" in log, "triton" in log) == (0, True, False)
    assert "--index-url https://example.org/whl torch==9.9" in log
    assert "-m venv --clear" in make("test")[1]

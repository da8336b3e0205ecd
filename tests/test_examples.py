"""Examples run and do what they say; they and the GRPO loop use what any user can."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import processes

import covgrpo_kernels
from covgrpo_kernels import reference

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EPS = torch.finfo(torch.float32).eps
LOOP = [*sorted((ROOT / "covgrpo_kernels" / "grpo").glob("*.py")), ROOT / "covgrpo_kernels" / "cli.py"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def example(name: str, run_name: str = "example") -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / name), run_name=run_name)


def test_every_example_is_run() -> None:
    """By a test of its name below."""
    source = Path(__file__).read_text()
    assert len(EXAMPLES) > 5
    assert not [path.name for path in EXAMPLES if f'"{path.name}"' not in source]


@pytest.mark.slow
def test_grpo_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is run by a user: the reward that it prints rises from chance to nearly 1."""
    monkeypatch.setattr(sys, "argv", ["grpo.py"])
    example("grpo.py", "__main__")
    rewards = [float(reward) for reward in re.findall(r"reward (\S+)", capsys.readouterr().out)]
    assert len(rewards) > 5
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.9


@pytest.mark.parametrize("weighting", ["none", "kl_cov"])
def test_grpo_with_other_weights(weighting: str) -> None:
    rewards = example("grpo.py")["train"](steps=25, weighting=weighting)
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5


def test_accumulation(capsys: pytest.CaptureFixture[str]) -> None:
    example("accumulation.py", "__main__")
    assert float(capsys.readouterr().out.split()[-1]) < 8 * EPS


def test_accumulation_needs_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would see nothing of them: a group that is cut in two is weighted as two groups."""
    loss = covgrpo_kernels.covgrpo_loss
    monkeypatch.setattr(covgrpo_kernels, "covgrpo_loss", lambda *inputs, moments, **rest: loss(*inputs, **rest))
    assert example("accumulation.py")["main"]() > 1e-3


def test_trl() -> None:
    pytest.importorskip("trl")
    rewards = example("with_trl.py")["main"]()
    assert rewards[-1] > 3 * rewards[0]


@pytest.mark.parametrize("weighting", ["none", "covariance"])
def test_lora_with_a_frozen_head(weighting: str) -> None:
    pytest.importorskip("peft")
    better, worse, model = example("lora_frozen_head.py")["main"](weighting=weighting)
    assert worse < -0.05 < 0.05 < better
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert model.get_output_embeddings().weight.grad is None


def test_packed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    loss, grad = example("packed.py")["main"]()
    assert max(loss, grad) < 16 * EPS
    assert "67 tokens in place of 120" in capsys.readouterr().out


def on_a_rank(name: str) -> Any:
    return example(name)["main"](dist.group.WORLD)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun with one process."""
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0").items():
        monkeypatch.setenv(name, value)


def fsdp2_by_the_reference() -> tuple[float, float]:
    """Loss of the whole batch and norm of its gradient, by the specification. The model and the numbers are the
    example's; which states predict which tokens is not taken from it."""
    model = example("fsdp2.py")["tiny_model"]()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(200, (8, 12), generator=generator)  # the first five of a row are the prompt
    advantages = torch.randn(8, generator=generator)
    hidden = model.model(tokens).last_hidden_state[:, 4:-1]
    loss = reference.covgrpo_loss(hidden, model.lm_head.weight, tokens[:, 5:], advantages, group_size=4).loss
    loss.backward()
    return loss.item(), torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item()


def test_fsdp2(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    """One process, which is what a user starts, and two ranks have the loss and the gradient of the reference."""
    pytest.importorskip("transformers")
    expected = pytest.approx(fsdp2_by_the_reference(), rel=1e-4)
    example("fsdp2.py", "__main__")
    said = re.findall(r"(?:loss|gradient) (\S+?),?\s", capsys.readouterr().out)
    assert tuple(float(value) for value in said) == expected
    for of_rank in processes(2).run(on_a_rank, "fsdp2.py"):
        assert of_rank == expected


def test_vocab_parallel(alone: None) -> None:
    example("vocab_parallel.py", "__main__")
    for of_rank in processes(2).run(on_a_rank, "vocab_parallel.py"):
        assert max(of_rank.values()) < 8 * EPS


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_begins_with_what_it_shows(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 120
    introduction = ast.get_docstring(ast.parse(text)) or ""
    assert "What it shows:" in introduction
    assert "What to expect:" in introduction


def _imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of all that a file imports from the package, by absolute names."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "covgrpo_kernels")
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module.split(".")[0] == "covgrpo_kernels":
                yield from ((module, alias.name) for alias in node.names)


def _is_public(module: str, name: str) -> bool:
    """Names of the package itself, those of an integration that are no modules of it, and `packed_sequences`."""
    if module == "covgrpo_kernels":
        return name in ("", "__version__", *covgrpo_kernels.__all__)
    if module == "covgrpo_kernels.packing":
        return name == "packed_sequences"
    if re.fullmatch(r"covgrpo_kernels\.integrations\.\w+", module):
        return name != "" and not name.startswith("_") and module == getattr(
            getattr(importlib.import_module(module), name), "__module__", None
        )  # fmt: skip
    return False


@pytest.mark.parametrize("path", [*EXAMPLES, *LOOP], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_names_only(path: Path) -> None:
    if path in LOOP:
        pytest.importorskip("transformers")
    own = [f"covgrpo_kernels.{module}" for module in ("doctor", "benchmark", "config_file")]
    for module, name in _imported(path):
        of_the_loop = path in LOOP and (f"{module}.{name}." + ".").startswith("covgrpo_kernels.grpo.")
        of_the_command = path.name == "cli.py" and module in own
        assert of_the_loop or of_the_command or _is_public(module, name), f"{path.name}: {module} {name}"


def test_the_loop_imports_the_loss() -> None:
    """Or the test above would see nothing."""
    seen = {name for path in [*EXAMPLES, *LOOP] for _, name in _imported(path)}
    assert seen >= {"covgrpo_loss", "linear_logprob", "CovGRPOConfig", "patch_model"}


@pytest.mark.parametrize("path", [*EXAMPLES, *LOOP], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"

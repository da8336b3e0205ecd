"""Functions that fit into the head: a limit on their length and on their number of parameters."""

import ast
import inspect
from pathlib import Path

from covgrpo_kernels import covgrpo_loss

ROOT = Path(__file__).parent.parent
MAX_LINES = 80
MAX_PARAMETERS = len(inspect.signature(covgrpo_loss).parameters)


def lines_and_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """From ``def`` to the last line, the docstring left out; the parameters of every kind."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return lines, len(named) + (given.vararg is not None) + (given.kwarg is not None)


def too_large(source: str, where: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines, parameters = lines_and_parameters(node)
            if lines > MAX_LINES or parameters > MAX_PARAMETERS:
                found.append(f"{where}: {node.name} has {lines} lines and {parameters} parameters")
    return found


def test_functions_of_the_package() -> None:
    """Triton kernels and custom operators as all others."""
    paths = sorted((ROOT / "covgrpo_kernels").rglob("*.py"))
    assert paths
    found = [line for path in paths for line in too_large(path.read_text(), str(path.relative_to(ROOT)))]
    assert not found, f"at most {MAX_LINES} lines and {MAX_PARAMETERS} parameters:\n" + "\n".join(found)


def test_what_is_too_large_is_seen() -> None:
    def function(lines: int, parameters: int, decorator: str = "staticmethod") -> str:
        names = ", ".join(f"x{i}" for i in range(parameters - 1))
        return f"class A:\n  @{decorator}\n  def f({names}, **rest):\n    '''One\n    two.'''\n" + "    pass\n" * (
            lines - 1
        )

    for decorator in ("staticmethod", "triton.jit(do_not_specialize=['n'])", "torch.library.custom_op()"):
        assert too_large(function(MAX_LINES, MAX_PARAMETERS, decorator), "here") == []
        assert len(too_large(function(MAX_LINES + 1, MAX_PARAMETERS, decorator), "here")) == 1
        assert len(too_large(function(MAX_LINES, MAX_PARAMETERS + 1, decorator), "here")) == 1

"""Functions that fit into the head: a limit on their length and on their number of parameters."""

import ast
import inspect
from pathlib import Path

from covgrpo_kernels import covgrpo_loss

ROOT = Path(__file__).parent.parent
MAX_LINES = 80
MAX_PARAMETERS = len(inspect.signature(covgrpo_loss).parameters)
# One launch does what several functions do elsewhere, and takes every tensor that these read.
MAX_KERNEL_LINES, MAX_KERNEL_PARAMETERS = 160, 36


def lines_and_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """From ``def`` to the last line, the docstring left out; the parameters of every kind."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return lines, len(named) + (given.vararg is not None) + (given.kwarg is not None)


def limits(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """Of Triton kernels, and of custom operators, whose arguments cannot be grouped, others than of functions."""
    decorators = {ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list}
    if "triton.jit" in decorators and function.name.endswith("_kernel"):
        return MAX_KERNEL_LINES, MAX_KERNEL_PARAMETERS
    return MAX_LINES, MAX_KERNEL_PARAMETERS if "torch.library.custom_op" in decorators else MAX_PARAMETERS


def too_large(source: str, where: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines, parameters = lines_and_parameters(node)
            max_lines, max_parameters = limits(node)
            if lines > max_lines or parameters > max_parameters:
                found.append(f"{where}: {node.name} has {lines} lines and {parameters} parameters")
    return found


def test_functions_of_the_package() -> None:
    paths = sorted((ROOT / "covgrpo_kernels").rglob("*.py"))
    assert paths
    found = [line for path in paths for line in too_large(path.read_text(), str(path.relative_to(ROOT)))]
    assert not found, (
        f"at most {MAX_LINES} lines and {MAX_PARAMETERS} parameters, of kernels "
        f"{MAX_KERNEL_LINES} and {MAX_KERNEL_PARAMETERS}:\n" + "\n".join(found)
    )


def test_what_is_too_large_is_seen() -> None:
    def function(lines: int, parameters: int, name: str = "f", decorator: str = "staticmethod") -> str:
        names = ", ".join(f"x{i}" for i in range(parameters - 1))
        return f"class A:\n  @{decorator}\n  def {name}({names}, **rest):\n    '''One\n    two.'''\n" + "    pass\n" * (
            lines - 1
        )

    assert too_large(function(MAX_LINES, MAX_PARAMETERS), "here") == []
    assert len(too_large(function(MAX_LINES + 1, MAX_PARAMETERS), "here")) == 1
    assert len(too_large(function(MAX_LINES, MAX_PARAMETERS + 1), "here")) == 1

    kernel = dict(name="f_kernel", decorator="triton.jit(do_not_specialize=['n'])")
    assert too_large(function(MAX_KERNEL_LINES, MAX_KERNEL_PARAMETERS, **kernel), "here") == []
    assert len(too_large(function(MAX_KERNEL_LINES + 1, MAX_KERNEL_PARAMETERS, **kernel), "here")) == 1
    assert len(too_large(function(MAX_KERNEL_LINES, MAX_KERNEL_PARAMETERS + 1, **kernel), "here")) == 1
    assert (
        len(too_large(function(MAX_LINES, MAX_KERNEL_PARAMETERS + 1, decorator="torch.library.custom_op()"), "")) == 1
    )

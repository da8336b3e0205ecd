"""The documents say what is so: snippets run, and names, defaults, paths and commands are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import covgrpo_kernels
from bench import report
from covgrpo_kernels import ClipCov, CovarianceWeighting, CovGRPOConfig, KLCov, covgrpo_loss, loss
from covgrpo_kernels.engines.tiling import WORKSPACE_BYTES

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "README.md"])
README = (ROOT / "README.md").read_text()
FOLDERS = ("covgrpo_kernels", "examples", "bench", "research", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FILES = {
    path.relative_to(ROOT).as_posix()
    for pattern in ("*", ".ci/*", "csrc/*", "docs/*", *(f"{folder}/**/*" for folder in FOLDERS))
    for path in ROOT.glob(pattern)
    if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
}


def _blocks(language: str) -> list[Any]:
    """Fenced blocks of all documents, each with empty lines before it, so that errors name the right line."""
    blocks = []
    for document in DOCUMENTS:
        text = document.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
            line = text[: match.start(1)].count("\n")
            blocks.append(pytest.param("\n" * line + match[1], document, id=f"{document.name}:{line + 1}"))
    return blocks


@pytest.mark.parametrize(("code", "document"), _blocks("python"))
def test_snippet_runs(code: str, document: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, str(document), "exec"), {"__name__": "snippet"})


def test_readme_has_snippets_and_the_loss_takes_ten_lines() -> None:
    snippets = [block.values[0] for block in _blocks("python") if block.values[1].name == "README.md"]
    [step] = [code for code in snippets if "# What you add" in code]
    added = step.split("# What you add")[1].split("optimizer.step()")[0].splitlines()[1:]
    assert len([line for line in added if line.strip()]) == 10


# ------------------------------------------------------------------------------------------------- the tables


def _tables(header: str) -> list[list[list[str]]]:
    """Rows of cells of the README's tables with this header."""
    lines = README.splitlines()
    tables = []
    for i, line in enumerate(lines):
        if line == header:
            end = next(j for j in range(i + 2, len(lines) + 1) if j == len(lines) or not lines[j].startswith("|"))
            tables.append([[cell.strip() for cell in row.strip("|").split("|")] for row in lines[i + 2 : end]])
    assert tables, header
    return tables


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _defaults(rows: list[list[str]]) -> dict[str, Any]:
    """Name -> default of rows whose first two cells are names and defaults."""
    result = {}
    for names, values, *_ in rows:
        result |= dict(zip(_code(names), map(ast.literal_eval, _code(values)), strict=True))
    return result


def _fields(kind: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind)}


def _config_tables() -> list[tuple[type, list[list[str]]]]:
    config, weighting = _tables("| field | default | |")
    [neighbours] = _tables("| | field | default | |")
    second = next(i for i, row in enumerate(neighbours) if "KLCov" in row[0])
    baselines = [[row[1:] for row in part] for part in (neighbours[:second], neighbours[second:])]
    return list(zip((CovGRPOConfig, CovarianceWeighting, ClipCov, KLCov), (config, weighting, *baselines), strict=True))


def test_options_and_defaults() -> None:
    for kind, rows in _config_tables():
        assert _defaults(rows) == _fields(kind), kind.__name__


def test_choices_of_options() -> None:
    """A row of a string option names every choice there is, and no other."""
    for kind, rows in _config_tables():
        for names, _, *rest in rows:
            [name, *others] = _code(names)
            if others or not isinstance(_fields(kind)[name], str):
                continue
            with pytest.raises(ValueError, match="must be one of") as error:
                kind(**{name: "no such choice"})
            accepted = set(re.findall(r"'([^']+)'", str(error.value).split(", got")[0]))
            documented = {token.strip('"') for token in _code(" ".join([_, *rest])) if token.startswith('"')}
            assert documented == accepted, name


def test_arguments_of_the_loss() -> None:
    parameters = inspect.signature(covgrpo_loss).parameters
    [tensors] = _tables("| argument | padded: one response a row | packed: tokens in a line | |")
    [options] = _tables("| option | default | |")
    defaults = _defaults(options)
    names = [name for row in tensors for name in _code(row[0])] + list(defaults)
    assert sorted(names) == sorted(parameters)
    assert defaults == {name: parameters[name].default for name in defaults}


def test_metrics() -> None:
    [rows] = _tables("| key | |")
    assert sorted(name for row in rows for name in _code(row[0])) == sorted(loss._METRICS)


def test_public_names_are_mentioned() -> None:
    mentioned = set(re.findall(r"\w+", README))
    missing = {*covgrpo_kernels.__all__} - mentioned - {"LinearLogprob"}
    assert not missing
    assert f"CovGRPOOutput({', '.join(covgrpo_kernels.CovGRPOOutput._fields)})" in README


def test_workspace_figures() -> None:
    cpu, gpu = (WORKSPACE_BYTES[kind] >> 20 for kind in ("cpu", "cuda"))
    assert re.search(rf"at most {cpu} MiB on a CPU\s+and {gpu} MiB on a GPU", README)


# -------------------------------------------------------------------------------------- files, paths, commands


def _file_tree() -> dict[str, str]:
    """Path -> description of the README's tree; folders end in "/"."""
    [block] = [b.values[0].strip("\n") for b in _blocks("text") if b.values[1].name == "README.md"]
    tree: dict[str, str] = {}
    folders: list[str] = []
    for line in block.splitlines():
        name, _, description = line.strip().partition(" ")
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        tree["".join(folders) + name] = description.strip()
        if name.endswith("/"):
            folders.append(name)
    return tree


def test_file_tree() -> None:
    tree = _file_tree()
    absent = [path for path in tree if not ((ROOT / path).is_dir() if path.endswith("/") else path in FILES)]
    assert not absent
    undescribed = [path for path, what in tree.items() if not what and path not in ("covgrpo_kernels/", "tests/")]
    assert not undescribed
    # A folder without entries of its own stands for all that is in it.
    covers = [path for path in tree if path.endswith("/") and not any(p != path and p.startswith(path) for p in tree)]
    unlisted = [
        path
        for path in sorted(FILES)
        if path not in tree
        and not path.startswith((".g", "README.md", *covers))
        and path.count("/") <= (1 if path.startswith(("bench/", "tests/")) else 9)
    ]
    assert not unlisted


def _exists(path: str) -> bool:
    path = path.removeprefix("./").rstrip("/")
    return any(f"/{file}".endswith(f"/{path}") for file in FILES) or (bool(path) and (ROOT / path).is_dir())


NAMED_FILE = re.compile(r"(?<![\w/.*{<-])[\w/.-]*\w\.(?:py|md|toml|txt|cfg)\b(?![\w(])")


def test_paths_in_documents() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        code = set(_code(re.sub(r"```.*?```", "", text, flags=re.S)))
        named = {path for path in code if path.endswith("/") or path.startswith(".ci")} | set(NAMED_FILE.findall(text))
        links = {target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target}
        missing = {path for path in named if path not in links and not _exists(path)}
        missing |= {target for target in links if not (document.parent / target).exists()}
        assert not missing, document.name


def _prose(source: Path) -> Iterator[str]:
    """Comments and docstrings."""
    text = source.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def test_paths_in_comments_and_docstrings() -> None:
    missing = {
        (source.relative_to(ROOT).as_posix(), path)
        for source in SOURCES
        for prose in _prose(source)
        for path in NAMED_FILE.findall(prose)
        if not _exists(path)
    }
    assert not missing


def _commands() -> str:
    """All code in the documents, in blocks and in lines."""
    texts = [document.read_text() for document in DOCUMENTS]
    blocks = [block for text in texts for block in re.findall(r"```\w*\n(.*?)```", text, re.S)]
    inline = [code for text in texts for code in _code(re.sub(r"```.*?```", "", text, flags=re.S))]
    return "\n".join([*blocks, *inline])


def test_make_targets_and_variables() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    used = set(re.findall(r"^make ([a-z][\w-]*)", _commands(), re.M))
    assert {"demo", "test"} <= used
    assert used <= targets
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.M))
    assert {
        name for line in re.findall(r"^make .*", _commands(), re.M) for name in re.findall(r"([A-Z_]+)=", line)
    } <= (variables)
    assert {"demo", "test", "lint"} <= targets


def test_commands_and_extras() -> None:
    cli = pytest.importorskip("covgrpo_kernels.cli")
    commands = set(re.findall(r"^covgrpo (\w+)", _commands(), re.M))
    subcommands = next(a.choices for a in cli._parser()._actions if a.dest == "command")
    assert commands == set(subcommands)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {e for e in re.findall(r"^\[([a-z]+)\]$", _commands(), re.M)} == set(project["optional-dependencies"])


def test_version_has_a_changelog_entry_with_a_line_on_numerics() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    entries = dict(re.findall(r"^## (\S+).*?\n(.*?)(?=^## |\Z)", changelog, re.M | re.S))
    assert covgrpo_kernels.__version__ in entries
    assert not [version for version, entry in entries.items() if "\n- Numerics: " not in entry]


def _layers() -> dict[str, int]:
    """Module or folder of the package -> number, by the list in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    layer: dict[str, int] = {}
    for number, item in re.findall(r"^(\d)\. (.*?)(?=^\d\. |^$)", text, re.M | re.S):
        for path in re.findall(r"`covgrpo_kernels/(\w+)(?:\.py|/)`", item):
            assert path not in layer, f"{path} is in two layers"
            layer[path] = int(number)
    return layer


def test_layers_import_only_what_is_below() -> None:
    """The numbered list of CONTRIBUTING.md, which has every module; and within a function, too."""
    layer, package = _layers(), ROOT / "covgrpo_kernels"
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert layer.keys() == modules - {"__init__"}
    for source in sorted(package.rglob("*.py")):
        name = source.relative_to(package).with_suffix("").parts
        if name == ("__init__",):
            continue
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(name):  # from the package itself
                imported = [node.module] if node.module else [alias.name for alias in node.names]
                for other in {module.split(".")[0] for module in imported} & modules:
                    assert layer[other] >= layer[name[0]], f"{source.relative_to(package)} imports {other}"


def test_figures_are_those_of_the_benchmark() -> None:
    """None is typed by hand: the documents are what `python -m bench report` makes of the results."""
    for document, figures in report.documents(report.RESULTS).items():
        assert document.read_text() == report.updated(document.read_text(), figures), document

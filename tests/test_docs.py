"""The documents say what is so: snippets run, and names, defaults, paths and commands are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import io
import itertools
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

import covgrpo_kernels
from bench import report
from covgrpo_kernels import (
    ClipCov,
    CovarianceWeighting,
    CovGRPOConfig,
    HighEntropy,
    KLCov,
    Steer,
    covgrpo_loss,
    loss,
)
from covgrpo_kernels.engines.tiling import WORKSPACE_BYTES

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "README.md"])
README = (ROOT / "README.md").read_text()
LOSS = (ROOT / "docs" / "loss.md").read_text()
MADE = {"site/", "runs/"}  # by commands; not in a fresh clone
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


@pytest.mark.parametrize(("code", "document"), _blocks("diff"))
def test_what_a_diff_adds_is_there(code: str, document: Path) -> None:
    """Its imports are made, and its keywords are taken."""
    pytest.importorskip("trl")
    trainer = importlib.import_module("covgrpo_kernels.integrations.trl").CovGRPOTrainer
    taken = inspect.signature(trainer).parameters.keys() | inspect.signature(trainer.__mro__[1]).parameters.keys()
    for line in re.findall(r"^\+(.*)", code, re.M):
        [statement] = ast.parse(line).body
        if isinstance(statement, ast.ImportFrom):
            exec(line, {})
        else:
            assert isinstance(statement, ast.Assign)
            assert isinstance(statement.value, ast.Call)
            assert ast.unparse(statement.value.func) == "CovGRPOTrainer"
            assert {keyword.arg for keyword in statement.value.keywords} <= taken


def test_first_screen() -> None:
    """The claim, a figure and how to install it; and all of it is no longer than what one reads."""
    first = "\n".join(README.splitlines()[:30])
    assert re.search(r"never builds the `\[tokens, vocabulary\]` logits", first)
    assert re.search(r"!\[.+\]\(bench/results/\w+\.png\)", first)
    assert re.search(r"\*\*In \w+ a step takes", first)
    assert re.search(r"^pip install", first, re.M)
    assert len(README.splitlines()) <= 200


def test_the_step_of_the_first_page_is_short() -> None:
    snippets = [block.values[0] for block in _blocks("python") if block.values[1].name == "README.md"]
    [step] = [code for code in snippets if "covgrpo_loss(" in code]
    lines = [line for line in step.splitlines() if line.strip()]
    assert len(lines) <= 24
    begin, end = (next(i for i, line in enumerate(lines) if part in line) for part in ("config = ", ".backward()"))
    assert end - begin <= 10


# ------------------------------------------------------------------------------------------------- the tables


def _tables(header: str) -> list[list[list[str]]]:
    """Rows of cells of the tables of docs/loss.md with this header."""
    lines = LOSS.splitlines()
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
    begins = [i for i, row in enumerate(neighbours) if row[0]]
    tables = [[row[1:] for row in neighbours[a:b]] for a, b in itertools.pairwise([*begins, len(neighbours)])]
    kinds = (ClipCov, KLCov, Steer, HighEntropy)
    assert [_code(neighbours[i][0]) for i in begins] == [[kind.__name__] for kind in kinds]
    return list(zip((CovGRPOConfig, CovarianceWeighting, *kinds), (config, weighting, *tables), strict=True))


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


def test_public_names_are_in_the_reference_and_explained() -> None:
    reference = re.findall(r"^::: covgrpo_kernels\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(reference) == sorted(covgrpo_kernels.__all__)
    missing = {*covgrpo_kernels.__all__} - set(re.findall(r"\w+", LOSS + (ROOT / "docs" / "devices.md").read_text()))
    assert missing <= {"LinearLogprob"}
    assert f"CovGRPOOutput({', '.join(covgrpo_kernels.CovGRPOOutput._fields)})" in LOSS


def _described(docstring: str, section: str) -> set[str]:
    """Names in a section of a docstring: those before a colon."""
    lines = inspect.cleandoc(docstring).split(f"{section}:\n")[1].split("\n\n")[0].splitlines()
    return {name.strip("* ") for line in lines if (m := re.match(r"    (\S[^:]*):", line)) for name in m[1].split(",")}


@pytest.mark.parametrize("name", covgrpo_kernels.__all__)
def test_docstrings_have_every_argument_and_the_errors(name: str) -> None:
    public = getattr(covgrpo_kernels, name)
    docstring = public.__doc__
    if hasattr(public, "_fields"):
        assert _described(docstring, "Attributes") == set(public._fields)
        return
    if name == "GroupMoments":  # made by `of`
        public, docstring = public.of, public.of.__doc__
    parameters = {parameter for parameter in inspect.signature(public).parameters if parameter != "self"}
    assert _described(docstring, "Args") == parameters
    assert "Raises:" in docstring or name == "weighting_metrics"  # which takes what the other has made


def test_workspace_figures() -> None:
    cpu, gpu = (WORKSPACE_BYTES[kind] >> 20 for kind in ("cpu", "cuda"))
    performance = (ROOT / "docs" / "performance.md").read_text()
    assert re.search(f"at most {cpu} MiB on a CPU and {gpu} MiB on a GPU", " ".join(performance.split()))


# -------------------------------------------------------------------------------------- files, paths, commands


def test_every_file_says_what_it_is() -> None:
    """In its first sentence, of which the map of files is made."""
    hooks = _site_hooks()
    files = hooks.source_files()
    assert {"covgrpo_kernels/loss.py", "csrc/gemm.h", "tests/test_docs.py"} <= set(files)
    assert not [name for name in files if len(hooks.first_sentence(ROOT / name)) < 10]


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
        missing = {path for path in named if path not in links and not _exists(path)} - MADE
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
    page = (ROOT / "docs" / "installation.md").read_text()
    extras = page.split("| extra | for |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", extras, re.M) == list(project["optional-dependencies"])


def test_version_has_a_changelog_entry_with_a_line_on_numerics() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    entries = dict(re.findall(r"^## (\S+).*?\n(.*?)(?=^## |\Z)", changelog, re.M | re.S))
    assert covgrpo_kernels.__version__ in entries
    assert not [version for version, entry in entries.items() if "\n- Numerics: " not in entry]


def test_forms_for_issues() -> None:
    """Of the keys that GitHub takes, of which it shows a form with any other to nobody; every question has an answer.
    Whoever reports something wrong is asked for `covgrpo doctor --json`."""
    yaml = pytest.importorskip("yaml")
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")}
    assert forms.pop("config") == {"blank_issues_enabled": True}
    assert forms.keys() == {"bug", "slow", "wish"}
    for form in forms.values():
        assert form.keys() == {"name", "description", "body"}
        for field in form["body"]:
            assert field.keys() == {"type", "id", "attributes", "validations"}
            assert field["type"] == "textarea"
            assert {"label"} <= field["attributes"].keys() <= {"label", "description", "render"}
            assert field["validations"] == {"required": True}
        assert len({field["id"] for field in form["body"]}) == len(form["body"])
    for name in ("bug", "slow"):
        [doctor] = [field for field in forms[name]["body"] if field["id"] == "doctor"]
        assert "`covgrpo doctor --json`" in doctor["attributes"]["label"]


def test_the_citation() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == covgrpo_kernels.__version__
    assert citation["license"] == "Apache-2.0"


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


# --------------------------------------------------------------------------------------------------------- the site


def _site_hooks() -> Any:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_documents_are_turned_into_those_of_the_site() -> None:
    """In which docs/ is the root, and all else is where it is in the repository."""
    turned = _site_hooks()._on_the_site
    assert turned("docs/loss.md", "README.md") == "loss.md"
    assert turned("../README.md", "docs/loss.md") == "README.md"
    assert turned("../bench/results/cpu_limit.png", "docs/performance.md") == "bench/results/cpu_limit.png"
    assert turned("results/cpu_limit.png", "bench/README.md") == "results/cpu_limit.png"
    assert turned("../docs/numerics.md", "bench/README.md") == "../numerics.md"


class _Page(HTMLParser):
    """Anchors of a page, where it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        is_loaded = tag == "link" and found.get("rel") in ("stylesheet", "icon")
        source = found.get("href") if is_loaded else found.get("src")
        if source:
            self.loads.append(source)


def _broken_links(site: Path) -> list[str]:
    """Links of its pages to files or anchors that are not there, and what a page loads from elsewhere."""
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in pages.items():
        for target in [*page.links, *page.loads]:
            link = urlsplit(target)
            if link.scheme or link.netloc:
                if target in page.loads:
                    broken.append(f"{path.relative_to(site)} loads {target} from elsewhere")
                continue
            there = (path.parent / unquote(link.path)).resolve() if link.path else path
            there = there / "index.html" if there.is_dir() else there
            is_anchor = not link.fragment or there not in pages or unquote(link.fragment) in pages[there].anchors
            if not there.exists() or not is_anchor:
                broken.append(f"{path.relative_to(site)}: {target}")
    return broken


def test_broken_links_are_found(tmp_path: Path) -> None:
    """Or the test below would see nothing."""
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text('<h1 id="here"></h1><a href="../">up</a><a href="#there"></a>')
    (tmp_path / "index.html").write_text(
        '<link rel="icon" href="https://example.org/icon.png"><img src="no.png"><img src="page/index.html">'
        '<a href="https://example.org">out</a><a href="page/">page</a><a href="page/#here">anchor</a>'
        '<a href="page/#away">no anchor</a><a href="away/">no page</a>'
    )
    assert sorted(_broken_links(tmp_path)) == [
        "index.html loads https://example.org/icon.png from elsewhere",
        "index.html: away/",
        "index.html: no.png",
        "index.html: page/#away",
        "page/index.html: #there",
    ]


def test_site_builds_without_warnings_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=os.environ | dict(NO_MKDOCS_2_WARNING="1"), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.rglob("*.html"))) > 15
    assert not _broken_links(tmp_path)
    # What the site has beyond the documents.
    assert "--group-size" in (tmp_path / "commands" / "index.html").read_text()
    assert "which rows are dense" in (tmp_path / "CONTRIBUTING" / "index.html").read_text()

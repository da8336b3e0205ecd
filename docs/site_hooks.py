"""What the site has beyond the files in docs/: documents and pictures that stand elsewhere in the repository, the help
of commands, and the map of files. Hooks of mkdocs, which calls them by their names; mkdocs.yml names this file."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = "docs/"
ELSEWHERE = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "LICENSE", "bench/README.md",
    "research/results/study.md",
)  # fmt: skip
FOLDERS = ("bench", "covgrpo_kernels", "csrc", "docs", "examples", "research", "tests")
PICTURES = ("bench/results/*.png", "research/results/*.png")
PICTURE = re.compile(r"!\[[^]]*\]\(([^)]+\.png)\)")
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    pictures = [path.relative_to(ROOT).as_posix() for pattern in PICTURES for path in sorted(ROOT.glob(pattern))]
    for name in (*ELSEWHERE, *pictures):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = page.file.src_uri if page.file.src_uri in ELSEWHERE else DOCS + page.file.src_uri
    markdown = LINK.sub(lambda match: _on_the_site(match[1], here), markdown)
    markdown = PICTURE.sub(r"[\g<0>](\g<1>)", markdown)  # a click shows it in full
    markdown = re.sub(r"<!-- help: (.*) -->", lambda match: _help(match[1].split()), markdown)
    return markdown.replace("<!-- files -->", _files_by_folder())


def _on_the_site(target: str, here: str) -> str:
    """A relative link of a document of the repository as one of the site, in which docs/ is the root."""
    source, wanted = here.removeprefix(DOCS), posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    return posixpath.relpath(wanted.removeprefix(DOCS), posixpath.dirname(source) or ".")


# --------------------------------------------------------------------------------------------------------- commands


def _help(commands: list[str]) -> str:
    return "\n\n".join(f"### covgrpo {command}\n\n```text\n{_help_of(command)}\n```" for command in commands)


def _help_of(command: str) -> str:
    from covgrpo_kernels.cli import main

    output, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "96"
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([command, "--help"])
    os.environ.pop("COLUMNS")
    if columns is not None:
        os.environ["COLUMNS"] = columns
    return output.getvalue().strip()


# ------------------------------------------------------------------------------------------------------------ files


def _files_by_folder() -> str:
    """A table of files for each folder, with what each says of itself."""
    folders: dict[str, list[str]] = {}
    for name in source_files():
        folders.setdefault(posixpath.dirname(name), []).append(name)
    tables = []
    for folder, names in folders.items():
        rows = [f"| `{posixpath.basename(name)}` | {first_sentence(ROOT / name)} |" for name in names]
        tables.append("\n".join([f"### {folder}/", "", "| file | |", "|---|---|", *rows]))
    return "\n\n".join(tables)


def source_files() -> list[str]:
    """All Python and C++ of the repository, by folder."""
    found = [path for folder in FOLDERS for end in ("py", "h", "cpp") for path in (ROOT / folder).rglob(f"*.{end}")]
    names = [path.relative_to(ROOT).as_posix() for path in found]
    return sorted(names, key=lambda name: (posixpath.dirname(name), name))


def first_sentence(path: Path) -> str:
    """What a file says of itself: the first sentence of its docstring, or of the comment that it begins with."""
    text = path.read_text()
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = re.match(r"(//.*\n)+", text)
        said = re.sub(r"^//", "", comment[0], flags=re.M) if comment else ""
    paragraph = " ".join(said.split("\n\n")[0].split())
    return re.split(r"(?<=[.?]) (?=[A-Z])", paragraph)[0].replace("|", "\\|").replace("[", "\\[")

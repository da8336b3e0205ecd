"""The cache of real models, with small made-up packages in place of the downloads; what is measured of recordings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch

for package in ("transformers", "rich"):
    pytest.importorskip(package)

from covgrpo_kernels.testing import POLICIES, random_head, rl_head  # noqa: E402
from research import models, recordings, trainers  # noqa: E402

PARTS = [b"first half, ", b"second half"]


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> models.Source:
    """Of two packages, whose conversion writes the joined file."""
    source = models.Source(
        "Toy", "CC0", ("toy-model==1.0", "toy-model-more==1.0"), (".part0", ".part1"),
        hashlib.sha256(b"".join(PARTS)).hexdigest(), ("/LICENSE",),
    )  # fmt: skip
    monkeypatch.setitem(models.SOURCES, "toy", source)

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(models, "_convert", convert)
    return source


def put_wheels(folder: Path, parts: list[bytes] = PARTS) -> None:
    folder.mkdir(parents=True)
    for i, name in enumerate(("toy_model", "toy_model_more")):
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data/model.part{i}", parts[i])
            wheel.writestr(f"{name}.dist-info/LICENSE", "free")


def test_a_model_is_joined_from_its_packages_once(
    source: models.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(models.ModelNotFetchedError, match="python -m research fetch-models toy"):
        models.model_folder("toy", tmp_path)
    put_wheels(tmp_path / "models" / "toy.download")
    models.fetch(["toy"], tmp_path)
    assert "Licence: CC0" in capsys.readouterr().out
    folder = models.model_folder("toy", tmp_path)
    assert (folder / "model.safetensors").read_bytes() == b"first half, second half"
    assert (folder / "LICENSE").read_text() == "free"
    assert json.loads((folder / models.ORIGIN_FILE).read_text())["licence"] == "CC0"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["toy"]  # the downloads are gone
    monkeypatch.setattr(models, "_download", None)  # nothing is downloaded again
    models.fetch(["toy"], tmp_path)


def test_wrong_files_are_refused(source: models.Source, tmp_path: Path) -> None:
    put_wheels(tmp_path / "models" / "toy.download", [PARTS[0], b"another half"])
    with pytest.raises(ValueError, match="SHA-256"):
        models.fetch(["toy"], tmp_path)
    assert not (tmp_path / "models" / "toy").exists()


def test_a_damaged_folder_is_refused(source: models.Source, tmp_path: Path) -> None:
    put_wheels(tmp_path / "models" / "toy.download")
    models.fetch(["toy"], tmp_path)
    (models.model_folder("toy", tmp_path) / "model.safetensors").write_bytes(b"first half")
    with pytest.raises(ValueError, match="damaged"):
        models.fetch(["toy"], tmp_path)


def test_an_interrupted_conversion_leaves_no_model(
    source: models.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheels(tmp_path / "models" / "toy.download")
    convert = models._convert

    def interrupted(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.fetch(["toy"], tmp_path)
    with pytest.raises(models.ModelNotFetchedError):
        models.model_folder("toy", tmp_path)
    monkeypatch.setattr(models, "_convert", convert)
    models.fetch(["toy"], tmp_path)
    assert models.model_folder("toy", tmp_path)


def test_unknown_models_and_packages(tmp_path: Path, source: models.Source) -> None:
    with pytest.raises(ValueError, match="models are smollm2, gemma3, toy, got nothing"):
        models.fetch(["nothing"], tmp_path)
    wheels = tmp_path / "models" / "toy.download"
    put_wheels(wheels)
    other = dataclasses.replace(source, gguf=(".part0", ".part7"))
    with pytest.raises(ValueError, match=r"one file \*\.part7, and has 0"):
        models._join(sorted(wheels.glob("*.whl")), other, tmp_path / "model.gguf")


# -------------------------------------------------------------------------------------------------------- recordings


def test_statistics_are_those_of_the_distribution() -> None:
    """Of a row that is written down: p is proportional to 1 / rank, and one entry has the half of it."""
    vocab = 4096
    p = 1 / torch.arange(1, vocab, dtype=torch.float64)
    p = torch.cat([torch.tensor([0.5], dtype=torch.float64), 0.5 * p / p.sum()])
    weight = p.log().unsqueeze(1).float()
    hidden, targets = torch.ones(3, 1), torch.tensor([0, 1, -100])
    found = recordings.distribution(hidden, weight, targets, floor=1e-4)
    assert found["rows"] == 2
    assert found["entropy"]["mean"] == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
    assert found["entries"]["mean"] == (p >= 1e-4).sum().item()
    tail = p[p < 1e-4]
    assert found["tail_mass"]["mean"] == pytest.approx(tail.sum().item(), rel=1e-4)
    assert found["tail_fill"]["50%"] == pytest.approx((tail.square().sum() / tail.sum() / 1e-4).item(), rel=1e-4)
    assert found["exponent"]["50%"] == pytest.approx(1, abs=0.02)
    assert found["entries_above"] == {"64": 1.0, "128": 1.0, "256": 1.0}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_line_of_the_report(policy: str) -> None:
    """At a toy size; the error of dL/dlogits keeps what was certified, and is not nothing."""
    found = recordings.statistics(rl_head(0, 256, 32, 3000, policy=policy), probes=128)
    assert 0 < found["dlogits"]["error"] <= found["dlogits"]["certificate"]
    assert sum(found["row_classes"].values()) == pytest.approx(1)
    text = recordings.report(dict(environment=dict(commit="c", torch="t", backend="b"), rows=256, inputs={"x": found}))
    assert text.count("|\n") == len(recordings._LINES) + 2


def test_some_groups_are_whole() -> None:
    n = 24
    head = random_head(0, n, 4, 11) | dict(group_ids=torch.arange(n) // 6)
    part = recordings.some_groups(head, 13)
    assert part["group_ids"].tolist() == [0] * 6 + [3] * 6
    assert part["hidden"].equal(torch.cat([head["hidden"][:6], head["hidden"][18:]]))
    valid = [(x["targets"] >= 0).sum().item() for x in (head, part)]
    torch.testing.assert_close(part["logprob_grad"][6:], head["logprob_grad"][18:] * (valid[0] / valid[1]))
    assert part["weight"] is head["weight"]


def test_table_of_trainers() -> None:
    runs = [dict(trainer="A", tokens=8, dtype="float32", peak_mib=12.4, seconds=[9.0, 1.0, 3.0])]
    assert trainers.report(dict(runs=runs)).splitlines()[-1] == "| 8 | float32 | A | 12 | 2.0 s |"


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (1500, 1280), (4000, 2816), (1e9, 8176 // 256 * 256)])
def test_the_longest_completion_within_a_limit(limit: float, found: int) -> None:
    """Of peaks that grow faster than in a straight line, from few of them; the next length is over the limit."""
    asked = []

    def peak(tokens: int) -> float:
        asked.append(tokens)
        return tokens + (tokens / 100) ** 2

    assert trainers.longest(peak, limit, 8176) == found
    assert len(asked) == len(set(asked)) <= 7
    assert not any(n % 256 for n in asked)
    assert found == 0 or peak(found) <= limit
    assert found == 7936 or peak(found + 256) > limit

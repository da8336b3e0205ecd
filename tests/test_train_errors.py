"""`covgrpo train` where something is wrong with what it is given: an error in one sentence, and no file touched."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from covgrpo_kernels import cli  # noqa: E402
from covgrpo_kernels.grpo import demo  # noqa: E402
from covgrpo_kernels.grpo import train as training  # noqa: E402
from covgrpo_kernels.grpo.checkpoint import RunFolder, TrainingError  # noqa: E402
from covgrpo_kernels.grpo.config import TrainConfig  # noqa: E402
from covgrpo_kernels.grpo.policy import byte_tokenizer  # noqa: E402
from covgrpo_kernels.grpo.train import train  # noqa: E402

RUN = TrainConfig(
    hidden_size=64, layers=1, warm_start_steps=1, steps=2, prompts_per_step=2, group_size=4,
    max_new_tokens=3, checkpoint_every=1, eval_problems=2,
)  # fmt: skip
VOCAB = len(byte_tokenizer())
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny run's time. That of `finished` is real: it runs before this."""
    monkeypatch.setattr(training, "save_report", lambda run, runs: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(dataclasses.replace(RUN, out=str(out)))
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run, to do harm to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def save_model(folder: Path, family: str = "llama", **changes: object) -> Path:
    config = transformers.AutoConfig.for_model(family, **(SIZES | changes))
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def refused(error: type[Exception], match: str, root: Path, **options: object) -> None:
    """The run is refused, and nothing under root is written, changed or deleted."""
    before = contents(root)
    with pytest.raises(error, match=match) as raised:
        train(dataclasses.replace(RUN, **options))
    assert "\n" not in str(raised.value).strip()
    assert contents(root) == before


# --- nobody's files are touched ----------------------------------------------------------------------------


def test_out_is_the_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "mine")
    refused(ValueError, "out must not be in the folder of the model", tmp_path, model=str(model), out=str(model))
    refused(ValueError, "out must not be in", tmp_path, model=str(model), out=str(model / "runs" / "first"))
    link = tmp_path / "link"
    link.symlink_to(model)
    refused(ValueError, "out must not be in", tmp_path, model=str(model), out=str(link))
    refused(ValueError, "out must not be in", tmp_path, model=str(link), out=str(model / ".." / "mine"))
    refused(TrainingError, "holds files that are not of a covgrpo run", tmp_path, model=str(model), out=str(tmp_path))
    transformers.AutoModelForCausalLM.from_pretrained(model)


def test_out_shadows_the_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next command would take the run for the model."""
    monkeypatch.chdir(tmp_path)
    refused(ValueError, "out must not be in the folder of the model", tmp_path, model="org/name", out="org/name")


def test_a_folder_with_a_model_and_no_model_option(tmp_path: Path) -> None:
    save_model(tmp_path / "mine")
    refused(TrainingError, r"not of a covgrpo run \(config.json, ", tmp_path, out=str(tmp_path / "mine"))


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "report.png", "metrics.jsonl", "model/weights", "warm_start/weights"),
        *("notes.txt", ".hidden", "covgrpo_run.json.mine"),
    ],
)
def test_a_folder_with_other_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("{}\n")
    refused(TrainingError, f"not of a covgrpo run .{name.split('/')[0]}", tmp_path, out=str(tmp_path / "out"))


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    train(dataclasses.replace(RUN, out=str(tmp_path), steps=1))
    assert (tmp_path / "model").is_dir()


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(TrainingError, "out is a file", tmp_path, out=str(tmp_path / "out"))
    refused(OSError, "out", tmp_path, out=str(tmp_path / "out" / "run"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "llama"}', "\0"])
def test_a_run_file_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "covgrpo_run.json").write_text(text)
    refused(TrainingError, "covgrpo_run.json is damaged or not of a run", tmp_path, out=str(tmp_path))


def _other_checkpoint(run: Path) -> None:
    """Whole, and of another run."""
    other = json.loads((run / "model" / "covgrpo_run.json").read_text())
    (run / "model" / "covgrpo_run.json").write_text(json.dumps({**other, "run": "0" * 16}))


def _cut(name: str) -> Callable[[Path], None]:
    def cut(run: Path) -> None:
        (run / name).write_bytes((run / name).read_bytes()[:-1])

    return cut


def _write(name: str, content: str = "mine\n") -> Callable[[Path], None]:
    def write(run: Path) -> None:
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        (run / name).unlink(missing_ok=True)
        (run / name).write_text(content)

    return write


def _folder(name: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        (run / name).unlink()
        (run / name / "mine").mkdir(parents=True)

    return make


def _link(name: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        (run / name).unlink()
        (run / name).symlink_to(run / "nowhere")

    return make


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_write("report.png"), "report.png"),
        (_write("metrics.jsonl", '{"step": 0}\n'), "metrics.jsonl"),
        (_write("metrics.jsonl", ""), "metrics.jsonl"),
        (_write("model"), "model"),
        (_write("model/covgrpo_run.json", "{}"), "model"),
        (_write("model/notes.txt"), "model"),
        (_write("warm_start/covgrpo_run.json", "{}"), "warm_start"),
        (_folder("report.png"), "report.png"),
        (_folder("metrics.jsonl"), "metrics.jsonl"),
        (_link("report.png"), "report.png"),
        (_other_checkpoint, "model"),
        (_write("model/optimizer.pt", ""), "model"),
        (_cut("model/optimizer.pt"), "model"),
        (_cut("model/model.safetensors"), "model"),
        (_cut("warm_start/model.safetensors"), "warm_start"),
    ],
)
def test_files_of_others_in_a_run(run: Path, harm: Callable[[Path], None], message: str) -> None:
    """Damaged, or of others, at names that the run would write next."""
    harm(run)
    message = rf"run/{message} is not as this run wrote it, .* or move {message} away, and what it held is done again"
    refused(TrainingError, message, run, out=str(run), steps=3)


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "config.json", "tokenizer.json"])
def test_a_checkpoint_whose_content_is_damaged(run: Path, name: str) -> None:
    """Of the size that it had."""
    path = run / "model" / name
    path.write_bytes(b"?" * path.stat().st_size)
    with pytest.raises((TrainingError, ValueError), match=rf"run/model(/{name}| \(qwen2\))? cannot be (read|used)"):
        train(dataclasses.replace(RUN, out=str(run), steps=3))


def test_other_files_beside_a_run_stay(run: Path) -> None:
    for name in ("notes.txt", "config.json"):
        _write(name)(run)
    train(dataclasses.replace(RUN, out=str(run), steps=3))
    for name in ("notes.txt", "config.json"):
        assert (run / name).read_text() == "mine\n"


def test_without_its_checkpoint_a_run_begins_again(run: Path) -> None:
    shutil.rmtree(run / "model")
    train(dataclasses.replace(RUN, out=str(run)))
    assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("lines", [1, 2])
def test_lost_metrics(run: Path, lines: int) -> None:
    path = run / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    with pytest.raises(TrainingError, match=r"metrics.jsonl does not hold all of the 2 steps of the checkpoint"):
        train(dataclasses.replace(RUN, out=str(run), steps=3))
    path.unlink()
    with pytest.raises(TrainingError, match="does not hold all of the 2 steps"):
        train(dataclasses.replace(RUN, out=str(run), steps=3))


def test_a_demo_is_no_run(run: Path, tmp_path: Path) -> None:
    options = json.loads((run / "covgrpo_run.json").read_text())
    (run / "covgrpo_run.json").write_text(json.dumps({**options, "command": "demo"}))
    refused(TrainingError, "holds a run with --command demo, not train", run, out=str(run))


def test_a_folder_is_exchanged_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a save is killed, what is found afterwards is the old folder or the new one."""
    from covgrpo_kernels.grpo import checkpoint

    def save(content: str) -> None:
        checkpoint.save_folder_atomically(tmp_path / "model", lambda path: (path / "weights").write_text(content))

    save("old")
    calls = [0]
    real = {name: getattr(module, name) for module, name in ((shutil, "rmtree"), (os, "replace"))}

    def killed_at(number: int, name: str, *arguments: object, **options: bool) -> None:
        calls[0] += 1
        if calls[0] == number:
            raise KeyboardInterrupt
        real[name](*arguments, **options)

    for number in itertools.count(1):
        calls[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", partial(killed_at, number, "rmtree"))
            patch.setattr(os, "replace", partial(killed_at, number, "replace"))
            try:
                save("new")
            except KeyboardInterrupt:
                pass
            else:
                break
        checkpoint.recover_folder(tmp_path / "model")
        assert (tmp_path / "model" / "weights").read_text() in ("old", "new")
        save("old")
        assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert number > 4


# --- inputs that changed -----------------------------------------------------------------------------------


def test_a_data_file_that_changed(tmp_path: Path) -> None:
    data, out = tmp_path / "mine.jsonl", tmp_path / "out"
    rows = [json.dumps({"prompt": f"say {i}", "answer": str(i)}) + "\n" for i in range(4)]
    data.write_text("".join(rows))
    options = dict(data=str(data), out=str(out))
    train(dataclasses.replace(RUN, **options))
    data.write_text("".join(rows[::-1]))
    refused(TrainingError, r"holds a run with --data .*mine.jsonl \(sha256 \w+\), not .* \(sha256", tmp_path, **options)
    data.write_text("".join(rows))
    train(dataclasses.replace(RUN, **options, steps=3))


def test_a_model_that_changed(tmp_path: Path) -> None:
    model, out = save_model(tmp_path / "start"), tmp_path / "out"
    options = dict(model=str(model), out=str(out), warm_start_steps=0)
    train(dataclasses.replace(RUN, **options))
    policy = training.load_policy(str(model), torch.device("cpu"))
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[3, 3] += 1
    policy.save(model)
    refused(TrainingError, r"holds a run with --model .*start \(weights \w+\), not .* \(weights", tmp_path, **options)


# --- models and tokenizers ---------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", vocab_size=VOCAB - 1)
    message = f"its tokenizer has tokens up to {VOCAB - 1}, its vocabulary only {VOCAB - 1}"
    refused(ValueError, message, tmp_path, model=str(model), out=str(tmp_path / "out"))


def test_an_added_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    refused(ValueError, f"tokens up to {VOCAB}, its", tmp_path, model=str(model), out=str(tmp_path / "out"))


def test_an_end_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    config = transformers.GenerationConfig.from_pretrained(model)
    config.eos_token_id = [1, VOCAB + 4]
    config.save_pretrained(model)
    refused(ValueError, f"tokens up to {VOCAB + 4}, its", tmp_path, model=str(model), out=str(tmp_path / "out"))


def test_the_vocabulary_may_be_larger_than_the_tokenizer(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", vocab_size=VOCAB + 6)
    train(dataclasses.replace(RUN, model=str(model), out=str(tmp_path / "out"), steps=1))


def test_our_tokenizer_stays_within_the_vocabulary(finished: Path) -> None:
    """Also once it was saved and loaded: Qwen2's own tokenizer would add a token for what is unknown."""
    policy = training.load_policy(str(finished / "model"), torch.device("cpu"))
    assert max(policy.tokenizer("<|endoftext|> <|im_end|>").input_ids) < VOCAB == policy.model.config.vocab_size


ENCODER = "it is an encoder: a token's logits depend on the tokens after it"


@pytest.mark.parametrize(
    ("family", "message"),
    [("bert", ENCODER), ("roberta", ENCODER), ("electra", ENCODER), ("rwkv", "it has no key-value cache")],
)
def test_models_that_cannot_be_trained(tmp_path: Path, family: str, message: str) -> None:
    model = save_model(tmp_path / "model", family, num_hidden_layers=2)
    message = rf"model .* \({family}\) cannot be used: {message}"
    refused(ValueError, message, tmp_path, model=str(model), out=str(tmp_path / "out"))


@pytest.mark.parametrize("family", ["t5", "bart", "vit", "clip"])
def test_other_kinds_of_models(tmp_path: Path, family: str) -> None:
    """Encoder-decoders, and what has nothing to do with text."""
    transformers.AutoConfig.for_model(family).save_pretrained(tmp_path / "model")
    message = rf"\({family}\) cannot be used: it is not a decoder-only causal language model"
    refused(ValueError, message, tmp_path, model=str(tmp_path / "model"), out=str(tmp_path / "out"))


def test_a_model_without_its_head(tmp_path: Path) -> None:
    """Loaded, its head would be random."""
    model = save_model(tmp_path / "model", tie_word_embeddings=False)
    transformers.AutoModel.from_pretrained(model).save_pretrained(model)
    refused(ValueError, "its files lack weights: lm_head.weight", tmp_path, model=str(model), out=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "message"), [("model.safetensors", "cannot be used"), ("config.json", "cannot be used")]
)
def test_a_cut_model(tmp_path: Path, name: str, message: str) -> None:
    model = save_model(tmp_path / "model")
    (model / name).write_bytes((model / name).read_bytes()[:100])
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(RUN, model=str(model), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_model_of_nan(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    broken = transformers.AutoModelForCausalLM.from_pretrained(model)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    broken.save_pretrained(model)
    refused(ValueError, "its logits are NaN", tmp_path, model=str(model), out=str(tmp_path / "out"))


def test_a_model_that_sees_its_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model")
    kind = type(transformers.AutoModelForCausalLM.from_pretrained(model))
    own = kind.forward

    def forward(self: Any, *arguments: Any, attention_mask: Any = None, **options: Any) -> Any:
        return own(self, *arguments, **options)

    monkeypatch.setattr(kind, "forward", forward)
    refused(ValueError, "its logits behind padding", tmp_path, model=str(model), out=str(tmp_path / "out"))


def test_a_model_without_tokenizer_or_end(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", eos_token_id=None)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    refused(ValueError, "it has no end-of-sequence token", tmp_path, model=str(model), out=str(tmp_path / "out"))
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="cannot be used"):
        train(dataclasses.replace(RUN, model=str(model), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# --- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["clip_cov", "kl_cov"])
def test_weightings_and_loss_types_that_do_not_go_together(tmp_path: Path, weighting: str) -> None:
    """Before the warm start, which may take minutes."""
    options = dict(out=str(tmp_path / "out"), loss_type="cispo", weighting=weighting)
    refused(ValueError, "loss_type 'cispo' has no PPO clip", tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seed=2**64), "seed must be <= 18446744073709551615, got 18446744073709551616"),
        (dict(lr=10**400), "lr must be finite, got 1000"),
    ],
)
def test_numbers_that_are_too_large(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RUN, **options)
    assert dataclasses.replace(RUN, seed=2**64 - 1).seed == 2**64 - 1


def test_a_run_that_is_finished_with_fewer_steps(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last step was not evaluated: what is said is of the last one that was."""
    start, first, second = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert "eval/accuracy" not in first
    other = {name: value for name, value in second.items() if name != "eval/accuracy"}
    for rows, last in (([start, first], 0), ([start, first, second, other | {"step": 3}], 2)):
        monkeypatch.setattr(training, "read_metrics", lambda path, rows=rows: rows)
        training.conclude(RunFolder(run, "train", {}, ()), RUN, 2)
        before, after = start["eval/accuracy"], rows[last]["eval/accuracy"]
        said = f"Of 2 held-out problems {before:.1%} solved at the start, {after:.1%} after {last} steps."
        assert said in capsys.readouterr().out
        assert f"{before:.0%} -> {after:.0%}" in demo.summary({"GRPO": rows})


def test_prompts_that_are_too_long(tmp_path: Path) -> None:
    """61 tokens and 3 new ones fit into 64 positions, 62 do not."""
    model, data = save_model(tmp_path / "model"), tmp_path / "mine.jsonl"
    options = dict(model=str(model), data=str(data), out=str(tmp_path / "out"), warm_start_steps=0)
    for length in (62, 61):
        rows = [{"prompt": "short", "answer": "a"}, {"prompt": "x" * length, "answer": "a"}]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if length == 62:
            message = r"mine.jsonl, line 2: a prompt must .* fit into the 64 positions .*, got 62 \+ 3 tokens with 'x"
            refused(ValueError, message, tmp_path, **options)
        else:
            train(dataclasses.replace(RUN, **options, steps=1))


def test_prompts_without_tokens(tmp_path: Path) -> None:
    """A tokenizer may leave nothing of a prompt: one that strips blanks, say."""
    from tokenizers import normalizers

    model, data = save_model(tmp_path / "model"), tmp_path / "mine.jsonl"
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    tokenizer.save_pretrained(model)
    data.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "xxx", "answer": "b"}\n')
    options = dict(model=str(model), data=str(data), out=str(tmp_path / "out"))
    refused(
        ValueError, "mine.jsonl, line 2: a prompt must have tokens, .* got 0 .* tokens with 'xxx'", tmp_path, **options
    )


# --- what the command says ---------------------------------------------------------------------------------


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "mine")
    capsys.readouterr()
    assert cli.main(["train", "--model", str(model), "--out", str(model)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("covgrpo: error: out must not be in the folder of the model")
    assert error.count("\n") == 1

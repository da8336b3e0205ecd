"""The benchmark of training: it sees what the backward does wrong, and nothing where there is nothing to see."""

import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from covgrpo_kernels import CovGRPOConfig, linear_logprob, reference
from covgrpo_kernels.grpo.rollout import Batch, Rollout
from covgrpo_kernels.testing import random_batch
from research import training
from research.languages import Languages, make_batch
from research.training import EXACT, TOY, Comparison, Variant

AUTO = torch.finfo(torch.bfloat16).eps / 8
FLOAT32 = Variant("float32", dtype=torch.float32)


@pytest.fixture(scope="module")
def corpus():
    return training.make_corpus(TOY)


def language_model(corpus, *chosen):
    """Phase -> comparisons, and phase -> curves by seed, of two seeds."""
    by_seed = [dict(training.language_model(seed, corpus, TOY, 2, list(chosen))) for seed in (0, 1)]
    by_phase = {name: [made[name] for made in by_seed] for name in by_seed[0]}
    return {name: training.compare(found, list(chosen)) for name, found in by_phase.items()}, by_phase


def test_what_is_left_out_is_seen_and_an_identical_run_is_not(corpus):
    """Half of the gradient against bfloat16's rounding; and as little of it as rounds to nothing."""
    chosen = EXACT, Variant("half", grad_tol=0.5), Variant("nothing", grad_tol=1e-30), FLOAT32
    comparisons, curves = language_model(corpus, *chosen)
    assert training.verdicts(comparisons) == dict(half=True, nothing=False)
    for seeds in curves.values():
        for runs in seeds:
            exact, same = ({c: x for c, x in runs[name].items() if "/" not in c} for name in ("exact", "nothing"))
            assert same == {c: x for c, x in exact.items() if "moved" not in c}
            assert not any(same["weights"])


@pytest.mark.parametrize(("error", "seen"), [(0.05, True), (0.0, False)])
def test_an_error_in_the_gradient_of_the_head_is_seen(corpus, monkeypatch, error, seen):
    """5% of each entry, in the runs at the default tolerance only."""

    def planted(hidden, weight, targets, *, grad_tol, **options):
        if grad_tol == AUTO and error:
            weight = weight.clone()
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
            weight.register_hook(lambda grad: grad * (1 + error * noise))
        return linear_logprob(hidden, weight, targets, grad_tol=grad_tol, **options)

    monkeypatch.setattr(training, "linear_logprob", planted)
    comparisons, _ = language_model(corpus, EXACT, Variant("auto", AUTO), FLOAT32)
    assert training.verdicts({"later": comparisons["later"]}) == dict(auto=seen)


def compared(distances, noise, **names):
    options = dict(tolerance="auto", yardstick="float32", curve="weights") | names
    return Comparison(distances=distances, noise=noise, **options)


@pytest.mark.parametrize(
    ("distances", "noise", "expected"),
    [
        ([3.0, 3.3, 6.0], [1.0, 1.1, 2.0], True),  # seeds differ, but both alike
        ([1.0, 1.1, 2.0], [3.0, 3.3, 6.0], False),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], False),
        ([1.2, 4.0, 1.1], [1.0, 1.0, 1.0], False),  # further, by less than seeds differ
        ([9.0, 9.0, 0.9], [1.0, 1.0, 1.0], False),  # not in every seed
        ([1e-9, 1e-9], [0.0, 0.0], True),
        ([1e-9, 2.0], [0.0, 1.0], True),
        ([0.5, 1.0], [1.0, 0.0], False),
        ([0.0, 0.0], [0.0, 0.0], False),
    ],
)
def test_beyond_the_noise(distances, noise, expected):
    assert compared(distances, noise).distinguishable == expected


def test_the_verdict_is_on_the_weights_and_every_yardstick():
    far, near = ([2.0, 2.0], [1.0, 1.0]), ([1.0, 1.0], [2.0, 2.0])
    one = {"grpo": [compared(*far, yardstick="reordered"), compared(*near)]}
    assert training.verdicts(one) == dict(auto=False)
    assert training.verdicts({"grpo": [compared(*far, curve="loss")]}) == dict(auto=False)
    both = {"grpo": [compared(*far, yardstick="reordered"), compared(*far)]}
    assert training.verdicts(both) == dict(auto=True)
    assert training.verdicts({"scratch": one["grpo"]} | both) == dict(auto=True)
    assert training.verdicts({"loop": [compared(*far, curve="head")]}) == dict(auto=True)


def test_curves_are_compared_step_by_step():
    exact, run = dict(loss=[1.0, 2.0], weights=[0.0, 0.0]), dict(loss=[1.0, 5.0], weights=[7.0, 3.0])
    assert training.apart("loss", run, exact) == pytest.approx((9 / 2) ** 0.5)
    assert training.apart("weights", run, exact) == 3.0


def test_distance_of_weights():
    a = training.Weights([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], [torch.tensor([[4.0]])])
    b = a.copy()
    b.everything[0][1] = 1.0
    assert b.distances(a) == dict(weights=pytest.approx(1 / 5), head=0.0)
    assert a.everything[0][1] == 0


def test_distance_of_policies():
    a, b = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert training.divergence(a.double().log(), b.double().log()) == pytest.approx(expected)
    assert training.divergence(a.double().log(), a.double().log()) == 0


def test_two_languages_share_no_tail():
    """Hardly any probability is in the other language; the tails of one are alike, or vary, as is asked for."""
    for own_tail, alike in ((0.1, True), (1.5, False)):
        sizes = Languages(tokens=128, depth=256, vocab=600, own_tail=own_tail)
        batch, weight = make_batch(0, sizes)
        p = (batch.hidden.double() @ weight.double().T).softmax(1)
        by_language = torch.stack([p[:, 0::2].sum(1), p[:, 1::2].sum(1)], 1)
        language = by_language.argmax(1)
        assert by_language.amin(1).max() < 1e-3
        assert set(language.tolist()) == {0, 1}
        assert set((batch.targets % 2 == language).tolist()) == {True}
        tails = p[language == 0][:, 0::2].log()
        spread = (tails - tails.median(1, keepdim=True).values).std(0).median()
        assert (spread < 1.3) == alike  # embeddings are not quite orthogonal, which adds some 0.9
        assert 0 < (batch.logprob_grad == 0).sum() < len(p) / 2


def test_the_eager_run_is_the_reference():
    """Of `covgrpo_loss` only metrics are left in it."""
    made = random_batch(0, dtype=torch.float64)
    leaves = {name: made[name].requires_grad_() for name in ("hidden", "weight")}
    config = CovGRPOConfig(weighting="none")
    out = training.eager_loss(**made, config=config, grad_tol=0.0, process_group=None)
    expected = reference.covgrpo_loss(**made, config=config)
    assert torch.equal(out.loss, expected.loss)
    assert out.metrics
    for a, b in zip(*(torch.autograd.grad(x.loss, list(leaves.values())) for x in (out, expected)), strict=True):
        assert torch.equal(a, b)


def test_reordered_rows_stay_in_their_group():
    tokens = torch.arange(12).unsqueeze(1).repeat(1, 3)
    data = Rollout(
        Batch(tokens, tokens, torch.ones(12, 2, dtype=torch.bool)), torch.arange(12.0), tokens[:, :2].float(), None
    )
    training._reorder(data, 4, torch.Generator().manual_seed(0))
    order = data.advantages.long()
    assert order.tolist() != list(range(12))
    assert [sorted(group.tolist()) for group in order.view(3, 4)] == [list(range(i, i + 4)) for i in (0, 4, 8)]
    assert torch.equal(data.batch.tokens, tokens[order])
    assert torch.equal(data.old_logprobs, tokens[order, :2].float())


def test_reward():
    assert training.overlap([5, 5, 5, 9], [5, 5, 7, 8]) == 0.5
    assert training.overlap([], [1]) == 0


def test_too_little_text_is_said():
    with pytest.raises(ValueError, match="1000000 are needed"):
        training.make_corpus(dataclasses.replace(TOY, vocab=10**6, files=2))


def test_one_seed_is_refused(monkeypatch):
    monkeypatch.setattr(training, "measure", None)  # not for a quarter of an hour, if it isn't
    with pytest.raises(ValueError, match="seeds must be >= 2, got 1"):
        training.run(seeds=1)


def test_smoke(tmp_path, monkeypatch, capsys):
    """All that a run does, at toy sizes; and that it writes nothing unless it is told where."""
    training.run(smoke=True, out=tmp_path)
    output = capsys.readouterr().out
    for tolerance in ("auto", "10x auto"):
        assert f"{tolerance} (grad_tol=" in output
    assert all(f"{phase}: {what}" in output for phase, what in training.PHASES.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.json", "training.png"]
    made = json.loads((tmp_path / "training.json").read_text())
    assert set(made["distinguishable"]) == {"auto", "10x auto"}
    assert made["variants"]["auto"] == dict(grad_tol=AUTO, dtype="bfloat16")
    assert {"cpu", "threads", "processes", "commit"} <= set(made["environment"])
    for name, phase in made["phases"].items():
        for runs in phase["seeds"]:
            assert set(runs) == set(made["variants"])
            wanted = {"loss", "weights", "head", "policy"}
            wanted |= {"reward"} if name in ("grpo", "loop") else set()
            wanted |= {"entropy"} if "tails" not in training.PHASES[name] and name != "languages" else set()
            steps = {len(values) for run in runs.values() for values in run.values()}
            assert len(steps) == 1
            assert all(wanted <= set(run) for run in runs.values())
            assert not any(runs["exact"]["weights"])

    written = []
    monkeypatch.setattr(training, "measure", lambda *arguments: made)
    monkeypatch.setattr(training, "write_json", lambda path, report: written.append(path))
    monkeypatch.setattr(training, "save_plot", lambda report, path: written.append(path))
    training.run(smoke=True)
    assert written == []
    training.run()
    assert written == [training.RESULTS / "training.json", training.RESULTS / "training.png"]

"""The entropy law: exact to first order, taken of real updates, and reported as measured."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from covgrpo_kernels import covgrpo_loss, reference
from covgrpo_kernels.grpo.policy import Policy, new_policy
from covgrpo_kernels.grpo.rollout import Rollout, sample
from research import RESULTS
from research.entropy_law import law
from research.entropy_law.law import States, entropy, first_order, gradients, measure_step
from research.entropy_law.report import findings, updated
from research.entropy_law.run import is_finished, run
from research.entropy_law.statistics import agreement, correlation, interval, slope, statistics

F64 = torch.float64
EPS = torch.finfo(F64).eps
ROOT = Path(__file__).parents[2]
PLAN = law.plan(0, quick=True)
STEPS = (1e-4, 1e-3)
GROUP, TEMPERATURE = 4, PLAN.policy.temperature


@pytest.fixture(scope="module")
def policy() -> Policy:
    policy = new_policy(64, 1, seed=0, device=torch.device("cpu"))
    policy.model.double()
    return policy


@pytest.fixture(scope="module")
def data(policy: Policy) -> Rollout:
    """Responses of different lengths; a group whose advantages are zero."""
    batch = sample(policy, ["1+1=", "23", "4"], GROUP, 6, TEMPERATURE, torch.Generator().manual_seed(1))
    batch.mask &= torch.arange(6) < torch.arange(len(batch.mask))[:, None] % 5 + 2
    advantages = torch.randn(3 * GROUP, generator=torch.Generator().manual_seed(2), dtype=F64)
    advantages[GROUP : 2 * GROUP] = 0
    return Rollout(batch, advantages, torch.zeros(batch.mask.shape), None)


# -------------------------------------------------------------------------------------------------------- the law


@given(seed=st.integers(0, 2**31), sureness=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_law_is_the_derivative_of_the_entropy(seed: int, sureness: float) -> None:
    """Against autograd, which goes another way: within rounding of the terms that are added up."""
    generator = torch.Generator().manual_seed(seed)
    z = (sureness * torch.randn(5, 33, generator=generator, dtype=F64)).requires_grad_()
    dz = torch.randn(5, 33, generator=generator, dtype=F64)
    [gradient] = torch.autograd.grad(entropy(z).sum(), z)
    log_p = z.detach().log_softmax(-1)
    terms = log_p.exp() * (log_p.abs() + entropy(z.detach())[:, None] + 1) * dz.abs()
    error = (first_order(z.detach(), dz) - (gradient * dz).sum(-1)).abs()
    assert (error <= 8 * EPS * (1 + sureness) * terms.sum(-1)).all()


def test_error_of_the_law_falls_with_the_square_of_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, advantages = torch.randn(50, 33, generator=generator, dtype=F64), torch.randn(50, generator=generator)
    responses = torch.randint(33, (50,), generator=generator)
    laws = law.logit_law(logits, advantages.double(), responses, generator)["laws"]
    assert list(laws) == ["natural gradient", "gradient", "gradient of a sampled token"]
    for found in laws.values():
        assert found["slope"] == pytest.approx(2, abs=0.05)
        assert found["error"][0] < 0.01 * found["change"][0]


# ------------------------------------------------------------------------------------------------------ one batch


def test_covariance_is_that_of_the_weights(policy: Policy, data: Rollout) -> None:
    """The weights of the reference are a softmax of the covariance measured here."""
    logits = law.response_logits(policy, data.batch, TEMPERATURE).detach()
    tokens = law.tokens_of(data, logits, GROUP)
    mask = data.batch.mask
    x = torch.zeros(mask.shape, dtype=F64).masked_scatter(mask, tokens.x)
    weights = reference.covariance_weights(x, data.advantages, mask, group_size=GROUP)[mask]
    group = (torch.arange(len(mask)) // GROUP)[:, None].expand(mask.shape)[mask]
    for i in range(3):
        c = tokens.covariance[group == i]
        expected = len(c) * (-c.square() / (2 * c.var(correction=0))).softmax(0) if i != 1 else torch.ones_like(c)
        torch.testing.assert_close(weights[group == i], expected, rtol=1e-10, atol=0)

    loss = data.batch.apply_head(
        policy,
        lambda *a, **how: covgrpo_loss(
            *a, data.batch.responses, data.advantages, mask, group_size=GROUP, temperature=TEMPERATURE, **how
        ),
    )
    assert tokens.H.mean().item() == pytest.approx(loss.metrics["entropy"].item(), rel=1e-6)
    assert tokens.covariance.mean().item() == pytest.approx(loss.metrics["covariance/mean"].item(), rel=1e-6)


def test_predictions_are_the_laws(policy: Policy, data: Rollout) -> None:
    """Covariances within and between states add up, and all is negated: what raises the covariance lowers entropy."""
    logits = law.response_logits(policy, data.batch, TEMPERATURE).detach()
    tokens = law.tokens_of(data, logits, GROUP)
    responses = data.batch.responses[data.batch.mask]
    found = law.predictions(tokens, logits, responses)
    assert found["covariance"] == pytest.approx(-tokens.covariance.mean().item(), rel=1e-12)
    parts = found["covariance within states"] + found["covariance between states"]
    assert parts == pytest.approx(found["covariance"], rel=1e-10)
    # What a gradient in the logits does, by the chain rule through each state's log-prob and entropy.
    z = logits.clone().requires_grad_()
    [score] = torch.autograd.grad((tokens.A * z.log_softmax(-1).gather(1, responses[:, None])[:, 0]).sum(), z)
    [slope] = torch.autograd.grad(entropy(z).mean(), z)
    assert found["gradient of each state's logits"] == pytest.approx((score * slope).sum().item(), rel=1e-9)


def test_covariance_within_a_state_is_estimated_without_bias() -> None:
    """One state, each of its tokens as often as it is sampled: the mean is -Cov(log p, A), whatever the baseline."""
    counts = torch.tensor([1, 2, 5, 8])
    z, responses = (counts / 16.0).to(F64).log(), torch.arange(4).repeat_interleave(counts)
    A = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=F64)
    x = z[responses]
    for baseline in (A[responses].mean(), 3.0):
        dA = A[responses] - baseline
        tokens = law.Tokens(x, entropy(z).expand(16), (x - x.mean()) * dA, dA, A[responses])
        found = law.predictions(tokens, z.expand(16, 4), responses)
        assert found["covariance within states"] == pytest.approx(first_order(z, A).item(), rel=1e-12)
        assert found["covariance between states"] == pytest.approx(0, abs=1e-15)  # there is only one


def test_updates_of_the_parts_add_up(policy: Policy, data: Rollout) -> None:
    """Of the tokens with the highest and lowest covariance and those between, the gradients make that of all."""
    logits = law.response_logits(policy, data.batch, TEMPERATURE).detach()
    c = law.tokens_of(data, logits, GROUP).covariance
    parts = law.parts(c)
    assert (parts["top"] + parts["middle"] + parts["bottom"] == parts["all"]).all()
    assert parts["all"].all()
    assert parts["top"].sum() == pytest.approx(0.2 * len(c), abs=1)
    assert c[parts["top"] == 1].min() >= c[parts["middle"] == 1].max()
    assert c[parts["middle"] == 1].min() >= c[parts["bottom"] == 1].max()

    def of(part: str) -> list[torch.Tensor]:
        return gradients(policy, data, config, "none", parts[part])

    config = dataclasses.replace(PLAN.policy, group_size=GROUP)
    whole = gradients(policy, data, config, "none")
    # transformers computes norms in float32, their gradients as well.
    size = 4 * torch.finfo(torch.float32).eps * max(g.abs().max().item() for g in whole)
    for g, everything, *three in zip(whole, of("all"), of("top"), of("middle"), of("bottom"), strict=True):
        torch.testing.assert_close(everything, g, rtol=0, atol=size)
        torch.testing.assert_close(sum(three), g, rtol=0, atol=size)


def test_a_step_is_measured_and_taken_back(policy: Policy, data: Rollout) -> None:
    """What the first order in the parameters leaves of the change falls with the square of the step; the optimiser
    moves as it says; not a bit of the policy is different afterwards."""
    states = {"own": States.of(policy, data.batch, TEMPERATURE)}
    generator = torch.Generator().manual_seed(3)
    gradient = [torch.randn(p.shape, generator=generator, dtype=F64) for p in policy.model.parameters()]
    before = copy.deepcopy(policy.model.state_dict())
    for optimizer, moved in (("SGD", gradient), ("AdamW", [g / (g.abs() + 1e-8) for g in gradient])):
        expected = -sum((h * m).sum().item() for h, m in zip(states["own"].gradient, moved, strict=True))
        errors = []
        for step in STEPS:
            found = measure_step(policy, gradient, optimizer, step, states, TEMPERATURE)
            assert found["own, first order"] == pytest.approx(step * expected, rel=1e-6)
            errors.append(abs(found["own"] - found["own, first order"]))
        assert math.log10(errors[1] / errors[0]) == pytest.approx(2, abs=0.1)
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ---------------------------------------------------------------------------------------------- what it amounts to


def test_intervals() -> None:
    """Of the mean as wide as the normal distribution has it; where all is certain, of no width."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=F64)
    value, low, high = interval(lambda v: v.mean(-1), x.tolist())
    width = 1.96 * x.std().item() / 200**0.5
    assert value == pytest.approx(x.mean().item())
    assert (value - low, high - value) == pytest.approx((width, width), rel=0.1)
    line = (1 - 3 * x).tolist()
    assert interval(correlation, x.tolist(), line) == pytest.approx([-1, -1, -1])
    assert interval(slope, x.tolist(), line) == pytest.approx([-3, -3, -3])
    assert interval(agreement, x.tolist(), (-x).tolist()) == [0, 0, 0]
    noise = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=F64)
    _, low, high = interval(correlation, x.tolist(), noise.tolist())
    assert low < 0 < high


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("law")
    return run(out, quick=True), out


def test_quick_run(quick: tuple[dict, Path]) -> None:
    results, out = quick
    assert json.loads((out / "entropy_law.json").read_text()) == results
    assert (out / "entropy_law.png").read_bytes().startswith(b"\x89PNG")
    assert [(stage["seed"], stage["grpo_steps"]) for stage in results["stages"]] == [(0, 0), (0, 2)]
    text = findings(results)
    assert "nan" not in text
    assert text.count("#### After") == 2
    for stage in results["stages"]:
        for row in stage["changes"]:
            if row["optimizer"] == "AdamW" and row["update"] == "all":
                errors = torch.tensor(row["own"]) - torch.tensor(row["own, first order"])
                assert errors.abs().mean() < 0.3 * torch.tensor(row["own"]).abs().mean()
            assert len(row["own"]) == len(row["fresh"]) == PLAN.batches


def test_a_law_of_other_settings_is_not_taken(quick: tuple[dict, Path], tmp_path: Path) -> None:
    assert is_finished(quick[1], quick=True)
    assert not is_finished(quick[1])
    assert not is_finished(quick[1], seed=1, quick=True)
    assert not is_finished(tmp_path, quick=True)


def test_sentences_follow_the_numbers(quick: tuple[dict, Path]) -> None:
    def text(kind: str, name: str, found: list[float], **label: object) -> str:
        results = copy.deepcopy(quick[0])
        rows = [row for row in results["statistics"][kind] if label.items() <= row.items()]
        assert rows
        for row in rows:
            row[name] = found
        return findings(results)

    fresh = dict(law="covariance", states="fresh")
    for found, words in (
        ([0.5, 0.2, 0.8], "the covariance predicts how the entropy of fresh"),
        ([0.1, -0.2, 0.3], "the covariance does not predict how the entropy of fresh"),
        ([-0.5, -0.8, -0.2], "the covariance predicts the opposite of how the entropy of fresh"),
    ):
        assert text("laws", "correlation", found, **fresh).count(words) == 2
        cases = 4 if found[1] > 0 else 0
        assert f"for own states and in {cases} for fresh ones; the gradient" in text(
            "laws", "correlation", found, **fresh
        )
    for found, words in (
        ([-1e-3, -2e-3, -1e-4], "own states is lower than after GRPO's (-1.00 [-2.00, -0.10] thousandths"),
        ([1e-3, 1e-4, 2e-3], "own states is higher than after GRPO's (1.00 [0.10, 2.00] thousandths"),
        ([1e-4, -1e-3, 1e-3], "own states does not certainly differ (0.10 [-1.00, 1.00] thousandths"),
    ):
        assert text("weights", "difference", found, optimizer="AdamW", states="own").count(words) == 2
        cases = 4 if found[1] > 0 else 0
        assert f"than after GRPO's in {cases} of 4 for own" in text("weights", "difference", found, states="own")
    falls, rises = [-1.0, -2.0, -0.5], [1.0, 0.5, 2.0]
    for top, bottom, words in (
        (falls, rises, "it rises, on those between"),
        (falls, rises, "the signs are those of the premise"),
        (rises, rises, "these are not, beyond doubt, the signs of the premise"),
        (falls, [0.5, -1.0, 2.0], "these are not, beyond doubt, the signs of the premise"),
    ):
        results = copy.deepcopy(quick[0])
        for row in results["statistics"]["updates"]:
            row["change"] = {"top": top, "bottom": bottom}.get(row["update"], row["change"])
        assert findings(results).count(words) == 2


# --------------------------------------------------------------------------------------------- what is committed


def test_document_says_what_was_measured() -> None:
    """None of its figures is typed by hand, and the statistics are those of the batches."""
    document = ROOT / "docs" / "method.md"
    results = json.loads((RESULTS / "entropy_law.json").read_text())
    again = statistics(results["stages"])
    for kind, rows in results["statistics"].items():
        for row, expected in zip(rows, again[kind], strict=True):
            for name, value in expected.items():
                assert row[name] == (pytest.approx(value, rel=1e-4, abs=1e-9) if isinstance(value, list) else value)
    text = document.read_text()
    assert updated(text, findings(results)) == text
    assert (RESULTS / "entropy_law.png").exists()
    assert "../research/results/entropy_law.png" in text

"""Rows that share what they have in common, against the padded rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("transformers")

from covgrpo_kernels import linear_logprob
from covgrpo_kernels.grpo.policy import Policy, new_policy
from covgrpo_kernels.grpo.rollout import Batch, sample
from research.prefix_tree import PrefixTree, PrefixTreePolicy

PROMPTS = ["1+1=2\n3+4=", "1+1=2\n3+5=", "1+1=2\n12+7=", "2"]


@pytest.fixture
def policies() -> tuple[Policy, PrefixTreePolicy]:
    """The same model twice, in float64, so that what is compared differs by little."""
    plain = new_policy(64, 2, 0, torch.device("cpu"))
    plain.model.double()
    return plain, PrefixTreePolicy(plain.model, plain.tokenizer, plain.device)


def sampled(policy: Policy, seed: int = 0) -> Batch:
    return sample(policy, PROMPTS, 4, 6, 0.5, torch.Generator().manual_seed(seed))


def test_nodes_are_the_different_prefixes() -> None:
    tokens = torch.tensor([[0, 7, 8, 9], [0, 7, 8, 5], [7, 8, 8, 9], [7, 8, 9, 0]])
    attention = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    tree = PrefixTree.of(tokens, attention)
    prefixes = {
        tuple(row[there][: length + 1].tolist())
        for row, there in zip(tokens, attention.bool(), strict=True)
        for length in range(int(there.sum()))
    }
    found = []
    for node in range(tree.tokens.shape[1]):
        branch = tree.visible[0, 0, node].nonzero().flatten()
        assert (branch <= node).all()
        assert tree.positions[0, node] == len(branch) - 1
        assert tree.positions[0, branch].tolist() == list(range(len(branch)))
        found.append(tuple(tree.tokens[0, branch].tolist()))
    assert len(found) == len(prefixes)
    assert set(found) == prefixes
    for row in range(4):
        for column in attention[row].nonzero().flatten():
            prefix = tokens[row, : column + 1][attention[row, : column + 1].bool()]
            assert found[tree.places[row, column]] == tuple(prefix.tolist())


def test_a_batch_needs_a_token() -> None:
    with pytest.raises(ValueError, match="attention must have a token"):
        PrefixTree.of(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long))


def test_samples_are_those_of_the_padded_rows(policies: tuple[Policy, PrefixTreePolicy]) -> None:
    for seed in range(3):
        plain, shared = (sampled(policy, seed) for policy in policies)
        assert torch.equal(plain.tokens, shared.tokens)
        assert torch.equal(plain.attention, shared.attention)


def test_logprobs_and_gradients_are_those_of_the_padded_rows(policies: tuple[Policy, PrefixTreePolicy]) -> None:
    batch = sampled(policies[0])
    assert PrefixTree.of(batch.tokens, batch.attention).tokens.numel() < 0.6 * batch.attention.sum()
    weights = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for policy in policies:
        policy.model.zero_grad()
        score = partial(linear_logprob, targets=batch.responses.where(batch.mask, -100), grad_tol=0.0)
        logprob = batch.apply_head(policy, score).logprob
        (logprob * weights).sum().backward()
        results.append([logprob.detach(), *(parameter.grad for parameter in policy.model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        # Qwen2 normalises in float32.
        bound = 16 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def test_the_whole_logits_are_refused(policies: tuple[Policy, PrefixTreePolicy]) -> None:
    batch = sampled(policies[0])
    with pytest.raises(ValueError, match="forward must be called with head, or with logits_to_keep=1"):
        policies[1].forward(batch.tokens, batch.attention)

"""A training step of plain PyTorch with gradient accumulation.

What it shows: `covgrpo_loss` in micro-batches. The denominator of the loss is that of the whole batch, passed as
`normalizer`, and groups may be cut by micro-batches: their statistics are taken before, by `GroupMoments`.

What to expect: the gradient that two micro-batches accumulate is that of the whole batch in one call. The difference
that is printed is rounding, some 1e-7 of the gradient.

    python examples/accumulation.py
"""

import torch
from torch import Tensor, nn

from covgrpo_kernels import CovGRPOConfig, GroupMoments, covgrpo_loss, linear_logprob

VOCAB, WIDTH, GROUP = 500, 64, 4
CONFIG = CovGRPOConfig()  # CW-GRPO; with weighting="none" there are no moments to take


class Model(nn.Module):
    """Stands for yours."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(VOCAB, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def backbone(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B, L, D], without the head
        return self.rnn(self.embed(tokens))[0]


def gradient(model: Model, batch: dict[str, Tensor], micro_batches: list[slice]) -> Tensor:
    """Of the head, after one step's micro-batches."""
    model.zero_grad()
    tokens, mask = batch["tokens"], batch["is_response"][:, 1:]

    # Once, before the first update on these samples: log-probs and, from them, the statistics of the groups.
    old, moments = [], []
    for rows in micro_batches:
        with torch.no_grad():
            hidden = model.backbone(tokens[rows])[:, :-1]
            old.append(linear_logprob(hidden, model.lm_head.weight, tokens[rows, 1:]).logprob)
        ids = batch["group_ids"][rows]
        moments.append(GroupMoments.of(old[-1], batch["advantages"][rows], mask[rows], group_ids=ids))
    of_all = moments[0].merge(*moments[1:])

    for rows, old_logprobs in zip(micro_batches, old, strict=True):
        out = covgrpo_loss(
            model.backbone(tokens[rows])[:, :-1],  # [B, T, D]: the state at position t predicts the token at t + 1
            model.lm_head.weight,
            targets=tokens[rows, 1:],
            advantages=batch["advantages"][rows],
            mask=mask[rows],
            group_ids=batch["group_ids"][rows],
            old_logprobs=old_logprobs,
            config=CONFIG,
            normalizer=len(tokens),  # sequences of the whole batch
            moments=of_all,
        )
        out.loss.backward()
    assert model.lm_head.weight.grad is not None
    return model.lm_head.weight.grad.clone()


def main() -> float:
    """The difference of the two gradients, relative to their norm."""
    torch.manual_seed(0)
    model = Model()
    batch = dict(
        tokens=torch.randint(VOCAB, (3 * GROUP, 20)),  # [B, L]: prompt and response in one row
        is_response=(torch.arange(20) >= 5).expand(3 * GROUP, 20),  # neither prompt nor padding
        advantages=torch.randn(3 * GROUP),
        group_ids=torch.arange(3 * GROUP) // GROUP,
    )
    whole = gradient(model, batch, [slice(0, 12)])
    parts = gradient(model, batch, [slice(0, 6), slice(6, 12)])  # the second group is in both
    difference = ((parts - whole).norm() / whole.norm()).item()
    print(f"gradients of two micro-batches and of the whole batch differ by {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()

"""Packed sequences: responses of different lengths in one line, and nothing spent on padding.

What it shows: the packed layout of `covgrpo_loss`, with what `packed_sequences` makes of the tokens and positions that
a model of transformers takes. Only the ids of its sequence and of its group say which response a token is of.

What to expect: the loss and its gradient are those of the padded layout, in fewer tokens. The differences that are
printed are rounding, some 1e-7.

    pip install '.[grpo]'
    python examples/packed.py
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from covgrpo_kernels import CovGRPOOutput, covgrpo_loss
from covgrpo_kernels.integrations.transformers import patch_model
from covgrpo_kernels.packing import packed_sequences

GROUP, PROMPT = 4, 3


def tiny_model() -> Any:
    """Stands for yours."""
    torch.manual_seed(0)
    size = dict(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return patch_model(LlamaForCausalLM(LlamaConfig(**size)))


def padded(model: Any, texts: list[Tensor], advantages: Tensor) -> Tensor:  # []
    tokens = pad_sequence(texts, batch_first=True)  # [B, L]
    place, lengths = torch.arange(tokens.shape[1]), torch.tensor([len(text) for text in texts])
    is_token = place < lengths[:, None]
    is_response = is_token & (place >= PROMPT)

    def policy_loss(hidden: Tensor, weight: Tensor, **head: Any) -> CovGRPOOutput:  # [B, L, D], [V, D]
        return covgrpo_loss(
            hidden[:, :-1], weight, tokens[:, 1:], advantages, is_response[:, 1:], group_size=GROUP, **head
        )

    return model(tokens, attention_mask=is_token.long(), head=policy_loss).loss


def packed(model: Any, texts: list[Tensor], advantages: Tensor) -> Tensor:  # []
    tokens = torch.cat(texts)[None]  # [1, N]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    targets, sequence, _ = packed_sequences(tokens, position_ids=positions)  # [1, N] each
    # The state at a token predicts the next one: so what belongs to a token moves one place to the left.
    is_response = (positions >= PROMPT).roll(-1, -1)

    def policy_loss(hidden: Tensor, weight: Tensor, **head: Any) -> CovGRPOOutput:  # [1, N, D], [V, D]
        ids = sequence[0]
        return covgrpo_loss(
            hidden[0], weight, targets[0], advantages[ids], is_response[0],
            sequence_ids=ids, group_ids=ids // GROUP, **head,
        )  # fmt: skip

    return model(tokens, position_ids=positions, head=policy_loss).loss


def main() -> tuple[float, float]:
    """Relative differences of the loss and of the head's gradient."""
    model = tiny_model()
    texts = [torch.randint(200, (PROMPT + n,)) for n in (3, 12, 5, 2, 9, 1, 4, 7)]  # 2 prompts, 4 responses each
    advantages = torch.randn(len(texts))
    losses, grads = [], []
    for loss_of in (padded, packed):
        model.zero_grad()
        losses.append(loss_of(model, texts, advantages))
        losses[-1].backward()
        grads.append(model.lm_head.weight.grad.clone())
    loss = ((losses[1] - losses[0]) / losses[0]).abs().item()
    grad = ((grads[1] - grads[0]).norm() / grads[0].norm()).item()
    packed_tokens, padded_tokens = sum(map(len, texts)), len(texts) * max(map(len, texts))
    print(f"{packed_tokens} tokens in place of {padded_tokens}; differences: loss {loss:.0e}, gradient {grad:.0e}")
    return loss, grad


if __name__ == "__main__":
    main()

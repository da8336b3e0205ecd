"""LoRA: adapters are trained, the backbone and the head are frozen.

What it shows: `patch_model` on a model of PEFT. The loss runs within the model's forward. Since the head is frozen its
gradient, the largest there is, is never computed: the backward makes that of the hidden states alone.

What to expect: after twenty updates on one batch the responses that were better than their group are likelier, and the
others less likely. The head has no gradient. This takes a second or two on one CPU core.

    pip install '.[grpo]' peft
    python examples/lora_frozen_head.py
    python examples/lora_frozen_head.py --weighting covariance    # CW-GRPO
"""

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from covgrpo_kernels import CovGRPOConfig, CovGRPOOutput, covgrpo_loss
from covgrpo_kernels.integrations.transformers import patch_model

GROUP, PROMPT = 4, 5


def tiny_model() -> Any:
    """Stands for yours."""
    size = dict(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**size))


def main(steps: int = 20, weighting: str = "none") -> tuple[float, float, Any]:
    """By how many nats a token of better and of worse responses became likelier, and the model."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    patch_model(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    config = CovGRPOConfig(weighting=weighting)  # type: ignore[arg-type]

    tokens = torch.randint(200, (4 * GROUP, 16))  # [B, L]: 4 prompts with 4 responses each, as a sampler makes them
    is_response = (torch.arange(16) >= PROMPT).expand_as(tokens)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(4)  # [B]
    labels = tokens.where(is_response, -100)

    def logprobs() -> Tensor:  # [B, L - 1]; without logits
        with torch.no_grad():
            return model(tokens, labels=labels, return_logprobs=True).logprobs

    def policy_loss(hidden: Tensor, weight: Tensor, **head: Any) -> CovGRPOOutput:  # [B, L, D], [V, D]
        return covgrpo_loss(
            hidden[:, :-1], weight, labels[:, 1:], advantages, group_size=GROUP, old_logprobs=old, config=config, **head
        )

    old = logprobs()
    for _ in range(steps):
        model(tokens, head=policy_loss).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    change = (logprobs() - old).sum(1) / is_response[:, 1:].sum(1)
    better, worse = change[advantages > 0].mean().item(), change[advantages < 0].mean().item()
    print(f"log-prob of a token: {better:+.3f} nats in better responses, {worse:+.3f} in worse ones")
    return better, worse, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="CovGRPO with LoRA and a frozen head")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--weighting", default="none", help="as CovGRPOConfig takes it")
    main(**vars(parser.parse_args()))

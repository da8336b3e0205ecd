"""FSDP2: a model whose parameters are sharded over the processes of torchrun, each with its own part of the batch.

What it shows: `patch_model` runs the loss within the model's forward, where FSDP2 has gathered the head's weight. With
`process_group` groups and the denominator are those of the batch of all ranks. Accelerate shards a model in this way,
too: with it, `accelerator.prepare` takes the place of the calls of `fully_shard`.

What to expect: every rank prints the same loss and the same norm of the gradient, whatever the number of processes,
over which the rows are dealt out. It takes some seconds on CPUs, by gloo; on GPUs it uses NCCL.

    torchrun --nproc-per-node 2 examples/fsdp2.py
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from covgrpo_kernels import CovGRPOOutput, covgrpo_loss
from covgrpo_kernels.integrations.transformers import patch_model

ROWS, GROUP, LENGTH = 8, 4, 12


def tiny_model() -> Any:
    """Stands for yours."""
    torch.manual_seed(0)
    size = dict(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**size))


def sharded(model: Any) -> Any:
    """Patched before it is sharded, or after."""
    patch_model(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard([model.model.norm, model.lm_head])
    fully_shard(model)
    return model


def main(ranks: dist.ProcessGroup) -> tuple[float, float]:
    """Loss of the whole batch, and norm of its gradient."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, ranks.rank() if kind == "cuda" else None)
    model = sharded(tiny_model().to(device))

    # What a sampler gives: here the same on each rank, which takes its rows of it. A group may be cut by this.
    generator = torch.Generator().manual_seed(1)
    mine = slice(ranks.rank() * ROWS // ranks.size(), (ranks.rank() + 1) * ROWS // ranks.size())
    tokens = torch.randint(200, (ROWS, LENGTH), generator=generator)[mine].to(device)  # [B, L]
    advantages = torch.randn(ROWS, generator=generator)[mine].to(device)  # [B]
    is_response = (torch.arange(LENGTH, device=device) >= 5).expand_as(tokens)

    def policy_loss(hidden: Tensor, weight: Tensor, **head: Any) -> CovGRPOOutput:  # [B, L, D], [V, D]
        return covgrpo_loss(
            hidden[:, :-1], weight, tokens[:, 1:], advantages, is_response[:, 1:],
            group_size=GROUP, process_group=ranks, **head,
        )  # fmt: skip

    part = model(tokens, head=policy_loss).loss  # this rank's part of the loss
    (part * ranks.size()).backward()  # FSDP averages gradients over the ranks; their sum is wanted
    loss = part.detach().clone()
    dist.all_reduce(loss, group=ranks)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
    print(f"rank {ranks.rank()} of {ranks.size()}: loss {loss.item():.6f}, norm of the gradient {norm.item():.5f}")
    return loss.item(), norm.item()


if __name__ == "__main__":
    dist.init_process_group()
    assert dist.group.WORLD is not None
    main(dist.group.WORLD)
    dist.destroy_process_group()

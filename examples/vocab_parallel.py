"""Tensor parallelism of the head: each process has a slice of the vocabulary.

What it shows: `vocab_group`. The ranks have the same hidden states and consecutive slices of the rows of the head; the
loss takes the slice, and nobody has logits. Log-probs, loss and the gradient of the hidden states are whole on every
rank; the gradient of the head is that of the rank's slice.

What to expect: the loss is that of one process with the whole head, and so are the gradients. The differences that
every rank prints are rounding, some 1e-7.

    torchrun --nproc-per-node 2 examples/vocab_parallel.py
"""

import torch
import torch.distributed as dist
from torch import Tensor

from covgrpo_kernels import covgrpo_loss

ROWS, GROUP, LENGTH, WIDTH, VOCAB = 8, 4, 12, 32, 501


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def main(ranks: dist.ProcessGroup) -> dict[str, float]:
    """How far loss and gradients are from those of the whole head, relative to their norms."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, ranks.rank() if kind == "cuda" else None)
    generator = torch.Generator().manual_seed(0)  # the same on each rank
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=generator).to(device)  # [B, T, D]
    head = torch.randn(VOCAB, WIDTH, generator=generator).to(device)  # [V, D]
    targets = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator).to(device)  # [B, T]
    advantages = torch.randn(ROWS, generator=generator).to(device)  # [B]

    # A slice may have any size: these differ by one row where the vocabulary cannot be divided.
    own = head.tensor_split(ranks.size())[ranks.rank()].clone().requires_grad_()
    states = hidden.clone().requires_grad_()
    out = covgrpo_loss(states, own, targets, advantages, group_size=GROUP, vocab_group=ranks)
    out.loss.backward()

    # The same in one process with the whole head, to compare with.
    whole, same_states = head.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = covgrpo_loss(same_states, whole, targets, advantages, group_size=GROUP)
    expected.loss.backward()

    assert whole.grad is not None
    assert own.grad is not None
    assert states.grad is not None
    assert same_states.grad is not None
    differences = {
        "loss": relative(out.loss, expected.loss),
        "hidden states": relative(states.grad, same_states.grad),
        "slice of the head": relative(own.grad, whole.grad.tensor_split(ranks.size())[ranks.rank()]),
    }
    said = ", ".join(f"{name} {difference:.0e}" for name, difference in differences.items())
    print(f"rank {ranks.rank()} has {len(own)} of {VOCAB} rows; differences: {said}")
    return differences


if __name__ == "__main__":
    dist.init_process_group()
    assert dist.group.WORLD is not None
    main(dist.group.WORLD)
    dist.destroy_process_group()

"""Kernels that a step starts, and waits of the host for the device: of the log-probs as a whole, and of what the loss
adds to them.

Counted on the CPU under Triton's interpreter: every PyTorch operation that computes or writes something is one launch,
as is every launch of a Triton kernel. What only a CPU does is left out: checks of values, and casts for products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from covgrpo_kernels import (
    CovarianceWeighting,
    CovGRPOConfig,
    HighEntropy,
    KLCov,
    Steer,
    covgrpo_loss,
    engines,
    kernels,
    linear_logprob,
    loss,
    operators,
)
from covgrpo_kernels.engines import fused_gpu
from covgrpo_kernels.testing import rl_head

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["triton"], indirect=True),
]

# Operations that only make another tensor of the same memory, or memory that nothing is written to.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "new_empty_strided",
    "permute", "promote_types", "reshape", "resolve_conj", "resolve_neg", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip
# Operations after which the host knows what the device has computed.
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim", "_unique2"}


class Counted(TorchDispatchMode):
    """Names of what was launched, and of what waited."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.__name__.partition(".")[0], kwargs or {}
        if not self.paused and function.namespace == "aten":
            if name in WAITS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
                self.waits[name] += 1
            elif name not in FREE:
                self.launches[name] += 1
        return function(*args, **kwargs)


@contextmanager
def counting(patch: pytest.MonkeyPatch, *, of_head: bool = False) -> Iterator[Counted]:
    """``of_head``: also what is inside of the operators of the head."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    counted = Counted()

    def within(function: Callable[..., Any], name: str | None) -> Callable[..., Any]:
        """``function``, in which nothing is counted but ``name``, once a call."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before, counted.paused = counted.paused, True
            if name is not None and not before:
                counted.launches[name] += 1
            try:
                return function(*args, **kwargs)
            finally:
                counted.paused = before

        return run

    def again(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with counted:
                return function(*args, **kwargs)

        return run

    def read(x: torch.Tensor) -> Any:  # no operation on a CPU
        counted.waits["tolist"] += not counted.paused
        return tolist(x)

    tolist = torch.Tensor.tolist
    patch.setattr(torch.Tensor, "tolist", read)
    start = interpreter.InterpretedFunction.__getitem__
    patch.setattr(
        interpreter.InterpretedFunction, "__getitem__", lambda self, grid: within(start(self, grid), self.fn.__name__)
    )
    # A mode does not see into custom operators by itself.
    kernels_here = kernels.select(torch.device("cpu"))
    for name in ("covariance_weights", "covariance_weights_grad", "segment_sums", "segments_of_ids", "token_terms"):
        patch.setattr(kernels_here, name, again(getattr(kernels_here, name)))
    for engine in (engines.Chunked, engines.FusedGpu):
        for name in ("forward", "plan", "backward"):
            function = getattr(engine, name)
            patch.setattr(engine, name, again(function) if of_head else within(function, None))
    patch.setattr(fused_gpu, "multiply_", within(fused_gpu.multiply_, "mm"))
    for module, name in ((loss, "_check_advantages"), (operators, "check_values")):
        patch.setattr(module, name, lambda *_: None)
    with counted:
        yield counted


# Launches of a forward with metrics, without, and of the backward. They may shrink, not grow. That of the backward is
# the coefficient 1 that PyTorch starts from.
CONFIGS = {
    "paper": (CovGRPOConfig(), (38, 26, 1)),
    "none": (CovGRPOConfig(weighting="none", loss_type="dapo"), (36, 20, 1)),
    "everything": (CovGRPOConfig(dual_clip=2.0, beta=0.1, entropy_coef=0.01), (40, 22, 1)),
    "cispo": (CovGRPOConfig(loss_type="cispo"), (36, 24, 1)),
    "sequence": (CovGRPOConfig(importance_level="sequence"), (48, 39, 1)),
    "batch": (CovGRPOConfig(weighting=CovarianceWeighting(scope="batch")), (41, 27, 1)),
    "kl_cov": (CovGRPOConfig(weighting=KLCov()), (53, 35, 1)),
    "steer": (CovGRPOConfig(weighting=Steer()), (54, 38, 1)),
    "high_entropy": (CovGRPOConfig(weighting=HighEntropy()), (62, 43, 1)),
    "author": (CovGRPOConfig.author_code(), (48, 30, 1)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_launches_around_the_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, limits = CONFIGS[name]
    batch = rl_head(0, 24, 16, 50)
    batch = {key: batch[key] for key in ("targets", "advantages", "group_ids", "sequence_ids", "old_logprobs")} | {
        key: batch[key].bfloat16().requires_grad_() for key in ("hidden", "weight")
    }
    if config.beta != 0:
        batch["ref_logprobs"] = batch["old_logprobs"] - 0.1
    counts = []
    for metrics in (True, False):
        with monkeypatch.context() as patch, counting(patch) as counted:
            out = covgrpo_loss(**batch, config=config, metrics=metrics)
        counts.append(counted)
    with monkeypatch.context() as patch, counting(patch) as counted:
        out.loss.backward()
    counts.append(counted)
    for what, counted, limit in zip(("with metrics", "without metrics", "backward"), counts, limits, strict=True):
        assert counted.launches.total() <= limit, (what, counted.launches)
        assert not counted.waits.total(), (what, counted.waits)


# Of the forward, and of the backward without its slabs of the vocabulary, of four launches each.
@pytest.mark.parametrize(("grad_tol", "limits"), [("auto", (4, 21)), (0.0, (4, 8))], ids=["default", "exact"])
@pytest.mark.parametrize("slabs", [1, 2])
def test_launches_of_log_probs(
    grad_tol: float | str, limits: tuple[int, int], slabs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the public function, from its call to the gradients. The backward waits once, to know how many rows are
    dense."""
    vocab = 1024
    monkeypatch.setattr(fused_gpu._Step, "_slab_width", lambda *_: vocab // slabs)
    head = rl_head(0, 256, 64, vocab)
    hidden, weight = (head[name].bfloat16().requires_grad_() for name in ("hidden", "weight"))
    with monkeypatch.context() as patch, counting(patch, of_head=True) as counted:
        x = linear_logprob(hidden, weight, head["targets"], grad_tol=grad_tol).logprob
    assert counted.launches.total() == limits[0], counted.launches
    assert not counted.waits
    with monkeypatch.context() as patch, counting(patch, of_head=True) as counted:
        torch.autograd.grad(x, (hidden, weight), head["logprob_grad"])
    assert counted.launches.total() == limits[1] + 4 * slabs, counted.launches
    assert counted.waits == dict(tolist=1)


def test_a_wait_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    with counting(monkeypatch) as counted:
        x.sum().item()
        x[x > 0]
        x.nonzero()
        x.tolist()
    assert counted.launches == dict(sum=1, gt=1)
    assert counted.waits.total() == 4

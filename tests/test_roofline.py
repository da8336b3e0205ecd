"""The roofline model: it counts what the loop does, obeys its own bounds, and its command line runs."""

import json
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from bench import roofline
from covgrpo_kernels import linear_logprob, logprob, tiles
from covgrpo_kernels.backward_plan import plan_backward
from covgrpo_kernels.tiles.interface import BLOCK, Head

TILE = (4, BLOCK)
# (tokens, depth, vocabulary): several blocks and slices with a rest; one block; one slice of less than a BLOCK.
SHAPES = [(10, 8, 2 * BLOCK + 500), (4, 3, BLOCK + 1), (9, 5, 700)]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, "eager")
    monkeypatch.setattr(logprob, "largest_tile", lambda depth, device: TILE)


def inputs(tokens, depth, vocab, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, depth, generator=generator).to(dtype).requires_grad_() for n in (tokens, vocab))
    return hidden, weight, torch.randint(vocab, (tokens,), generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_tile_operations_are_those_of_the_loop(shape, small_tiles, monkeypatch):
    """Recorded while the loop runs, with the bytes that bf16 operands and float32 results would have."""
    seen, flops = Counter(), 0

    def mm(a, b, out, *, add=False, original=logprob._mm):
        nonlocal flops
        flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        seen["gemm", (*out.shape, a.shape[1]), 2 * (a.numel() + b.numel()) + 4 * out.numel() * (2 if add else 1)] += 1
        original(a, b, out, add=add)

    monkeypatch.setattr(logprob, "_mm", mm)

    def recorded(name, original):
        def operation(tile, *rest):
            seen[name, tuple(tile.shape)] += 1
            original(tile, *rest)

        return operation

    for name in ("fold", "grad"):
        monkeypatch.setattr(tiles.eager, name, recorded(name, getattr(tiles.eager, name)))
    hidden, weight, targets = inputs(*shape, torch.float32)
    linear_logprob(hidden, weight, targets, grad_tol=0.0).logprob.sum().backward()

    tokens, depth, vocab = shape
    head = roofline.Head(depth, vocab)
    counted = Counter()
    step = roofline.forward(head, tokens, TILE) + roofline.backward(head, tokens, TILE)
    for o, times in step.items():
        if o.part != "other":
            counted[(o.part, o.shape, o.bytes) if o.part == "gemm" else (o.part, o.shape)] += times
    assert counted == seen
    assert sum(times * o.flops for o, times in step.items()) == flops == 4 * 2 * math.prod(shape)


class MatrixBytes(TorchDispatchMode):
    """Bytes of [..., depth] matrices that operations other than views read and write."""

    def __init__(self, depth):
        super().__init__()
        self.depth, self.bytes = depth, 0

    def counts(self, value):
        return isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == self.depth

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name()
        if function.is_view or "empty" in name or not self.counts(result):
            return result
        if name == "aten::_to_copy" and result.dtype == torch.float32:
            return result  # operands of a product; only a CPU needs this
        read = args[1:] if name == "aten::copy_" else () if "zeros" in name else args
        if name == "aten::index_put_":
            self.bytes += 2 * args[2].nbytes
        else:
            self.bytes += result.nbytes + sum(x.nbytes for x in read if self.counts(x))
        return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_bytes_are_those_of_the_loop(shape, small_tiles, monkeypatch):
    hidden, weight, targets = (x.detach() for x in inputs(*shape, torch.bfloat16))
    ones = torch.ones(len(hidden))
    settings = (hidden, weight, None, targets, None, Head(1.0, None))
    results, kept = logprob._stream_forward(*settings, False, -100, 0.0)
    monkeypatch.setattr(logprob, "_mm", lambda *a, **k: None)
    for name in ("fold", "grad"):
        monkeypatch.setattr(tiles.eager, name, lambda *a: None)
    tokens, depth, vocab = shape
    with MatrixBytes(depth) as forward:
        logprob._stream_forward(*settings, False, -100, 0.0)
    plan = plan_backward(results, kept, targets, ones, None, Head(1.0, None), None, 0.0)
    with MatrixBytes(depth) as backward:
        logprob._stream_backward(*settings, results, kept, ones, None, plan, 0.0, [True, True, True])
    step = roofline.backward(roofline.Head(depth, vocab), tokens, TILE)
    assert forward.bytes == 0
    assert backward.bytes == sum(n * o.bytes for o, n in step.items() if o.part == "other" and o.shape[1] == depth)


@pytest.mark.parametrize("device", roofline.DEVICES)
def test_a_product_that_fills_the_device_takes_its_operations(device):
    it = roofline.DEVICES[device]
    shape = (128 * it.multiprocessors, 256 * 4, 8192)
    expected = 2 * math.prod(shape) / (0.96 * it.sustained)
    assert roofline.seconds(roofline.product(*shape), it) == pytest.approx(expected, rel=1e-12)
    one_more = (128 * it.multiprocessors + 1, 256, 8192)
    assert roofline.rounded_up_flops(one_more, it.multiprocessors) == pytest.approx(2 * math.prod(shape) / 2)


def rows():
    for device in roofline.DEVICES:
        for model in roofline.MODELS:
            yield from (roofline.predict(device, model, tokens) for tokens in (1, 4096, 10000, 131072))
    yield from roofline.sweep("H200", "Llama-3-8B", 8192)


def test_never_faster_than_the_products_and_within_the_workspace():
    for row in rows():
        for ratio in ("forward_per_unit", "backward_per_three_units", "step_per_four_units"):
            assert row[ratio] >= 1 / 0.96 - 1e-12, row
        assert row["step"] > row["forward"] + row["backward"] - 1e-12
        assert sum(row["share"].values()) == pytest.approx(1)
        assert row["workspace_bytes"] <= logprob.WORKSPACE_BYTES["cuda"]


@pytest.mark.parametrize("field", ["sustained", "bandwidth", "cache_bandwidth", "cache", "clock"])
def test_a_better_device_is_never_slower(field, monkeypatch):
    before = list(rows())
    better = {name: it._replace(**{field: 2 * getattr(it, field)}) for name, it in roofline.DEVICES.items()}
    monkeypatch.setattr(roofline, "DEVICES", better)
    for old in before:
        new = roofline.predict(old["device"], old["model"], old["tokens"], old["tile"])
        for name in ("forward", "backward", "step", "eager"):
            assert new[name] <= old[name] * (1 + 1e-12), (name, old)


def test_the_host_bounds_a_step_of_little_work():
    """With a device that takes no time, a step takes what its launches take the host."""
    device = roofline.Device(*[math.inf] * 3, 1 << 60, 132, math.inf, 80e9)
    step = roofline.forward(roofline.Head(8, BLOCK), 4, TILE)
    assert roofline.duration(step, device) == pytest.approx(roofline.HOST["torch"] + roofline.HOST["triton"])


def test_a_tile_for_few_tokens():
    rows, entries = roofline.chosen_tile(roofline.MODELS["Llama-3-8B"], 100, roofline.DEVICES["H200"])
    assert rows == 100
    assert entries % BLOCK == 0


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "bench", "roofline", *words], capture_output=True, text=True, check=False
    )


def test_command_line(tmp_path):
    out = tmp_path / "new" / "report.json"
    done = run("--device", "H200", "--model", "Llama-3-8B", "--json", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [row["tokens"] for row in report["rows"]] == list(roofline.TOKENS)
    assert done.stdout.strip("\n") == roofline.report(report["rows"])
    assert [path.name for path in out.parent.iterdir()] == ["report.json"]


def test_sweep_and_wrong_arguments(capsys):
    parser = roofline.argparse.ArgumentParser()
    roofline.add_arguments(parser)
    one = ["--tiles", "--device", "MI300X", "--model", "Qwen2.5-7B"]
    roofline.run(parser.parse_args([*one, "--tokens", "5000"]))
    table = capsys.readouterr().out.split("MI300X")[1].splitlines()[2:]
    assert len(table) > 20
    assert sum("*" in line for line in table) == 1
    for wrong in (one, [*one, "--tokens", "0"]):
        with pytest.raises(SystemExit, match="--tokens"):
            roofline.run(parser.parse_args(wrong))

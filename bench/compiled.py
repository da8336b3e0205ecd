"""Registers, spills, shared memory and tensor-core instructions of every kernel on every architecture, compiled ahead
of time: needs no GPU, and kernels that are not interpreted."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from covgrpo_kernels.token_terms import TermOptions, TokenInputs, TokenTerms

from .measure import write_json

GOLDEN = Path(__file__).parent.parent / "tests" / "compiled.json"

# Bytes of shared memory that a program may have: CUDA C++ programming guide, table of compute capabilities; CDNA3 ISA.
# sm_86, sm_89 and sm_120 run the cuts of sm_80 and have less than it.
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


# By case and architecture.
Table = dict[str, dict[str, dict[str, int]]]


Arguments = dict[str, Any]


class Case(NamedTuple):
    name: str
    kernel: str  # module of the kernel, and its name there
    arguments: Arguments  # types of those at run time, in tuples where they are, and values of the others
    config: str  # key of CONFIGS[architecture]


_TILE: Arguments = dict(targets="*i64", n_rows="i32", width="i32", first="i32")
_PLAIN: Arguments = dict(bias=None, temperature=None, SCALE=1.0, CAP=None)
_ALL: Arguments = dict(bias="*fp32", temperature="*fp32", SCALE=0.5, CAP=30.0)
_RUNNING: Arguments = dict(maximum="*fp32", sums="*fp32", entropy_sum="*fp32", target="*fp32")
_NO_CANDIDATES: Arguments = dict(min_logits=None, found=None, vocab_ids=None, logits=None, CAPACITY=0)
_CANDIDATES: Arguments = dict(min_logits="*fp32", found="*i32", vocab_ids="*i32", logits="*fp32", CAPACITY=256)
_COEFFICIENTS: Arguments = dict(
    maximum="*fp32", log_sum="*fp32", at_target="*fp32", entropy="*fp32", logprob_grad="*fp32"
)
_DLOGITS: Arguments = {"tile": "*fp32", **_TILE, **_COEFFICIENTS}
_TOKENS: Arguments = dict(logprobs="*fp32", valid="*i1", order="*i64", offsets="*i64")
_WEIGHTS: Arguments = dict(advantages="*fp32", weights="*fp64", covariance="*fp64", deviation="*fp64", std="*fp64")
_READING: Arguments = dict(NOISE=1e-6, BANDWIDTH_EPS=0.0, NUMEL=False)

_ROWS: Arguments = dict(rows="*i32", count="*i32", first="i32", room="i32", n_tokens="i32")
_HEAD: Arguments = dict(weight="*bf16", depth="i32", vocab="i32", weight_stride="i32")
_SCOPE_GRAD: Arguments = dict(
    weights_grad="*fp32", weights="*fp64", covariance="*fp64", deviation="*fp64", valid="*i1", order="*i64",
    offsets="*i64", std="*fp64", ddx="*fp64", BANDWIDTH_EPS=0.0,
)  # fmt: skip
_CENTRE_GRAD: Arguments = dict(valid="*i1", order="*i64", offsets="*i64", ddx="*fp64", out="*fp64")
_SEGMENTS: Arguments = dict(ids="*i64", order="*i64", segment="*i64", offsets="*i64", n_tokens="i32", steps="i32")
_SUMS: Arguments = dict(values="*fp32", offsets="*i64", sums="*fp64", n_segments="i32", row_stride="i32", stride="i32")
_COEFS: Arguments = dict(beta="fp64", entropy_coef="fp64")
# The defaults without metrics: group weights, clipping, the mean of each sequence.
_INPUTS: Arguments = dict(
    logprobs="*fp32", entropy="*fp32", advantages="*fp32", valid="*i1", old="*fp32", ref=None, rollout=None,
    weights="*fp32", penalised=None, covariance=None, segment="*i64", lengths="*fp64", mean_log_ratio=None,
    total="*i64",
)  # fmt: skip
_OUT: Arguments = {**dict.fromkeys(TokenTerms._fields), "logprob_grad": "*fp32"}
_OPTIONS = TermOptions(
    cispo=False, ratio_low=0.8, ratio_high=1.2, dual_clip=None, penalty=0.0, max_length=None, beta=False,
    kl_estimator="k3", entropy_coef=False, share_grad=False, differentiate_weights=False, metrics=False,
)  # fmt: skip
_TERMS: Arguments = dict(
    inputs=TokenInputs(**_INPUTS), out=TokenTerms(**_OUT), to_sort=None, partial="*fp64", n_tokens="i32", **_COEFS,
    OPTIONS=_OPTIONS,
)  # fmt: skip
_TERMS_ALL: Arguments = {
    **_TERMS, "to_sort": "*fp64",
    "inputs": _TERMS["inputs"]._replace(
        ref="*fp32", rollout="*fp32", penalised="*i1", covariance="*fp64", mean_log_ratio="*fp64"
    ),
    "out": _TERMS["out"]._replace(shared_grad="*fp32", weights_grad="*fp32", entropy_grad="*fp32"),
    "OPTIONS": _OPTIONS._replace(dual_clip=3.0, penalty=1.0, max_length=512, beta=True, metrics=True),
}  # fmt: skip
_CISPO: Arguments = dict(
    out=_TERMS_ALL["out"]._replace(shared_grad=None), OPTIONS=_TERMS_ALL["OPTIONS"]._replace(cispo=True, dual_clip=None)
)
_TOTALS: Arguments = dict(
    partial="*fp64", loss="*fp32", n_blocks="i32", **_COEFS, KL_LOSS=True, ENTROPY_LOSS=True, TINY=1e-38,
    Q=(0.01, 0.2, 0.5, 0.8, 0.99),
)  # fmt: skip

_FORWARD: Arguments = {
    "hidden": "*bf16", "hidden_stride": "i32", "targets": "*i64", "partial": "*fp32", "splits": "i32",
    **_ROWS, **_HEAD, "B_P": 256,
}  # fmt: skip
_FORWARD_PLAIN: Arguments = {**_FORWARD, **_PLAIN, "ENTROPY": False}
_FORWARD_ALL: Arguments = {**_FORWARD, **_ALL, "ENTROPY": True, "peaks": "*bf16"}
_PRODUCTS: Arguments = {
    "hidden": "*bf16", "limits": "*fp32", "ends": "*i64", "item_ends": "*i32", "pairs": "*i32", "found": "*i32",
    "vocab_ids": "*i32", "logits": "*fp32", "tiles": "i32", "row_stride": "i32", "column_stride": 1,
    **_HEAD, "B_V": 256, "B_T": 1024, "ROOM": 128,
}  # fmt: skip
_SOFTMAX_ALL: Arguments = {"tile": "*fp32", **_TILE, **_ALL, **_RUNNING, **_CANDIDATES, "ENTROPY": True}
_SOFTMAX: Arguments = {"tile": "*fp32", **_TILE, **_PLAIN, **_RUNNING, "ENTROPY": False}
_SPARSE: Arguments = dict(
    values="*fp32", indices="*i64", offsets="*i64", out="*fp32", depth="i32", row_stride="i32", column_stride="i32"
)

# Of the backward: the plan, the tails, the pairs and the gradients.
_NO_TAILS: Arguments = dict(rows=None, log_floor=None, log_min_prob="fp32", TAILS=0)
_TAILS: Arguments = dict(rows="*i64", log_floor="*fp32", log_min_prob="fp32", TAILS=16)
_PLAN_ROWS: Arguments = dict(
    found="*i32", vocab_ids="*i32", logits="*fp32", min_logits="*fp32", stats="*fp32", targets="*i64",
    logprob_grad="*fp32", entropy_grad=None, temperature=None, kind="*i8", kept="*i32", per_row="*fp32",
    bounds="*fp64", n_rows="i32", SCALE=1.0, CAP=None, K=64,
)  # fmt: skip
_PLAN_ROWS_ALL: Arguments = dict(entropy_grad="*fp32", temperature="*fp32", SCALE=0.5, CAP=30.0)
_ASSIGN_TAILS: Arguments = dict(
    hidden="*bf16", tail_rows="*i64", tail="*fp32", mass="*fp32", log_floor="*fp32",
    plan_kind="*i8", plan_bound="*fp64", tail_bound="*fp64", shares="*fp32", kind="*i8", bound="*fp64", n_rows="i32",
    depth="i32", hidden_stride="i32", SHARPNESS=10.0, ENTROPY=True, T=16,
)  # fmt: skip
_CLASSES: Arguments = dict(row_class="*i8", place="*i32")
_CLASSIFY_ROWS: Arguments = dict(
    in_order="*fp64", order="*i64", bound="*fp64", norm="*fp64", kind="*i8", kept="*i32", tail_rows="*i64", **_CLASSES,
    rows="*i64", counts="*i64", error_bound="*fp64", n_rows="i32", GRAD_TOL=1e-3, LARGEST_SHARE=32.0, T=16,
)  # fmt: skip
_ENTRIES: Arguments = dict(
    kept="*i32", vocab_ids="*i32", values="*fp32", targets="*i64", target_value="*fp32", K=64
)  # fmt: skip
_PLACE_PAIRS: Arguments = dict(
    sorted_ids="*i32", order="*i64", rows="*i32", values="*fp32", sorted_rows="*i32", sorted_values="*fp32",
    offsets="*i32", n_pairs="i32", n_blocks="i32", steps="i32", PAIR_BLOCK=64,
)  # fmt: skip
_TAIL_STATES: Arguments = dict(
    hidden="*bf16", shares="*fp32", row_class="*i8", sums="*fp32", sums_of_shares="*fp32", n_rows="i32",
    depth="i32", hidden_stride="i32", part_rows="i32", T=16,
)  # fmt: skip
_GATHER_STATES: Arguments = dict(
    hidden="*bf16", rows="*i64", sums="*fp32", sums_of_shares="*fp32", states="*bf16", bias_factors="*fp32",
    n_rows="i32", depth="i32", hidden_stride="i32", n_parts="i32", min_prob="fp32", T=16,
)  # fmt: skip
_HEAD_GRAD: Arguments = dict(
    dz="*bf16", states="*bf16", hidden="*bf16", pair_ids="*i32", pair_rows="*i32", pair_values="*fp32",
    pair_offsets="*i32", bias_factors=None, scale=None, out="*bf16", bias_out=None, n_rows="i32", width="i32",
    depth="i32", first="i32", hidden_stride="i32", T=0, PAIR_BLOCK=64,
)  # fmt: skip

CASES = [
    Case("online softmax", "online_softmax.online_softmax_kernel", {**_SOFTMAX, **_NO_CANDIDATES}, "online_softmax"),
    Case(
        "online softmax, candidates", "online_softmax.online_softmax_kernel", {**_SOFTMAX, **_CANDIDATES},
        "online_softmax",
    ),
    Case("online softmax, all", "online_softmax.online_softmax_kernel", _SOFTMAX_ALL, "online_softmax"),
    Case(
        "online softmax of float64", "online_softmax.online_softmax_kernel",
        {key: "*fp64" if value == "*fp32" else value for key, value in _SOFTMAX_ALL.items()}, "online_softmax",
    ),
    *(
        Case(
            f"dlogits to {out}{', all' if entropy else ''}",
            "dlogits.dlogits_kernel",
            {**_DLOGITS, "out": f"*{out}", **_NO_TAILS, **options, "entropy_grad": entropy},
            "dlogits",
        )
        for out in ("bf16", "fp16", "fp32")
        for options, entropy in ((_PLAIN, None), (_ALL, "*fp32"))
    ),
    *(
        Case(
            f"dlogits with tails{', all' if entropy else ''}",
            "dlogits.dlogits_kernel",
            {**_DLOGITS, "out": "*bf16", **_TAILS, **options, "entropy_grad": entropy},
            "dlogits",
        )
        for options, entropy in ((_PLAIN, None), (_ALL, "*fp32"))
    ),
    Case("sparse product", "sparse_product.sparse_product_kernel", {**_SPARSE, "matrix": "*bf16"}, "sparse"),
    Case(
        "sequence means", "covariance_weights.sequence_means_kernel", {**_TOKENS, "lengths": "*fp64", "means": "*fp64"},
        "weights",
    ),
    Case(
        "covariance weights", "covariance_weights.covariance_weights_kernel",
        {**_TOKENS, **_WEIGHTS, **_READING, "segment": None, "lengths": None, "means": None}, "weights",
    ),
    Case(
        "covariance weights, all", "covariance_weights.covariance_weights_kernel",
        {**_TOKENS, **_WEIGHTS, **_READING, "segment": "*i64", "lengths": "*fp64", "means": "*fp64"}, "weights",
    ),
    Case("scope gradient", "covariance_weights_grad.scope_grad_kernel", {**_SCOPE_GRAD, "out": "*fp64"}, "weights"),
    Case(
        "scope gradient, uncentred", "covariance_weights_grad.scope_grad_kernel", {**_SCOPE_GRAD, "out": None},
        "weights",
    ),
    Case("centred gradient", "covariance_weights_grad.centre_grad_kernel", _CENTRE_GRAD, "weights"),
    Case("segments", "segments.segments_kernel", _SEGMENTS, "segments"),
    Case("segment sums", "segment_sums.segment_sums_kernel", {**_SUMS, "order": "*i64"}, "sums"),
    Case(
        "segment sums of flags, sorted", "segment_sums.segment_sums_kernel",
        {**_SUMS, "values": "*i1", "order": None}, "sums",
    ),
    Case("token terms", "token_terms.token_terms_kernel", _TERMS, "terms"),
    Case("token terms, all", "token_terms.token_terms_kernel", _TERMS_ALL, "terms"),
    Case("token terms, CISPO", "token_terms.token_terms_kernel", {**_TERMS_ALL, **_CISPO}, "terms"),
    Case("totals", "token_terms.totals_kernel", {**_TOTALS, "ascending": None, "metrics": None}, "totals"),
    Case(
        "totals, metrics", "token_terms.totals_kernel", {**_TOTALS, "ascending": "*fp64", "metrics": "*fp32"},
        "totals",
    ),
    Case("plan rows", "plan_rows.plan_rows_kernel", _PLAN_ROWS, "plan_rows"),
    Case("plan rows, all", "plan_rows.plan_rows_kernel", {**_PLAN_ROWS, **_PLAN_ROWS_ALL}, "plan_rows"),
    Case("plan rows, 256 candidates", "plan_rows.plan_rows_kernel", {**_PLAN_ROWS, "K": 256}, "plan_rows"),
    Case(
        "plan rows without candidates", "plan_rows.plan_rows_kernel",
        {**_PLAN_ROWS, "found": None, "vocab_ids": None, "logits": None, "min_logits": None, "K": 1}, "plan_rows",
    ),
    Case("assign tails", "tails.assign_tails_kernel", _ASSIGN_TAILS, "assign_tails"),
    Case("assign tails of float32", "tails.assign_tails_kernel", {**_ASSIGN_TAILS, "hidden": "*fp32"}, "assign_tails"),
    Case(
        "tail weights", "tail_weights.tail_weights_kernel",
        dict(logprob_grad="*fp32", entropy_grad="*fp32", tail_weight="*fp32", squares="*fp64", out="*fp32",
             n_rows="i32", LARGEST_SHARE=32.0),
        "classify_rows",
    ),
    Case("classify rows", "row_classes.classify_rows_kernel", _CLASSIFY_ROWS, "classify_rows"),
    Case(
        "list pairs", "pairs.list_pairs_kernel",
        {**_CLASSES, **_ENTRIES, "pair_ids": "*i32", "pair_rows": "*i32", "pair_values": "*fp32", "n_rows": "i32"},
        "list_pairs",
    ),
    Case("place pairs", "pairs.place_pairs_kernel", _PLACE_PAIRS, "place_pairs"),
    Case("tail states", "tails.tail_states_kernel", _TAIL_STATES, "tail_states"),
    Case(
        "tail states of float32", "tails.tail_states_kernel", {**_TAIL_STATES, "hidden": "*fp32"},
        "tail_states",
    ),
    Case("gather states", "tails.gather_states_kernel", _GATHER_STATES, "gather_states"),
    Case("head grad", "head_grad.head_grad_kernel", _HEAD_GRAD, "head grad"),
    Case("head grad by pointers", "head_grad.head_grad_kernel", _HEAD_GRAD, "head grad by pointers"),
    Case(
        "head grad, all", "head_grad.head_grad_kernel",
        {**_HEAD_GRAD, "bias_factors": "*fp32", "bias_out": "*bf16", "T": 16, "scale": "*fp32"}, "head grad",
    ),
    Case("head grad of many rows", "head_grad.head_grad_kernel", _HEAD_GRAD, "head grad of many rows"),
    Case(
        "head grad of float32", "head_grad.head_grad_kernel",
        {**_HEAD_GRAD, **dict.fromkeys(("dz", "states", "hidden", "out"), "*fp32")},
        "head grad of float32",
    ),
    Case(
        "hidden grad", "hidden_grad.hidden_grad_kernel",
        {**_CLASSES, **_ENTRIES, "shares": "*fp32", "T": 16, "weight": "*bf16", "products": "*fp32",
         "scale": None, "out": "*bf16", "n_rows": "i32", "depth": "i32", "weight_stride": "i32", "min_prob": "fp32"},
        "hidden_grad",
    ),
    Case("forward", "forward.forward_kernel", {**_FORWARD_PLAIN, "peaks": None}, "forward"),
    Case("forward, peaks", "forward.forward_kernel", {**_FORWARD_PLAIN, "peaks": "*bf16"}, "forward"),
    Case("forward, all", "forward.forward_kernel", _FORWARD_ALL, "forward"),
    Case("forward of deep rows", "forward.forward_kernel", {**_FORWARD_PLAIN, "peaks": "*bf16"}, "forward, deep"),
    Case("forward of deep rows, all", "forward.forward_kernel", _FORWARD_ALL, "forward, deep"),
    Case("forward by pointers", "forward.forward_kernel", _FORWARD_ALL, "forward by pointers"),
    Case(
        "forward of float32", "forward.forward_kernel",
        {**_FORWARD_ALL, "hidden": "*fp32", "weight": "*fp32"}, "forward of float32",
    ),
    Case(
        "merge", "forward.merge_kernel",
        {
            "partial": "*fp32", "place": "*i32", "stats": "*fp32", "first": "i32", "room": "i32", "n_tokens": "i32",
            "splits": "i32", "ENTROPY": True, "B_S": 256,
        },
        "merge",
    ),
    Case(
        "select rows", "select_rows.select_rows_kernel",
        {
            "targets": "*i64", "rows": "*i32", "place": "*i32", "count": "*i32", "n_tokens": "i32",
            "ignore_index": "i32",
        },
        "select",
    ),
    Case(
        "gather rows", "select_rows.gather_rows_kernel",
        {
            "hidden": "*bf16", "rows": "*i32", "count": "*i32", "out": "*bf16", "first": "i32", "room": "i32",
            "depth": "i32", "padded": "i32", "row_stride": "i32", "column_stride": 1,
        },
        "gather",
    ),
    Case(
        "limits", "collect.limits_kernel",
        {
            "peaks": "*bf16", "place": "*i32", "stats": "*fp32", "logprob_grad": "*fp32", "entropy_grad": "*fp32",
            "limits": "*fp32", "floors": "*fp32", "found": "*i32", "n_tokens": "i32", "tiles": "i32",
            "log_min_prob": "fp64", "ROOM": 128, "MAX_TILES": 32,
        },
        "limits",
    ),
    Case(
        "count", "collect.count_kernel",
        {"peaks": "*bf16", "limits": "*fp32", "count": "*i32", "counts": "*i32", "n_tokens": "i32"}, "count",
    ),
    Case(
        "ends", "collect.ends_kernel",
        {"counts": "*i32", "ends": "*i64", "item_ends": "*i32", "tiles": "i32", "B_R": 64}, "ends",
    ),
    Case(
        "list", "collect.list_kernel",
        {
            "peaks": "*bf16", "limits": "*fp32", "rows": "*i32", "count": "*i32", "ends": "*i64", "pairs": "*i32",
            "n_tokens": "i32",
        },
        "list",
    ),
    Case(
        "largest", "collect.largest_kernel",
        {
            "found": "*i32", "vocab_ids": "*i32", "logits": "*fp32", "floors": "*fp32", "largest_ids": "*i32",
            "largest_logits": "*fp32", "n_rows": "i32", "ROOM": 128, "K": 64,
        },
        "largest",
    ),
    Case("products", "collect.products_kernel", {**_PRODUCTS, **_PLAIN}, "products"),
    Case("products, all", "collect.products_kernel", {**_PRODUCTS, **_ALL}, "products"),
    Case("products by pointers", "collect.products_kernel", {**_PRODUCTS, **_ALL}, "products by pointers"),
    Case(
        "products of float32", "collect.products_kernel",
        {**_PRODUCTS, **_ALL, "hidden": "*fp32", "weight": "*fp32"}, "products of float32",
    ),
]  # fmt: skip


def _cuts(architecture: str) -> dict[str, dict[str, int]]:
    from covgrpo_kernels.kernels.triton import configs

    half, single = (configs.FORWARD[architecture][itemsize] for itemsize in (2, 4))
    pointers, head_grad = dict(DESCRIPTORS=False), configs.HEAD_GRAD[architecture]
    return {
        **configs.CONFIGS[architecture],
        "forward": half[min(half)],
        "forward, deep": half[max(half)],
        "forward by pointers": half[min(half)] | pointers,
        "forward of float32": single[min(single)],
        "products": configs.COLLECT[architecture][2],
        "products by pointers": configs.COLLECT[architecture][2] | pointers,
        "products of float32": configs.COLLECT[architecture][4],
        "head grad": head_grad[2]["few"],
        "head grad by pointers": head_grad[2]["few"] | pointers,
        "head grad of many rows": head_grad[2]["many"],
        "head grad of float32": head_grad[4]["few"],
    }


def compile_case(case: Case, architecture: str) -> dict[str, int]:
    """Registers of a thread, bytes of spilled registers of a thread, bytes of shared memory of a program, and how
    many tensor-core instructions there are of each kind."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget

    module, name = case.kernel.split(".")
    kernel = getattr(importlib.import_module(f"covgrpo_kernels.kernels.triton.{module}"), name)
    options = dict(_cuts(architecture)[case.config])
    compiler = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    arguments: dict[str, Any] = {**case.arguments, **options}
    if options.get("DESCRIPTORS") and "dz" in arguments:
        arguments["dz"] = f"tensordesc<bf16[{options['B_K']}, {options['B_V']}]>"
        arguments["states"] = f"tensordesc<bf16[{options['B_K']}, {options['B_D']}]>"
    elif options.get("DESCRIPTORS"):
        arguments["weight"] = f"tensordesc<bf16[{arguments['B_V']}, {options['B_D']}]>"
        if "hidden_stride" in arguments:  # of gathered rows, which are described too
            arguments["hidden"] = f"tensordesc<bf16[{options['B_R']}, {options['B_D']}]>"
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, tuple) and not parameter.is_constexpr:
            types[parameter.name] = type(value)(*("constexpr" if item is None else item for item in value))
            places: dict[tuple[int, ...], Any] = {(i, j): item for j, item in enumerate(value)}
        else:
            types[parameter.name] = value if isinstance(value, str) else "constexpr"
            places = {(i,): value}
        constants |= {place: item for place, item in places.items() if not isinstance(item, str)}
        if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            aligned |= {place: [["tt.divisibility", 16]] for place in places.keys() - constants.keys()}
    source = triton.compiler.ASTSource(kernel, types, constants, aligned)
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    compiled = triton.compile(source, target=target, options=compiler)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.findall(rf"\.{key}:\s+(\d+)", text)[0]) for key in _VECTOR_REGISTERS)
        numbers, spills = dict(registers=registers), 4 * spilled
    else:
        text, usage = compiled.asm["ptx"], _resource_usage(compiled.asm["cubin"])
        numbers, spills = dict(registers=usage["REG"]), usage["STACK"]
    return numbers | dict(spills=spills, shared=compiled.metadata.shared) | _tensor_cores(text)


_VECTOR_REGISTERS = ("vgpr_count", "vgpr_spill_count")

# As they are called in PTX and in AMD's assembly.
_TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")


def _tensor_cores(text: str) -> dict[str, int]:
    counts = {name: len(re.findall(rf"\b{re.escape(name)}[._]", text)) for name in _TENSOR_CORES}
    return {name: count for name, count in counts.items() if count}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What the tool of the CUDA toolkit that triton brings says of the one kernel in it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def check_search() -> None:
    """Every cut that COVGRPO_AUTOTUNE=1 tries, on every architecture. Raises AssertionError for one that has too much
    shared memory. (One that spills is slow, and a search leaves it.)"""
    from covgrpo_kernels.kernels.triton.configs import CONFIGS, SEARCH

    for case in CASES:
        for architecture in SHARED_LIMIT:
            for cut in SEARCH.get(case.config, []):
                CONFIGS[architecture][case.config] = cut
                numbers = compile_case(case, architecture)
                assert numbers["shared"] <= SHARED_LIMIT[architecture], (case.name, architecture, cut, numbers)


def _compile(key: tuple[str, str]) -> tuple[tuple[str, str], dict[str, int]]:
    name, architecture = key
    [case] = [case for case in CASES if case.name == name]
    return key, compile_case(case, architecture)


def compile_all(workers: int, architectures: list[str]) -> Table:
    keys = [(case.name, architecture) for case in CASES for architecture in architectures]
    table: Table = {}
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for (name, architecture), numbers in pool.map(_compile, keys):
            table.setdefault(name, {})[architecture] = numbers
    return table


def faults(table: Table, golden: Table | None) -> list[str]:
    """What is over a limit of the hardware, spills, lacks its tensor cores or has grown since it was committed. Without
    a committed table of this version of Triton: what is over a limit of the hardware."""
    found = []
    for name, by_architecture in table.items():
        for architecture, numbers in by_architecture.items():
            where = f"{name} on {architecture}"
            if numbers["shared"] > SHARED_LIMIT[architecture]:
                found.append(f"{where}: {numbers['shared']} bytes of shared memory are over the limit")
            if golden is None:
                continue
            if numbers["spills"] and architecture in ("sm_80", "sm_90"):
                found.append(f"{where}: {numbers['spills']} bytes are spilled")
            known = golden.get(name, {}).get(architecture)
            if known is None:
                found.append(f"{where}: not in the committed table")
                continue
            found += [f"{where}: {key} grew from {known[key]} to {numbers[key]}"
                      for key in _RESOURCES if numbers[key] > known[key]]  # fmt: skip
            found += [f"{where}: no {key} any more" for key in known.keys() - numbers.keys()]
    found += [f"{name}: no longer compiled" for name in (golden or {}).keys() - table.keys()]
    return found


_RESOURCES = ("registers", "spills", "shared")


def markdown(table: Table) -> str:
    header = "| kernel | architecture | registers | spills | shared bytes | tensor cores |"
    lines = [header, "|---|---|---|---|---|---|"]
    for name, by_architecture in table.items():
        for architecture, numbers in by_architecture.items():
            cells = [name, architecture, *(str(numbers[key]) for key in _RESOURCES)]
            cores = ", ".join(f"{key} {n}" for key, n in numbers.items() if key not in _RESOURCES)
            lines.append(f"| {' | '.join(cells)} | {cores} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--architectures", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT), help="default: all"
    )
    parser.add_argument("--update", action="store_true", help=f"write the table to {GOLDEN.parent.name}/{GOLDEN.name}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import triton

    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET must not be set: interpreted kernels are not compiled")
    if arguments.update and set(arguments.architectures) != set(SHARED_LIMIT):
        sys.exit("--update writes the table of all architectures: leave --architectures out")
    table = compile_all(arguments.workers, arguments.architectures)
    print(markdown(table))
    if arguments.update:
        write_json(GOLDEN, dict(triton=triton.__version__, table=table))
        return
    golden = json.loads(GOLDEN.read_text())
    if golden["triton"] != triton.__version__:
        print(f"\nthe committed table is of triton {golden['triton']}, this is {triton.__version__}: not compared")
        golden["table"] = None
    found = faults(table, golden["table"])
    if found:
        sys.exit("\n".join(["", *found]))

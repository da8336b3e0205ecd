"""A causal LM whose head computes log-probs and losses in place of logits, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ..integrations.transformers import patch_model


@dataclass
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the matrix products. Parameters, and so AdamW's steps, are float32
    chat: bool = False  # whether a prompt is a message, in the tokenizer's chat template

    def __post_init__(self) -> None:
        # Without dropout, or a token's log-prob would differ between scoring and training.
        nn.Module.to(self.model, self.device).eval()
        patch_model(self.model)
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos = eos if isinstance(eos, list) else [eos]
        ids = [i for i in dict.fromkeys([self.tokenizer.eos_token_id, *eos]) if i is not None]
        if not ids:
            raise ValueError("it has no end-of-sequence token")
        self.eos_ids = torch.tensor(ids, device=self.device)
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else ids[0]

    def encode(self, prompts: list[str]) -> list[list[int]]:
        if self.chat:
            apply = partial(self.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
            prompts = [str(apply([{"role": "user", "content": prompt}])) for prompt in prompts]
        return self.tokenizer(prompts, add_special_tokens=not self.chat).input_ids

    def forward(self, tokens: Tensor, attention: Tensor, **options: Any) -> Any:  # [B, L], [B, >= L]
        """The model over the tokens, the last ones of `attention`. Padding on the left has no position."""
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        mask = None if "cache_params" in options else attention  # a state has seen the padding, and ignored it
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(tokens, attention_mask=mask, position_ids=positions, **options)

    def save(self, folder: Path, state: dict[str, Any] | None = None) -> None:
        """`state`: the parameters, where the model has only a part of them."""
        self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)


def new_policy(hidden_size: int, layers: int, seed: int, device: torch.device) -> Policy:
    """A small Qwen2 with random weights and a tokenizer of bytes: any text, no file, 258 tokens."""
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=3 * hidden_size,
        num_hidden_layers=layers, num_attention_heads=hidden_size // 32, num_key_value_heads=hidden_size // 64,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = Qwen2ForCausalLM(config)
    return Policy(model, tokenizer, device)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Every byte is known. But without a token for unknown ones Qwen2's tokenizer adds one when it is loaded, beyond the
    # model's vocabulary.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def cached(output: Any) -> dict[str, Any]:
    """What the model keeps of the tokens that it has seen, as its next call takes it: keys and values, or a state."""
    return {name: output[name] for name in ("past_key_values", "cache_params") if output.get(name) is not None}


def load_policy(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, chat_template: str = "none"
) -> Policy:
    """A causal LM by folder or name. Raises ValueError where it cannot be loaded, sampled from or trained here."""
    kind = ""
    try:
        config = AutoConfig.from_pretrained(name)
        kind = f" ({config.model_type})"
        if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError("it is not a decoder-only causal language model")
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        model, loading = loaded
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(f"its files lack weights: {', '.join(missing[:3])}")
        tokenizer = AutoTokenizer.from_pretrained(name)
        policy = Policy(model, tokenizer, device, chat=chat_template == "auto" and bool(tokenizer.chat_template))
        _check(policy)
        policy.dtype = dtype  # from now on: bfloat16 would hide what is wrong with a model
    except Exception as error:  # of many kinds, from the libraries that read the files and from the model itself
        what = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"model {name}{kind} cannot be used: {what}") from error
    return policy


@torch.no_grad()
def _check(policy: Policy) -> None:
    """Raises ValueError unless the log-prob of a token depends on the tokens before it alone, and sampling behind
    padding, with a key-value cache, gives the same."""
    size = policy.model.get_input_embeddings().num_embeddings
    largest = max([*policy.tokenizer.get_vocab().values(), policy.pad_id, *policy.eos_ids.tolist()])
    if largest >= size:
        raise ValueError(f"its tokenizer has tokens up to {largest}, its vocabulary only {size}")
    tokens, attention = torch.tensor([[[policy.pad_id, 0, 1, 2, 3], [1] * 5]], device=policy.device).unbind(1)
    logits, other = (policy.forward(tokens[:, ids], attention[:, 1:]).logits for ids in ([1, 2, 3, 4], [1, 4, 4, 4]))
    if logits.isnan().any():
        raise ValueError("its logits are NaN")
    bound = 64 * torch.finfo(torch.float32).eps * logits.abs().max()
    if (other[:, 0] - logits[:, 0]).abs().max() > bound:
        raise ValueError("it is an encoder: a token's logits depend on the tokens after it")
    attention[:, 0] = 0
    prefix = policy.forward(tokens[:, :-1], attention[:, :-1], use_cache=True)
    if not cached(prefix):
        raise ValueError("it has no key-value cache, with which responses are sampled here")
    last = policy.forward(tokens[:, -1:], attention, use_cache=True, **cached(prefix)).logits
    if not (last[:, -1] - logits[:, -1]).abs().max() <= bound:
        raise ValueError("its logits behind padding, or with a cache, are not those without")

"""A causal LM whose head computes log-probs and losses in place of logits, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
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

    def __post_init__(self) -> None:
        # Without dropout, or a token's log-prob would differ between scoring and training.
        nn.Module.to(self.model, self.device).eval()
        patch_model(self.model)
        self.wrapper: nn.Module = self.model  # where a run is spread by DDP, that
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos = eos if isinstance(eos, list) else [eos]
        ids = [i for i in dict.fromkeys([self.tokenizer.eos_token_id, *eos]) if i is not None]
        if not ids:
            raise ValueError("model: it has no end-of-sequence token")
        self.eos_ids = torch.tensor(ids, device=self.device)
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else ids[0]

    @property
    def dtype(self) -> torch.dtype:
        """What the matrix products run in. The parameters, and so AdamW's steps, are always float32."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def forward(self, tokens: Tensor, attention: Tensor, **options: Any) -> Any:  # [B, L], [B, >= L]
        """The model over the tokens, the last ones of `attention`. Padding on the left has no position. Training and
        sampling, all goes through the model's own call, on which whatever spreads it over ranks has its hooks."""
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        module = self.wrapper if torch.is_grad_enabled() else self.model
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return module(tokens, attention_mask=attention, position_ids=positions, **options)

    def save(self, folder: Path, state: dict[str, Any] | None = None) -> None:
        """`state`: the parameters where the model has only a part of them."""
        self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)


def new_policy(hidden_size: int, layers: int, seed: int, device: torch.device) -> Policy:
    """A small Qwen2 with random weights and a tokenizer of bytes: any text, no file, 258 tokens."""
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = Qwen2ForCausalLM(config)
    return Policy(model, tokenizer, device)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<eos>"]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def load_policy(name: str, device: torch.device) -> Policy:
    """A causal LM by folder or name. Raises ValueError where it cannot be loaded or its head does
    what `patch_model` does not know."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name} cannot be loaded: {error}") from error
    if device.type == "cuda" and model.config.model_type == "qwen2":
        _patch_with_liger(model)
    return Policy(model, tokenizer, device)


def _patch_with_liger(model: PreTrainedModel) -> None:
    """Liger's kernels for the backbone, where they are installed; the head and the loss are ours."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2
    except ImportError:
        return
    apply_liger_kernel_to_qwen2(cross_entropy=False, fused_linear_cross_entropy=False, model=model)

"""TRL's GRPO without the logits: a script for `GRPOTrainer` with its import changed.

What it shows: `CovGRPOTrainer` in place of `GRPOTrainer`. With `weighting="none"` the algorithm is TRL's own; without
it the advantages are weighted token by token, which is CW-GRPO.

What to expect: a tiny model with random weights learns to write sevens, one character of twelve by chance. Eight
generations take some seconds on a CPU, and the share of sevens is several times as high after them.

    pip install '.[trl]'
    python examples/with_trl.py
"""

import tempfile

from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import GRPOConfig

from covgrpo_kernels.integrations.trl import CovGRPOTrainer  # was: from trl import GRPOTrainer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each digit. It and the model stand for yours."""
    tokens = ["<pad>", "<eos>", *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def share_of_sevens(completions: list[str], **_: object) -> list[float]:
    return [completion.count("7") / max(len(completion.replace(" ", "")), 1) for completion in completions]


def main(steps: int = 8) -> list[float]:
    """The reward of each step."""
    set_seed(0)
    tokenizer = tiny_tokenizer()
    trainer = CovGRPOTrainer(
        model=tiny_model(tokenizer),
        weighting="none",  # GRPO; without this line, CW-GRPO
        reward_funcs=share_of_sevens,
        args=GRPOConfig(
            tempfile.mkdtemp(),
            max_steps=steps,
            learning_rate=2e-2,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=8,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["123", "456"] * 64}),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # which prints every entry of the log
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"share of sevens: {rewards[0]:.2f} at first, {rewards[-1]:.2f} after {steps} steps")
    return rewards


if __name__ == "__main__":
    main()

"""The minimal GRPO loop: what a trainer around `covgrpo_kernels.covgrpo_loss` looks like, and no more.

train.py       the algorithm: sample, reward, score, several steps on the loss; start reading here
config.py      every option of a run, and of `covgrpo train`
rollout.py     grouped sampling with a KV cache, the batch it gives, advantages
policy.py      a causal LM whose head gives log-probs and losses; the small Qwen2 and its tokenizer
tasks.py       generated problems whose answers a program checks; your own from a file
parallel.py    the same run in several processes, under torchrun
checkpoint.py  files that survive a kill at any moment
progress.py    the progress bar; plots.py: report.png; demo.py: GRPO and CW-GRPO side by side
"""

"""The minimal GRPO loop: what a trainer around `covgrpo_kernels.covgrpo_loss` looks like, and no more. It uses public
names of the package only; `examples/grpo.py` is the same algorithm in one file.

train.py       the algorithm, `grpo_step`: sample, reward, compare, score, update; start reading here. Then a run of it
rollout.py     sampling in groups with a cache, rewards, advantages, the batch they make
policy.py      a causal LM whose head gives log-probs and losses; which models can be trained
tasks.py       generated problems whose answers a program checks; your own from a file
config.py      every option of a run, and of `covgrpo train`
parallel.py    the same run in several processes, under torchrun
checkpoint.py  the folder of a run: whole after a kill, and nobody else's files touched
logs.py        the metrics of each step: metrics.jsonl, TensorBoard, Weights & Biases
demo.py        GRPO and CW-GRPO side by side; plots.py: report.png; progress.py: what is shown meanwhile
"""

"""What was tried out with the library, and what came of it: `python -m research`. Not installed with the package.

study/        does CW-GRPO do what its paper says? Arms and seeds side by side, with a report
entropy_law/  the law that the paper starts from, measured
recipe/       the paper's set-up from a YAML file of recipes/
models.py     two real language models, fetched into a cache
recordings.py what the heads of these see, measured
trainers.py   memory and time of a training step of one of them
training.py   whether training notices what the backward leaves out
results/      what these found
"""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"

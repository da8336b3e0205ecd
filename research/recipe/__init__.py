"""`python -m research recipe`: a whole run from one YAML file of `research/recipes/`: model, data, rewards,
`CovGRPOTrainer`, benchmarks, report. Start in `run.py`."""

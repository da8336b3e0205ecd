"""A whole run from one YAML file: model, data, rewards, `CovGRPOTrainer`, benchmarks, report (`recipes/`). Start in
`run.py`."""

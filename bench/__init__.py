"""Benchmarks: `python -m bench`; what is measured and why is in README.md beside this."""

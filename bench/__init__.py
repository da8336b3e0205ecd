"""Benchmarks: `python -m bench CASE`."""

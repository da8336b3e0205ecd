"""Metadata lives in pyproject.toml; this file is where the optional C++ extension of csrc/ is attached."""

from setuptools import setup

setup()

"""Switchable Sparse-Dense Learning (ICML 2024, arXiv 2410.03440) as an experiment suite."""

__version__ = "0.1.0"

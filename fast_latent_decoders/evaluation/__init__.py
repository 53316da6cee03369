"""Evaluation: metrics, reports, benchmarks."""

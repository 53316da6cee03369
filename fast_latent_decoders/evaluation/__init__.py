"""Measures of decoded pictures: per-picture metrics, their intervals, distances of distributions."""

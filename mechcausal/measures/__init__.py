"""Measurements of a model at a probe step and after training."""

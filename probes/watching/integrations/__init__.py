"""Callbacks that track a run of a training framework; each loads its framework when imported."""

"""Probes hook into a model during its passes and return labelled readings."""

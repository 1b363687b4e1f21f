"""Helpers that have nothing to do with transformers: files, messages, signals, statistics."""

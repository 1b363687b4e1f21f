"""A run on disk and in W&B: written while it trains, read back afterwards."""

"""Models: each a HookedTransformer with the closed form that computes the same function.

This module imports nothing, because TransformerLens takes seconds to import.
"""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

"""File names of a saved model, in a module that does not import TransformerLens (slow)."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

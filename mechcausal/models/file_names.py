"""The files of a saved model, by name: known without TransformerLens, which takes seconds."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

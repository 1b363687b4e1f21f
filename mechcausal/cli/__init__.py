"""The commands of `mechcausal`: one module each, arguments in, exit code out."""

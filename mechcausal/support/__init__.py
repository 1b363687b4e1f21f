"""What has nothing to do with transformers: files, messages, signals, devices, statistics."""

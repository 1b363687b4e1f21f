"""Training: experiments, the loop, checkpoints, resuming."""

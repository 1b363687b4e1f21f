"""Watch a training run that is not ours: information of the data, gradients, agreement."""

"""Watch a training run: the information of its data, its gradients, its heads as they form."""

"""Models: each a HookedTransformer with the closed form that computes the same function."""

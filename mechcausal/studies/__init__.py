"""Questions asked of trained models: the paper again, explanations, induction heads."""

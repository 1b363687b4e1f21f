"""Marks what a test can only show with one of the TransformerLens versions that are supported."""

import pytest
import transformer_lens

needs_lens_3 = pytest.mark.skipif(
    "HookedTransformer" not in transformer_lens.__all__,
    reason="TransformerLens 4.0 removed its own HookedTransformer and HookedEncoder",
)

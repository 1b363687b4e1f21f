"""Which of the supported TransformerLens versions the tests run with."""

import pytest
import transformer_lens

HAS_LENS_3 = "HookedTransformer" in transformer_lens.__all__

needs_lens_3 = pytest.mark.skipif(
    not HAS_LENS_3,
    reason="TransformerLens 4.0 removed its own HookedTransformer and HookedEncoder",
)

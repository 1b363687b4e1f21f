"""Zero-shot causal discovery: a causal graph over the tokens of one input, read from attention.

    found = discover(model, tokens, n_eff=64)  # a HookedTransformer or TransformerBridge
    print(found.pag)

Attention is read as a linear structural equation model, so that A Aᵀ is a covariance of the
tokens; a search with independence tests then finds the graph of what remains dependent.

Source: Rohekar, Gurwicz and Nisimov 2023, "Causal interpretation of self-attention in pre-trained
transformers" (arXiv 2310.20307).
"""

from probes.causal_discovery.pag import PAG, Edge, Mark

__all__ = ["PAG", "Edge", "Mark"]

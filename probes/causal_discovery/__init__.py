"""Zero-shot causal discovery: a causal graph over the tokens of one input, read from attention.

    found = discover(model, tokens, n_eff=64)  # a HookedTransformer or TransformerBridge
    print(found.pag)

Attention is read as a linear structural equation model, so that A Aᵀ is a covariance of the
tokens; a search with independence tests then finds the graph of what remains dependent.

Cost: a search over dense graphs of many tokens can take very long (the number of conditioning sets
grows exponentially): give it `max_cond`, or a `time_budget`.

Source: Rohekar, Gurwicz and Nisimov 2023, "Causal interpretation of self-attention in pre-trained
transformers" (arXiv 2310.20307).
"""

from probes.causal_discovery.discovery import Discovery, discover, discover_attention
from probes.causal_discovery.independence import IndependenceTest, PartialCorrelationTest
from probes.causal_discovery.linear import linear_edges, linear_effects
from probes.causal_discovery.pag import PAG, Edge, Mark
from probes.causal_discovery.picture import draw, save_picture
from probes.causal_discovery.search import Found, icd

__all__ = [
    "PAG",
    "Discovery",
    "Edge",
    "Found",
    "IndependenceTest",
    "Mark",
    "PartialCorrelationTest",
    "discover",
    "discover_attention",
    "draw",
    "icd",
    "linear_edges",
    "linear_effects",
    "save_picture",
]

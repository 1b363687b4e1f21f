"""Zero-shot causal discovery: a causal graph over the tokens of one input, read from attention.

    discovery = discover(model, tokens, n_eff=64)  # a HookedTransformer or TransformerBridge
    print(discovery.pag)

Attention is read as a linear structural equation model, so that A Aᵀ is the covariance of the
tokens; a search with independence tests then finds the graph.

Cost: the number of conditioning sets grows exponentially with the size of a dense graph; limit it
with `max_cond` or `time_budget`.

Source: Rohekar, Gurwicz and Nisimov 2023, "Causal interpretation of self-attention in pre-trained
transformers" (arXiv 2310.20307).
"""

from probes.causal_discovery.discovery import Discovery, discover, discover_attention
from probes.causal_discovery.explanation import Explanation, explain
from probes.causal_discovery.independence import IndependenceTest, PartialCorrelationTest
from probes.causal_discovery.linear_model import linear_edges, linear_effects
from probes.causal_discovery.options import SearchOptions
from probes.causal_discovery.pag import PAG, Edge, Mark
from probes.causal_discovery.picture import draw, save_picture
from probes.causal_discovery.search import SearchResult, icd
from probes.causal_discovery.stability import Stability, bootstrap, bootstrap_model

__all__ = [
    "PAG",
    "Discovery",
    "Edge",
    "Explanation",
    "IndependenceTest",
    "Mark",
    "PartialCorrelationTest",
    "SearchOptions",
    "SearchResult",
    "Stability",
    "bootstrap",
    "bootstrap_model",
    "discover",
    "discover_attention",
    "draw",
    "explain",
    "icd",
    "linear_edges",
    "linear_effects",
    "save_picture",
]

"""FCI and PC from the package causal-learn, to check our search (optional extra `discovery`)."""

import contextlib
import io
import warnings
from typing import Any, Literal

import numpy as np

from probes.causal_discovery.independence import IndependenceTest
from probes.causal_discovery.orientation import ARROW, CIRCLE, NONE, TAIL
from probes.causal_discovery.pag import PAG
from probes.causal_discovery.search import SearchResult
from probes.reading.errors import ProbeError

_NAME = "probes_independence"


def causal_learn(
    test: IndependenceTest, method: Literal["fci", "pc"], *, max_cond: int | None = None
) -> SearchResult:
    """Search with causal-learn and our independence test.

    Compare mainly the skeleton: causal-learn's rule R5 may give false tails. PC assumes no hidden
    variables; its undirected edges become `o-o`.

    Args:
        test: the test of conditional independence.
        method: "fci" or "pc".
        max_cond: largest conditioning set of the adjacency search, None for no limit.

    Returns:
        As `icd`, with `reached` None; a pair's separating set is the first that the search met.

    Raises:
        ProbeError: causal-learn is not installed.

    Source: Zheng et al. 2024, "Causal-learn: Causal discovery in Python".
    """
    n = test.n_variables
    if n < 2:
        return SearchResult(PAG(tuple(range(n)), np.zeros((n, n), int)), {}, 0, True, None)
    asked: dict[tuple[int, int, tuple[int, ...]], bool] = {}
    depth = -1 if max_cond is None else max_cond
    graph = _run(test, method, asked, depth)
    # causal-learn stores the mark at i of the edge i–j in [i, j]; we store it in [j, i].
    marks = np.zeros((n, n), dtype=int)
    for theirs, ours in ((-1, TAIL), (1, ARROW), (2, CIRCLE)):
        marks[graph.T == theirs] = ours
    if method == "pc":
        marks[(marks == TAIL) & (marks.T == TAIL)] = CIRCLE
    separating: dict[tuple[int, int], tuple[int, ...]] = {}
    for (i, j, given), independent in asked.items():
        if independent and marks[i, j] == NONE:
            separating.setdefault((i, j), given)
    complete = True
    if max_cond is not None:
        # FCI and PC share the adjacency search, and PC's skeleton is its result; `asked` holds the
        # tests.
        adjacent = (graph if method == "pc" else _run(test, "pc", asked, depth)) != 0
        # The search tests larger sets only for nodes with more than max_cond other neighbours.
        complete = bool(adjacent.sum(1).max() - 1 <= max_cond)
    return SearchResult(PAG(tuple(range(n)), marks), separating, len(asked), complete, None)


def _run(
    test: IndependenceTest,
    method: Literal["fci", "pc"],
    asked: dict[tuple[int, int, tuple[int, ...]], bool],
    depth: int,
) -> np.ndarray:
    try:
        from causallearn.search.ConstraintBased.FCI import fci
        from causallearn.search.ConstraintBased.PC import pc
        from causallearn.utils.cit import CIT_Base, register_ci_test
    except ImportError:
        raise ProbeError(
            f"{method} needs the package causal-learn: pip install 'mechcausal[discovery]'"
        ) from None
    base: Any = CIT_Base

    class Ours(base):  # type: ignore[misc]
        """Our test in the form of causal-learn's tests, which expect data."""

        method = _NAME

        def __call__(self, x: Any, y: Any, given: Any = None, **_: Any) -> float:
            i, j = sorted((int(x), int(y)))
            key = (i, j, tuple(sorted(int(k) for k in (() if given is None else given))))
            if key not in asked:
                asked[key] = test.independent(*key)
            return float(asked[key])

    register_ci_test(_NAME, Ours)
    no_data = np.zeros((1, test.n_variables))
    # causal-learn prints to the terminal.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message="The number of features")
        if method == "fci":
            graph = fci(no_data, _NAME, 0.5, depth=depth, show_progress=False)[0].graph
        else:
            max_k = None if depth < 0 else depth
            graph = pc(no_data, 0.5, _NAME, show_progress=False, max_k=max_k).G.graph
    return np.asarray(graph)

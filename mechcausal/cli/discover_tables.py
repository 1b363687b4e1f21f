"""What `mechcausal discover` shows in the terminal."""

from typing import TYPE_CHECKING

from mechcausal.cli.tables import make_table

if TYPE_CHECKING:
    from probes import Discovery
    from probes.causal_discovery import Stability


def title_of(target: str, discovery: "Discovery") -> str:
    """The target, head and settings in one line."""
    layer, alpha = discovery.layer, discovery.alpha
    source = target if layer is None else f"{target}, layer {layer}, head {discovery.head}"
    order = "token order is causal order" if discovery.ordered else "no order known"
    return f"{source}: {len(discovery.pag.nodes)} tokens, alpha {alpha:g}, {order}"


def print_graph(
    target: str,
    discovery: "Discovery",
    words: list[str] | None,
    stability: "Stability | None" = None,
) -> None:
    """Print the edges of a graph, each with its stability if that was asked for."""
    from rich.console import Console
    from rich.markup import escape

    def node(position: int) -> str:
        return str(position) if words is None else escape(f"{position} {words[position]!r}")

    console = Console()
    console.print(escape(title_of(target, discovery)))
    edges = discovery.pag.edges()
    judged = () if stability is None else ("joined", "same marks")
    table = make_table(("from", "edge", "to", *judged), n_left=3)
    table.columns[0].justify = "right"
    table.columns[1].no_wrap = True
    for row, edge in enumerate(edges):
        shares = []
        if stability is not None:
            pair = stability.edges[row]
            shares = [f"{pair.joined:.0%}", f"{pair.same:.0%}"]
        table.add_row(node(edge.start), escape(edge.marks), node(edge.end), *shares)
    if edges:
        console.print(table)
    if stability is not None:
        n_eff = ", ".join(f"{value:g}" for value in stability.n_eff)
        console.print(
            f"shares of {stability.replicates} replicates over {', '.join(stability.over)} "
            f"(n_eff {n_eff})"
        )
        for pair in stability.missing[:5]:
            if pair.joined >= 0.5:
                ends = f"{node(pair.start)} and {node(pair.end)}"
                console.print(f"no edge here, but in {pair.joined:.0%} of them: {ends}")
    console.print(f"edges: {len(edges)}, tests: {discovery.tests}, n_eff: {discovery.n_eff:g}")
    if not discovery.complete:
        reached = "none" if discovery.reached is None else discovery.reached
        console.print(
            f"stopped early (largest conditioning set with all tests made: {reached}): "
            "edges may be too many"
        )


def print_sweep(target: str, discoveries: "list[Discovery]") -> None:
    """Print how many edges the search keeps with each n_eff."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(escape(title_of(target, discoveries[0])))
    table = make_table(("n_eff", "edges", "-->", "<->", "tests", "complete"), n_left=0)
    for discovery in discoveries:
        marks = [edge.marks for edge in discovery.pag.edges()]
        counts = (len(marks), marks.count("-->"), marks.count("<->"), discovery.tests)
        complete = "yes" if discovery.complete else "no"
        table.add_row(f"{discovery.n_eff:g}", *map(str, counts), complete)
    console.print(table)

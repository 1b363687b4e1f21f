"""`mechcausal theory`."""

import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from mechcausal.cli.display import bar_on_terminal
from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.recipes import Recipe, RecipeError, load_recipe, parse_recipe

if TYPE_CHECKING:
    from mechcausal.theory import PairwiseTheory, ParentInformation


@dataclass
class Theory:
    """Pairwise information of a causal graph, and the attention gradient that it predicts."""

    recipe: tyro.conf.Positional[str | None] = None
    """Path of a recipe, or the name of a bundled recipe; without one, give --parents."""
    parents: str | None = None
    """Parent of every position, -1 for a root, as in "-1,0,0,1,2"."""
    vocab_size: int | None = None
    """Number of tokens S (with --parents; default 10)."""
    alpha: float | None = None
    """Dirichlet concentration (with --parents; default 0.1)."""
    priors: int | None = None
    """Transition matrices to average over; when absent 1,000, or what about a minute allows."""
    seed: int | None = None
    """Seed of the matrices and of a recipe's random graph; when absent, the recipe's seed or 0."""
    json: bool = False
    """Print one JSON object."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, or 2 by way of `RefusedError`."""
    options = parse(Theory, _joined(arguments, "--parents"), command="theory")
    try:
        if (options.recipe is None) == (options.parents is None):
            raise RefusedError("theory needs either a recipe or --parents")
        if options.recipe is not None:
            if options.vocab_size is not None or options.alpha is not None:
                raise RefusedError("--vocab-size and --alpha go with --parents, not with a recipe")
            recipe = load_recipe(options.recipe)
            if options.seed is not None:
                recipe = recipe.with_overrides(seed=options.seed)
        else:
            given = {"vocab_size": options.vocab_size, "alpha": options.alpha}
            data = {
                "graph": {"preset": "manual", "parents": _integers(options.parents)},
                "task": {key: value for key, value in given.items() if value is not None},
                "seed": options.seed or 0,
            }
            recipe = parse_recipe(data, source="command line")
        if options.priors is not None and options.priors < 2:
            raise RefusedError(f"--priors is {options.priors}: at least 2 are needed")
        source = options.recipe or "--parents"
        return _print_theory(recipe, source, options.priors, as_json=options.json)
    except RecipeError as error:
        raise RefusedError(str(error)) from None


def _print_theory(recipe: Recipe, source: str, n_priors: int | None, *, as_json: bool) -> int:
    import torch

    from mechcausal.graphs import GraphError
    from mechcausal.tasks import SeveralParentsTask, build_task
    from mechcausal.tasks.priors import PriorError
    from mechcausal.theory import (
        Information,
        ParentInformation,
        pairwise_theory,
        parent_information,
        theory_notes,
    )
    from mechcausal.training.experiments.memory import check_memory, theory_needs

    generator = torch.Generator().manual_seed(recipe.seed)
    progress = _Progress()
    try:
        graph = recipe.build_graph()
        task = build_task(graph, recipe.build_prior())
        check_memory(theory_needs(recipe, graph))
        options: dict[str, Any] = {
            "n_priors": 1000 if n_priors is None else n_priors,
            "generator": generator,
            "max_seconds": None if n_priors else recipe.evaluation.theory_seconds,
            "on_progress": progress.tell,
        }
        information: Information
        if isinstance(task, SeveralParentsTask):
            information = parent_information(task, **options)
        else:
            beta0 = recipe.training.beta0
            information = pairwise_theory(task.graph, task.prior, beta0=beta0, **options)
    except (GraphError, PriorError) as error:
        raise RefusedError(f"{source}: {error}") from None
    finally:
        progress.close()
    for note in theory_notes(information, "--priors"):
        print(f"mechcausal: {note}", file=sys.stderr)
    if isinstance(information, ParentInformation):
        return _print_information(information, as_json=as_json)
    return _print_pairs(information, as_json=as_json)


class _Progress:
    """A bar of the draws on a terminal, if they take more than a second."""

    def __init__(self) -> None:
        self._bar = bar_on_terminal()
        self._task = self._bar.add_task("draws", total=None, figures="")
        self._began = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        """Update the bar."""
        self._bar.update(self._task, completed=done, total=total)
        if done < total and time.monotonic() > self._began + 1:
            self._bar.start()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()


def _print_pairs(theory: "PairwiseTheory", *, as_json: bool) -> int:
    edges = theory.predicted_edges()
    if as_json:
        content = {
            "parents": list(theory.graph.parent_array()),
            "n_priors": theory.n_priors,
            "chi2": theory.chi2.tolist(),
            "chi2_stderr": theory.chi2_stderr.tolist(),
            "shannon": theory.shannon.tolist(),
            "g": theory.g.tolist(),
            "predicted_gradient": theory.predicted_gradient.tolist(),
            "edges": [list(edge) for edge in edges],
        }
        print(json.dumps(content))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(edges)} edges picked; averages over {theory.n_priors} matrices")
    for heading in ("parent → child", "g", "χ² (± stderr)", "Shannon (nats)", "true edge"):
        table.add_column(heading, justify="right")
    true = set(theory.graph.edges)
    for parent, child in sorted(set(edges) | true, key=lambda edge: edge[1]):
        mark = "yes" if (parent, child) in true else "no"
        table.add_row(
            f"{parent} → {child}",
            f"{theory.g[child, parent]:.4f}",
            f"{theory.chi2[child, parent]:.4f} ± {theory.chi2_stderr[child, parent]:.4f}",
            f"{theory.shannon[child, parent]:.4f}",
            mark if (parent, child) in edges else f"{mark}, not picked",
        )
    Console().print(table)
    return 0


def _print_information(information: "ParentInformation", *, as_json: bool) -> int:
    """Print, for several parents, the information of every edge and of each set of parents."""
    graph = information.graph
    if as_json:
        names = ("chi2", "shannon", "set_chi2", "set_shannon")
        values = {
            name + end: getattr(information, name + end).tolist()
            for name in names
            for end in ("", "_stderr")
        }
        content = {
            "parents": [list(row) for row in graph.parents],
            "query_parents": list(graph.query_parents or ()),
            "method": information.method,
            "n_priors": information.n_priors,
            "n_sequences": information.n_sequences,
        }
        print(json.dumps(content | values))
        return 0
    from rich.console import Console
    from rich.table import Table

    title = f"information with parents ({information.method}, {information.n_priors} draws)"
    table = Table(title=title)
    for heading in ("parents → child", "χ² (± stderr)", "Shannon (nats)"):
        table.add_column(heading, justify="right")
    children = [*enumerate(graph.parents), (graph.n_positions, graph.query_parents or ())]
    for child, parents in children:
        name = "predicted token" if child == graph.n_positions else str(child)
        rows: list[tuple[str, float, float, float]] = [
            (
                f"{parent} → {name}",
                information.chi2[child, parent].item(),
                information.chi2_stderr[child, parent].item(),
                information.shannon[child, parent].item(),
            )
            for parent in parents
        ]
        if len(parents) > 1:
            label = f"{', '.join(map(str, parents))} → {name}"
            tensors = (information.set_chi2, information.set_chi2_stderr, information.set_shannon)
            chi2, stderr, shannon = (tensor[child].item() for tensor in tensors)
            rows.append((label, chi2, stderr, shannon))
        for label, chi2, stderr, shannon in rows:
            table.add_row(label, f"{chi2:.4f} ± {stderr:.4f}", f"{shannon:.4f}")
    Console().print(table)
    return 0


def _joined(arguments: list[str], flag: str) -> list[str]:
    """Turn `--flag -1,0` into `--flag=-1,0`: the parser would take `-1,0` for an option."""
    joined: list[str] = []
    for word in arguments:
        if joined and joined[-1] == flag:
            joined[-1] = f"{flag}={word}"
        else:
            joined.append(word)
    return joined


def _integers(text: str | None) -> list[int]:
    words = (text or "").split(",")
    try:
        return [int(word) for word in words]
    except ValueError:
        raise RefusedError(
            f'--parents is {text!r}: give one integer for each position, as in "-1,0,0,1,2"'
        ) from None

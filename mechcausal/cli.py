"""The `mechcausal` command: parsing and printing only. Heavy imports stay inside the commands."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import tyro

from mechcausal.recipes import (
    Recipe,
    RecipeError,
    WandbMode,
    load_recipe,
    packaged_recipes,
    parse_recipe,
    recipe_to_dict,
)

if TYPE_CHECKING:
    from mechcausal.training import Progress, RunResult

BAD_INPUT = 2

USAGE = """usage: mechcausal COMMAND ...

Watch a transformer learn causal structure.

commands:
  train RECIPE   train a recipe's model, watched by hooks, recorded to W&B and files
  theory         pairwise information of a causal graph and the attention gradient it predicts

options:
  -h, --help     this text; `mechcausal COMMAND --help` for a command's options
  --version      the version

recipes that come along: {recipes}
"""

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 (run failed), 2 (bad input) or 128 + signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "→" or "χ" shows "?"
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    commands: dict[str, Callable[[list[str]], int]] = {"train": _train, "theory": _theory}
    if command in ("-h", "--help", "help"):
        print(USAGE.format(recipes=", ".join(packaged_recipes())), end="")
        return 0
    if command == "--version":
        from mechcausal import __version__

        print(f"mechcausal {__version__}")
        return 0
    if command not in commands:
        return _complain(f"{command}: unknown command; allowed: {', '.join(commands)}")
    # Threads that wait for each other should sleep: spinning, torch's default, is many times slower
    # than one thread as soon as anything else wants the cores. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return commands[command](rest)
    except _RefusedError as refusal:
        return _complain(str(refusal))
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _RefusedError(Exception):
    """Input that a command refuses; one line."""


def _complain(message: str) -> int:
    line = " ".join(message.split())
    print(f"mechcausal: {line}", file=sys.stderr)
    return BAD_INPUT


def _parse(kind: type[T], arguments: Sequence[str], *, command: str, default: T | None = None) -> T:
    """tyro's parser, its error boxes turned into one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            prog = f"mechcausal {command}"
            parsed = tyro.cli(kind, prog=prog, args=list(arguments), default=default)
            return cast(T, parsed)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise _RefusedError(_first_lines(errors.getvalue())) from None


def _first_lines(box: str) -> str:
    """The message of a tyro error box: what stands before its first rule, and the suggestions."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    lines = [line for line in lines if line and not line.startswith("╰")]
    is_rule = [set(line) <= {"─", "-"} for line in lines]
    if is_rule[1:2] == [True]:  # where the terminal has no box characters the title has a rule
        lines, is_rule = lines[2:], is_rule[2:]
    head = lines[: is_rule.index(True)] if True in is_rule else lines
    message = " ".join(line for line in head if not line.startswith("╭"))
    start = next((i for i, line in enumerate(lines) if line.startswith("Perhaps you meant")), None)
    if start is not None:
        close = [
            line.split()[0].rstrip(",")
            for line in lines[start + 1 :]
            if line.startswith("--") and line.strip("-")
        ]
        message += f"; did you mean {' or '.join(close[:3])}?"
    return message


@dataclass
class Train:
    """Train a recipe's model, watched by hooks, recorded to W&B and files."""

    recipe: tyro.conf.Positional[str] = ""
    """Path of a recipe (TOML), or the name of one that comes along."""
    out: Path | None = None
    """Folder of this run; runs/<recipe>/<run-id> when absent."""
    wandb_mode: WandbMode | None = None
    """Short for --wandb.mode."""
    quiet: bool = False
    """No progress bar."""
    values: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def _train(arguments: list[str]) -> int:
    # Values on the command line override those of the recipe: read which recipe it is first.
    target = _parse(Train, arguments, command="train").recipe
    if not target:
        raise _RefusedError(f"train needs a recipe: a file, or {', '.join(packaged_recipes())}")
    try:
        start = Train(values=load_recipe(target))
        options = _parse(Train, arguments, command="train", default=start)
        values = recipe_to_dict(options.values)
        if options.wandb_mode is not None:
            values["wandb"]["mode"] = options.wandb_mode
        recipe = parse_recipe(values, source="command line")
    except RecipeError as error:
        raise _RefusedError(str(error)) from None
    return _run_training(recipe, target, options.out, quiet=options.quiet)


def _run_training(recipe: Recipe, source: str, out: Path | None, *, quiet: bool) -> int:
    print(f"mechcausal train {recipe.name} (seed {recipe.seed}, {recipe.device})", flush=True)
    from mechcausal.graphs import GraphError
    from mechcausal.priors import PriorError
    from mechcausal.tracking import RunFolderError, TrackingError
    from mechcausal.training import NonFiniteLossError, train

    bar = _ProgressBar(quiet=quiet)
    try:
        result = train(recipe, out=out, on_progress=bar.show)
    except (GraphError, PriorError) as error:
        raise _RefusedError(f"{source}: {error}") from None
    except (RecipeError, RunFolderError, TrackingError) as error:
        raise _RefusedError(str(error)) from None
    except NonFiniteLossError as error:
        bar.close()
        print(f"mechcausal: {error}", file=sys.stderr)
        return 1
    finally:
        bar.close()
    _print_result(result)
    return 128 + result.signal if result.signal is not None else 0


class _ProgressBar:
    """Loss, gap and recovered edges beside the steps; nothing where stderr is no terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None

    def show(self, progress: "Progress") -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=progress.n_steps,
                disable=True if self._quiet else None,
                unit="step",
                dynamic_ncols=True,
            )
        bar = self._bar
        if bar.disable:
            return
        figures = progress.figures
        shown = {
            "loss": figures.get("loss/eval"),
            "gap": figures.get("loss/gap"),
            "edges": figures.get("graph/recovered"),
        }
        formats = {"loss": "{:.3f}", "gap": "{:.3f}", "edges": "{:.0%}"}
        texts = {key: formats[key].format(v) for key, v in shown.items() if v is not None}
        bar.set_description(progress.stage, refresh=False)
        bar.set_postfix(texts, refresh=False)
        bar.update(progress.step - bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


# Rows of the closing table: figure, whether the first probe step is what counts, what it means.
_TABLE = (
    ("gradient/edge_hits", True, "first gradient: rows that name the parent"),
    ("graph/f1", True, "first gradient: F1 of the edges it names"),
    ("gradient/theory_correlation", True, "first gradient with the predicted one"),
    ("gradient/chi2_correlation", True, "first gradient with χ²-information"),
    ("graph/recovered", False, "edges that get the row's attention"),
    ("graph/parent_attention", False, "mean attention on the parent"),
    ("induction/score", False, "layer 2 where parent = query"),
    ("induction/formation_step", False, "step at which that passed 0.5"),
    ("loss/eval", False, "nats"),
    ("loss/bayes", False, "nats, the best possible"),
    ("loss/gap", False, "nats above Bayes"),
)


def _print_result(result: "RunResult") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.state} after {result.summary['train/steps']:,} steps")
    for heading, justify in (("figure", "left"), ("value", "right"), ("meaning", "left")):
        table.add_column(heading, justify="right" if justify == "right" else "left")
    for name, first, meaning in _TABLE:
        source = result.summary.get("first", {}) if first else result.summary
        value = source.get(name)
        if value is not None:
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            table.add_row(name, text, meaning)
    console = Console()
    console.print(table)
    figures = result.folder / "figures"
    for label, place in (
        ("run", result.folder),
        ("figures", figures if figures.is_dir() else None),
        ("W&B", result.url or result.wandb_folder),
    ):
        if place is not None:
            console.print(f"{label + ':':9}{place}", soft_wrap=True, highlight=False)
    for warning in result.warnings:
        print(f"mechcausal: warning: {warning}", file=sys.stderr)


@dataclass
class Theory:
    """Pairwise information of a causal graph, and the attention gradient that it predicts."""

    recipe: tyro.conf.Positional[str | None] = None
    """Path of a recipe, or the name of one that comes along; else give --parents."""
    parents: str | None = None
    """Parent of every position, -1 for a root, as in "-1,0,0,1,2"."""
    vocab_size: int | None = None
    """Number of tokens S (with --parents; default 10)."""
    alpha: float | None = None
    """Dirichlet concentration (with --parents; default 0.1)."""
    priors: int = 1000
    """Transition matrices to average over."""
    seed: int | None = None
    """Seed of the matrices, and of a recipe's random graph; the recipe's, else 0, when absent."""
    json: bool = False
    """Print one JSON object."""


def _theory(arguments: list[str]) -> int:
    options = _parse(Theory, _joined(arguments, "--parents"), command="theory")
    try:
        if (options.recipe is None) == (options.parents is None):
            raise _RefusedError("theory needs either a recipe or --parents")
        if options.recipe is not None:
            if options.vocab_size is not None or options.alpha is not None:
                raise _RefusedError("--vocab-size and --alpha go with --parents, not with a recipe")
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
        if options.priors < 2:
            raise _RefusedError(f"--priors is {options.priors}: at least 2 are needed")
        source = options.recipe or "--parents"
        return _print_theory(recipe, source, options.priors, as_json=options.json)
    except RecipeError as error:
        raise _RefusedError(str(error)) from None


def _print_theory(recipe: Recipe, source: str, n_priors: int, *, as_json: bool) -> int:
    import torch

    from mechcausal.graphs import GraphError
    from mechcausal.priors import PriorError
    from mechcausal.theory import pairwise_theory

    try:
        theory = pairwise_theory(
            recipe.build_graph(),
            recipe.build_prior(),
            n_priors=n_priors,
            generator=torch.Generator().manual_seed(recipe.seed),
            beta0=recipe.training.beta0,
        )
    except (GraphError, PriorError) as error:
        raise _RefusedError(f"{source}: {error}") from None
    edges = theory.predicted_edges()
    if as_json:
        content = {
            "parents": list(theory.graph.parent_array()),
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


def _joined(arguments: list[str], flag: str) -> list[str]:
    """`--flag -1,0` as `--flag=-1,0`: a value that starts with a minus is no option."""
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
        raise _RefusedError(
            f'--parents is {text!r}: give one integer for each position, as in "-1,0,0,1,2"'
        ) from None


if __name__ == "__main__":
    sys.exit(main())

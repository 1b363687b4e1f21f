"""`mechcausal explain`."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.cli.tables import make_table, print_locations
from mechcausal.recipes import WandbMode

if TYPE_CHECKING:
    from rich.table import Table

    from mechcausal.studies.explanations.recording import Comparison
    from mechcausal.studies.explanations.text_classifier import TextExplanation

APPLICATIONS = ("recommender", "sentiment", "bridge")


@dataclass
class Explain:
    """The smallest set of tokens that changes a prediction, by causal discovery and by controls."""

    application: tyro.conf.Positional[str] = ""
    """recommender, sentiment, or bridge. The bridge compares discovered graphs with the true graph
    of the training data."""
    recipe: tyro.conf.Positional[str | None] = None
    """For bridge: a recipe with a causal graph; random_tree when absent."""
    seeds: int | None = None
    """Models to train, with seeds 0, 1, ...; 5 (bridge: 3) when absent."""
    sequences: int | None = None
    """Predictions to explain for each model; 60 (bridge: 20 sequences) when absent."""
    budget: int | None = None
    """Model runs that each method may use for one explanation; 300 when absent."""
    n_eff: float | None = None
    """Effective sample size of the discovery's tests; d_head (bridge: 768) when absent."""
    data: Path | None = None
    """For recommender: a MovieLens file (ratings.dat, ratings.csv or u.data) instead of generated
    sessions."""
    model: Path | None = None
    """For sentiment, with --text: a folder with a Hugging Face classifier."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")] = ()
    """Texts to explain with --model."""
    out: Path | None = None
    """Folder for models, table and picture; runs/explain_<application>/<time> when absent."""
    quick: bool = False
    """Fewer seeds and sequences and shorter training: under a minute."""
    json: bool = False
    """Print one JSON object."""
    wandb_mode: WandbMode | None = None
    """W&B mode; see `mechcausal train --help`."""
    device: str = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, 1 (training failed), 2 (bad input) or 128 + signal."""
    options = parse(Explain, arguments, command="explain")
    _check(options)
    import torch

    from mechcausal.recipes import RecipeError
    from mechcausal.records.run_folder import RunFolderError
    from mechcausal.records.wandb_runs import TrackingError
    from mechcausal.studies.explanations.movielens import RatingsError
    from mechcausal.studies.targets import TargetError
    from mechcausal.training.run import TrainingError

    # With several threads the order of summation varies, and equal seeds give other figures.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if options.model is not None:
            return _explain_texts(options, options.model)
        if options.application == "bridge":
            return _bridge(options)
        return _compare(options)
    except (RatingsError, RecipeError, RunFolderError, TargetError, TrackingError) as error:
        raise RefusedError(str(error)) from None
    except ValueError as error:
        raise RefusedError(f"{options.application}: {error}") from None
    except (FloatingPointError, TrainingError) as error:
        print(f"mechcausal: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"mechcausal: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(stop, "number", 2)
    except OSError as error:
        raise RefusedError(f"{error.filename or options.out}: {error.strerror or error}") from None
    finally:
        torch.set_num_threads(threads)


def _check(options: Explain) -> None:
    name = options.application
    if name not in APPLICATIONS:
        problem = f"{name}: no such application" if name else "explain needs an application"
        raise RefusedError(f"{problem}; allowed: {', '.join(APPLICATIONS)}")
    for flag, value, applications in (
        ("a recipe", options.recipe, ("bridge",)),
        ("--data", options.data, ("recommender",)),
        ("--model", options.model, ("sentiment",)),
        ("--text", options.text or None, ("sentiment",)),
        ("--budget", options.budget, ("recommender", "sentiment")),
    ):
        if value is not None and name not in applications:
            raise RefusedError(f"{flag} goes with {' or '.join(applications)}, not with {name}")
    if (options.model is None) != (not options.text):
        raise RefusedError("--model and --text go together")
    if options.model is not None:
        for flag, given in (
            ("--seeds", options.seeds),
            ("--sequences", options.sequences),
            ("--out", options.out),
            ("--wandb-mode", options.wandb_mode),
            ("--quick", options.quick or None),
        ):
            if given is not None:
                raise RefusedError(f"{flag} goes with training, not with --model")
    for flag, value, least in (
        ("--seeds", options.seeds, 1),
        ("--sequences", options.sequences, 1),
        ("--budget", options.budget, 3),
    ):
        if value is not None and value < least:
            raise RefusedError(f"{flag} is {value}: at least {least}")
    if options.n_eff is not None and not 3 < options.n_eff < float("inf"):
        raise RefusedError(f"--n-eff is {options.n_eff:g}: it must be above 3 and finite")


def _compare(options: Explain) -> int:
    from mechcausal.recipes.devices import device_named
    from mechcausal.studies.explanations.applications import Application, Recommendation, Sentiment
    from mechcausal.studies.explanations.driver import run_application
    from mechcausal.studies.explanations.movielens import load_ratings
    from mechcausal.studies.explanations.recording import new_folder
    from mechcausal.studies.explanations.sessions import ThemeRule

    device = str(device_named(options.device))
    application: Application = Sentiment(device=device)
    if options.application == "recommender":
        source = ThemeRule() if options.data is None else load_ratings(options.data)
        application = Recommendation(source, device=device)
    result = run_application(
        application.quick() if options.quick else application,
        seeds=options.seeds or (2 if options.quick else 5),
        n_sequences=options.sequences or (20 if options.quick else 60),
        budget=options.budget or 300,
        folder=options.out or new_folder(options.application),
        n_eff=options.n_eff,
        wandb_mode=options.wandb_mode,
        on_progress=_report,
    )
    return _print_result(options, result, _comparison_table)


def _bridge(options: Explain) -> int:
    from mechcausal.recipes import load_recipe
    from mechcausal.studies.explanations.bridge import bridge
    from mechcausal.studies.explanations.recording import new_folder

    recipe = load_recipe(options.recipe or "random_tree").with_overrides(device=options.device)
    result = bridge(
        recipe,
        seeds=options.seeds or (1 if options.quick else 3),
        n_sequences=options.sequences or (5 if options.quick else 20),
        folder=options.out or new_folder("bridge"),
        n_eff=options.n_eff or 768,
        quick=options.quick,
        wandb_mode=options.wandb_mode,
        on_progress=_report,
    )
    return _print_result(options, result, _bridge_table)


def _explain_texts(options: Explain, folder: Path) -> int:
    from mechcausal.recipes.devices import device_named
    from mechcausal.studies.explanations.text_classifier import TextClassifier
    from probes.causal_discovery.explanation import METHODS

    classifier = TextClassifier(folder, device=str(device_named(options.device)))
    explanations = [
        classifier.explain(text, method=method, budget=options.budget or 300, n_eff=options.n_eff)
        for text in options.text
        for method in METHODS
    ]
    if options.json:
        print(json.dumps({"explanations": [one.as_json() for one in explanations]}, indent=2))
    else:
        _print_texts(explanations)
    return 0


def _report(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _print_result(
    options: Explain, result: "Comparison", make_table: "Callable[[Comparison], Table]"
) -> int:
    from rich.console import Console

    for warning in result.warnings:
        print(f"mechcausal: warning: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps(result.as_json(), indent=2, allow_nan=False))
        return 0
    console = Console()
    console.print(make_table(result))
    print_locations({"picture": result.picture, "W&B": result.wandb})
    return 0


def _comparison_table(result: "Comparison") -> "Table":
    from mechcausal.studies.explanations.comparison import LABELS

    settings = result.settings
    table = make_table(
        ("method", "tokens", "excess", "explained", "verified", "in rule", "model runs"),
        title=f"{settings['application']}: {settings['seeds']} seeds, {settings['sequences']} "
        f"predictions each, at most {settings['budget']} model runs for one; accuracy "
        f"{_number(settings['accuracy'], settings['accuracy_stderr'])}",
    )
    for row in result.rows:
        mean, stderr = row.mean, row.stderr
        table.add_row(
            LABELS[row.labels["method"]],
            _number(mean["size"], stderr["size"]),
            *(_number(mean[name]) for name in ("above_minimum", "found", "verified", "causes")),
            _number(mean["calls"], stderr["calls"], 1),
        )
    return table


def _bridge_table(result: "Comparison") -> "Table":
    from mechcausal.studies.explanations.skeletons import READINGS

    settings = result.settings
    table = make_table(
        ("model", "read from", "precision", "recall", "F1"),
        title=f"{settings['recipe']}: pairs found against the true graph; {settings['seeds']} "
        f"seeds, {settings['sequences']} sequences each, n_eff {settings['n_eff']:g}",
        n_left=2,
    )
    previous = ""
    for row in result.rows:
        model = row.labels["model"]
        if previous not in ("", model):
            table.add_section()
        table.add_row(
            model if model != previous else "",
            READINGS[row.labels["reading"]],
            *(_number(row.mean[name], row.stderr[name]) for name in ("precision", "recall", "f1")),
        )
        previous = model
    return table


def _print_texts(texts: "list[TextExplanation]") -> None:
    from rich.console import Console
    from rich.markup import escape

    headings = ("text", "method", "tokens", "label", "model runs")
    title = "the tokens without which the label changes"
    table = make_table(headings, title=title, n_left=4)
    previous = ""
    for row in texts:
        table.add_row(
            escape(row.text) if row.text != previous else "",
            row.explanation.method,
            escape(" ".join(row.words)) or "–",
            escape(row.label if row.new_label is None else f"{row.label} → {row.new_label}"),
            str(row.explanation.calls),
        )
        previous = row.text
    Console().print(table)


def _number(mean: float | None, stderr: float | None = None, digits: int = 2) -> str:
    if mean is None:
        return "–"
    error = "" if stderr is None else f" ± {stderr:.{digits}f}"
    return f"{mean:.{digits}f}{error}"

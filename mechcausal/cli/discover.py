"""`mechcausal discover`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mechcausal.cli.discover_tables import print_graph, print_sweep, title_of
from mechcausal.cli.parsing import RefusedError, parse

if TYPE_CHECKING:
    from mechcausal.studies.targets import Target
    from probes import Discovery
    from probes.causal_discovery import Stability
    from probes.causal_discovery.options import SearchKeywords

_PICTURES = (".png", ".svg", ".pdf")


@dataclass
class Discover:
    """A causal graph over the tokens of one input, from one head's attention.

    Edges: `a --> b`: a causes b; `a <-> b`: a hidden common cause; `a o-> b`: one of the two;
    `a o-o b`: undecided. --n-eff sets the sparsity and is no sample size: one forward pass has no
    samples. The larger it is, the more edges stay; try several (--n-eff 32,64,128).
    """

    target: tyro.conf.Positional[str] = ""
    """A run folder; a folder of `save_model`; a folder with a Hugging Face model (safetensors); the
    name of one; or a .npy file with one attention matrix (query by key, rows that sum to 1)."""
    text: str | None = None
    """The input as text, for a model with a tokenizer."""
    tokens: str | None = None
    """The input as token numbers, such as "1,2,3"."""
    step: int | None = None
    """Checkpoint of a run folder; its final weights when absent."""
    layer: int | None = None
    """Layer whose attention is read; the last one when absent."""
    head: int | None = None
    """Head of that layer; 0 when absent."""
    n_eff: str | None = None
    """How many samples the tests assume, or several numbers, such as 32,64,128. It sets the
    sparsity and is no sample size. d_head when absent."""
    alpha: float = 0.01
    """Significance level of the independence tests; the smaller, the fewer edges."""
    ordered: tyro.conf.FlagCreatePairsOff[bool] = False
    """Use token order as causal order; the default if no token attends to a later one."""
    no_ordered: tyro.conf.FlagCreatePairsOff[bool] = False
    """Assume no causal order."""
    sink: Literal["node", "conditioned"] = "node"
    """Keep the attention sink as a node, or remove it by conditioning on it."""
    sink_position: int | None = None
    """Position of the sink, with --sink conditioned; 0 when absent."""
    positions: Annotated[tuple[int, ...], tyro.conf.arg(metavar="P [P ...]")] = ()
    """Positions of the tokens that become nodes; all when absent. The others count as hidden."""
    values: bool = False
    """Use covariances of the attention-weighted values instead of the attention."""
    engine: Literal["icd", "fci", "pc"] = "icd"
    """Search algorithm: icd is ours; fci and pc are causal-learn's (extra `discovery`), to check
    ours."""
    max_cond: int | None = None
    """Largest conditioning set; no limit when absent."""
    time_budget: float | None = None
    """Seconds after which the search stops with a sound partial graph."""
    stable: bool = False
    """Make the edges independent of the order in which pairs are tested; needs more tests."""
    bootstrap: int = 0
    """Repeat the search so often, with --bootstrap-over varied, and show how often each edge is
    there and has these marks."""
    bootstrap_over: Annotated[
        tuple[Literal["heads", "layers", "n_eff", "values"], ...],
        tyro.conf.arg(metavar="WHAT [WHAT ...]"),
    ] = ()
    """What varies: heads of the layer, layers, n_eff (half, once, twice), values (n_eff of them
    drawn anew). All when absent; of a matrix, n_eff and values."""
    seed: int = 0
    """Seed of --bootstrap."""
    json: bool = False
    """Print one JSON object."""
    picture: Path | None = None
    """Draw the graph to this file (.png, .svg or .pdf)."""
    device: str = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, or 2 by way of `RefusedError`."""
    options = parse(Discover, arguments, command="discover")
    if not options.target:
        raise RefusedError("discover needs a target: a model, or a .npy file with an attention")
    if options.ordered and options.no_ordered:
        raise RefusedError("--ordered and --no-ordered: only one of them can hold")
    if options.sink_position is not None and options.sink != "conditioned":
        raise RefusedError("--sink-position goes with --sink conditioned")
    sweep = _n_eff(options.n_eff)
    _check_picture(options.picture, len(sweep))
    _check_bootstrap(options, len(sweep))
    is_matrix = Path(options.target).suffix == ".npy"
    _check_input(options, is_matrix=is_matrix)
    from mechcausal.recipes import RecipeError
    from mechcausal.studies.targets import TargetError
    from probes import ProbeError, save_picture

    try:
        prepared = _from_matrix(options) if is_matrix else _from_model(options)
        discoveries = [prepared.discover(n_eff) for n_eff in sweep]
        stability = prepared.bootstrap(discoveries[0]) if options.bootstrap else None
        if options.picture is not None:
            title = title_of(options.target, discoveries[0])
            shares = None if stability is None else stability.joined()
            graph = discoveries[0].pag
            save_picture(graph, options.picture, prepared.words, title=title, shares=shares)
    except (TargetError, RecipeError) as error:
        raise RefusedError(str(error)) from None
    except (ProbeError, ValueError) as error:
        raise RefusedError(f"{options.target}: {error}") from None
    except OSError as error:
        raise RefusedError(f"--picture: {options.picture}: {error.strerror or error}") from None
    if options.json:
        contents = [discovery.to_dict() for discovery in discoveries]
        content: dict[str, Any] = contents[0] if len(contents) == 1 else {"sweep": contents}
        if stability is not None:
            content["bootstrap"] = stability.to_dict()
        print(json.dumps(content, indent=2, allow_nan=False))
    elif len(discoveries) == 1:
        print_graph(options.target, discoveries[0], prepared.words, stability)
    else:
        print_sweep(options.target, discoveries)
    if options.picture is not None and not options.json:
        print(f"picture: {options.picture}")
    return 0


@dataclass(frozen=True)
class _Prepared:
    """The search as a function of n_eff (None for the default), its bootstrap, the tokens' text."""

    discover: "Callable[[float | int | None], Discovery]"
    bootstrap: "Callable[[Discovery], Stability]"
    words: list[str] | None


def _n_eff(text: str | None) -> list[float | int | None]:
    if text is None:
        return [None]
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise RefusedError(f"--n-eff is {text!r}: a number is needed, or several: 32,64") from None
    return [int(value) if value.is_integer() else value for value in values]


def _check_picture(picture: Path | None, n_graphs: int) -> None:
    if picture is None:
        return
    if n_graphs > 1:
        raise RefusedError("--picture shows one graph: give one --n-eff")
    if picture.suffix not in _PICTURES:
        raise RefusedError(f"--picture is {picture}: a file that ends in {', '.join(_PICTURES)}")
    if not picture.parent.is_dir():
        raise RefusedError(f"--picture: {picture.parent} is no folder")


def _check_bootstrap(options: Discover, n_graphs: int) -> None:
    if options.bootstrap < 0:
        raise RefusedError(f"--bootstrap is {options.bootstrap}: a number of replicates is needed")
    if not options.bootstrap and options.bootstrap_over:
        raise RefusedError("--bootstrap-over goes with --bootstrap")
    if options.bootstrap and n_graphs > 1:
        raise RefusedError("--bootstrap judges the edges of one graph: give one --n-eff")
    if options.seed < 0:
        raise RefusedError(f"--seed is {options.seed}: it must be at least 0")


def _check_input(options: Discover, *, is_matrix: bool) -> None:
    if is_matrix:
        given = {
            "--text": options.text is not None,
            "--tokens": options.tokens is not None,
            "--layer": options.layer is not None,
            "--head": options.head is not None,
            "--step": options.step is not None,
            "--values": options.values,
            "--device": options.device != "cpu",
            "--bootstrap-over heads": "heads" in options.bootstrap_over,
            "--bootstrap-over layers": "layers" in options.bootstrap_over,
        }
        for flag, is_given in given.items():
            if is_given:
                raise RefusedError(f"{flag} goes with a model, and {options.target} is a matrix")
        if options.n_eff is None:
            raise RefusedError(f"{options.target}: a matrix has no d_head: give --n-eff")
        return
    if (options.text is None) == (options.tokens is None):
        both = "both are given" if options.text is not None else "neither is given"
        raise RefusedError(f'--text or --tokens "1,2,3": one of them is needed, {both}')
    if options.text is not None and not options.text.strip():
        raise RefusedError("--text is empty: at least one token is needed")


def _search_options(options: Discover, n_eff: float | int | None) -> "SearchKeywords":
    return {
        "n_eff": n_eff,
        "alpha": options.alpha,
        "ordered": True if options.ordered else False if options.no_ordered else None,
        "sink": options.sink,
        "sink_position": options.sink_position or 0,
        "positions": options.positions or None,
        "engine": options.engine,
        "stable": options.stable,
        "max_cond": options.max_cond,
        "time_budget": options.time_budget,
    }


def _from_matrix(options: Discover) -> _Prepared:
    import numpy as np

    from mechcausal.studies.targets import TargetError
    from probes import discover_attention
    from probes.causal_discovery import bootstrap
    from probes.causal_discovery.linear_model import checked_attention

    try:
        # A .npy file may hold pickled objects: never load those.
        attention: Any = np.load(options.target, allow_pickle=False)
    except FileNotFoundError:
        raise TargetError(f"{options.target}: no such file") from None
    except OSError as error:
        raise TargetError(f"{options.target}: not read: {error.strerror or error}") from None
    except Exception:  # numpy passes on errors of its parser, the zip reader and the allocator
        raise TargetError(f"{options.target}: not a .npy file with a matrix of numbers") from None
    if not isinstance(attention, np.ndarray):
        raise TargetError(f"{options.target}: an archive of arrays; one matrix is needed")

    def judge(discovery: "Discovery") -> "Stability":
        return bootstrap(
            discovery,
            checked_attention(attention)[None, None],
            replicates=options.bootstrap,
            over=options.bootstrap_over or ("n_eff", "values"),
            seed=options.seed,
            **_search_options(options, discovery.n_eff),
        )

    return _Prepared(
        lambda n_eff: discover_attention(attention, **_search_options(options, n_eff)),
        judge,
        words=None,
    )


def _from_model(options: Discover) -> _Prepared:
    from mechcausal.recipes.devices import device_named
    from mechcausal.studies.targets import load_target, running
    from probes import discover
    from probes.causal_discovery.stability import VARIATIONS, bootstrap_model

    target = load_target(
        options.target, step=options.step, device=str(device_named(options.device))
    )
    tokens = _tokens(options, target)
    model: Any = target.model

    def search(n_eff: float | int | None) -> "Discovery":
        with running(options.target):
            return discover(
                model,
                tokens,
                layer=options.layer,
                head=options.head or 0,
                values=options.values,
                **_search_options(options, n_eff),
            )

    def judge(discovery: "Discovery") -> "Stability":
        with running(options.target):
            return bootstrap_model(
                model,
                tokens,
                discovery,
                replicates=options.bootstrap,
                over=options.bootstrap_over or VARIATIONS,
                seed=options.seed,
                **_search_options(options, discovery.n_eff),
            )

    words = None
    if _has_tokenizer(target):
        words = [model.tokenizer.decode([int(token)]) for token in tokens]
    return _Prepared(search, judge, words)


def _has_tokenizer(target: "Target") -> bool:
    # A bridge without a tokenizer has a placeholder that reads words as numbers.
    return target.bos == "auto" and getattr(target.model, "tokenizer", None) is not None


def _tokens(options: Discover, target: "Target") -> Any:
    import torch

    if options.text is not None:
        if not _has_tokenizer(target):
            raise RefusedError(f"{options.target}: has no tokenizer: give --tokens, not --text")
        model: Any = target.model
        # Do not truncate: the model refuses a text that is too long.
        return model.to_tokens(options.text, truncate=False)[0]
    parts = (options.tokens or "").replace(",", " ").split()
    if not parts:
        raise RefusedError("--tokens is empty: at least one token is needed")
    try:
        return torch.tensor([int(part) for part in parts])
    except (ValueError, OverflowError, RuntimeError):
        raise RefusedError(
            f"--tokens is {options.tokens!r}: whole numbers are needed, such as 1,2,3"
        ) from None

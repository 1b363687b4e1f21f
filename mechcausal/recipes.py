"""A run as typed data: one strict recipe type for TOML, command line, Python, W&B and resume.

Importing this module is cheap (no torch): the command line prints its help from these types.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

if TYPE_CHECKING:
    from mechcausal.graphs import CausalGraph
    from mechcausal.priors import Prior

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
WandbMode = Literal["online", "offline", "disabled"]

PresetName = Literal[
    "chain",
    "lag_chain",
    "icl_pairs",
    "random_tree",
    "random_forest",
    "random_parents",
    "star",
    "binary_tree",
    "interleaved_chains",
    "manual",
    "edge_list",
]
# Which options of the graph section a preset takes, beside the sequence length.
_GRAPH_OPTIONS: dict[str, tuple[str, ...]] = {
    "lag_chain": ("lag",),
    "random_tree": ("seed",),
    "random_forest": ("edge_probability", "seed"),
    "random_parents": ("seed",),
    "interleaved_chains": ("n_chains", "seed"),
    "manual": ("parents",),
    "edge_list": ("edge_list",),
}


class RecipeError(ValueError):
    """A recipe that cannot be read or run; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True)
class GraphSection:
    """The causal graph of the sequences."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    preset: PresetName = "chain"
    """Shape of the graph."""
    sequence_length: Annotated[int, Field(ge=2, le=10_000)] | None = None
    """Tokens of a sequence, T, the query included; follows from `parents` or `edge_list`."""
    lag: PositiveInt | None = None
    """Distance to the parent (lag_chain)."""
    edge_probability: Probability | None = None
    """Probability that an edge is kept (random_forest)."""
    n_chains: PositiveInt | None = None
    """Number of chains (interleaved_chains)."""
    parents: tuple[int, ...] | None = None
    """Parent of every position, -1 for a root (manual)."""
    edge_list: str | None = None
    """File with a line `parent child` for every edge (edge_list)."""
    seed: Seed | None = None
    """Seed of a random graph; follows the run's seed when absent."""


@dataclass(frozen=True, kw_only=True)
class TaskSection:
    """What the sequences are drawn from."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["causal_graph", "repeated_tokens"] = "causal_graph"
    """causal_graph: sequences that the graph generates. repeated_tokens: [BOS r r], r random."""
    vocab_size: Annotated[int, Field(ge=2, le=10_000)] = 10
    """Number of tokens, S; token 0 is the BOS of repeated_tokens."""
    alpha: PositiveFloat | tuple[PositiveFloat, ...] = 0.1
    """Dirichlet concentration of every row of the transition matrix, or one for each token."""
    transition: tuple[tuple[NonNegativeFloat, ...], ...] | None = None
    """A fixed transition matrix in place of the prior."""
    repeat_lengths: tuple[PositiveInt, PositiveInt] | None = None
    """Shortest and longest block that is repeated, drawn for every batch (repeated_tokens)."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model that is trained."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["simplified", "attention_only"] = "simplified"
    """simplified: the paper's two-layer transformer (A1 and A2), for causal_graph.
    attention_only: learned embeddings and attention layers with LayerNorm, for repeated_tokens."""
    n_layers: Annotated[int, Field(ge=1, le=100)] = 2
    """Layers (attention_only)."""
    n_heads: Annotated[int, Field(ge=1, le=1000)] = 2
    """Heads of every layer (attention_only)."""
    d_model: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Width of the residual stream, a multiple of n_heads (attention_only)."""
    positions: Literal["shortformer", "standard"] = "shortformer"
    """Learned positions: added to queries and keys alone, or to the residual stream."""


@dataclass(frozen=True, kw_only=True)
class StageSection:
    """One stage of gradient descent."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: NonNegativeInt = 300
    """Number of steps, each on a fresh batch."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Gradient descent, or Adam with torch's defaults."""
    lr: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Learning rate."""


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """Algorithm 1 of the paper, or joint training."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    algorithm: Literal["two_stage", "joint"] = "two_stage"
    """two_stage: stage1 trains A1, then stage2 trains A2. joint: `joint` trains both."""
    batch_size: Annotated[int, Field(ge=1, le=10_000_000)] = 1024
    """Fresh sequences for every step."""
    epsilon: NonNegativeFloat = 1e-3
    """Added to predicted probabilities inside the logarithm of the loss."""
    beta0: PositiveFloat = 1.0
    """Initial scale of A2 = beta0 I."""
    stage1: StageSection = StageSection(steps=300, lr=200.0)
    """First stage of two_stage: A1 alone."""
    stage2: StageSection = StageSection(steps=300, lr=10.0)
    """Second stage of two_stage: A2 alone."""
    joint: StageSection = StageSection(steps=600, optimizer="adam", lr=0.05)
    """The only stage of joint: A1 and A2 together."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """The fixed sequences on which a run is watched, and what it is compared with."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    n_sequences: Annotated[int, Field(ge=2)] = 1024
    """Sequences of the evaluation batch, which the probes see too."""
    bayes_draws: Annotated[int, Field(ge=2)] = 128
    """Draws for each sequence that integrate over what the roots say about the matrix."""
    theory_priors: Annotated[int, Field(ge=2)] = 1000
    """Transition matrices over which information and predicted gradient are averaged."""


@dataclass(frozen=True, kw_only=True)
class ProbingSection:
    """When the hooked model is looked at."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    enabled: bool = True
    """False trains without a look inside: only the losses at the first and last step."""
    schedule: Literal["every", "geometric"] = "every"
    """every: each `every` steps. geometric: steps 1, 2, 4, 8, ... of each stage."""
    every: PositiveInt = 200
    """Steps between probe steps (schedule every)."""
    dense: NonNegativeInt = 5
    """Probe steps at the start of each stage, one a step."""
    checkpoints: bool = False
    """True saves the weights at every probe step, under checkpoints/."""
    images: NonNegativeInt = 12
    """Probe steps, spread over the run, whose heatmaps go to W&B."""


@dataclass(frozen=True, kw_only=True)
class WandbSection:
    """The W&B run that records everything."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    mode: WandbMode | None = None
    """When absent: WANDB_MODE, else online if a key is configured, else offline."""
    project: str = "mechcausal"
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    group: str | None = None
    """W&B group; the recipe's name when absent."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    """W&B tags, beside the graph preset and the model kind."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, completely described."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")] = "run"
    """Names the run's folder and its W&B group."""
    seed: Seed = 0
    """Seed from which initialisation, training data, evaluation and a random graph follow."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""
    graph: GraphSection = field(default_factory=GraphSection)
    task: TaskSection = field(default_factory=TaskSection)
    model: ModelSection = field(default_factory=ModelSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    probing: ProbingSection = field(default_factory=ProbingSection)
    wandb: WandbSection = field(default_factory=WandbSection)

    def with_overrides(self, **changes: Any) -> "Recipe":
        """A changed copy: keys are dotted paths with `__` for the dot, values are checked.

        Example:
            >>> recipe = load_recipe("markov_chain")
            >>> recipe.with_overrides(seed=3, training__stage1__steps=10).training.stage1.steps
            10
        """
        data = recipe_to_dict(self)
        for key, value in changes.items():
            *path, last = key.split("__")
            section = data
            for part in path:
                section = section.setdefault(part, {})
            section[last] = value
        return parse_recipe(data, source="override")

    def build_graph(self) -> "CausalGraph":
        """The causal graph; random presets follow `graph.seed`, else the run's seed.

        Raises:
            GraphError: a graph that is not one (cycle, forward edge, unreadable edge list).
        """
        import torch

        from mechcausal import graphs

        section = self.graph
        if section.preset == "manual":
            return graphs.manual(section.parents or ())
        if section.preset == "edge_list":
            return graphs.CausalGraph.from_edge_list(Path(section.edge_list or ""))
        names = _GRAPH_OPTIONS.get(section.preset, ())
        options = {name: getattr(section, name) for name in names if name != "seed"}
        if "seed" in names:
            seed = self.seed if section.seed is None else section.seed
            options["generator"] = torch.Generator().manual_seed(seed)
        assert section.sequence_length is not None  # checked when the recipe was parsed
        return graphs.build_preset(section.preset, section.sequence_length - 1, **options)

    def build_prior(self) -> "Prior":
        """The prior over transition matrices, or the fixed matrix."""
        from mechcausal.priors import DirichletPrior, FixedTransition

        if self.task.transition is not None:
            return FixedTransition(self.task.transition)
        if isinstance(self.task.alpha, tuple):
            return DirichletPrior(self.task.alpha)
        return DirichletPrior.symmetric(self.task.alpha, self.task.vocab_size)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dict of plain JSON values, `None` entries left out."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, tuple) else value

    return dict(clean(asdict(recipe)))


def parse_recipe(data: dict[str, Any], *, source: str) -> Recipe:
    """Check nested plain data and make a recipe of it.

    Args:
        data: as read from TOML.
        source: named in the error, a file or "command line".

    Raises:
        RecipeError: unknown key (with a suggestion), wrong type, value out of range, or options
            that do not go together.
    """
    try:
        # JSON mode: strict on types, but an array may fill a tuple and a table a dataclass.
        recipe = _ADAPTER.validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_first_error(error.errors())}") from None
    if recipe.task.kind == "repeated_tokens":
        _check_repeated_tokens(recipe, source)
    else:
        _check_graph(recipe.graph, source)
        _check_task(recipe.task, source)
        if recipe.model.kind != "simplified":
            raise RecipeError(f"{source}: model.kind: causal_graph is learned by simplified")
    return recipe


def load_recipe(target: str | Path) -> Recipe:
    """Read a recipe from a TOML file, or by the name of one that comes with the package.

    Args:
        target: a path (`runs/markov_chain.toml`) or a name (`markov_chain`).

    Raises:
        RecipeError: no such file, not TOML, or not a valid recipe; one line that names the file.
    """
    path = find_recipe(target)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    except ValueError:  # what int() says of a number of thousands of digits
        raise RecipeError(f"{path}: not valid TOML: a number is too long") from None
    except RecursionError:
        raise RecipeError(f"{path}: not valid TOML: nested too deeply") from None
    data.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem).lstrip("_.-")[:100] or "run")
    edge_list = data.get("graph", {}).get("edge_list") if isinstance(data.get("graph"), dict) else 0
    if isinstance(edge_list, str):  # relative to the recipe, like every path a file names
        data["graph"]["edge_list"] = str(path.parent / edge_list)
    return parse_recipe(data, source=str(path))


def find_recipe(target: str | Path) -> Path:
    """The file that a path or the name of a packaged recipe stands for.

    Raises:
        RecipeError: neither a file nor a packaged recipe.
    """
    path = Path(target)
    try:
        if path.is_file():
            return path
    except OSError as error:  # too long a name, a folder that may not be entered
        raise RecipeError(f"{path}: {error.strerror or error}") from None
    packaged = packaged_recipes()
    if str(target) in packaged:
        return packaged[str(target)]
    if path.suffix == ".toml" or len(path.parts) > 1:
        reason = "is a folder" if path.is_dir() else "no such file"
        raise RecipeError(f"{path}: {reason}; recipes that come along: {', '.join(packaged)}")
    raise RecipeError(
        f"{target}: no such file or recipe{_suggestion(str(target), packaged)}; "
        f"recipes that come along: {', '.join(packaged)}"
    )


def packaged_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    package = Path(__file__).resolve().parent
    folder = package / "_recipes"  # in a wheel
    if not folder.is_dir():
        folder = package.parent / "runs"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def recipe_to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML; `load_recipe` reads back an equal one."""
    lines: list[str] = []

    def write(table: dict[str, Any], path: tuple[str, ...]) -> None:
        if path:
            lines.extend(["", f"[{'.'.join(path)}]"])
        for key, value in table.items():
            if not isinstance(value, dict):
                # Strings, numbers, booleans and nested arrays are written alike in JSON and TOML,
                # but for surrogate pairs and the delete character.
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{key} = {text}")
        for key, value in table.items():
            if isinstance(value, dict):
                write(value, (*path, key))

    write(recipe_to_dict(recipe), ())
    return "\n".join(lines) + "\n"


_PATTERN_RULES = {
    "device": "input should be cpu, cuda or cuda:N",
    "name": "input should be at most 100 letters, digits, dots, dashes and underscores",
}


_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def _first_error(errors: list[ErrorDetails]) -> str:
    # A union reports one error for each member: of those about the first key, the deepest is about
    # the member that came close.
    top = _dotted(errors[0]["loc"])
    related = [error for error in errors if f"{_dotted(error['loc'])}.".startswith(f"{top}.")]
    first = max(related, key=lambda error: _dotted(error["loc"]).count("."))
    path = _dotted(first["loc"])
    found = json.dumps(first["input"], default=str)
    found = found if len(found) <= 60 else found[:57] + "..."
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = _allowed_keys(first["loc"][:-1])
        message = f"{path}: unknown key{_suggestion(str(first['loc'][-1]), allowed)}; "
        message += f"allowed: {', '.join(allowed)}"
    else:
        rule = _PATTERN_RULES.get(path) if first["type"] == "string_pattern_mismatch" else None
        message = f"{path}: {rule or first['msg'].lower()}, found {found}"
    message = " ".join(message.replace("an object", "a table").split())
    others = {_dotted(error["loc"]) for error in errors if error not in related}
    return message + (f" (and {len(others)} more)" if others else "")


def _dotted(location: tuple[int | str, ...]) -> str:
    # pydantic adds the names of union members to the path: keep what the user wrote.
    known: list[str] = []
    section: Any = Recipe
    for part in location:
        if isinstance(part, int):
            known.append(str(part))
            continue
        if is_dataclass(section):
            known.append(part)
            section = get_type_hints(section).get(part)
    return ".".join(known) or "recipe"


def _allowed_keys(location: tuple[int | str, ...]) -> list[str]:
    section: Any = Recipe
    for part in location:
        section = get_type_hints(section)[str(part)]
    return [item.name for item in fields(section)]


def _suggestion(word: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _check_graph(graph: GraphSection, source: str) -> None:
    wanted = _GRAPH_OPTIONS.get(graph.preset, ())
    for name in ("lag", "edge_probability", "n_chains", "parents", "edge_list", "seed"):
        given = getattr(graph, name) is not None
        if given and name not in wanted:
            owners = [preset for preset, names in _GRAPH_OPTIONS.items() if name in names]
            raise RecipeError(
                f"{source}: graph.{name}: not an option of preset {graph.preset} "
                f"(it belongs to {', '.join(owners)})"
            )
        if not given and name in wanted and name != "seed":
            raise RecipeError(f"{source}: graph.{name}: needed by preset {graph.preset}")
    sized = graph.preset not in ("manual", "edge_list")
    if sized and graph.sequence_length is None:
        raise RecipeError(f"{source}: graph.sequence_length: needed by preset {graph.preset}")
    if not sized and graph.sequence_length is not None:
        raise RecipeError(
            f"{source}: graph.sequence_length: follows from the graph with preset {graph.preset}"
        )


def _check_task(task: TaskSection, source: str) -> None:
    if isinstance(task.alpha, tuple) and len(task.alpha) != task.vocab_size:
        raise RecipeError(
            f"{source}: task.alpha: {len(task.alpha)} values for a vocabulary of {task.vocab_size}"
        )
    if task.repeat_lengths is not None:
        raise RecipeError(f"{source}: task.repeat_lengths: belongs to kind repeated_tokens")
    if task.transition is not None and len(task.transition) != task.vocab_size:
        raise RecipeError(
            f"{source}: task.transition: {len(task.transition)} rows "
            f"for a vocabulary of {task.vocab_size}"
        )


def _check_repeated_tokens(recipe: Recipe, source: str) -> None:
    task, model = recipe.task, recipe.model
    if model.kind != "attention_only":
        raise RecipeError(f"{source}: model.kind: repeated_tokens is learned by attention_only")
    if recipe.training.algorithm != "joint":
        raise RecipeError(f"{source}: training.algorithm: attention_only is trained by joint")
    if recipe.graph != GraphSection():
        raise RecipeError(f"{source}: graph: repeated_tokens has no graph")
    if task.repeat_lengths is None:
        raise RecipeError(f"{source}: task.repeat_lengths: needed by repeated_tokens")
    low, high = task.repeat_lengths
    if not (2 <= low <= high and 3 <= high <= 5_000):  # the probes need a block of three
        raise RecipeError(
            f"{source}: task.repeat_lengths: shortest (at least 2) and longest (3 to 5000), "
            f"found [{low}, {high}]"
        )
    if task.transition is not None:
        raise RecipeError(f"{source}: task.transition: belongs to kind causal_graph")
    if model.d_model % model.n_heads:
        raise RecipeError(
            f"{source}: model.d_model: {model.d_model} is no multiple of {model.n_heads} heads"
        )

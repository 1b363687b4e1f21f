"""A run as typed data: one strict recipe type for TOML, command line, Python, W&B and resume.

Importing this module is cheap (no torch): the command line prints its help from these types.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from mechcausal.messages import excerpt

if TYPE_CHECKING:
    from mechcausal.graphs import CausalGraph
    from mechcausal.priors import Prior

# Bounds far above any use: what they keep out would fill memory, or a terminal.
MAX_COUNT = 10**9
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Position = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
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
    "two_parents",
    "k_gram",
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
    "k_gram": ("k",),
    "manual": ("parents", "query_parents"),
    "edge_list": ("edge_list",),
}
_OPTIONAL_GRAPH_OPTIONS = ("seed", "query_parents")
# Presets in which the predicted token has parents of its own: no query token is added.
_WITHOUT_QUERY = ("two_parents", "k_gram")


MAX_FILE_BYTES = 4 * 2**20
"""The largest recipe file read."""


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
    k: PositiveInt | None = None
    """Number of parents, the k positions before (k_gram)."""
    parents: tuple[Position | tuple[Position, ...], ...] | None = None
    """Parent of every position, -1 for a root; in a file also a list of several (manual)."""
    query_parents: tuple[Position, ...] | None = None
    """Parents of the predicted token; without them a uniform query token is added (manual)."""
    edge_list: str | None = None
    """File with a line `parent child` for every edge (edge_list); a recipe file names one in its
    own folder or below."""
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

    kind: Literal["simplified", "disentangled", "standard"] = "simplified"
    """simplified: the paper's two-layer transformer with A1 and A2 alone, one parent a position.
    disentangled: the paper's whole one, nothing in its residual stream is added up.
    standard: an ordinary transformer, for repeated_tokens too."""
    heads: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)] = (1, 1)
    """Heads of each layer (disentangled)."""
    initial_scale: NonNegativeFloat = 0.0
    """Standard deviation at the start, of the attention matrices (disentangled), or of all weights,
    TransformerLens's 0.8 / sqrt(d_model) when 0 (standard)."""
    n_layers: Annotated[int, Field(ge=1, le=100)] = 2
    """Layers (standard)."""
    n_heads: Annotated[int, Field(ge=1, le=1000)] = 2
    """Heads of every layer (standard)."""
    d_model: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Width of the residual stream, a multiple of n_heads (standard)."""
    d_mlp: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Width of the ReLU MLPs; attention alone when absent (standard)."""
    layer_norm: bool = False
    """LayerNorm before every part (standard)."""
    embeddings: Literal["learned", "fixed"] = "learned"
    """fixed: one-hot tokens and positions, not trained (standard)."""
    positions: Literal["standard", "shortformer"] = "standard"
    """Positions added to the residual stream, or to queries and keys alone (standard)."""


@dataclass(frozen=True, kw_only=True)
class StageSection:
    """One stage of gradient descent."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: NonNegativeInt = 300
    """Number of steps, each on a fresh batch."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Gradient descent, or Adam or AdamW with torch's defaults."""
    lr: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Learning rate, at the start where the schedule changes it."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the learning rate falls to 0 along half a cosine over the stage."""
    warmup: NonNegativeInt = 0
    """Steps over which the learning rate rises from 0, in a straight line."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty; decoupled from the gradient with adamw."""


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """Algorithm 1 of the paper, or joint training."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    algorithm: Literal["two_stage", "joint"] = "two_stage"
    """two_stage: stage1 trains A1, then stage2 trains A2. joint: `joint` trains everything."""
    batch_size: Annotated[int, Field(ge=1, le=10_000_000)] = 1024
    """Fresh sequences for every step."""
    accumulation: PositiveInt = 1
    """Parts into which a step's batch is divided to save memory; their gradients are added up."""
    target: Literal["sampled", "posterior"] = "sampled"
    """What predictions are trained on: the row drawn with the sequence, or its mean given the
    sequence, which has the same expected gradient and less noise (graphs of several parents)."""
    epsilon: NonNegativeFloat = 1e-3
    """Added to predicted probabilities inside the logarithm of the loss."""
    beta0: PositiveFloat = 1.0
    """Initial scale of A2 = beta0 I (simplified)."""
    stage1: StageSection = StageSection(steps=300, lr=200.0)
    """First stage of two_stage: A1 alone."""
    stage2: StageSection = StageSection(steps=300, lr=10.0)
    """Second stage of two_stage: A2 alone."""
    joint: StageSection = StageSection(steps=600, optimizer="adam", lr=0.05)
    """The only stage of joint: all parameters together."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """The fixed sequences on which a run is watched, and what it is compared with."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    n_sequences: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 1024
    """Sequences of the evaluation batch, which the probes see too."""
    bayes_draws: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 128
    """Draws for each sequence that integrate over what the roots say about the matrix."""
    theory_priors: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 1000
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
    frames: NonNegativeInt = 200
    """Probe steps, spread over the run, whose attention and gradients are kept in full."""
    images: NonNegativeInt = 12
    """Probe steps, spread over the run, whose heatmaps go to W&B."""
    report: bool = True
    """False leaves out report.html, the page that is drawn when a run ends."""


@dataclass(frozen=True, kw_only=True)
class CheckpointsSection:
    """What the run can go on from after a crash."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    schedule: Literal["every", "formation", "probes", "none"] = "every"
    """every: each `every` steps, and at the end. formation: also at every probe step while the
    induction score lies between 0.1 and 0.9. probes: also at every probe step. What formation and
    probes add is kept. none: none."""
    every: PositiveInt = 200
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """How many of the newest are kept, beside the one with the lowest loss."""
    artifacts: bool = True
    """True logs each to W&B as an artifact, with the aliases latest, best and step-N."""


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
    panels: bool = True
    """False leaves out the pictures and tables that W&B gets when the run ends."""
    page: bool = True
    """False leaves out report.html among them: 5 MB for every run."""


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
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Threads on the CPU. One repeats bit by bit and is fastest for small models; with several the
    order in which they add up may differ from run to run."""
    graph: GraphSection = field(default_factory=GraphSection)
    task: TaskSection = field(default_factory=TaskSection)
    model: ModelSection = field(default_factory=ModelSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    probing: ProbingSection = field(default_factory=ProbingSection)
    checkpoints: CheckpointsSection = field(default_factory=CheckpointsSection)
    wandb: WandbSection = field(default_factory=WandbSection)

    @property
    def n_steps(self) -> int:
        """Steps of all stages together."""
        training = self.training
        if training.algorithm == "joint":
            return training.joint.steps
        return training.stage1.steps + training.stage2.steps

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
            parents = section.parents or ()
            return graphs.manual(parents, query_parents=section.query_parents)
        if section.preset == "edge_list":
            return graphs.CausalGraph.from_edge_list(Path(section.edge_list or ""))
        names = _GRAPH_OPTIONS.get(section.preset, ())
        options = {name: getattr(section, name) for name in names if name != "seed"}
        if "seed" in names:
            seed = self.seed if section.seed is None else section.seed
            options["generator"] = torch.Generator().manual_seed(seed)
        assert section.sequence_length is not None  # checked when the recipe was parsed
        n_positions = section.sequence_length - (section.preset not in _WITHOUT_QUERY)
        return graphs.build_preset(section.preset, n_positions, **options)

    def self_contained(self) -> "Recipe":
        """The same recipe without a file that it depends on: an edge list becomes its parents.

        Raises:
            GraphError: see `build_graph`.
        """
        if self.graph.preset != "edge_list" or self.task.kind != "causal_graph":
            return self
        graph = self.build_graph()
        values = recipe_to_dict(self)
        parents = [list(row) if len(row) > 1 else (row or (-1,))[0] for row in graph.parents]
        values["graph"] = {"preset": "manual", "parents": parents}
        if graph.query_parents is not None:
            values["graph"]["query_parents"] = list(graph.query_parents)
        return parse_recipe(values, source=self.graph.edge_list or self.name)

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


def recipe_fields(section: Any = Recipe, prefix: str = "") -> dict[str, Any]:
    """The type of every field and section of a recipe, by dotted path."""
    found = {}
    hints = get_type_hints(section)
    for item in fields(section):
        path = prefix + item.name
        found[path] = hints[item.name]
        if is_dataclass(hints[item.name]):
            found |= recipe_fields(hints[item.name], f"{path}.")
    return found


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
        raise RecipeError(f"{source}: {_first_error(error.errors(include_url=False))}") from None
    except RecursionError:
        raise RecipeError(f"{source}: nested too deeply") from None
    except (TypeError, ValueError) as error:  # a key that is no text, a number of many digits
        raise RecipeError(f"{source}: not plain data: {excerpt(error)}") from None
    try:
        _check_together(recipe.graph, recipe.task, recipe.model, recipe.training)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    return recipe


def load_recipe(target: str | Path) -> Recipe:
    """Read a recipe from a TOML file, or by the name of one that comes with the package.

    Args:
        target: a path (`runs/markov_chain.toml`) or a name (`markov_chain`).

    Raises:
        RecipeError: no such file, not TOML, or not a valid recipe; one line that names the file.
    """
    path = find_recipe(target)
    text = _read_text(path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {excerpt(error, 100)}") from None
    except ValueError:  # what int() says of a number of thousands of digits
        raise RecipeError(f"{path}: not valid TOML: a number is too long") from None
    except RecursionError:
        raise RecipeError(f"{path}: not valid TOML: nested too deeply") from None
    data.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem).lstrip("_.-")[:100] or "run")
    edge_list = data.get("graph", {}).get("edge_list") if isinstance(data.get("graph"), dict) else 0
    if isinstance(edge_list, str):
        data["graph"]["edge_list"] = str(_beside(path, edge_list))
    return parse_recipe(data, source=str(path))


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise RecipeError(f"{path}: more than {MAX_FILE_BYTES} bytes, the most a recipe may have")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file") from None


def _beside(recipe: Path, name: str) -> Path:
    """A file that a recipe names: relative to it, in its folder or below.

    Raises:
        RecipeError: it lies elsewhere. A recipe that came from someone else must not make us read,
            and by way of an error message show, any file there is.
    """
    inside, path = name.isprintable() and len(name) <= 200, recipe.parent / name
    try:
        inside = inside and not Path(name).is_absolute() and ".." not in Path(name).parts
        # A link may lead out too.
        inside = inside and path.resolve().is_relative_to(recipe.parent.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, a null character
        inside = False
    if not inside:
        raise RecipeError(
            f"{recipe}: graph.edge_list: must be a file in the recipe's folder or below, found "
            f'"{excerpt(name)}" (on the command line --graph.edge-list takes any file)'
        )
    return path


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
# A file may hold a million mistakes: what is said of the first ones is enough.
MAX_ERRORS = 100


def _first_error(errors: list[ErrorDetails]) -> str:
    # A union reports one error for each member: of those about the first key, the deepest is about
    # the member that came close.
    more = "at least " if len(errors) > MAX_ERRORS else ""
    errors = errors[:MAX_ERRORS]
    top = _dotted(errors[0]["loc"])
    related = [error for error in errors if f"{_dotted(error['loc'])}.".startswith(f"{top}.")]
    first = max(related, key=lambda error: _dotted(error["loc"]).count("."))
    path = _dotted(first["loc"])
    found = excerpt(json.dumps(first["input"], default=str))
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = _allowed_keys(first["loc"][:-1])
        message = f"{path}: unknown key{_suggestion(str(first['loc'][-1]), allowed)}; "
        message += f"allowed: {', '.join(allowed)}"
    else:
        rule = _PATTERN_RULES.get(path) if first["type"] == "string_pattern_mismatch" else None
        message = f"{path}: {rule or first['msg'].lower()}, found {found}"
    message = " ".join(message.replace("an object", "a table").split())
    others = {_dotted(error["loc"]) for error in errors if error not in related}
    return message + (f" (and {more}{len(others)} more)" if others else "")


def _dotted(location: tuple[int | str, ...]) -> str:
    # pydantic adds the names of union members to the path: keep what the user wrote.
    known: list[str] = []
    section: Any = Recipe
    for part in location:
        if isinstance(part, int):
            known.append(str(part))
            continue
        if is_dataclass(section):
            known.append(excerpt(part))
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


def _check_together(
    graph: GraphSection, task: TaskSection, model: ModelSection, training: TrainingSection
) -> None:
    """Whether the options of these sections go together.

    Raises:
        RecipeError: they do not; the first reason.
    """
    if task.kind == "repeated_tokens":
        _check_repeated_tokens(graph, task, model, training)
    else:
        _check_graph(graph)
        _check_task(task)
    _check_model(model, training)


def _not_an_option(
    section: str, name: str, choice: str, options: dict[str, tuple[str, ...]]
) -> RecipeError:
    owners = ", ".join(owner for owner, names in options.items() if name in names)
    return RecipeError(f"{section}.{name}: not an option of {choice} (it belongs to {owners})")


def _check_graph(graph: GraphSection) -> None:
    wanted = _GRAPH_OPTIONS.get(graph.preset, ())
    for name in sorted({name for names in _GRAPH_OPTIONS.values() for name in names}):
        given = getattr(graph, name) is not None
        if given and name not in wanted:
            raise _not_an_option("graph", name, f"preset {graph.preset}", _GRAPH_OPTIONS)
        if not given and name in wanted and name not in _OPTIONAL_GRAPH_OPTIONS:
            raise RecipeError(f"graph.{name}: needed by preset {graph.preset}")
    sized = graph.preset not in ("manual", "edge_list")
    if sized and graph.sequence_length is None:
        raise RecipeError(f"graph.sequence_length: needed by preset {graph.preset}")
    if not sized and graph.sequence_length is not None:
        raise RecipeError(
            f"graph.sequence_length: follows from the graph with preset {graph.preset}"
        )


def _check_task(task: TaskSection) -> None:
    if isinstance(task.alpha, tuple) and len(task.alpha) != task.vocab_size:
        raise RecipeError(
            f"task.alpha: {len(task.alpha)} values for a vocabulary of {task.vocab_size}"
        )
    if task.repeat_lengths is not None:
        raise RecipeError("task.repeat_lengths: belongs to kind repeated_tokens")
    if task.transition is not None and len(task.transition) != task.vocab_size:
        raise RecipeError(
            f"task.transition: {len(task.transition)} rows for a vocabulary of {task.vocab_size}"
        )


def _check_repeated_tokens(
    graph: GraphSection, task: TaskSection, model: ModelSection, training: TrainingSection
) -> None:
    if model.kind != "standard":
        raise RecipeError("model.kind: repeated_tokens is learned by standard")
    if graph != GraphSection():
        raise RecipeError("graph: repeated_tokens has no graph")
    if task.repeat_lengths is None:
        raise RecipeError("task.repeat_lengths: needed by repeated_tokens")
    low, high = task.repeat_lengths
    if not (2 <= low <= high and 3 <= high <= 5_000):  # the probes need a block of three
        raise RecipeError(
            "task.repeat_lengths: shortest (at least 2) and longest (3 to 5000), "
            f"found [{low}, {high}]"
        )
    if task.transition is not None:
        raise RecipeError("task.transition: belongs to kind causal_graph")
    if training.target != "sampled":
        raise RecipeError("training.target: repeated_tokens has sampled targets alone")


# Which options of the model section a kind takes.
_MODEL_OPTIONS: dict[str, tuple[str, ...]] = {
    "simplified": (),
    "disentangled": ("heads", "initial_scale"),
    "standard": (
        "initial_scale",
        "n_layers",
        "n_heads",
        "d_model",
        "d_mlp",
        "layer_norm",
        "embeddings",
        "positions",
    ),
}


def _check_model(model: ModelSection, training: TrainingSection) -> None:
    for item in fields(ModelSection):
        takes = item.name == "kind" or item.name in _MODEL_OPTIONS[model.kind]
        if not takes and getattr(model, item.name) != item.default:
            raise _not_an_option("model", item.name, f"kind {model.kind}", _MODEL_OPTIONS)
    if model.kind != "simplified" and training.algorithm != "joint":
        raise RecipeError(
            "training.algorithm: two_stage is for kind simplified; "
            f"{model.kind} is trained by joint"
        )
    if model.kind == "disentangled" and max(model.heads) > 1 and model.initial_scale == 0:
        raise RecipeError(
            "model.initial_scale: must be above 0 with several heads in a layer, "
            "since equal heads stay equal"
        )
    if model.kind == "standard" and model.d_model % model.n_heads:
        raise RecipeError(f"model.d_model: {model.d_model} is no multiple of {model.n_heads} heads")
    widening = math.prod(n_heads + 1 for n_heads in model.heads)
    if model.kind == "disentangled" and widening > 1024:
        raise RecipeError(
            f"model.heads: {list(model.heads)} widen the residual stream "
            f"{widening:,} times; at most 1024 times is possible"
        )
    if training.batch_size % training.accumulation:
        raise RecipeError(
            f"training.accumulation: {training.accumulation} parts do not divide "
            f"a batch of {training.batch_size}"
        )

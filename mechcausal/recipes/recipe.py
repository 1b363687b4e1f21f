"""The recipe type: all settings of a run, checked strictly."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field

from mechcausal.graphs import WITH_QUERY_PARENTS, CausalGraph, build_preset
from mechcausal.recipes.checks import check_together
from mechcausal.recipes.clamp_checks import check_clamp
from mechcausal.recipes.errors import RecipeError, validated
from mechcausal.recipes.sections import (
    GRAPH_OPTIONS,
    CheckpointsSection,
    ClampSection,
    EvaluationSection,
    GraphSection,
    ModelSection,
    ProbingSection,
    Seed,
    TaskSection,
    TrainingSection,
    WandbSection,
)
from mechcausal.support.corpora import Corpus, TextError, read_corpus

if TYPE_CHECKING:
    import torch

    from mechcausal.tasks.protocol import Prior, Task
    from mechcausal.tasks.text import TextTask


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of one run."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")] = "run"
    """Names the run's folder and its W&B group."""
    seed: Seed = 0
    """Seed of initialisation, training data, evaluation and a random graph."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads. With one, a run repeats bit by bit on the same machine, and small models train
    fastest; with several, rounding may differ from run to run."""
    experiment: Annotated[str, Field(max_length=500)] | None = None
    """The caller's own experiment that a run trained. Recorded by `mechcausal.train(recipe,
    experiment=...)`; no recipe can name one."""
    graph: GraphSection = field(default_factory=GraphSection)
    task: TaskSection = field(default_factory=TaskSection)
    model: ModelSection = field(default_factory=ModelSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    clamp: ClampSection = field(default_factory=ClampSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    probing: ProbingSection = field(default_factory=ProbingSection)
    checkpoints: CheckpointsSection = field(default_factory=CheckpointsSection)
    wandb: WandbSection = field(default_factory=WandbSection)

    @property
    def n_steps(self) -> int:
        """The total number of steps of all stages."""
        training = self.training
        if training.algorithm == "joint":
            return training.joint.steps
        return training.stage1.steps + training.stage2.steps

    @property
    def n_training_sequences(self) -> int:
        """The total number of training sequences, `n_steps * batch_size`.

        Example:
            >>> training = TrainingSection(algorithm="joint", batch_size=10)
            >>> Recipe(training=training).n_training_sequences
            6000
        """
        return self.n_steps * self.training.batch_size

    def with_overrides(self, **changes: Any) -> "Recipe":
        """A checked copy with some fields changed; keys are dotted paths with `__` for the dot.

        Raises:
            RecipeError: see `parse_recipe`.

        Example:
            >>> from mechcausal.recipes import load_recipe
            >>> recipe = load_recipe("markov_chain")
            >>> recipe.with_overrides(seed=3, training__stage1__steps=10).training.stage1.steps
            10
        """
        data = recipe_to_dict(self)
        for key, value in changes.items():
            *path, last = key.split("__")
            section = data
            for part in path:
                inner = section.get(part)
                section[part] = section = dict(inner) if isinstance(inner, dict) else {}
            section[last] = value
        return parse_recipe(data, source="override")

    def build_graph(self) -> CausalGraph:
        """Build the causal graph; random presets use `graph.seed`, or the run's seed if it is None.

        Raises:
            GraphError: an invalid graph (cycle, forward edge, unreadable edge list).
        """
        import torch

        section = self.graph
        if section.preset == "manual":
            parents = section.parents or ()
            return CausalGraph.from_parents(parents, query_parents=section.query_parents)
        if section.preset == "edge_list":
            return CausalGraph.from_edge_list(Path(section.edge_list or ""))
        names = GRAPH_OPTIONS[section.preset]
        options = {name: getattr(section, name) for name in names if name != "seed"}
        if "seed" in names:
            seed = self.seed if section.seed is None else section.seed
            options["generator"] = torch.Generator().manual_seed(seed)
        assert section.sequence_length is not None  # parse_recipe has checked it
        n_positions = section.sequence_length - (section.preset not in WITH_QUERY_PARENTS)
        return build_preset(section.preset, n_positions, **options)

    def self_contained(self) -> "Recipe":
        """The same recipe as a run keeps it: with the edge list's parents, or the text's hash.

        Raises:
            GraphError: see `build_graph`.
            RecipeError: see `read_corpus`.
        """
        if self.task.kind == "text":
            corpus = self.read_corpus()
            name = corpus.name if corpus.is_bundled else str(Path(corpus.name).absolute())
            return self.with_overrides(task__text=name, task__text_sha256=corpus.sha256)
        if self.graph.preset != "edge_list" or self.task.kind != "causal_graph":
            return self
        graph = self.build_graph()
        values = recipe_to_dict(self)
        parents = [list(row) if len(row) > 1 else (row or (-1,))[0] for row in graph.parents]
        values["graph"] = {"preset": "manual", "parents": parents}
        if graph.query_parents is not None:
            values["graph"]["query_parents"] = list(graph.query_parents)
        return parse_recipe(values, source=self.graph.edge_list or self.name)

    def read_corpus(self) -> Corpus:
        """Read the text of kind text.

        Raises:
            RecipeError: it cannot be read, or its hash is not the recipe's.
        """
        try:
            return read_corpus(self.task.text or "topics", sha256=self.task.text_sha256)
        except TextError as error:
            raise RecipeError(f"task.text: {error}") from None

    def build_text(self, *, device: "torch.device | None" = None) -> "TextTask":
        """Read, encode and split the text of kind text.

        Raises:
            RecipeError: see `read_corpus`, or it is too short for the context.
        """
        from mechcausal.tasks.text import TextTask

        task, corpus = self.task, self.read_corpus()
        assert task.context is not None  # parse_recipe has checked it
        try:
            return TextTask(
                corpus,
                vocab_size=task.vocab_size,
                context=task.context,
                interleaved=task.interleaved,
                device=device,
            )
        except TextError as error:
            raise RecipeError(f"task.text: {error}") from None

    def build_prior(self) -> "Prior":
        """Build the prior over transition matrices, or the fixed matrix.

        Raises:
            PriorError: too many `task.matrices`.
        """
        from mechcausal.tasks.finite_prior import FinitePrior
        from mechcausal.tasks.priors import DirichletPrior, FixedTransition

        task = self.task
        if task.transition is not None:
            return FixedTransition(task.transition)
        concentration = task.alpha
        if not isinstance(concentration, tuple):
            concentration = (concentration,) * task.vocab_size
        prior = DirichletPrior(concentration)
        return prior if task.matrices is None else FinitePrior(prior, task.matrices, self.task_seed)

    @property
    def task_seed(self) -> int:
        """Seed of what all sequences share: `task.seed`, or the run's."""
        return self.seed if self.task.seed is None else self.task.seed

    def build_task(self) -> "Task":
        """Build the task of kind tree, selective_lags or in_context_graphs."""
        import torch

        from mechcausal.tasks.hierarchy import Grammar, Hierarchy
        from mechcausal.tasks.hierarchy_tasks import MaskedLeafTask, RootTask
        from mechcausal.tasks.in_context_graphs import InContextGraphTask, possible_kernel
        from mechcausal.tasks.priors import DirichletPrior, FixedTransition
        from mechcausal.tasks.selective_lags import SelectiveLagTask

        task, generator = self.task, torch.Generator().manual_seed(self.task_seed)
        if task.kind == "tree":
            assert task.depth is not None  # parse_recipe has checked it
            grammar = Grammar.random(task.vocab_size, generator=generator, sigma=task.sigma)
            tree = Hierarchy(grammar, task.depth, task.filter)
            return MaskedLeafTask(tree) if task.predict == "leaf" else RootTask(tree)
        prior = self.build_prior()
        assert isinstance(prior, DirichletPrior)
        (matrix,) = prior.sample(1, generator=generator, dtype=torch.float64)
        if task.kind == "in_context_graphs":
            assert task.positions is not None  # parse_recipe has checked both
            assert task.examples is not None
            return InContextGraphTask(possible_kernel(matrix), task.positions, task.examples)
        assert task.kind == "selective_lags"
        assert task.lags is not None  # parse_recipe has checked both
        assert task.context is not None
        return SelectiveLagTask(FixedTransition.from_matrix(matrix), task.lags, task.context)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a nested dict of JSON values, without `None` entries."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, tuple) else value

    return dict(clean(asdict(recipe)))


def recipe_fields(section: Any = Recipe, prefix: str = "") -> dict[str, Any]:
    """The type of every field and section of a recipe, by dotted path."""
    types = {}
    hints = get_type_hints(section)
    for item in fields(section):
        path = prefix + item.name
        types[path] = hints[item.name]
        if is_dataclass(hints[item.name]):
            types |= recipe_fields(hints[item.name], f"{path}.")
    return types


def parse_recipe(data: dict[str, Any], *, source: str) -> Recipe:
    """Build a recipe from nested plain data.

    Args:
        data: data as read from TOML.
        source: where the data comes from, a file or "command line", for the error message.

    Raises:
        RecipeError: an unknown key (with a suggestion), a wrong type, a value out of range, or
            options that do not fit together.
    """
    recipe = validated(Recipe, data, source=source)
    try:
        check_together(recipe.graph, recipe.task, recipe.model, recipe.training)
        check_clamp(recipe.clamp, recipe.task, recipe.model, n_steps=recipe.n_steps)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    return recipe

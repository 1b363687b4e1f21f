"""The sections of a recipe: every setting with its type, its bounds and its default."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field

from mechcausal.graphs import PRESETS, preset_options

# Bounds far above any sensible value; larger numbers would fill the memory or the terminal.
MAX_COUNT = 10**9
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Position = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
WandbMode = Literal["online", "offline", "disabled"]
TaskKind = Literal[
    "causal_graph",
    "repeated_tokens",
    "text",
    "tree",
    "selective_lags",
    "in_context_graphs",
    "own",
]

# The graph options that each preset takes, besides the sequence length.
GRAPH_OPTIONS: dict[str, tuple[str, ...]] = {
    **{
        name: tuple("seed" if option == "generator" else option for option in preset_options(name))
        for name in PRESETS
    },
    "manual": ("parents", "query_parents"),
    "edge_list": ("edge_list",),
}
if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(GRAPH_OPTIONS)]


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
    """Parent of every position, -1 for a root; in a file also a list of parents (manual)."""
    query_parents: tuple[Position, ...] | None = None
    """Parents of the predicted token; default: a uniformly drawn query token is added (manual)."""
    edge_list: str | None = None
    """File with one line `parent child` per edge (edge_list); in a recipe file, a path in the
    recipe's folder or below."""
    seed: Seed | None = None
    """Seed of a random graph; follows the run's seed when absent."""


@dataclass(frozen=True, kw_only=True)
class TaskSection:
    """The task that generates the sequences."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: TaskKind = "causal_graph"
    """causal_graph: sequences that the graph generates. repeated_tokens: [BOS r r], r random. text:
    windows of a real text, character by character. tree: the leaves of random trees, of which one
    leaf or the root is to be predicted. selective_lags: a Markov chain whose lag each sequence
    draws. in_context_graphs: examples of a random tree that each sequence draws. own: an experiment
    of the caller's own, from Python alone, which may read `graph` and `task`."""
    vocab_size: Annotated[int, Field(ge=2, le=10_000)] = 10
    """Number of tokens, S; token 0 is the BOS of repeated_tokens, the last one of text stands for
    every character but the S - 1 most frequent. Of tree: the symbols, without the mask token."""
    alpha: PositiveFloat | tuple[PositiveFloat, ...] = 0.1
    """Dirichlet concentration of every row of the transition matrix, or one for each token."""
    matrices: PositiveInt | None = None
    """Draw this many matrices once, of which every sequence takes one; default: every sequence
    draws a new one (causal_graph)."""
    transition: tuple[tuple[NonNegativeFloat, ...], ...] | None = None
    """A fixed transition matrix in place of the prior."""
    repeat_lengths: tuple[PositiveInt, PositiveInt] | None = None
    """Shortest and longest block that is repeated, drawn for every batch (repeated_tokens)."""
    text: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """topics: Python's pydoc_data.topics, the default. stdlib: the standard library's source. Or a
    text file in UTF-8; in a recipe file, a path from the recipe's folder (text)."""
    text_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the text, which a run records; another text is refused (text)."""
    context: Annotated[int, Field(ge=8, le=10_000)] | None = None
    """Characters or tokens of a sequence (text, selective_lags)."""
    interleaved: bool = False
    """True interleaves two halves of the text, so that keys at odd lags say nothing about the next
    character: the control of text."""
    lags: tuple[PositiveInt, ...] | None = None
    """The lags that a sequence draws from (selective_lags)."""
    positions: Annotated[int, Field(ge=3, le=100)] | None = None
    """Tokens of an example; each but the first has a random parent before it
    (in_context_graphs)."""
    examples: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Complete examples before the one that is predicted (in_context_graphs)."""
    depth: Annotated[int, Field(ge=1, le=10)] | None = None
    """Levels of the tree below its root; 2^depth leaves (tree)."""
    filter: NonNegativeInt = 0
    """Level whose nodes are independent given the root: 0 for the full tree, `depth` for
    independent leaves (tree)."""
    sigma: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Spread of the logits of a symbol's rules; 0 makes all its rules equally likely (tree)."""
    predict: Literal["leaf", "root"] = "leaf"
    """leaf: one masked leaf of each sequence. root: the symbol at the root (tree)."""
    seed: Seed | None = None
    """Seed of what all sequences share: the `matrices`, the matrix of selective_lags and of
    in_context_graphs, the rules of tree. Follows the run's seed when absent."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model to train."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["simplified", "disentangled", "standard", "in_context_graphs", "own"] = (
        "simplified"
    )
    """simplified: the paper's two-layer transformer with only A1 and A2, at most one parent per
    position. disentangled: the paper's full transformer, whose residual stream concatenates the
    layers' outputs. standard: an ordinary transformer, for every kind of task. in_context_graphs:
    two layers tailored to the task of that name. own: built by the caller, from Python alone."""
    heads: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)] = (1, 1)
    """Heads of each layer (disentangled)."""
    initial_scale: NonNegativeFloat = 0.0
    """Initial standard deviation of the attention matrices (disentangled), of the heads' choice of
    an example (in_context_graphs), or of all weights, where 0 means TransformerLens's
    0.8 / sqrt(d_model) (standard)."""
    n_layers: Annotated[int, Field(ge=1, le=100)] = 2
    """Layers (standard)."""
    n_heads: Annotated[int, Field(ge=1, le=1000)] = 2
    """Heads of every layer (standard), or heads that copy from an example (in_context_graphs)."""
    own_column: Annotated[float, Field(ge=-100, le=100)] = 3.0
    """Initial score of a head for the same column of other examples; others start at 0. From 0,
    heads have to learn which column to compare, and may not (in_context_graphs)."""
    d_model: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Width of the residual stream, a multiple of n_heads (standard)."""
    d_mlp: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Width of the ReLU MLPs; default: attention only (standard)."""
    layer_norm: bool = False
    """LayerNorm before every part (standard)."""
    embeddings: Literal["learned", "fixed"] = "learned"
    """fixed: one-hot tokens and positions, not trained (standard)."""
    attention: Literal["causal", "bidirectional"] = "causal"
    """bidirectional: every position sees all others, as tree needs (standard)."""
    positions: Literal["standard", "shortformer"] = "standard"
    """Positions added to the residual stream, or only to queries and keys (standard)."""


@dataclass(frozen=True, kw_only=True)
class StageSection:
    """One stage of gradient descent."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: NonNegativeInt = 300
    """Number of steps, each on a fresh batch."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Gradient descent, or Adam or AdamW with torch's defaults."""
    lr: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Learning rate; with the cosine schedule the highest."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the learning rate falls to 0 along half a cosine over the stage."""
    warmup: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""
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
    """sampled: train on the transition row drawn with the sequence. posterior: on its mean given
    the sequence, which has the same expected gradient and less noise (several parents)."""
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
class ClampSection:
    """Attention that is held fixed for a part of the training."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    pattern: Literal["free", "graph", "wrong_graph", "previous_token", "frozen"] | None = None
    """graph: every position attends to its parent; of several, head n to the n-th. wrong_graph: to
    earlier positions that are no parents, drawn once. Positions without parents stay free.
    previous_token: every position but the first attends to the one before. frozen: the layer's mean
    pattern on the evaluation sequences at `from_step`. free, the default: no pattern."""
    forbidden: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()
    """Pairs [position, earlier position or its own] whose attention is 0."""
    layer: NonNegativeInt = 0
    """The layer that is clamped, from 0."""
    head: NonNegativeInt | None = None
    """The only head that is clamped, from 0; all of the layer when absent."""
    from_step: NonNegativeInt = 0
    """First step of the run that is trained with the clamp."""
    until_step: PositiveInt | None = None
    """First step without it again; the clamp stays to the end when absent."""
    seed: Seed | None = None
    """Seed of wrong_graph; follows the run's seed when absent."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """The fixed evaluation sequences and the baselines."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    n_sequences: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 1024
    """Sequences of the evaluation batch, which the probes use too."""
    bayes_draws: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 128
    """Monte Carlo draws per sequence with which the Bayes predictor accounts for the roots."""
    theory_priors: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 1000
    """Transition matrices over which the information and the predicted gradient are averaged."""
    theory_seconds: PositiveFloat = 60.0
    """Seconds that theory, and the Bayes loss, may each take. Where theory_priors or bayes_draws
    would take longer, fewer are used, and the run says so. Counted from sizes, not by a clock."""
    max_lag: Annotated[int, Field(ge=3, le=10_000)] = 16
    """Largest lag of the residual information, at most the context less one (text)."""


@dataclass(frozen=True, kw_only=True)
class ProbingSection:
    """When the probes run."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    enabled: bool = True
    """False records only the losses, at the first and last step."""
    schedule: Literal["every", "geometric"] = "every"
    """every: each `every` steps. geometric: steps 1, 2, 4, 8, ... of each stage."""
    every: PositiveInt = 200
    """Steps between probe steps (schedule every)."""
    dense: NonNegativeInt = 5
    """Number of steps at the start of each stage that are all probe steps."""
    frames: NonNegativeInt = 200
    """Probe steps, spread over the run, whose attention and gradients are kept in full."""
    images: NonNegativeInt = 12
    """Probe steps, spread over the run, whose heatmaps go to W&B."""
    report: bool = True
    """False skips report.html, the page written at the end of a run."""


@dataclass(frozen=True, kw_only=True)
class CheckpointsSection:
    """When to write checkpoints, from which a run can be resumed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    schedule: Literal["every", "formation", "probes", "none"] = "every"
    """every: each `every` steps, and at the end. formation: also at every probe step while the
    induction score, 0 at chance, lies between 0.1 and 0.9, whenever it has moved by 0.05. probes:
    also at every probe step. The checkpoints that formation and probes add are never deleted.
    none: no checkpoints."""
    every: PositiveInt = 200
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints to keep, besides the one with the lowest loss."""
    artifacts: bool = True
    """True logs each checkpoint to W&B as an artifact, with the aliases latest, best and step-N."""


@dataclass(frozen=True, kw_only=True)
class WandbSection:
    """The W&B run."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    mode: WandbMode | None = None
    """Default: WANDB_MODE, else the setting of `wandb offline`, else online if there is a key for
    the server, else offline."""
    project: str = "mechcausal"
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    group: str | None = None
    """W&B group; the recipe's name when absent."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    """W&B tags, besides the graph preset and the model kind."""
    panels: bool = True
    """False leaves out the pictures and tables that W&B gets when the run ends."""
    page: bool = True
    """False does not upload report.html to W&B (5 MB per run)."""

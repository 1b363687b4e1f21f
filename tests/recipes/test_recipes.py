"""Recipes: what is accepted comes back equal from a file, what is not is refused in one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechcausal.graphs import GraphError, two_parents
from mechcausal.recipes import (
    Recipe,
    RecipeError,
    find_recipe,
    load_recipe,
    packaged_recipes,
    parse_recipe,
    recipe_to_dict,
    recipe_to_toml,
)
from mechcausal.tasks import SeveralParentsTask, SingleParentTask, build_task
from mechcausal.tasks.priors import DirichletPrior, FixedTransition, PriorError
from mechcausal.training.experiments import check_experiment
from tests.refusals import raises_one_line

RUNS = Path(__file__).parents[2] / "runs"
CHAIN = {"preset": "chain", "sequence_length": 8}
DISENTANGLED = {"model__kind": "disentangled", "training__algorithm": "joint"}
STANDARD = {"model__kind": "standard", "training__algorithm": "joint"}


def nested(**values: Any) -> dict[str, Any]:
    """A chain recipe's plain data with values set at dotted paths, `__` for the dot."""
    data: dict[str, Any] = {"graph": dict(CHAIN)}
    for key, value in values.items():
        *path, last = key.split("__")
        section = data
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return data


def refusal(**values: Any) -> str:
    """The one line with which a recipe file of these values is refused."""
    with raises_one_line(RecipeError) as caught:
        parse_recipe(nested(**values), source="some.toml")
    message = str(caught.value)
    assert message.startswith("some.toml: ")
    return message


def file_refusal(path: Path, text: str | bytes | None = None) -> str:
    """The one line with which `load_recipe` refuses a file, which names the file."""
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with raises_one_line(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert str(path) in message
    return message


# --- Bundled recipes ---


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.toml")), ids=lambda path: path.stem)
def test_packaged_recipe_loads_and_builds_its_graph_and_prior(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    if recipe.task.kind != "causal_graph":  # see test_repeated_tokens.py and test_text_run.py
        return
    graph, prior = recipe.build_graph(), recipe.build_prior()
    assert build_task(graph, prior).sequence_length == graph.sequence_length
    assert graph.edges
    assert prior.vocab_size == recipe.task.vocab_size
    if recipe.graph.sequence_length is not None:
        assert graph.sequence_length == recipe.graph.sequence_length


def test_the_recipes_of_the_issue_come_along() -> None:
    wanted = {"markov_chain", "random_tree", "random_forest", "icl_pairs", "manual", "lag_two"}
    wanted |= {"repeated_tokens", "text", "text_interleaved"}
    assert wanted <= set(packaged_recipes())
    markov_chain = load_recipe("markov_chain")
    assert (markov_chain.task.vocab_size, markov_chain.graph.sequence_length) == (10, 20)
    assert markov_chain.task.alpha == 0.1


def test_a_recipe_is_found_by_name_and_by_path() -> None:
    assert find_recipe("markov_chain") == RUNS / "markov_chain.toml"
    assert load_recipe("markov_chain") == load_recipe(str(RUNS / "markov_chain.toml"))


def test_the_name_is_the_file_name_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[graph]\npreset = "chain"\nsequence_length = 5\n')
    assert load_recipe(path).name == "mine"
    path.write_text('name = "ours"\n[graph]\npreset = "chain"\nsequence_length = 5\n')
    assert load_recipe(path).name == "ours"


# --- Round trips ---


def test_defaults_survive_the_round_trip_through_a_file(tmp_path: Path) -> None:
    recipe = parse_recipe(nested(), source="test")
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
non_negative = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
rates = st.floats(0, 1e9, exclude_min=True)
words = st.text(st.characters(codec="utf-8"), max_size=12)
seeds = st.integers(0, 2**32 - 1)
lengths = st.integers(2, 10_000)
graphs = st.one_of(
    st.fixed_dictionaries(
        {"preset": st.sampled_from(["chain", "icl_pairs", "star"]), "sequence_length": lengths}
    ),
    st.fixed_dictionaries(
        {"preset": st.just("random_tree"), "sequence_length": lengths}, optional={"seed": seeds}
    ),
    st.fixed_dictionaries(
        {
            "preset": st.just("random_forest"),
            "sequence_length": lengths,
            "edge_probability": st.floats(0, 1),
        },
        optional={"seed": seeds},
    ),
    st.fixed_dictionaries(
        {
            "preset": st.just("manual"),
            "parents": st.lists(st.integers(-1, 50), min_size=1, max_size=6),
        }
    ),
)
tasks = st.integers(2, 5).flatmap(
    lambda s: st.fixed_dictionaries(
        {
            "vocab_size": st.just(s),
            "alpha": positive | st.lists(positive, min_size=s, max_size=s),
        },
        optional={
            "transition": st.lists(
                st.lists(non_negative, min_size=s, max_size=s), min_size=s, max_size=s
            )
        },
    )
)
valid_recipes = st.fixed_dictionaries(
    {"graph": graphs, "task": tasks},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True),
        "seed": seeds,
        "device": st.sampled_from(["cpu", "cuda", "cuda:3"]),
        "training": st.fixed_dictionaries(
            {"epsilon": non_negative, "beta0": positive},
            optional={
                "algorithm": st.sampled_from(["two_stage", "joint"]),
                "joint": st.fixed_dictionaries({"lr": rates, "steps": st.integers(0, 9)}),
            },
        ),
        "probing": st.fixed_dictionaries({"enabled": st.booleans()}),
        "wandb": st.fixed_dictionaries(
            {"project": words, "tags": st.lists(words.filter(bool), max_size=3)},
            optional={"entity": words, "mode": st.sampled_from(["online", "offline"])},
        ),
    },
)


@given(data=valid_recipes)
def test_every_valid_recipe_survives_the_round_trip_through_toml(
    data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = parse_recipe(data, source="test")
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert parse_recipe(recipe_to_dict(recipe), source="test") == recipe


def test_the_plain_dict_is_json_and_leaves_out_what_is_absent() -> None:
    data = recipe_to_dict(parse_recipe(nested(), source="test"))
    assert json.loads(json.dumps(data)) == data
    assert "lag" not in data["graph"]
    assert "mode" not in data["wandb"]


# --- Refusals: each names file, dotted path and what is allowed ---


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"traning": {}}, ["traning: unknown key", "did you mean training?"]),
        ({"training__stage1__stepz": 3}, ["training.stage1.stepz", "did you mean steps?", "lr"]),
        ({"graph__zzz": 1}, ["graph.zzz: unknown key; allowed: preset, "]),
        ({"a\nb": 1}, ["unknown key"]),
        ({"seed": "20"}, ["seed: input should be a valid integer", '"20"']),
        ({"seed": True}, ["seed: input should be a valid integer", "true"]),
        ({"seed": 1.5}, ["seed: input should be a valid integer", "1.5"]),
        ({"graph__sequence_length": 20.0}, ["graph.sequence_length", "integer", "20.0"]),
        ({"seed": -1}, ["seed", "greater than or equal to 0"]),
        ({"seed": 2**32}, ["seed", "4294967295", "4294967296"]),
        ({"seed": 10**400}, ["seed", "4294967295"]),
        ({"training": 3}, ["training", "table", "found 3"]),
        ({"training__stage1": []}, ["training.stage1", "table"]),
        ({"probing__enabled": "no"}, ["probing.enabled", "boolean", '"no"']),
        ({"graph__sequence_length": 10**12}, ["graph.sequence_length", "10000", str(10**12)]),
        ({"graph__sequence_length": 1}, ["graph.sequence_length", "2", "found 1"]),
        ({"task__vocab_size": 1}, ["task.vocab_size", "greater than or equal to 2", "found 1"]),
        ({"task__alpha": 0}, ["task.alpha", "greater than 0", "found 0"]),
        ({"task__alpha": -0.5}, ["task.alpha", "greater than 0", "found -0.5"]),
        ({"task__alpha": "0.1"}, ["task.alpha", "number", '"0.1"']),
        ({"task__alpha": [0.1, 0.2]}, ["task.alpha", "2 values", "10"]),
        ({"task__alpha": [0.1] * 9 + [-1]}, ["task.alpha.9", "greater than 0", "found -1"]),
        ({"task__alpha": [0.1] * 9 + ["x"]}, ["task.alpha.9", "number", '"x"']),
        ({"task__alpha": math.nan}, ["task.alpha", "finite"]),
        ({"task__alpha": math.inf}, ["task.alpha", "finite"]),
        ({"task__transition": [[0.5, 0.5], [1, 0]]}, ["task.transition", "2 rows", "10"]),
        ({"training__epsilon": -1e-9}, ["training.epsilon", "greater than or equal to 0"]),
        ({"training__epsilon": math.nan}, ["training.epsilon", "finite"]),
        ({"training__beta0": math.inf}, ["training.beta0", "finite"]),
        ({"training__stage1__lr": 0}, ["training.stage1.lr", "greater than 0"]),
        ({"training__stage1__lr": math.inf}, ["training.stage1.lr", "less than"]),
        ({"training__stage1__lr": math.nan}, ["training.stage1.lr"]),
        ({"training__stage1__lr": 1e60}, ["training.stage1.lr", "1000000000"]),
        (
            {"training__stage2__optimizer": "lion"},
            ["training.stage2.optimizer", "'sgd', 'adam' or 'adamw'"],
        ),
        ({"training__batch_size": 0}, ["training.batch_size", "greater than or equal to 1"]),
        ({"graph__preset": "chian"}, ["graph.preset", "'chain'", '"chian"']),
        ({"graph__lag": 2}, ["graph.lag", "not an option of preset chain", "lag_chain"]),
        ({"graph__seed": 2}, ["graph.seed", "not an option of preset chain", "random_tree"]),
        ({"graph__preset": "lag_chain"}, ["graph.lag: needed by preset lag_chain"]),
        ({"graph__sequence_length": None}, ["graph.sequence_length: needed by preset chain"]),
        (
            {"graph__preset": "manual", "graph__parents": [-1, 0]},
            ["graph.sequence_length: follows from the graph with preset manual"],
        ),
        (
            {"graph__preset": "random_forest", "graph__edge_probability": math.nan},
            ["graph.edge_probability"],
        ),
        (
            {"graph__preset": "random_forest", "graph__edge_probability": 1.5},
            ["graph.edge_probability", "less than or equal to 1"],
        ),
        ({"device": "gpu"}, ["device", "cpu, cuda or cuda:N", '"gpu"']),
        ({"device": "cuda:x"}, ["device", "cpu, cuda or cuda:N"]),
        ({"device": "cuda:-1"}, ["device", "cpu, cuda or cuda:N"]),
        ({"device": ""}, ["device", "cpu, cuda or cuda:N"]),
        ({"name": "../x"}, ["name", "letters, digits", '"../x"']),
        ({"name": "a/b"}, ["name", "letters, digits"]),
        ({"name": "a\\b"}, ["name", "letters, digits"]),
        ({"name": ".."}, ["name", "letters, digits"]),
        ({"name": ""}, ["name", "letters, digits"]),
        ({"name": "a\n"}, ["name", "letters, digits"]),
        ({"name": "x" * 101}, ["name", "at most 100"]),
        ({"wandb__mode": "onlin"}, ["wandb.mode", "'online', 'offline' or 'disabled'"]),
        ({"wandb__tags": "one"}, ["wandb.tags", "array"]),
        ({"wandb__tags": ["a", ""]}, ["wandb.tags.1", "at least 1 character"]),
        ({"wandb__tags": ["x" * 65]}, ["wandb.tags.0", "at most 64 characters"]),
        ({"graph__k": 2}, ["graph.k", "not an option of preset chain", "belongs to k_gram"]),
        ({"graph__preset": "two_parents", "graph__k": 2}, ["graph.k", "k_gram"]),
        ({"graph__preset": "k_gram"}, ["graph.k: needed by preset k_gram"]),
        ({"graph__preset": "k_gram", "graph__k": 0}, ["graph.k", "found 0"]),
        (
            {"graph__query_parents": [1]},
            ["graph.query_parents: not an option of preset chain (it belongs to manual)"],
        ),
        (
            {"graph": {"preset": "edge_list", "edge_list": "x", "query_parents": [0]}},
            ["graph.query_parents", "edge_list", "manual"],
        ),
        ({"graph": {"preset": "manual", "query_parents": [0]}}, ["graph.parents: needed"]),
        (
            {"graph": {"preset": "manual", "parents": [-1, 0], "query_parents": 1}},
            ["graph.query_parents", "array", "found 1"],
        ),
        (
            {"graph": {"preset": "manual", "parents": [-1, [0, "x"]]}},
            ["graph.parents.1.1", "integer", '"x"'],
        ),
        (
            {"graph": {"preset": "manual", "parents": [-1, [[0]]]}},
            ["graph.parents.1.0", "integer", "[0]"],
        ),
        ({"graph": {"preset": "manual", "parents": [-1, True]}}, ["graph.parents.1", "true"]),
        ({"graph": {"preset": "manual", "parents": -1}}, ["graph.parents", "array", "-1"]),
        ({"model__kind": "bert"}, ["model.kind", "'standard', 'in_context_graphs' or 'own'"]),
        ({"model__headz": [1]}, ["model.headz", "did you mean heads?"]),
        (DISENTANGLED | {"model__heads": []}, ["model.heads", "at least 1 item"]),
        (DISENTANGLED | {"model__heads": [1, 0]}, ["model.heads.1", "found 0"]),
        (DISENTANGLED | {"model__heads": 2}, ["model.heads", "array", "found 2"]),
        (DISENTANGLED | {"model__heads": [1] * 9}, ["model.heads", "at most 8 items"]),
        (
            DISENTANGLED | {"model__heads": [31, 31, 1], "model__initial_scale": 0.1},
            ["model.heads: [31, 31, 1] widen the residual stream 2,048 times", "1024"],
        ),
        (
            DISENTANGLED | {"model__heads": [2, 1]},
            ["model.initial_scale: must be above 0", "equal heads stay equal"],
        ),
        (DISENTANGLED | {"model__initial_scale": -1.0}, ["model.initial_scale", "-1.0"]),
        ({"model__heads": [1, 2]}, ["model.heads", "kind simplified", "to disentangled"]),
        (
            {"model__initial_scale": 0.1},
            ["model.initial_scale", "to disentangled, in_context_graphs, standard)"],
        ),
        ({"model__embeddings": "fixed"}, ["model.embeddings", "belongs to standard"]),
        (DISENTANGLED | {"model__d_model": 32}, ["model.d_model", "belongs to standard"]),
        (DISENTANGLED | {"model__layer_norm": True}, ["model.layer_norm", "to standard"]),
        (STANDARD | {"model__heads": [2, 1]}, ["model.heads", "belongs to disentangled"]),
        (STANDARD | {"model__d_model": 33}, ["model.d_model: 33 is no multiple of 2 heads"]),
        (STANDARD | {"model__d_mlp": 0}, ["model.d_mlp", "found 0"]),
        (STANDARD | {"model__positions": "rotary"}, ["model.positions", "'shortformer'"]),
        ({"model__kind": "standard"}, ["training.algorithm: two_stage is for kind simplified"]),
        ({"model__kind": "disentangled"}, ["training.algorithm", "disentangled needs joint"]),
        (
            {"training__batch_size": 10, "training__accumulation": 3},
            ["training.accumulation: 3 parts do not divide a batch of 10"],
        ),
        ({"training__accumulation": 0}, ["training.accumulation", "found 0"]),
        ({"training__target": "bayes"}, ["training.target", "'sampled' or 'posterior'"]),
        ({"training__joint__schedule": "linear"}, ["training.joint.schedule", "'cosine'"]),
        ({"training__joint__weight_decay": -1.0}, ["training.joint.weight_decay", "-1.0"]),
        ({"training__stage1__weight_decay": math.inf}, ["training.stage1.weight_decay", "finite"]),
        (
            STANDARD
            | {
                "graph": {},
                "task": {"kind": "repeated_tokens", "repeat_lengths": [3, 8]},
                "training__target": "posterior",
            },
            ["training.target: repeated_tokens only has sampled targets"],
        ),
    ],
    ids=lambda value: str(value)[-40:] if isinstance(value, dict) else "",
)
def test_bad_values_and_options_are_refused_with_their_dotted_path(
    values: dict[str, Any], parts: list[str]
) -> None:
    message = refusal(**values)
    for part in parts:
        assert part in message


def test_several_mistakes_are_counted() -> None:
    assert "(and 1 more)" in refusal(training__stage1__lr="x", training__stage2__lr="y")


@pytest.mark.parametrize("parents", [[-1, 2, 0], [-1, 1], [1, 0], [0]])
def test_forward_edges_and_cycles_in_parents_are_refused(parents: list[int]) -> None:
    recipe = parse_recipe({"graph": {"preset": "manual", "parents": parents}}, source="test")
    with raises_one_line(GraphError):
        recipe.build_graph()


def edge_list_recipe(folder: Path, edges: str) -> Path:
    (folder / "graph.txt").write_text(edges)
    path = folder / "mine.toml"
    path.write_text('[graph]\npreset = "edge_list"\nedge_list = "graph.txt"\n')
    return path


def test_an_edge_list_is_read_relative_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edge_list_recipe(tmp_path, "0 1\n0 2\n1 3\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_recipe(path).build_graph().parent_array() == (-1, 0, 0, 1)
    assert load_recipe(Path("..", "mine.toml")).build_graph().edges == ((0, 1), (0, 2), (1, 3))


@pytest.mark.parametrize("edges", ["1 0\n", "0 1\n1 0\n", "0 1\n1 1\n", "0 one\n"])
def test_an_edge_list_that_is_no_graph_is_refused_by_file_name(tmp_path: Path, edges: str) -> None:
    recipe = load_recipe(edge_list_recipe(tmp_path, edges))
    with raises_one_line(GraphError, match=r"graph\.txt"):
        recipe.build_graph()


def test_a_missing_edge_list_is_refused_by_file_name(tmp_path: Path) -> None:
    path = edge_list_recipe(tmp_path, "0 1\n")
    (tmp_path / "graph.txt").unlink()
    with pytest.raises(GraphError, match=r"graph\.txt"):
        load_recipe(path).build_graph()


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in file_refusal(tmp_path / "absent.toml")


def test_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in file_refusal(tmp_path)


def test_overlong_path_is_refused() -> None:
    file_refusal(Path("x" * 5000 + ".toml"))


def test_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"did you mean markov_chain\?.*random_tree"):
        load_recipe("markov_chian")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\xff\xfe\x00\x01", "not a text file"),
        (b"\x00\x01\x02", "not valid TOML"),
        ("seed = \n", "not valid TOML"),
        ("seed = 1\nseed = 2\n", "not valid TOML"),
        ("seed = 1" + "0" * 5000, "not valid TOML"),
        ("a = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ('graph = "chain"\n', "graph"),
        ("[graph]\nedge_list = 3\n", "graph.edge_list"),
        ("[graph]\npreset = 1979-05-27\n", "graph.preset"),
        ("[graph]\nsequence_length = nan\n", "graph.sequence_length"),
        ("", "graph.sequence_length"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str | bytes, part: str) -> None:
    assert part in file_refusal(tmp_path / "bad.toml", content)


# --- Several parents and the paper's models ---


def of_graph(**graph: Any) -> Recipe:
    return parse_recipe({"graph": graph}, source="test")


def test_graphs_that_name_the_querys_parents_add_no_query_token() -> None:
    assert of_graph(preset="two_parents", sequence_length=32).build_graph() == two_parents(32)
    graph = of_graph(preset="k_gram", sequence_length=5, k=2).build_graph()
    assert graph.parents == ((), (), (0, 1), (1, 2), (2, 3))
    assert graph.query_parents == (3, 4)
    for recipe in (
        of_graph(preset="k_gram", sequence_length=5, k=2),
        of_graph(preset="k_gram", sequence_length=5, k=5),
        of_graph(preset="two_parents", sequence_length=5),
        of_graph(preset="manual", parents=[-1] * 5, query_parents=[4]),
        of_graph(preset="manual", parents=[-1, 0, [0, 1], [], [3]], query_parents=[4, 0]),
    ):
        task = build_task(recipe.build_graph(), recipe.build_prior())
        assert isinstance(task, SeveralParentsTask)
        assert (task.graph.n_positions, task.sequence_length) == (5, 5)
    for recipe in (
        of_graph(preset="chain", sequence_length=5),
        of_graph(preset="manual", parents=[-1, 0, [1], []]),
    ):
        task = build_task(recipe.build_graph(), recipe.build_prior())
        assert isinstance(task, SingleParentTask)
        assert (task.graph.n_positions, task.sequence_length) == (4, 5)


@pytest.mark.parametrize(
    "values",
    [
        {"graph": {"preset": "manual", "parents": [-1, 0, [0, 1], []], "query_parents": [0, 3]}},
        {"graph": {"preset": "manual", "parents": [[], [0], [1, 0]], "query_parents": [1]}},
        {"graph": {"preset": "k_gram", "sequence_length": 32, "k": 3}},
        DISENTANGLED | {"model__heads": [2, 1, 3], "model__initial_scale": 1e-4},
        STANDARD
        | {
            "model__n_layers": 3,
            "model__n_heads": 4,
            "model__d_model": 32,
            "model__d_mlp": 64,
            "model__layer_norm": True,
            "model__embeddings": "fixed",
            "model__positions": "shortformer",
        },
        {
            "training__accumulation": 8,
            "training__target": "posterior",
            "training__stage1__schedule": "cosine",
            "training__stage2__weight_decay": 1e-5,
            "training__joint__optimizer": "adamw",
            "training__joint__weight_decay": 2e-4,
            "training__joint__schedule": "cosine",
        },
    ],
    ids=["several parents", "nested alone", "k-grams", "disentangled", "standard", "training"],
)
def test_every_new_key_survives_the_round_trip(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(nested(**values), source="test")
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    plain = recipe_to_dict(recipe)
    for key, value in values.items():
        inner: Any = plain
        for part in key.split("__"):
            inner = inner[part]
        assert inner == value


@pytest.mark.parametrize(
    ("graph", "part"),
    [
        ({"preset": "manual", "parents": [-1, [0, 0]]}, "parent 0 of position 1 is given twice"),
        ({"preset": "manual", "parents": [-1, [-1]]}, "parent -1 of position 1 is out of range"),
        ({"preset": "manual", "parents": [-1, [0, 2], 0]}, "parent 2 of position 1"),
        ({"preset": "manual", "parents": []}, "the graph is empty"),
        ({"preset": "manual", "parents": [-1, 0], "query_parents": []}, "the query has no parents"),
        ({"preset": "manual", "parents": [-1, 0], "query_parents": [2]}, "parent 2 of the query"),
        ({"preset": "k_gram", "sequence_length": 5, "k": 6}, "k must be a whole number from 1 to"),
    ],
)
def test_graphs_of_several_parents_that_are_none_are_refused(
    graph: dict[str, Any], part: str
) -> None:
    with raises_one_line(GraphError, match=part):
        of_graph(**graph).build_graph()


@pytest.mark.parametrize(
    ("values", "error", "part"),
    [
        (
            {"graph": {"preset": "two_parents", "sequence_length": 8}},
            RecipeError,
            "model.kind: simplified learns graphs with at most one parent",
        ),
        (
            {"graph": {"preset": "manual", "parents": [-1, [0], [0, 1]]}} | STANDARD,
            GraphError,
            "needs query_parents",
        ),
        ({"training__target": "posterior"}, RecipeError, "training.target: posterior is for"),
        (
            STANDARD | {"model__embeddings": "fixed", "model__d_model": 16},
            RecipeError,
            "fixed embeddings of 10 tokens and 8 positions need 18, found 16",
        ),
        (
            STANDARD
            | {
                "graph": {},
                "task": {"kind": "repeated_tokens", "repeat_lengths": [3, 8]},
                "model__embeddings": "fixed",
                "model__d_model": 16,
            },
            RecipeError,
            "fixed embeddings of 10 tokens and 17 positions need 27, found 16",
        ),
    ],
)
def test_a_model_that_cannot_learn_the_task_is_refused_before_training(
    values: dict[str, Any], error: type[Exception], part: str
) -> None:
    recipe = parse_recipe(nested(**values), source="test")
    with raises_one_line(error, match=part):
        check_experiment(recipe)


# The paper's own training of its figures: (S, T), most parents, the stage, steps.
SGD = {"optimizer": "sgd", "lr": 1.0}
COSINE = {"optimizer": "adamw", "lr": 0.01, "schedule": "cosine"}
PAPER: list[tuple[str, tuple[int, int], int, dict[str, Any], int]] = [
    ("figure2_chain", (10, 20), 1, SGD | {"schedule": "cosine"}, 2**17),
    ("figure2_icl", (10, 20), 1, SGD | {"schedule": "cosine"}, 2**17),
    ("figure2_random", (10, 20), 1, SGD | {"schedule": "cosine"}, 2**17),
    ("figure2_manual", (3, 6), 1, SGD | {"schedule": "cosine"}, 2**17),
    ("figure5_two_parents", (5, 32), 2, COSINE | {"weight_decay": 1e-4}, 2**16),
    ("figure8_mlp", (10, 20), 1, COSINE | {"weight_decay": 2e-4}, 2**12),
    ("figure9_forest", (3, 20), 1, SGD, 2**14),
]


@pytest.mark.parametrize(("name", "sizes", "parents", "stage", "steps"), PAPER)
@pytest.mark.parametrize("seed", [0, 19])
def test_the_papers_own_settings_are_recipes(
    name: str, sizes: tuple[int, int], parents: int, stage: dict[str, Any], steps: int, seed: int
) -> None:
    recipe = load_recipe(name).with_overrides(
        seed=seed,
        training__batch_size=1024,
        training__accumulation=4,
        training__joint=stage | {"steps": steps},
    )
    check_experiment(recipe)
    task = build_task(recipe.build_graph(), recipe.build_prior())
    assert (task.vocab_size, task.sequence_length) == sizes
    assert (bool(task.graph.edges), task.graph.max_parents) == (True, parents)


# --- Overrides and seeds ---


def test_overrides_return_a_checked_copy() -> None:
    recipe = parse_recipe(nested(), source="test")
    changed = recipe.with_overrides(seed=3, training__stage1__steps=7, task__alpha=(0.5,) * 10)
    assert (changed.seed, changed.training.stage1.steps) == (3, 7)
    assert changed.task.alpha == (0.5,) * 10
    assert recipe.seed == 0
    assert changed.with_overrides(wandb__mode="offline", wandb__tags=["a"]).wandb.tags == ("a",)


def test_overrides_are_as_strict_as_files() -> None:
    recipe = parse_recipe(nested(), source="test")
    for change in ({"training__stage1__stepz": 3}, {"seed": "3"}, {"task__alpha": 0.0}):
        with pytest.raises(RecipeError) as caught:
            recipe.with_overrides(**change)
        assert next(iter(change)).replace("__", ".") in str(caught.value)


@pytest.mark.parametrize("key", ["seed__x", "seed__x__y", "task__alpha__x"])
def test_an_override_within_a_value_is_refused(key: str) -> None:
    with pytest.raises(RecipeError, match=f"override: {key.split('__')[0]}"):
        load_recipe("markov_chain").with_overrides(**{key: 1})


def test_overrides_leave_the_values_they_are_given_as_they_are() -> None:
    stage = {"steps": 3}
    recipe = load_recipe("markov_chain")
    changed = recipe.with_overrides(training__stage1=stage, training__stage1__lr=2.0)
    assert (changed.training.stage1.lr, stage) == (2.0, {"steps": 3})


def test_an_override_of_none_takes_an_option_away() -> None:
    recipe = load_recipe("lag_two")
    assert recipe.with_overrides(graph__preset="chain", graph__lag=None).build_graph().edges


def test_a_random_graph_follows_the_runs_seed_unless_it_has_its_own() -> None:
    tree = load_recipe("random_tree")
    edges = [tree.with_overrides(seed=seed).build_graph().edges for seed in (1, 1, 2)]
    assert edges[0] == edges[1] != edges[2]
    kept = tree.with_overrides(graph__seed=1)
    for seed in (1, 2):
        assert kept.with_overrides(seed=seed).build_graph().edges == edges[0]


def test_priors_are_symmetric_by_token_or_fixed() -> None:
    recipe = parse_recipe(nested(task__vocab_size=2), source="test")
    assert recipe.build_prior() == DirichletPrior((0.1, 0.1))
    by_token = recipe.with_overrides(task__alpha=[0.5, 2.0])
    assert by_token.build_prior() == DirichletPrior((0.5, 2.0))
    fixed = recipe.with_overrides(task__transition=[[0.9, 0.1], [0.3, 0.7]])
    assert fixed.build_prior() == FixedTransition(((0.9, 0.1), (0.3, 0.7)))


@pytest.mark.parametrize("rows", [[[0.5, 0.4], [0.5, 0.5]], [[1.0], [0.5, 0.5]]])
def test_a_matrix_that_is_no_transition_matrix_is_refused(rows: list[list[float]]) -> None:
    recipe = parse_recipe(nested(task__vocab_size=2, task__transition=rows), source="test")
    with raises_one_line(PriorError):
        recipe.build_prior()


def test_recipe_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Recipe().seed = 3  # type: ignore[misc]

"""Runs with a [clamp]: what is held, when it is let go, resumed runs, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechcausal.cli.main import main
from mechcausal.graphs import CausalGraph, chain
from mechcausal.models.loading import load_graph_model
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.recipes import Recipe, RecipeError, load_recipe, parse_recipe, recipe_to_toml
from mechcausal.records.matrices import find_matrices
from mechcausal.sweeps.batch import batches, train_batch
from mechcausal.training.checkpoints import read_checkpoint
from mechcausal.training.experiments import check_experiment
from mechcausal.training.experiments.clamping import wrong_rows
from mechcausal.training.resuming import resume
from mechcausal.training.run import RunResult, train
from tests import kill_runs
from tests.left_as_found import fingerprint
from tests.refusals import raises_one_line
from tests.run_folders import at
from tests.small_recipes import LEAN

pytestmark = pytest.mark.usefixtures("no_figures")
PARENTS = [-1, 0, 0, 2, 1]


def recipe(**overrides: Any) -> Recipe:
    """Joint training of 12 steps on a tree of six positions, a probe step every third step."""
    data = {
        "name": "clamped",
        "graph": {"preset": "manual", "parents": PARENTS},
        "task": {"vocab_size": 3, "alpha": 0.3},
        "training": {
            "algorithm": "joint",
            "batch_size": 16,
            "joint": {"steps": 12, "lr": 20.0},
        },
        "evaluation": {"n_sequences": 16, "bayes_draws": 2, "theory_priors": 10},
        "probing": {"every": 3, "dense": 0, "images": 0, "report": False},
        "checkpoints": {"every": 4},
        "wandb": {"mode": "disabled"},
    }
    return parse_recipe(data, source="test").with_overrides(**overrides)


def attention(run: RunResult) -> dict[int, Tensor]:
    """Layer 1's attention by probe step."""
    frames, _, _ = find_matrices(run.folder)
    return {step: torch.from_numpy(m["attention/layer0"]) for step, m in frames.items()}


def hooks(run: RunResult) -> dict[str, Any]:
    state = fingerprint(run.experiment.hooked)
    return {name: value for name, value in state.items() if "hooks" in name and value}


# --- What is held ---


def test_layer_1_is_held_at_the_graph_for_some_steps(tmp_path: Path):
    run = train(recipe(clamp__pattern="graph", clamp__until_step=6), out=tmp_path / "run")
    seen = attention(run)
    assert list(seen) == [0, 3, 6, 9, 12]
    for step in (0, 3):
        for position, parent in enumerate(PARENTS):
            if parent >= 0:
                assert seen[step][position].tolist() == torch.eye(6)[parent].tolist()
        assert seen[step][5].count_nonzero() == 6  # the query's row is free
    # Until then no row of a child has moved, and the next look sees the free pattern.
    uniform = torch.ones(6, 6).tril() / torch.arange(1, 7).unsqueeze(1)
    torch.testing.assert_close(seen[6][:5], uniform[:5])
    assert not torch.equal(seen[6][5], uniform[5])
    assert not torch.allclose(seen[12][3], uniform[3])
    assert run.history[0]["graph/parent_attention"] == 1.0
    assert hooks(run) == {}
    assert not run.experiment.model.is_clamped  # type: ignore[attr-defined]


def test_figures_of_the_clamped_model_are_its_own(tmp_path: Path):
    run = train(recipe(clamp__pattern="graph"), out=tmp_path / "run")
    model = run.experiment.model  # type: ignore[attr-defined]
    free = run.experiment.losses()["loss/eval"]
    with torch.no_grad():
        model.A1.zero_()
        for position, parent in enumerate(PARENTS):
            if parent >= 0:
                model.A1[position, parent] = 200.0
    own = run.experiment.losses()["loss/eval"]
    # The query's row was free; the ideal weights leave it as it is at A1 = 0.
    assert abs(own - run.summary["loss/eval"]) < abs(free - run.summary["loss/eval"])
    weights = load_graph_model(run.folder / "model")
    assert isinstance(weights, SimplifiedTransformer)
    assert not weights.A1[1:5].any()  # the files hold weights, not the clamp


def test_a_pair_is_forbidden_and_a_pattern_frozen_at_a_step(tmp_path: Path):
    forbidden = [[2, 0], [5, 5]]
    run = train(recipe(clamp__forbidden=forbidden, clamp__from_step=4), out=tmp_path / "run")
    seen = attention(run)
    assert seen[3][2, 0] > 0
    assert not any(seen[step][key] for step in (6, 12) for key in ((2, 0), (5, 5)))
    frozen = train(recipe(clamp__pattern="frozen", clamp__from_step=3), out=tmp_path / "frozen")
    seen = attention(frozen)
    assert not torch.equal(seen[0], seen[3])
    for step in (6, 9, 12):
        torch.testing.assert_close(seen[step], seen[3])


@pytest.mark.parametrize("kind", ["disentangled", "standard", "repeated_tokens"])
def test_other_models_are_held_too(tmp_path: Path, kind: str):
    if kind == "repeated_tokens":
        small = parse_recipe(LEAN, source="test").with_overrides(
            clamp__pattern="previous_token", clamp__head=1, probing__enabled=False
        )
        run = train(small, out=tmp_path / "run")
        first = run.experiment.hooked.blocks[0].attn
        started = (
            train(
                small.with_overrides(training__joint__steps=1, clamp__pattern="free"),
                out=tmp_path / "start",
            )
            .experiment.hooked.blocks[0]
            .attn
        )
        assert torch.isfinite(first.W_Q).all()
        # Adam moves head 0 by a learning rate a step; head 1 has stayed where it began.
        assert (first.W_Q[0] - started.W_Q[0]).abs().max() > 0.015
        assert (first.W_Q[1] - started.W_Q[1]).abs().max() < 0.0101
        return
    size = {"model__d_model": 8, "model__n_heads": 2} if kind == "standard" else {}
    run = train(recipe(model__kind=kind, **size, clamp__pattern="graph"), out=tmp_path / "run")
    for seen in attention(run).values():
        by_head = seen if seen.ndim == 3 else seen.unsqueeze(0)
        for position, parent in enumerate(PARENTS):
            if parent >= 0:
                expected = torch.eye(6)[parent].expand(len(by_head), 6)
                torch.testing.assert_close(by_head[:, position], expected)
    assert hooks(run) == {}


def test_several_parents_are_held_one_by_each_head(tmp_path: Path):
    several = recipe(
        graph__preset="k_gram",
        graph__parents=None,
        graph__k=2,
        graph__sequence_length=5,
        model__kind="disentangled",
        model__heads=(2, 1),
        model__initial_scale=0.1,
        clamp__pattern="graph",
        training__joint__steps=2,
    )
    seen = attention(train(several, out=tmp_path / "run"))[2]
    assert seen[:, 3].tolist() == torch.eye(5)[[1, 2]].tolist()
    assert seen[:, 4].tolist() == torch.eye(5)[[3, 4]].tolist()  # the query's parents
    with raises_one_line(RecipeError, "graph needs a head for each of 2 parents, layer 1 has 1"):
        check_experiment(several.with_overrides(clamp__layer=1))
    with raises_one_line(RecipeError, "clamp.head: graph holds head n at the n-th parent"):
        check_experiment(several.with_overrides(clamp__head=0))


def test_a_wrong_graph_shares_no_edge_and_follows_its_seed():
    graph = chain(30)
    drawn = [wrong_rows(graph, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for rows in drawn:
        assert list(rows) == list(range(1, 30))
        assert rows[1] == (1,)  # position 1 has no other earlier one than its parent
        assert all(key < row and key != row - 1 for row, (key,) in rows.items() if row > 1)
    several = CausalGraph(((), (), (0, 1), (0, 1)), query_parents=(2, 3))
    assert wrong_rows(several, 0) == {2: (2,), 3: (0, 1)}


# --- Resuming, and batches ---


@pytest.mark.parametrize("step", [2, 5, 9, 11])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, undisturbed: Path, step: int
) -> None:
    class CrashError(RuntimeError):
        pass

    def crash() -> None:
        raise CrashError

    with pytest.raises(CrashError):
        train(frozen(), out=tmp_path / "run", on_progress=at(step, crash))
    newest = step // 4 * 4
    if newest:
        saved = read_checkpoint(tmp_path / "run" / "checkpoints" / f"{newest:08d}")
        assert list(saved.clamp) == (["layer0_from3"] if 3 <= newest < 9 else [])
    result = resume(tmp_path / "run")
    assert (result.start, result.warnings) == (newest, [])
    for name in kill_runs.COMPARED:
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes(), name


def frozen() -> Recipe:
    return recipe(
        clamp__pattern="frozen",
        clamp__from_step=3,
        clamp__until_step=9,
        training__algorithm="two_stage",
        training__stage1={"steps": 6, "lr": 100.0},
        training__stage2={"steps": 6, "lr": 5.0},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(frozen(), out=tmp_path_factory.mktemp("undisturbed") / "run").folder


def test_members_of_a_batch_are_clamped_each_in_its_own_way(tmp_path: Path):
    clamps = ("free", "graph", "wrong_graph", "frozen")
    members = [recipe(clamp__pattern=pattern, training__joint__lr=2.0) for pattern in clamps]
    assert batches(members) == [[0, 1, 2, 3]]
    folders = [tmp_path / pattern for pattern in clamps]
    outcomes = train_batch(members, folders)
    assert [outcome.state for outcome in outcomes] == ["finished"] * 4
    seen = {}
    for member, folder in zip(members, folders, strict=True):
        single = train(member, out=tmp_path / f"{folder.name} alone")
        last = find_matrices(folder)[0][12]["attention/layer0"]
        seen[folder.name] = torch.from_numpy(last)
        # Float32 sums of 12 steps in another order.
        torch.testing.assert_close(seen[folder.name], attention(single)[12], atol=1e-4, rtol=1e-3)
    for name in ("graph", "wrong_graph", "frozen"):
        assert not torch.allclose(seen[name], seen["free"], atol=1e-3)


# --- What is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 1}, "clamp.layer: needs clamp.pattern or clamp.forbidden"),
        ({"pattern": "tree"}, "clamp.pattern: input should be 'free', 'graph'"),
        ({"pattern": "graph", "layer": 2}, "clamp.layer: 0 to 1 in a model of 2 layers, found 2"),
        ({"pattern": "graph", "head": 1}, "clamp.head: 0 to 0 in layer 0 of 1 heads, found 1"),
        ({"pattern": "graph", "from_step": 12}, "clamp.from_step: 0 to 11 in a run of 12 steps"),
        (
            {"pattern": "graph", "from_step": 5, "until_step": 5},
            "clamp.until_step: above from_step, 5, found 5",
        ),
        ({"pattern": "graph", "seed": 3}, "clamp.seed: belongs to pattern wrong_graph"),
        ({"forbidden": [[2, 3]]}, r"clamp.forbidden: \[2, 3\]: a position attends to earlier"),
        ({"forbidden": [[1, 0], [1, 1]]}, "clamp.forbidden: position 1 keeps no key"),
        ({"forbidden": [[6, 0]]}, "clamp.forbidden: positions 0 to 5 allowed, found 6"),
        ({"forbidden": [[2]]}, "clamp.forbidden.0"),
        ({"forbidden": [[2, -1]]}, "clamp.forbidden.0.1: input should be greater than or equal"),
        ({"pattern": "graph", "until": 3}, "clamp.until: unknown key, did you mean until_step"),
    ],
)
def test_mistakes_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
):
    with raises_one_line(RecipeError, message):
        check_experiment(recipe(clamp=changes))
    text = recipe_to_toml(recipe()).replace("[clamp]", "[unused]")
    lines = [f"clamp = {{{', '.join(f'{k} = {v!r}' for k, v in changes.items())}}}"]
    kept = [line for line in text.splitlines() if not line.startswith("experiment")]
    start = kept.index("[unused]")
    end = next(i for i in range(start + 1, len(kept)) if kept[i].startswith("["))
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(lines + kept[:start] + kept[end:]), encoding="utf-8")
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_tasks_without_a_graph_take_the_other_clamps():
    small = parse_recipe(LEAN, source="test")
    check_experiment(small.with_overrides(clamp__pattern="frozen", clamp__layer=1))
    with raises_one_line(RecipeError, "graph needs a graph, which repeated_tokens lacks"):
        small.with_overrides(clamp__pattern="graph")
    with raises_one_line(RecipeError, "clamp: a model of kind in_context_graphs cannot be clamped"):
        load_recipe("in_context_graphs").with_overrides(clamp__pattern="frozen")
    tree = {
        "task__kind": "tree",
        "task__repeat_lengths": None,
        "task__depth": 2,
        "task__vocab_size": 3,
        "model__attention": "bidirectional",
    }
    with raises_one_line(RecipeError, "clamp.forbidden: needs causal attention"):
        small.with_overrides(**tree, clamp__forbidden=[[1, 0]])


def test_the_command_line_takes_the_section(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["--clamp.pattern", "graph", "--clamp.forbidden", "3", "1", "4", "0"]
    assert main(["train", "markov_chain", *words, "--clamp.layer", "5"]) == 2
    assert "clamp.layer: 0 to 1 in a model of 2 layers, found 5" in capsys.readouterr().err

"""The repeated_tokens experiment: its data, its record, and the induction heads that it grows."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mechcausal.models.adapter import load_model
from mechcausal.recipes import (
    Recipe,
    RecipeError,
    load_recipe,
    parse_recipe,
    recipe_to_dict,
    recipe_to_toml,
)
from mechcausal.recipes.stages import stages
from mechcausal.records.run_folder import MATRICES_FILE, read_metrics, read_summary
from mechcausal.studies.detection import detect
from mechcausal.studies.targets import load_target
from mechcausal.training.checkpoints import checkpoint_folders
from mechcausal.training.experiments import Generators, build_experiment, repeated_tokens
from mechcausal.training.experiments.repeated_tokens import BOS, RepeatedTokens
from mechcausal.training.run import RunResult, train
from probes import HeadScores, score_heads, track_formation
from tests.left_as_found import left_as_found
from tests.small_recipes import LEAN

FIGURES = {
    *("loss/train", "loss/eval", "loss/first_copy", "loss/second_copy"),
    *("loss/in_context_gain", "loss/chance"),
    *("induction/score", "induction/prefix_matching", "induction/positional_control"),
    *("induction/copying", "induction/formation_step"),
    *("strategy/kl_uniform", "strategy/kl_copy", "strategy/mixture_kl"),
    *("strategy/weight_uniform", "strategy/weight_copy"),
}
KINDS = ("prefix_matching", "previous_token", "duplicate_token")


def tiny(**overrides: Any) -> Recipe:
    """Two layers of two heads, twelve tokens, blocks of three to five; four steps, W&B off."""
    return parse_recipe(LEAN, source="test").with_overrides(**overrides)


def experiment(recipe: Recipe | None = None) -> RepeatedTokens:
    """The experiment of a recipe on the CPU."""
    recipe = recipe or tiny()
    built = build_experiment(recipe, Generators.from_seed(recipe.seed, torch.device("cpu")))
    assert isinstance(built, RepeatedTokens)
    return built


def weights(built: RepeatedTokens) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in built.hooked.named_parameters()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One tiny run that several tests read."""
    return train(tiny(), out=tmp_path_factory.mktemp("runs") / "run")


# --- Recipes ---


def test_the_recipe_survives_the_round_trip_through_toml(tmp_path: Path) -> None:
    for recipe in (tiny(), load_recipe("repeated_tokens")):
        path = tmp_path / f"{recipe.name}.toml"
        path.write_text(recipe_to_toml(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe
        assert parse_recipe(recipe_to_dict(recipe), source="test") == recipe


def test_joint_training_moves_everything() -> None:
    (stage,) = stages(tiny())
    built = experiment()
    assert stage.parameters == ("all",)
    assert len(built.parameters(stage.parameters)) == len(weights(built))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"model__kind": "simplified"}, ["model.kind", "standard"]),
        ({"training__algorithm": "two_stage"}, ["training.algorithm", "joint"]),
        ({"graph": {"preset": "chain", "sequence_length": 8}}, ["graph", "has no graph"]),
        ({"graph__preset": "star"}, ["graph", "has no graph"]),
        ({"task__repeat_lengths": None}, ["task.repeat_lengths: needed by repeated_tokens"]),
        ({"task__repeat_lengths": [5, 3]}, ["task.repeat_lengths", "[5, 3]"]),
        ({"task__repeat_lengths": [1, 3]}, ["task.repeat_lengths", "[1, 3]"]),
        ({"task__repeat_lengths": [2, 2]}, ["task.repeat_lengths", "[2, 2]"]),
        ({"task__repeat_lengths": [0, 3]}, ["task.repeat_lengths.0", "greater than or equal to 1"]),
        ({"task__repeat_lengths": [3, 10**6]}, ["task.repeat_lengths", "5000"]),
        ({"task__repeat_lengths": [3]}, ["task.repeat_lengths"]),
        ({"task__repeat_lengths": 3}, ["task.repeat_lengths"]),
        (
            {"task__kind": "causal_graph", "graph__sequence_length": 8},
            ["task.repeat_lengths", "kind repeated_tokens"],
        ),
        ({"task__transition": [[1.0] * 12] * 12}, ["task.transition", "kind causal_graph"]),
        ({"model__d_model": 9}, ["model.d_model: 9 is no multiple of 2 heads"]),
        ({"model__n_heads": 0}, ["model.n_heads"]),
        ({"model__n_layers": 0}, ["model.n_layers"]),
        ({"model__positions": "rotary"}, ["model.positions", "'standard' or 'shortformer'"]),
        ({"task__kind": "repeated"}, ["task.kind", "'repeated_tokens'"]),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_refused_in_one_line(
    overrides: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny(**overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message


# --- Data ---


def batches(built: RepeatedTokens, count: int) -> list[torch.Tensor]:
    """The tokens that the model reads in some training steps."""
    seen: list[torch.Tensor] = []
    handle = built.hooked.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].clone())
    )
    for _ in range(count):
        built.training_loss(built.recipe.training.batch_size)
    handle.remove()
    return seen


def test_sequences_are_a_bos_and_a_block_twice_of_every_length_and_token() -> None:
    seen = batches(experiment(), 60)
    for tokens in seen:
        length = (tokens.shape[1] - 1) // 2
        assert tokens.shape == (4, 2 * length + 1)
        assert (tokens[:, 0] == BOS).all()
        assert torch.equal(tokens[:, 1 : 1 + length], tokens[:, 1 + length :])
        assert ((tokens[:, 1:] > BOS) & (tokens[:, 1:] < 12)).all()
    assert {(tokens.shape[1] - 1) // 2 for tokens in seen} == {3, 4, 5}
    assert set(torch.cat([tokens.flatten() for tokens in seen]).tolist()) == set(range(12))


@pytest.mark.parametrize("lengths", [[2, 3], [3, 3], [2, 20]])
def test_short_blocks_and_blocks_longer_than_the_vocabulary_train_and_are_probed(
    lengths: list[int],
) -> None:
    built = experiment(tiny(task__repeat_lengths=lengths, task__vocab_size=3))
    built.training_loss(4).backward()
    figures = built.observe().figures
    assert 0 <= figures["induction/prefix_matching"] <= 1
    assert figures["induction/score"] <= 1


# --- Randomness ---


def test_weights_and_data_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = experiment()
    torch.manual_seed(2)
    again, other = experiment(), experiment(tiny(seed=1))
    for name, value in weights(first).items():
        assert torch.equal(weights(again)[name], value)
    assert not torch.equal(weights(other)["embed.W_E"], weights(first)["embed.W_E"])
    ours, theirs = batches(first, 5), batches(again, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ours, batches(other, 5), strict=False))


def test_what_probes_are_shown_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the initial weights, nor of training, evaluation or theory."""
    seeds: list[int] = []

    def recorded(*args: Any, **options: Any) -> HeadScores:
        seeds.append(options["generator"].initial_seed())
        return score_heads(*args, **options)

    monkeypatch.setattr(repeated_tokens, "score_heads", recorded)
    built = experiment()
    built.observe()
    built.observe()
    generators = Generators.from_seed(built.recipe.seed, torch.device("cpu"))
    others = [generators.data, generators.evaluation, generators.theory]
    assert len(set(seeds)) == 1
    assert seeds[0] not in {generators.init, *(other.initial_seed() for other in others)}


def test_the_same_recipe_gives_the_same_run_and_leaves_the_global_generator_alone(
    run: RunResult, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = train(tiny(), out=tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("metrics.jsonl", "model/model.safetensors", MATRICES_FILE):
        assert (again.folder / name).read_bytes() == (run.folder / name).read_bytes()


@pytest.mark.parametrize(
    "overrides",
    [{"probing__enabled": False}, {"probing__every": 1, "evaluation__n_sequences": 9}],
    ids=["less", "more"],
)
def test_watching_does_not_change_what_is_learned(
    run: RunResult, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    other = train(tiny(**overrides), out=tmp_path / "other")
    ours, theirs = (load_file(r.folder / "model" / "model.safetensors") for r in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if not other.experiment.recipe.probing.enabled:  # the losses are kept
        assert [row["train/step"] for row in other.history] == [0, 4]
        assert {"loss/eval", "loss/second_copy"} <= set(other.summary)
        assert "induction/score" not in other.summary


# --- What is seen, and what is left behind ---


def test_observation_has_the_figures_of_the_charts() -> None:
    observation = experiment().observe()
    heads = {f"heads/L{i}H{j}/{kind}" for i in (0, 1) for j in (0, 1) for kind in KINDS}
    by_run = {"loss/train", "induction/formation_step"}
    assert set(observation.figures) == (FIGURES - by_run) | heads
    assert set(observation.matrices) == {f"heads/{kind}" for kind in KINDS}
    for kind in KINDS:
        matrix = observation.matrices[f"heads/{kind}"]
        assert matrix.shape == (2, 2)
        assert matrix[1, 0].item() == observation.figures[f"heads/L1H0/{kind}"]
    best = observation.matrices["heads/prefix_matching"].max().item()
    assert observation.figures["induction/prefix_matching"] == best


def test_the_induction_score_is_that_above_uniform_attention() -> None:
    watched = experiment()
    figures, scores = watched.observe().figures, watched._scores()
    by_chance = scores.uniform_baseline[0, 0].item()
    assert by_chance > 0.05
    expected = (figures["induction/prefix_matching"] - by_chance) / (1 - by_chance)
    assert figures["induction/score"] == pytest.approx(expected, abs=1e-6)
    with torch.no_grad():
        for block in watched.hooked.blocks:
            block.attn.W_Q.zero_()
            block.attn.b_Q.zero_()
    assert watched.observe().figures["induction/score"] == pytest.approx(0.0, abs=1e-6)


def test_losses_are_consistent() -> None:
    losses = experiment().losses()
    mean = (losses["loss/first_copy"] + losses["loss/second_copy"]) / 2
    assert losses["loss/eval"] == pytest.approx(mean)
    gain = losses["loss/first_copy"] - losses["loss/second_copy"]
    assert losses["loss/in_context_gain"] == pytest.approx(gain)
    assert losses["loss/chance"] == pytest.approx(math.log(11))


def test_a_model_that_guesses_is_the_uniform_strategy() -> None:
    guessing = experiment()
    with torch.no_grad():
        guessing.hooked.unembed.W_U.zero_()
        guessing.hooked.unembed.b_U.fill_(0.0)
        guessing.hooked.unembed.b_U[BOS] = -40.0
    figures = guessing.observe().figures
    assert figures["strategy/kl_uniform"] == pytest.approx(0.0, abs=1e-6)
    assert figures["strategy/weight_uniform"] == pytest.approx(1.0, abs=1e-4)
    assert figures["strategy/kl_copy"] > 1.0


def test_looking_changes_nothing() -> None:
    built = experiment()
    with left_as_found(built.hooked):
        first, again = built.observe(), built.observe()
    assert first.figures == again.figures


def test_the_run_holds_rows_figures_and_matrices(run: RunResult) -> None:
    assert [row["train/step"] for row in read_metrics(run.folder)] == [0, 2, 4]
    assert set(read_summary(run.folder)) >= FIGURES
    assert (run.folder / "figures" / "heads.png").is_file()
    saved = load_file(run.folder / MATRICES_FILE)
    assert saved["00000004/heads/prefix_matching"].shape == (2, 2)
    assert load_recipe(run.folder / "recipe.toml") == tiny()


def test_every_probe_step_leaves_a_checkpoint_that_loads(run: RunResult) -> None:
    folders = checkpoint_folders(run.folder)
    assert list(folders) == [0, 2, 4]
    start = experiment()
    for name, value in load_model(folders[0]).named_parameters():
        assert torch.equal(value, weights(start)[name])
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(load_model(folders[4])(tokens), run.experiment.hooked(tokens))
        assert not torch.equal(load_model(folders[2])(tokens), run.experiment.hooked(tokens))


# --- What the recipe is for ---


@pytest.mark.slow
def test_the_recipe_grows_an_induction_circuit(tmp_path: Path) -> None:
    """A third of the recipe's steps: the heads are there, only not yet as sharp."""
    recipe = load_recipe("repeated_tokens").with_overrides(
        wandb__mode="disabled", training__joint__steps=500
    )
    result = train(recipe, out=tmp_path / "run")
    detection = detect(load_target(str(tmp_path / "run")), ablate=True, compose=True)

    best = detection.scores.heads("induction")[0]
    row = detection.scores.layers.index(best[0]), best[1]
    assert detection.scores.prefix_matching[row] >= 0.8
    assert detection.scores.positional_control[row] < 0.1
    assert detection.in_context is not None
    assert detection.in_context.in_context_gain > 2
    (effect,) = (e for e in detection.ablations or () if (e.layer, e.head) == best)
    assert effect.rise >= 0.5  # nats; more than 1 after all 1500 steps
    assert not effect.removable
    assert detection.composition is not None
    ((partner, score),) = detection.composition.partners(best)
    assert detection.is_previous_token(partner)
    assert score > 0.02  # beyond what random matrices give
    (effect,) = (e for e in detection.ablations or () if (e.layer, e.head) == partner)
    assert effect.rise >= 1

    # Guessing at the start, copying at the end.
    copied = [row["strategy/weight_copy"] or 0.0 for row in result.history]
    assert copied[0] < 0.1
    assert copied[-1] > 0.7

    # The head forms while the loss of the second copy falls.
    models = ((step, load_model(path)) for step, path in checkpoint_folders(result.folder).items())
    formation = track_formation(models, n_sequences=16, bos=BOS)
    formed = formation.first_crossing[row].item()
    loss = {int(r["train/step"] or 0): r["loss/second_copy"] or 0.0 for r in result.history}
    plateau, every = loss[0], recipe.probing.every
    begins = min(step for step, value in loss.items() if value < plateau * 3 / 4)
    ends = min(step for step, value in loss.items() if value < plateau / 4)
    assert begins - every <= formed <= ends + every
    assert begins - every <= formation.midpoint[row].item() <= ends + every

"""The text experiment: its figures, its record, resuming, and bad input."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mechcausal.cli.main import main
from mechcausal.measures.residual_law import correlation, law_in_window
from mechcausal.models.adapter import load_model
from mechcausal.pictures import interactive
from mechcausal.pictures.pages.run_page import render
from mechcausal.pictures.wandb_panels import draw_panels
from mechcausal.recipes import Recipe, RecipeError, load_recipe, parse_recipe, recipe_to_toml
from mechcausal.records.run_data import RunData
from mechcausal.records.run_folder import RunFolderError, read_metrics, read_summary
from mechcausal.training.experiments import Generators, build_experiment, check_experiment
from mechcausal.training.experiments.text import TextExperiment
from mechcausal.training.resuming import resume
from mechcausal.training.run import Progress, RunResult, train
from probes import attention_gradient, descent_by_lag, direct_path, residual_information
from tests.left_as_found import left_as_found
from tests.small_recipes import without_figures

WORDS = "the cat sat on the mat and the dog ran to the hill with a red hat "


def text_of(n: int) -> str:
    """Words in random order."""
    words = WORDS.split()
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(words), (n // 3,), generator=generator).tolist()
    return " ".join(words[i] for i in picked)[:n]


@pytest.fixture(scope="module", autouse=True)
def every_gradient_counts() -> Iterator[None]:
    """These models are so small that noise would leave most correlations out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probes.watching.agreement.MIN_SIGNAL_TO_NOISE", 0.1)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(text_of(20_000), encoding="utf-8")
    return path


def tiny(corpus: Path, **overrides: Any) -> Recipe:
    """Windows of 10 characters, two layers of two heads, six steps, W&B off."""
    data = {
        "name": "tiny",
        "task": {"kind": "text", "vocab_size": 12, "context": 10, "text": str(corpus)},
        "model": {"kind": "standard", "n_heads": 2, "d_model": 8, "d_mlp": 16, "layer_norm": True},
        "training": {
            "algorithm": "joint",
            "batch_size": 8,
            "joint": {"steps": 6, "optimizer": "adam", "lr": 0.01},
        },
        "evaluation": {"n_sequences": 48, "max_lag": 5},
        "probing": {"every": 2, "dense": 0, "report": False},
        "checkpoints": {"every": 2},
        "wandb": {"mode": "disabled"},
    }
    return parse_recipe(data, source="test").with_overrides(**overrides)


def experiment(recipe: Recipe) -> TextExperiment:
    built = build_experiment(recipe, Generators.from_seed(recipe.seed, torch.device("cpu")))
    assert isinstance(built, TextExperiment)
    return built


@pytest.fixture
def trained(corpus: Path) -> TextExperiment:
    """A model after some steps."""
    built = experiment(tiny(corpus))
    optimizer = torch.optim.Adam(built.parameters(["all"]), lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        built.training_loss(16).backward()
        optimizer.step()
    optimizer.zero_grad()
    return built


@pytest.fixture
def not_drawn() -> Iterator[None]:
    """Runs draw no figures, which take half of their time."""
    with without_figures():
        yield


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One tiny run that several tests read."""
    return train(tiny(corpus), out=tmp_path_factory.mktemp("runs") / "run")


# --- Figures ---


def test_a_look_writes_the_figures_of_the_law(trained: TextExperiment) -> None:
    built = trained
    figures = built.observe().figures
    residual = residual_information(built.hooked, built.windows, max_lag=5)
    gradient = attention_gradient(built.hooked, built.windows, wrt="pattern", layers=0)
    descent, path = descent_by_lag(gradient)[:, :5], direct_path(built.hooked, residual)
    for lag in range(1, 6):
        assert figures[f"residual/lag{lag}"] == residual.centred_chi2[lag - 1].item()
    assert figures["residual/misfit"] == pytest.approx(residual.misfit.mean().item())
    for name, reference in (
        ("residual", residual.centred_chi2.expand(2, -1)),
        ("raw", built.information.chi2.expand(2, -1)),
        ("direct_path", path.descent),
    ):
        by_head = [
            torch.corrcoef(torch.stack([head, other]))[0, 1].item()
            for head, other in zip(descent, reference, strict=True)
        ]
        assert figures[f"gradient/{name}_correlation"] == pytest.approx(sum(by_head) / 2, abs=1e-9)
    assert figures["gradient/signal_to_noise"] > 0
    with torch.no_grad():
        expected = built.hooked(built.windows, return_type="loss").item()
    assert figures["loss/eval"] == pytest.approx(expected, abs=1e-5)
    weights = [figures[f"strategy/weight_{name}"] for name in ("unigram", "bigram", "trigram")]
    assert sum(weights) == pytest.approx(1.0)
    assert figures["strategy/mixture_kl"] <= figures["strategy/kl_bigram"]


def test_heads_lost_in_noise_count_in_no_correlation(trained: TextExperiment) -> None:
    attention = trained.hooked.blocks[0].attn
    with torch.no_grad():
        for values in (attention.W_V, attention.b_V):
            values[1] = 0.0  # the second head's gradient is 0
        residual = residual_information(trained.hooked, trained.windows, max_lag=5)
    gradient = attention_gradient(trained.hooked, trained.windows, wrt="pattern", layers=0)
    first = descent_by_lag(gradient)[:1, :5]
    expected = correlation(first, residual.centred_chi2.unsqueeze(0)).item()
    figures = trained.observe().figures
    assert figures["gradient/residual_correlation"] == pytest.approx(expected, abs=1e-9)
    with torch.no_grad():
        attention.W_V.zero_()
        attention.b_V.zero_()
    assert math.isnan(trained.observe().figures["gradient/residual_correlation"])


def test_the_window_of_the_law_lies_between_unigram_and_bigram_loss() -> None:
    levels = {"loss/unigram": 3.0, "loss/bigram": 2.0}
    rows = [
        {"train/step": step, "loss/eval": loss, "gradient/residual_correlation": value, **levels}
        for step, loss, value in ((0, 4.0, 0.1), (2, 2.9, 0.8), (4, 2.1, 0.6), (6, 1.9, 0.2))
    ]
    means = law_in_window(rows)
    assert means == {
        "law/first_step": 2,
        "law/last_step": 4,
        "law/residual_correlation": pytest.approx(0.7),
    }
    assert law_in_window(rows[:1]) == {}


def test_a_look_and_training_leave_nothing_behind(corpus: Path) -> None:
    built = experiment(tiny(corpus))
    built.training_loss(4).backward()
    with left_as_found(built.hooked):
        built.observe()


def test_interleaving_leaves_information_at_even_lags_alone(corpus: Path) -> None:
    """At step 0 the model has used nothing: what residual information it has is the text's."""
    built = experiment(tiny(corpus, task__interleaved=True, evaluation__n_sequences=200))
    chi2, error = built.information.chi2, built.information.chi2_stderr
    assert bool((chi2[0::2].abs() < 4 * error[0::2]).all())
    assert chi2[1] > 10 * error[1]


# --- The run ---


def test_a_run_records_its_text(corpus: Path, run: RunResult) -> None:
    content = corpus.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    recipe = load_recipe(run.folder / "recipe.toml")
    assert recipe.task.text == str(corpus)
    assert recipe.task.text_sha256 == sha256
    facts = read_summary(run.folder)["text"]
    assert (facts["sha256"], facts["characters"], facts["bytes"]) == (sha256, 20_000, 20_000)
    stored = json.loads((run.folder / "run.json").read_text())["recipe"]["task"]
    assert stored["text_sha256"] == sha256
    assert [row["train/step"] for row in read_metrics(run.folder)] == [0, 2, 4, 6]
    assert load_model(run.folder / "model").cfg.d_vocab == 12


def test_a_relative_path_is_kept_from_the_recipes_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(corpus, tmp_path / "mine.txt")
    recipe = tiny(corpus, task__text="mine.txt")
    (tmp_path / "mine.toml").write_text(recipe_to_toml(recipe))
    loaded = load_recipe(tmp_path / "mine.toml")
    assert loaded.task.text == str(tmp_path / "mine.txt")
    monkeypatch.chdir(tmp_path)
    assert recipe.self_contained().task.text == str(tmp_path / "mine.txt")
    assert load_recipe("text").task.text == "topics"


class CrashError(Exception):
    """Ends a run as a crash would."""


def crash_at(step: int) -> Any:
    def crash(progress: Progress) -> None:
        if progress.step == step:
            raise CrashError

    return crash


def test_a_resumed_run_equals_an_uninterrupted_one(
    corpus: Path, run: RunResult, tmp_path: Path, not_drawn: None
) -> None:
    with pytest.raises(CrashError):
        train(tiny(corpus), out=tmp_path / "run", on_progress=crash_at(5))
    resumed = resume(tmp_path / "run")
    assert resumed.start == 4
    for name in ("metrics.jsonl", "model/model.safetensors", "matrices.safetensors"):
        assert (resumed.folder / name).read_bytes() == (run.folder / name).read_bytes()


def test_a_run_is_not_resumed_with_another_text(
    corpus: Path, tmp_path: Path, not_drawn: None
) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(corpus, text)
    with pytest.raises(CrashError):
        train(tiny(text), out=tmp_path / "run", on_progress=crash_at(3))
    hashes = [hashlib.sha256(text.read_bytes()).hexdigest()]
    text.write_text(text_of(20_000).upper())
    hashes.append(hashlib.sha256(text.read_bytes()).hexdigest())
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(RecipeError) as caught:
        resume(tmp_path / "run")
    assert all(sha256 in str(caught.value) for sha256 in hashes)
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows
    recipe = load_recipe(tmp_path / "run" / "recipe.toml")
    recipe = recipe.with_overrides(task__text_sha256=hashes[1])
    with pytest.raises(RunFolderError, match=f"task.text_sha256 was {hashes[0][:20]}"):
        resume(tmp_path / "run", recipe=recipe)
    assert resume(tmp_path / "run", recipe=recipe, allow_change=True).state == "finished"


def test_pictures_page_and_panels_are_drawn(corpus: Path, run: RunResult) -> None:
    assert (run.folder / "figures" / "law.png").stat().st_size > 10_000
    data = RunData.load(run.folder)
    html = render(data)
    for title in ("Gradient and information, lag by lag", "Residual information by lag"):
        assert title in html
    assert "words.txt" in html
    assert str(corpus) not in html.split("Recipe</h2>")[0]
    assert {"panels/law", "panels/law_by_lag", "panels/residual_map"} <= set(draw_panels(data))
    figure = interactive.residual_map(data)
    assert figure.data[0].customdata.shape == (5, 4)
    value = data.history[1]["residual/lag2"]
    assert figure.data[0].customdata[1, 1] == pytest.approx(value, rel=1e-5)


# --- Bad input ---


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"model__kind": "simplified"}, "model.kind: text needs kind standard"),
        ({"graph__preset": "star"}, "graph: text has no graph"),
        ({"task__context": None}, "task.context: needed by text"),
        ({"task__context": 4}, "task.context"),
        ({"task__vocab_size": 1000}, "task.vocab_size: 3 to 256 for text, found 1000"),
        ({"task__repeat_lengths": [3, 5]}, "task.repeat_lengths: belongs to kind repeated_tokens"),
        ({"task__transition": [[1.0]]}, "task.transition: belongs to kind causal_graph"),
        ({"task__text_sha256": "abc"}, "task.text_sha256"),
        ({"task__text": ""}, "task.text"),
        ({"training__target": "posterior"}, "training.target: text only has sampled targets"),
        ({"evaluation__max_lag": 2}, "evaluation.max_lag"),
    ],
)
def test_what_does_not_go_together_is_refused(
    corpus: Path, overrides: dict[str, Any], part: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny(corpus, **overrides)
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["text", "interleaved", "context", "text_sha256"])
def test_options_of_a_text_belong_to_it(name: str) -> None:
    value: Any = {"interleaved": True, "context": 9, "text_sha256": "0" * 64}.get(name, "topics")
    with pytest.raises(RecipeError, match=f"task.{name}: belongs to kind text"):
        load_recipe("markov_chain").with_overrides(**{f"task__{name}": value})


def test_a_text_that_is_too_short_is_refused_before_training(corpus: Path) -> None:
    recipe = tiny(corpus, task__context=300)
    with pytest.raises(RecipeError, match=r"task.text: .*windows of 300 need at least 30,000"):
        check_experiment(recipe)
    check_experiment(recipe, on_this_machine=False)  # another machine has the text


def test_tables_that_do_not_fit_into_memory_are_refused(corpus: Path) -> None:
    recipe = tiny(corpus, task__vocab_size=256, task__context=30, evaluation__max_lag=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mechcausal.training.experiments.memory.available_memory", lambda _: 10 * 2**20
        )
        with pytest.raises(RecipeError, match=r"reduce evaluation.max_lag, task.vocab_size"):
            check_experiment(recipe)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["text", "--text", "{folder}/none.txt"], "task.text: {folder}/none.txt: no such file"),
        (["text", "--text", "{folder}"], "task.text: {folder}: is a folder"),
        (["text", "--text", "{folder}/empty.txt"], "task.text: {folder}/empty.txt: holds no text"),
        (["text", "--text", "{folder}/binary"], "task.text: {folder}/binary: not UTF-8: byte 0"),
        (["text", "--text", "{folder}/short.txt"], "windows of 48 need at least 4,800"),
        (["markov_chain", "--text", "topics"], "task.text: belongs to kind text"),
    ],
)
def test_the_command_refuses_a_bad_text_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], part: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("a few words")
    arguments = [option.format(folder=tmp_path) for option in options]
    out = tmp_path / "run"
    assert main(["train", *arguments, "--out", str(out), "--wandb-mode", "disabled"]) == 2
    errors = capsys.readouterr().err
    assert part.format(folder=tmp_path) in errors
    assert len(errors.splitlines()) == 1
    assert not out.exists()


def test_the_command_trains_on_a_file(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus.parent)
    options = ["--task.context", "10", "--model.d-model", "8", "--training.joint.steps", "1"]
    options += ["--evaluation.n-sequences", "16", "--wandb-mode", "disabled", "--quiet"]
    options += ["--probing.no-enabled"]
    out = tmp_path / "run"
    assert main(["train", "text", "--text", corpus.name, "--out", str(out), *options]) == 0
    assert load_recipe(out / "recipe.toml").task.text == str(corpus)
    assert read_summary(out)["text"]["name"] == str(corpus)

"""Every figure of the paper in miniature: the machinery, not the science."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import wandb

from mechcausal.measures.figures import STEP
from mechcausal.recipes import Recipe, load_recipe
from mechcausal.studies.replication import FIGURES, Replication, replicate, runs
from mechcausal.studies.replication.driver import PAGE_FILE, TABLE_FILE, ReplicationError, _log
from mechcausal.studies.replication.evaluation import losses, miscounted_prediction
from mechcausal.studies.replication.figures import forests, trees
from mechcausal.studies.replication.page import measured, number, publish
from mechcausal.studies.replication.paper_settings import with_paper_settings
from mechcausal.studies.replication.result import Row
from mechcausal.studies.replication.runs import Member, Run, run_all
from mechcausal.support.signals import StopRequested
from mechcausal.support.statistics import mean_and_stderr, sequence_mean
from mechcausal.sweeps.member import run_member
from mechcausal.sweeps.plan import Member as SweepMember
from mechcausal.tasks import SingleParentTask
from tests.oracles import seeded
from tests.small_recipes import without_figures


def miniature(recipe: Recipe) -> Recipe:
    """A recipe of the same figure that takes a second."""
    changes = {
        "training__batch_size": 16,
        "evaluation__n_sequences": 16,
        "evaluation__bayes_draws": 4,
        "evaluation__theory_priors": 20,
        "probing__every": 4,
        "probing__dense": 0,
        "probing__images": 0,
        "probing__report": False,
    }
    stages = ("joint",) if recipe.training.algorithm == "joint" else ("stage1", "stage2")
    for stage in stages:
        if getattr(recipe.training, stage).steps:
            changes[f"training__{stage}__steps"] = 4
    if recipe.graph.sequence_length is not None:
        changes["graph__sequence_length"] = 8
    return recipe.with_overrides(**changes)


def train_here(members: Sequence[SweepMember], *, workers: int | None, on_end: Any) -> None:
    """Train members in this process."""
    for member in members:
        on_end(member, run_member(member.recipe, member.folder))


def quickly(
    folder: Path, figures: Sequence[str] = (), *, processes: bool = False, **options: Any
) -> Replication:
    """A quick replication of miniatures, with two forests."""
    options = {"workers": 2, "adjust": miniature, "quick": True, **options}
    with without_figures() as monkeypatch:
        monkeypatch.setattr(forests, "N_GRAPHS_QUICK", 2)
        if not processes:
            monkeypatch.setattr(runs, "train_members", train_here)
        return replicate(figures, folder=folder, wandb_mode="disabled", **options)


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[str, str]]:
    return []


@pytest.fixture(scope="module")
def everything(
    tmp_path_factory: pytest.TempPathFactory, outcomes: list[tuple[str, str]]
) -> Replication:
    return quickly(
        tmp_path_factory.mktemp("replication") / "all",
        on_done=lambda name, outcome: outcomes.append((name, outcome)),
    )


def test_every_figure_has_rows_and_pictures(
    everything: Replication, outcomes: list[tuple[str, str]]
) -> None:
    assert everything.failed == {}
    for figure in (name for name, figure in FIGURES.items() if figure.group != "tasks"):
        assert [row for row in everything.rows if row.figure == figure]
        pictures = [path for name, path in everything.pictures.items() if name.startswith(figure)]
        assert pictures
        for path in pictures:
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    trained = [name for name, outcome in outcomes if outcome == "trained"]
    assert len(trained) == len(set(trained))


def test_tasks_beyond_the_paper_have_rows_pictures_and_a_page(tmp_path: Path) -> None:
    replication = quickly(tmp_path, ["tasks"])
    assert replication.failed == {}
    assert replication.warnings == []
    beyond = [name for name, figure in FIGURES.items() if figure.group == "tasks"]
    assert list(dict.fromkeys(row.figure for row in replication.rows)) == beyond
    assert {row.figure for row in replication.rows if row.holds is False} == set(beyond)
    assert set(replication.pictures) == set(beyond)
    page = (tmp_path / PAGE_FILE).read_text(encoding="utf-8")
    assert page.startswith("# Tasks beyond the paper\n")
    assert "Made by `mechcausal replicate tasks --quick`" in page


def test_half_of_a_figure_is_used_when_it_stays_below() -> None:
    values = {0: 9.0, 4: 5.0, 20: 4.0, 30: 1.0, 40: 3.0, 50: 1.9, 60: 0.5}
    history = [{STEP: step, "tree/residual_pair_2": value} for step, value in values.items()]
    assert trees._halved(history, "tree/residual_pair_2") == 50
    assert trees._halved(history[:3], "tree/residual_pair_2") is None
    assert trees._halved(history, "tree/residual_pair_3") is None


def test_untrained_models_do_not_pass_for_the_paper(everything: Replication) -> None:
    assert not everything.holds
    judged = [row.figure for row in everything.rows if row.holds is False]
    assert {"figure2", "figure5", "figure7", "figure8", "figure9", "theory"} <= set(judged)


def test_table_and_pages_agree(everything: Replication, tmp_path: Path) -> None:
    stored = json.loads((everything.folder / TABLE_FILE).read_text(encoding="utf-8"))
    assert stored == [row.as_json() for row in everything.rows]
    keys = ["figure", "quantity", "paper", "ours", "stderr", "theory", "holds"]
    assert all(list(row) == keys for row in stored)
    publish(everything, tmp_path / "docs" / "published.md")
    for page, pictures in (
        (everything.folder / PAGE_FILE, "figures"),
        (tmp_path / "docs" / "published.md", "published"),
    ):
        text = page.read_text(encoding="utf-8")
        assert "Made by `mechcausal replicate all --quick`" in text
        assert text.startswith("# The paper, figure by figure\n")
        assert all(f"| {row.quantity} |" in text for row in everything.rows)
        for path in everything.pictures.values():
            assert f"({pictures}/{path.name})" in text
            assert (page.parent / pictures / path.name).read_bytes() == path.read_bytes()


def test_runs_are_found_again_and_a_picture_that_fails_is_a_warning(
    everything: Replication, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such colour")

    monkeypatch.setattr("mechcausal.studies.replication.driver._draw", broken)
    progress: list[tuple[str, str]] = []
    again = quickly(
        everything.folder,
        ["figure6", "figure2"],
        on_done=lambda name, outcome: progress.append((name, outcome)),
    )
    assert {outcome for _, outcome in progress} == {"reused", "measured"}
    assert again.rows == [r for r in everything.rows if r.figure in ("figure2", "figure6")]
    assert not again.failed
    assert again.warnings == [
        f"{name}: not drawn: ValueError: no such colour" for name in ("figure2", "figure6")
    ]
    page = (everything.folder / PAGE_FILE).read_text(encoding="utf-8")
    assert "Made by `mechcausal replicate figure6 figure2 --quick`" in page


def run_of(folder: Path, **changes: object) -> Run:
    """The run of one member, trained only if the folder has none of this recipe."""
    member = Member("figure2_manual", changes={"training__joint__steps": 2000}, label="short")
    with without_figures() as monkeypatch:
        monkeypatch.setattr(runs, "train_members", train_here)
        by_name, failed = run_all(
            [member],
            folder,
            workers=1,
            adjust=lambda recipe: miniature(recipe).with_overrides(
                wandb__mode="disabled", **changes
            ),
            on_done=lambda name, outcome: None,
        )
    assert failed == {}
    return by_name[member.name]


def test_a_run_of_another_recipe_is_left_alone(everything: Replication) -> None:
    other = everything.folder / "figure2_manual-short-seed0"
    before = {path: path.read_bytes() for path in other.glob("*.json*")}
    changed = run_of(everything.folder, training__joint__lr=0.5)
    assert changed.folder == everything.folder / "figure2_manual-short-seed0-2"
    assert {path: path.read_bytes() for path in other.glob("*.json*")} == before


def test_losses_of_fresh_sequences_name_the_predictors(everything: Replication) -> None:
    run = run_of(everything.folder)
    assert run.folder == everything.folder / "figure2_manual-short-seed0"
    values = losses(run, 20)
    assert set(values) == {"model", "bayes", "miscounted", "counted"}
    excess, stderr = sequence_mean(values["miscounted"] - values["bayes"])
    assert excess > -4 * stderr


def test_a_failed_run_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    def diverges(recipe: Recipe) -> Recipe:
        small = miniature(recipe)
        wild = {"training__joint__lr": 1e9, "training__epsilon": 0.0}
        return small.with_overrides(**wild) if recipe.seed == 1 else small

    outcomes: dict[str, str] = {}
    replication = quickly(
        tmp_path, ["figure9"], processes=True, adjust=diverges, on_done=outcomes.__setitem__
    )
    assert outcomes["figure9_forest-seed0"] == "trained"
    assert "lr 1e+09" in replication.failed["figure9_forest-seed1"]
    assert "a run that it needs failed" in replication.failed["figure9"]
    assert not replication.holds
    assert replication.rows == []
    assert "figure9_forest-seed1" in (tmp_path / PAGE_FILE).read_text(encoding="utf-8")


def test_a_stopped_training_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "train_members", lambda *_, **__: signal.SIGTERM)
    with pytest.raises(StopRequested, match="finished runs are kept") as caught:
        quickly(tmp_path, ["figure9"], processes=True)
    assert caught.value.number == signal.SIGTERM
    assert not (tmp_path / TABLE_FILE).exists()


@pytest.mark.parametrize(
    ("figure", "recipe", "sequences", "optimizer", "lr", "schedule", "weight_decay"),
    [
        ("figure2", "figure2_icl", 2**27, "sgd", 1.0, "cosine", 0.0),
        ("figure7", "figure5_two_parents", 2**26, "adamw", 0.01, "cosine", 1e-4),
        ("figure8", "figure8_mlp", 2**22, "adamw", 0.01, "cosine", 2e-4),
        ("figure9", "figure9_forest", 2**24, "sgd", 1.0, "constant", 0.0),
    ],
)
def test_the_papers_settings(
    figure: str,
    recipe: str,
    sequences: int,
    optimizer: str,
    lr: float,
    schedule: str,
    weight_decay: float,
) -> None:
    members = with_paper_settings(FIGURES[figure].members(False))
    built = [member.build() for member in members if member.recipe == recipe]
    assert [r.seed for r in built] == list(range(20 if figure == "figure9" else 1))
    for settings in built:
        stage = settings.training.joint
        assert (settings.training.batch_size, settings.n_training_sequences) == (1024, sequences)
        assert (stage.optimizer, stage.lr, stage.schedule) == (optimizer, lr, schedule)
        assert (stage.weight_decay, stage.warmup) == (weight_decay, 0)


def test_one_recipe_can_be_run_with_the_papers_settings(tmp_path: Path) -> None:
    trained: list[str] = []
    replication = quickly(
        tmp_path,
        ["figure2", "figure6"],
        quick=False,
        paper_settings=True,
        recipes=["figure2_chain"],
        on_done=lambda name, outcome: trained.append(name) if outcome == "trained" else None,
    )
    assert trained == ["figure2_chain-paper-seed0"]
    assert {row.figure for row in replication.rows} == {"figure2", "figure6"}
    page = (tmp_path / PAGE_FILE).read_text(encoding="utf-8")
    command = "mechcausal replicate figure2 figure6 --paper-settings --recipes figure2_chain"
    assert f"Made by `{command}`" in page


@pytest.mark.parametrize(
    ("figures", "options", "message"),
    [
        (["ood"], {"paper_settings": True}, "ood: the paper has no settings for it"),
        (["figure2"], {"recipes": ["figure9_forest"]}, "--recipes: figure9_forest: these figures"),
        (["figure2"], {"paper_settings": True, "quick": True}, "exclude each other"),
    ],
)
def test_settings_that_a_figure_does_not_have_are_refused(
    tmp_path: Path, figures: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ReplicationError, match=message):
        replicate(figures, folder=tmp_path / "new", wandb_mode="disabled", **options)
    assert not (tmp_path / "new").exists()


def test_an_unknown_figure_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ReplicationError, match=r"figure3: no such figure; allowed: figure2,"):
        replicate(["figure3"], folder=tmp_path / "new", wandb_mode="disabled")
    assert not (tmp_path / "new").exists()


def test_the_authors_count_treats_roots_as_children_of_the_last_position() -> None:
    recipe = load_recipe("manual")
    task = SingleParentTask(recipe.build_graph(), recipe.build_prior())
    tokens = task.sample(200, generator=seeded()).tokens
    predictions = miscounted_prediction(task, tokens)
    parents = task.graph.parent_array()
    for sequence, prediction in zip(tokens.tolist(), predictions, strict=True):
        counts = [0.1] * 3
        for position, parent in enumerate(parents):
            if sequence[:-1][parent] == sequence[-1]:  # -1 is the last position of the graph
                counts[sequence[position]] += 1
        expected = [count / sum(counts) for count in counts]
        assert prediction.tolist() == pytest.approx(expected)


def test_rows_and_numbers() -> None:
    mean, stderr = mean_and_stderr([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert stderr == pytest.approx(1 / 3**0.5)
    row = Row("figure9", "x", float("nan"), paper=0.5)
    assert row.as_json()["ours"] is None
    assert measured(Row("figure9", "x", 0.5, 0.01, holds=True)) == "0.5 ± 0.01"
    assert measured(Row("figure9", "x", None, holds=False)) == "not found"
    assert [number(x) for x in (12345.6, 0.00012, float("nan"))] == ["12,346", "0.00012", ""]


@pytest.mark.parametrize("step", ["log", "finish"])
def test_wandb_that_fails_on_the_way_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise wandb.errors.CommError("no connection")

    monkeypatch.setattr(wandb.Run, step, fail)
    replication = Replication([], {}, {}, tmp_path)
    _log(replication, "offline", "group")
    (warning,) = replication.warnings
    assert "no connection" in warning
    assert warning.endswith(f"the table is in {TABLE_FILE}")

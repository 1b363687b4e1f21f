"""What W&B shows of a run that ended: the same numbers, beside the last row, never in the way."""

import json
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from mechcausal import plot
from mechcausal.measures.figures import STEP
from mechcausal.pictures import wandb_panels
from mechcausal.pictures.wandb_panels import draw_panels, edge_table, head_table, portable
from mechcausal.recipes import Recipe
from mechcausal.records.run_data import RunData
from mechcausal.records.run_folder import read_metrics, read_summary
from mechcausal.records.tracking import RunRecord
from mechcausal.records.wandb_fragments import fragments, wandb_steps
from mechcausal.support.signals import StopSignal
from mechcausal.training.closing_pictures import ClosingPictures
from mechcausal.training.resuming import resume
from mechcausal.training.run import Progress, RunResult, train
from tests.records.test_tracking import inspect, kind
from tests.run_folders import (
    heads_recipe,
    recipe_of,
    run_of,
    tiny_recipe,
    two_parents_recipe,
    write_run,
)

# --- What is drawn ---


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            recipe_of(),
            {"attention", "graph", "first_gradient_against_theory", "formation", "edges"},
        ),
        (two_parents_recipe(), {"attention", "graph", "first_gradient_against_theory", "edges"}),
        (heads_recipe(), {"heads", "formation", "head_scores", "loss"}),
    ],
)
def test_every_kind_of_run_has_its_panels(recipe: Recipe, expected: set[str]) -> None:
    panels = draw_panels(run_of(recipe))
    assert {f"panels/{name}" for name in expected} <= set(panels)
    assert ("panels/attention" in panels) != ("panels/heads" in panels)


def test_the_gradient_is_that_of_the_first_step_that_has_one() -> None:
    run = run_of()
    first, second = run.steps[:2]
    empty = {**run.frames[first], "gradient/pattern": np.zeros((8, 8), dtype=np.float32)}
    panel = draw_panels(replace(run, frames={**run.frames, first: empty}))["panels/first_gradient"]
    assert isinstance(panel, go.Figure)
    drawn = np.array(panel.data[0].z, dtype=np.float64)
    expected = run.frames[second]["gradient/pattern"]
    rows, columns = np.tril_indices(8)
    assert drawn[rows, columns] == pytest.approx(expected[rows, columns], rel=1e-4)


def test_a_run_without_matrices_has_its_curves() -> None:
    panels = draw_panels(replace(run_of(), frames={}))
    assert set(panels) == {
        f"panels/{name}" for name in ("loss", "recovery", "correlations", "formation")
    }
    assert draw_panels(replace(run_of(), frames={}, history=())) == {}


def test_the_page_is_a_panel_where_there_is_one(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert "panels/page" not in draw_panels(run_of(), page=page)
    page.write_text("<p>x</p>")
    assert draw_panels(run_of(), page=page)["panels/page"] == page


@pytest.mark.parametrize("draw", [plot.attention, plot.gradient_scatter, plot.loss])
def test_a_portable_figure_holds_the_same_numbers_as_plain_lists(draw: Any) -> None:
    figure = draw(run_of())
    plain = json.loads(json.dumps(portable(figure).to_plotly_json(), allow_nan=False, default=str))
    assert "bdata" not in json.dumps(plain)
    assert len(plain["data"]) == len(figure.data)
    for trace, plain_trace in zip(figure.data, plain["data"], strict=True):
        for name in ("x", "y", "z"):
            if name in trace and trace[name] is not None:
                numbers = np.array(plain_trace[name], dtype=float)
                assert numbers == pytest.approx(
                    np.array(trace[name], dtype=float), rel=1e-4, nan_ok=True
                )


@pytest.mark.parametrize("recipe", [recipe_of(), two_parents_recipe()])
def test_the_table_of_edges_holds_what_the_matrices_say(recipe: Recipe) -> None:
    run = run_of(recipe)
    table = edge_table(run)
    assert tuple(table.columns) == wandb_panels.EDGE_COLUMNS
    edges = {(int(r), int(p)) for r, p in zip(*np.nonzero(run.truth), strict=True)}
    assert len(table) == len(edges) * len(run.steps)
    for entry in table.to_dict("records"):
        step, row, parent = (int(entry[name]) for name in ("step", "row", "parent"))
        assert (row, parent) in edges
        matrices = run.frames[step]
        length = len(run.truth)
        attention = matrices["attention/layer0"].reshape(-1, length, length)
        gradient = matrices["gradient/pattern"].reshape(-1, length, length).sum(0)
        assert entry["attention"] == attention[:, row, parent].max()
        order = sorted(range(row + 1), key=lambda key: -gradient[row, key])
        assert entry["gradient rank"] == 1 + order.index(parent)
        serves_query = row >= run.n_graph_rows
        for name in ("g", "chi2"):
            known = f"theory/{name}" in run.references and not serves_query
            assert np.isnan(entry[name]) != known
            if known:
                assert entry[name] == run.references[f"theory/{name}"][row, parent]


def test_tables_leave_out_steps_before_they_grow_too_large() -> None:
    run = run_of(n_frames=30)
    n_edges = int(run.truth.sum())
    table = edge_table(run, most_rows=5 * n_edges)
    steps = sorted(set(table["step"]))
    assert (len(steps), steps[0], steps[-1]) == (5, 0, 40)
    heads = head_table(run_of(heads_recipe(), n_frames=30), most_rows=8)
    assert len(heads) == 8
    assert set(heads.columns) == {
        *("step", "layer", "head"),
        *("prefix matching", "previous token", "duplicate token"),
    }


def test_a_gradient_of_zero_ranks_nothing() -> None:
    run = run_of(n_frames=1)
    step = run.steps[0]
    empty = {**run.frames[step], "gradient/pattern": np.zeros_like(run.truth)}
    assert edge_table(replace(run, frames={step: empty}))["gradient rank"].isna().all()


# --- What W&B keeps ---


def history(folder: Path) -> list[dict[str, Any]]:
    folders = fragments(folder, json.loads((folder / "run.json").read_text())["wandb_id"])
    return [row["item"] for fragment in folders for row in kind(inspect(fragment), "history")]


def media(result: RunResult, row: Mapping[str, Any], name: str) -> Path:
    assert result.wandb_folder is not None
    return result.wandb_folder / "files" / str(row[f"panels/{name}.path"])


def test_the_last_row_has_the_panels_and_no_row_is_added(finished_run: RunResult) -> None:
    assert finished_run.warnings == []
    rows = history(finished_run.folder)
    assert [row[STEP] for row in rows] == [row[STEP] for row in read_metrics(finished_run.folder)]
    kinds = {
        key.removesuffix("._type"): value
        for key, value in rows[-1].items()
        if key.startswith("panels/") and key.endswith("._type")
    }
    assert kinds["panels/attention"] == "plotly-file"
    assert kinds["panels/edges"] == "table-file"
    assert kinds["panels/page"] == "html-file"
    assert not any("panels/" in key for row in rows[:-1] for key in row)
    assert rows[-1]["loss/eval"] == read_metrics(finished_run.folder)[-1]["loss/eval"]


def test_panels_are_the_run(finished_run: RunResult) -> None:
    row = history(finished_run.folder)[-1]
    page = media(finished_run, row, "page").read_bytes()
    assert page == (finished_run.folder / "report.html").read_bytes()
    assert b"finished" in page
    table = json.loads(media(finished_run, row, "edges").read_text())
    expected = edge_table(RunData.load(finished_run.folder))
    assert table["columns"] == list(expected.columns)
    values = np.array(table["data"], dtype=float)
    assert values == pytest.approx(expected.to_numpy(dtype=float), nan_ok=True)
    figure = json.loads(media(finished_run, row, "attention").read_text())
    assert go.Figure(figure).data


@pytest.mark.soak
def test_panels_that_wandb_refuses_cost_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("no plots today\nnor tomorrow")

    monkeypatch.setattr(wandb, "Plotly", refuse)
    result = train(tiny_recipe(), out=tmp_path / "run")
    assert result.state == "finished"
    assert "W&B did not take panels/attention: no plots today" in result.warnings
    assert all("W&B did not take panels/" in warning for warning in result.warnings)
    rows = history(result.folder)
    assert [row[STEP] for row in rows] == [row[STEP] for row in read_metrics(result.folder)]
    assert "panels/edges._type" in rows[-1]
    assert read_summary(result.folder)["warnings"] == result.warnings
    assert "no plots today" in (result.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_interrupted_run_has_none_and_the_resumed_one_has_them(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 15:
            signal.raise_signal(signal.SIGTERM)

    first = train(tiny_recipe(), out=tmp_path / "run", on_progress=stop)
    assert first.state == "interrupted"
    assert not any("panels/" in key for row in history(first.folder) for key in row)
    assert not (first.folder / "report.html").exists()
    second = resume(first.folder)
    assert second.warnings == []
    rows = history(second.folder)
    assert [row[STEP] for row in rows] == [row[STEP] for row in read_metrics(first.folder)]
    assert "panels/page._type" in rows[-1]


@pytest.mark.soak
def test_a_run_killed_before_wandb_got_its_last_row_gives_it_with_the_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(*arguments: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("mechcausal.training.recorded_run.ClosingPictures.draw_page", killed)
        with pytest.raises(KilledError):
            train(tiny_recipe(), out=tmp_path / "run")
    folder = tmp_path / "run"
    assert not (folder / "summary.json").exists()
    process = json.loads((folder / "run.json").read_text())
    import wandb

    wandb.teardown()
    steps = [int(row[STEP] or 0) for row in read_metrics(folder)]
    (fragment,) = fragments(folder, process["wandb_id"])
    assert wandb_steps(fragment) == steps[:-1]
    result = resume(folder)
    assert result.warnings == []
    rows = history(folder)
    assert [row[STEP] for row in rows] == steps
    assert "panels/page._type" in rows[-1]


def test_what_is_wanted_is_drawn_and_what_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of()
    folder = write_run(tmp_path / "run", run_of(recipe))
    (folder / "report.html").touch()
    record, stop = RunRecord(folder, recipe, "offline"), StopSignal()
    assert {"panels/edges", "panels/page"} <= set(
        ClosingPictures(record, recipe).draw_panels({}, stop)
    )
    panels = ClosingPictures(record, recipe_of(wandb__page=False)).draw_panels({}, stop)
    assert "panels/edges" in panels
    assert "panels/page" not in panels
    assert ClosingPictures(record, recipe_of(wandb__panels=False)).draw_panels({}, stop) == {}
    assert record.warnings == []
    stop.received = signal.SIGTERM
    assert ClosingPictures(record, recipe).draw_panels({}, stop) == {}
    stop.received = None

    def fail(run: RunData, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(wandb_panels, "draw_panels", fail)
    assert ClosingPictures(record, recipe).draw_panels({}, stop) == {}
    assert [w.removeprefix("the panels for W&B ") for w in record.warnings] == [
        "were left out: the process was asked to stop",
        "could not be drawn: MemoryError",
    ]
    record.finish({}, "finished")

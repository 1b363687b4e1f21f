"""Runs read back: finished, unfinished, torn, broken, and folders that are none."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from mechcausal.pictures.pages import write_page, write_report
from mechcausal.recipes.stages import stages
from mechcausal.records import matrices as matrix_files
from mechcausal.records.run_data import RunData, RunDataError
from mechcausal.records.run_folder import find_runs
from tests.run_folders import heads_recipe, recipe_of, run_of, two_parents_recipe, write_run


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("recipe", [recipe_of(), two_parents_recipe(), heads_recipe()])
def test_a_run_is_read_back(recipe, finished: bool, tmp_path: Path) -> None:
    written = run_of(recipe)
    read = RunData.load(write_run(tmp_path / "some", written, finished=finished))
    assert read.name == "some"
    assert read.recipe == recipe
    assert read.kind == recipe.task.kind
    assert read.history == written.history
    assert read.state == ("finished" if finished else "unfinished")
    assert read.steps == written.steps
    assert read.formation_step == written.formation_step == 27
    assert not read.notes
    for step, matrices in written.frames.items():
        assert read.frames[step].keys() == matrices.keys()
        for name, matrix in matrices.items():
            assert np.array_equal(read.frames[step][name], matrix)
    assert read.references.keys() == written.references.keys()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path, run_of(), finished=False)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    run = RunData.load(folder)
    assert len(run.history) == 3
    assert "torn" in run.notes[0]


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "1" * 400])
def test_a_figure_that_is_no_finite_number_is_none(number: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, run_of())
    path = folder / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    changed = re.sub(r'"loss/train": [^,}]+', f'"loss/train": {number}', first)
    assert changed != first
    path.write_text("\n".join([changed, *rest]) + "\n")
    run = RunData.load(folder)
    assert run.row(0)["loss/train"] is None
    write_report(folder)


def test_a_matrix_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path, run_of(), finished=False)
    newest = folder / "matrices" / "00000040.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    run = RunData.load(folder)
    assert run.steps == (0, 13, 27)
    assert "00000040" in run.notes[0]


def broken(folder: Path, name: str, content: bytes) -> Path:
    (write_run(folder, run_of()) / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.toml", b"x = [", "not valid TOML"),
        ("summary.json", b"{", "not valid JSON"),
        ("summary.json", b"[]", "found list"),
        ("summary.json", b'{"a":' * 10_000, "nested too deep"),
        ("summary.json", b'{"a":' * 500 + b"1" + b"}" * 500, "nested too deep"),
        ("run.json", b"[" * 10_000, "nested too deep"),
        ("run.json", b'{"a":' * 500 + b"1" + b"}" * 500, "nested too deep"),
        ("summary.json", b'{"train/steps": "x"}', "train/steps is x: a whole number"),
        ("summary.json", b'{"train/steps": true}', "train/steps is True: a whole number"),
        ("summary.json", b'{"warnings": 5}', "warnings is 5: a list"),
        ("summary.json", b'{"state": "odd"}', "state is odd: finished, interrupted or failed"),
        ("summary.json", b'{"first": []}', r"first is \[\]: an object"),
        ("metrics.jsonl", b'{"train/step": true}\n', "line 1"),
        ("metrics.jsonl", b'{"train/step": -1}\n', "line 1"),
        ("metrics.jsonl", b'{"train/step": ' + b"1" * 400 + b"}\n", "line 1"),
        ("matrices.safetensors", b"nothing", "not a readable safetensors file"),
        ("metrics.jsonl", b'{"train/step": 0}\n{"loss": 1}\n{"train/step": 3}\n', "line 2"),
    ],
)
def test_a_broken_file_is_named_in_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RunDataError, match=message) as error:
        RunData.load(broken(tmp_path / "run", name, content))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_run_that_finishes_while_it_is_read_is_read(tmp_path: Path) -> None:
    """Its last act is to gather the matrices of single steps in one file."""
    run = run_of()
    folder = write_run(tmp_path / "run", run, finished=False)
    loaded = RunData.load(folder)
    shutil.rmtree(folder / "matrices")
    with pytest.raises(RunDataError, match=r"matrices/00000000.safetensors: not a readable"):
        loaded.frame(0)
    write_run(folder, run)
    assert loaded.steps == run.steps
    for step in run.steps:
        for name, matrix in run.frames[step].items():
            assert np.array_equal(loaded.frame(step)[1][name], matrix)
    write_page(loaded, tmp_path / "page.html")


@pytest.mark.parametrize("after", range(6))
def test_a_run_that_finishes_while_its_files_are_looked_for_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    run = run_of()
    folder = write_run(tmp_path / "run", run, finished=False)
    opened = 0

    def finishes(path: Path, **options: Any) -> Any:
        nonlocal opened
        if opened == after:
            write_run(folder, run)
            shutil.rmtree(folder / "matrices")
        opened += 1
        return safe_open(path, **options)

    monkeypatch.setattr(matrix_files, "safe_open", finishes)
    loaded = RunData.load(folder)
    assert opened > after
    assert (loaded.steps, loaded.notes) == (run.steps, ())
    assert set(loaded.references) == set(run.references)
    assert all(set(loaded.frame(step)[1]) == set(run.frames[step]) for step in run.steps)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunDataError, match="no such folder"):
        RunData.load(tmp_path / "absent")
    with pytest.raises(RunDataError, match=r"no recipe.toml and no metrics.jsonl"):
        RunData.load(tmp_path)
    assert find_runs(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(RunDataError, match="not a folder"):
        RunData.load(tmp_path / "file")


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a/2", "a/1"):
        write_run(tmp_path / name, run_of())
    assert [str(p.relative_to(tmp_path)) for p in find_runs(tmp_path)] == ["a/1", "a/2", "b"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of(),
        recipe_of(training__stage1__steps=0),
        recipe_of(training__stage2__steps=0),
        two_parents_recipe(),
    ],
)
def test_stages_start_where_training_starts_them(recipe) -> None:
    run = run_of(recipe)
    assert run.stage_starts == {stage.name: stage.start for stage in stages(recipe)}
    assert run.n_steps == sum(stage.section.steps for stage in stages(recipe))


def test_the_truth_has_the_parents_in_their_childs_row() -> None:
    assert np.argwhere(run_of().truth).tolist() == [[i, i - 1] for i in range(1, 7)]
    run = run_of(two_parents_recipe(6))
    rows = {row: np.flatnonzero(run.truth[row]).tolist() for row in range(6)}
    assert rows[4] == [1, 3]
    assert rows[5] == list(run.graph.query_parents or ())  # the row that serves the query
    assert run.n_graph_rows == 5


def test_a_step_that_was_not_kept_is_refused() -> None:
    with pytest.raises(RunDataError, match="no matrices of step 7 were kept; there are 4 steps"):
        run_of().frame(7)
    with pytest.raises(RunDataError, match="no matrices were kept"):
        run_of(n_frames=0).frame()


def test_an_edge_list_is_found_from_the_folder_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "edges.txt").write_text("0 1\n1 2\n")
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(
        graph__preset="edge_list", graph__edge_list="lists/edges.txt", graph__sequence_length=None
    )
    folder = write_run(tmp_path / "run", run_of(recipe))
    assert RunData.load(folder).graph.parents == ((), (0,), (1,))
    monkeypatch.chdir(folder)
    with pytest.raises(RunDataError, match=r"edges\.txt"):
        _ = RunData.load(folder).graph

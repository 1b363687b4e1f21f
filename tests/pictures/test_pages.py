"""Pages: what they hold is what the run holds, whatever its strings say, and they stay small."""

import base64
import errno
import json
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechcausal.cli.main import main
from mechcausal.cli.parsing import parse
from mechcausal.cli.train import Train
from mechcausal.pictures.interactive.comparison import groups
from mechcausal.pictures.pages import write_comparison, write_report
from mechcausal.pictures.pages.captions import frame_captions
from mechcausal.pictures.pages.comparison_page import differing_keys, group_labels
from mechcausal.pictures.pages.packing import LEVELS, MISSING, pack_frames, quantise
from mechcausal.pictures.pages.reproduce import reproduce_command
from mechcausal.pictures.pages.run_page import render
from mechcausal.recipes import Recipe, load_recipe, parse_recipe, recipe_to_dict
from mechcausal.records.run_data import RunData
from mechcausal.records.tracking import RunRecord
from mechcausal.support.signals import StopSignal
from mechcausal.training.closing_pictures import ClosingPictures
from mechcausal.training.run import RunResult
from tests.run_folders import (
    heads_recipe,
    history_of,
    matrices_of,
    recipe_of,
    run_of,
    two_parents_recipe,
    write_run,
)

MARKUP = "<img src=x onerror=alert(1)></script><b>&amp;\u2028"


def unpack(packed: dict[str, Any], frame: int) -> np.ndarray:
    """Restore one matrix of one step from its entry in `pack_frames(...)["matrices"]`."""
    shape = tuple(packed["shape"])
    codes = np.frombuffer(base64.b64decode(packed["data"]), dtype="<u2")
    codes = codes.reshape(len(packed["low"]), -1)[frame]
    low, high = packed["low"][frame], packed["high"][frame]
    values = np.where(codes == MISSING, np.nan, low + (high - low) * codes / (LEVELS))
    if not packed["triangle"]:
        return values.reshape(shape)
    matrix = np.zeros(shape)
    rows, columns = np.tril_indices(shape[-1])
    matrix[..., rows, columns] = values.reshape(*shape[:-2], -1)
    return matrix


class Page(HTMLParser):
    """A page's elements, its visible text and its data."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._data = ""
        self._stack: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.data: dict[str, Any] = json.loads(self._data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self._stack.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._stack and self._stack.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, attributes = self._stack[-1] if self._stack else ("", {})
        if attributes.get("id") == "data":
            self._data += data
        elif tag not in ("script", "style"):
            self.text += data


@pytest.mark.parametrize("recipe", [recipe_of(), two_parents_recipe(), heads_recipe()])
def test_the_page_holds_the_figures_and_matrices_of_the_run_with_words(
    recipe: Recipe, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", run_of(recipe))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    history = page.data["history"]
    assert history["steps"] == [row["train/step"] for row in rows]
    for key, column in history["columns"].items():
        for row, value in zip(rows, column, strict=True):
            expected = row.get(key)
            assert value == (expected if expected is None else pytest.approx(expected, rel=5e-6))
    assert {key for row in rows for key in row} == {*history["columns"], "train/step"}
    graph = recipe.task.kind == "causal_graph"
    assert ("above the hand-built model, nats" in page.text) == graph

    run = RunData.load(folder)
    frames = page.data["frames"]
    assert frames["steps"] == list(run.steps)
    names = {name for name in run.frame()[1] if name != "gradient/scores"}
    assert set(frames["matrices"]) == names
    for name in names:
        for frame, step in enumerate(run.steps):
            matrix = run.frames[step][name]
            unpacked = unpack(frames["matrices"][name], frame).reshape(matrix.shape)
            assert np.abs(unpacked - matrix).max() <= np.ptp(matrix) / LEVELS / 2 + 1e-7

    # Every picture has words for every step.
    plots = [a for tag, a in page.attributes if tag == "div" and "plot" in str(a.get("class"))]
    assert len(plots) == len(page.data["figures"])
    assert all(plot["role"] == "img" and len(str(plot["aria-label"])) > 30 for plot in plots)
    panels = {a["data-panel"] for tag, a in page.attributes if tag == "figure"}
    assert set(page.data["captions"]) == panels
    for sentences in page.data["captions"].values():
        assert len(sentences) == len(page.data["steps"])
        assert all(sentences)


def test_a_trained_run_has_its_page_unless_the_recipe_wants_none(
    finished_run: RunResult, tmp_path: Path
) -> None:
    page = Page((finished_run.folder / "report.html").read_text(encoding="utf-8"))
    panels = [a["data-panel"] for tag, a in page.attributes if tag == "figure"]
    assert panels[:5] == ["attention", "graph", "gradient", "scatter", "examples"]
    recipe = recipe_of(probing__report=False)
    record = RunRecord(write_run(tmp_path / "run", run_of(recipe)), recipe, "disabled")
    ClosingPictures(record, recipe).draw_page({})
    record.finish({}, "finished")
    assert record.warnings == []
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_page_that_cannot_be_drawn_is_a_warning(tmp_path: Path) -> None:
    recipe = recipe_of()
    record = RunRecord(write_run(tmp_path / "run", run_of(recipe)), recipe, "disabled")
    (tmp_path / "run" / "report.html").mkdir()
    ClosingPictures(record, recipe).draw_page({})
    (warning,) = record.warnings
    assert warning.startswith("report.html could not be drawn: ")
    assert "\n" not in warning
    (tmp_path / "run" / "recipe.toml").write_text("odd")
    ClosingPictures(record, recipe).draw_page({})
    assert record.warnings[1].startswith("report.html could not be drawn: ")
    record.finish({}, "finished")


def test_words_say_the_numbers() -> None:
    attention = np.tril(np.full((8, 8), 0.01))
    for row in range(1, 8):
        attention[row, row - 1] = 0.8
    attention[3] = 0.0
    attention[3, 0] = 1.0  # the wrong one
    run = replace(run_of(), frames={0: {"attention/layer0": attention}})
    words = frame_captions(run, 0)
    assert "in 5 of 6 rows" in words["attention"]
    assert "0.667 on average, the weakest 0" in words["attention"]
    assert words["graph"].startswith("5 of 6 true edges carry at least half")
    assert "; 1 other pairs carry 0.1 or more" in words["graph"]


def test_strings_of_recipes_show_as_text(tmp_path: Path) -> None:
    recipe = recipe_of(
        wandb__project=MARKUP, wandb__group=MARKUP, wandb__tags=[MARKUP, "<script>1</script>"]
    )
    run = replace(run_of(recipe, name=MARKUP), facts={MARKUP: {"id": MARKUP}})
    run = replace(run, summary={"state": MARKUP, "warnings": [MARKUP]}, notes=(MARKUP,))
    plain = Page(render(run_of()))
    marked = Page(render(run))
    assert "img" not in marked.tags
    assert marked.tags.count("script") == plain.tags.count("script") == 3
    assert marked.text.count(MARKUP) >= 6
    assert marked.data["run"] == MARKUP

    other = replace(run_of(recipe_of(task__alpha=0.3)), name=f"{MARKUP}/2")
    path = write_comparison([run, other], tmp_path / "all.html", notes=[MARKUP])
    page = Page(path.read_text(encoding="utf-8"))
    assert "img" not in page.tags
    assert page.text.count(MARKUP) >= 3


def test_matrices_survive_packing() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=1000) * 1e-6
    codes, low, high = quantise(values)
    assert (low, high) == (values.min(), values.max())
    assert codes.max() == LEVELS
    for same in (np.zeros(5), np.full(5, 3.0)):
        codes, low, high = quantise(same)
        assert (low, high) == (same[0], same[0])
        assert not codes.any()
    broken = values.copy()
    broken[3] = np.nan
    broken[4] = np.inf
    packed = {"shape": [1000], "triangle": False, "low": [0], "high": [1], "data": ""}
    codes, low, high = quantise(broken)
    packed |= {"low": [low], "high": [high], "data": base64.b64encode(codes.tobytes()).decode()}
    unpacked = unpack(packed, 0)
    assert np.isnan(unpacked[[3, 4]]).all()
    assert np.nanmax(np.abs(np.delete(unpacked - broken, [3, 4]))) <= np.ptp(values) / LEVELS


def long_run(n_steps: int, length: int) -> RunData:
    """A run of many probe steps on long sequences; all frames are one, to save memory."""
    recipe = recipe_of(graph__sequence_length=length, training__stage1__steps=n_steps)
    frame = matrices_of(recipe, 0)
    steps = list(range(n_steps))
    return replace(
        run_of(recipe, n_frames=1),
        history=history_of(steps, recipe),
        frames=dict.fromkeys(steps, frame),
    )


@pytest.mark.slow
def test_long_runs_on_long_sequences_stay_small() -> None:
    for run, thinned in ((long_run(200, 200), True), (long_run(1000, 20), False)):
        html = render(run)
        page = Page(html)
        assert len(html.encode()) < 25e6
        assert ("spread evenly" in page.text) == thinned
        steps = page.data["steps"]
        assert steps[0] == 0
        assert steps[-1] == run.steps[-1]
        assert len(steps) >= 100
        assert len(page.data["history"]["steps"]) == len(run.history)


def test_frames_are_thinned_to_the_bytes_allowed() -> None:
    run = long_run(100, 30)
    packed = pack_frames(run, most_bytes=60_000)
    assert packed["kept"] == 100
    assert 2 <= len(packed["steps"]) < 60
    assert sum(len(matrix["data"]) for matrix in packed["matrices"].values()) <= 60_000


def test_a_run_without_matrices_or_rows_has_a_page() -> None:
    page = Page(render(run_of(n_frames=0)))
    assert page.data["steps"] == []
    run = replace(run_of(), frames={}, references={})
    page = Page(render(run))
    assert page.data["steps"] == [row["train/step"] for row in run.history]
    assert "the run has no matrices" in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 7, "training__stage1__lr": 0.25, "checkpoints__every": 50},
        {"task__alpha": [1.0, 2.0, 3.0, *[1.0] * 7]},
        {"graph__lag": 2, "graph__preset": "lag_chain"},
        {"wandb__group": "other"},
        {"name": "mine"},
    ],
)
def test_the_command_trains_the_same_run_again(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe("markov_chain").with_overrides(**changes)
    words = reproduce_command(recipe).split()
    assert words[:2] == ["mechcausal", "train"]
    if words[2] == "recipe.toml":
        return  # the recipe stands below it
    start = Train(values=load_recipe(words[2]))
    parsed = parse(Train, words[2:], command="train", default=start)
    values = recipe_to_dict(parsed.values)
    expected = recipe_to_dict(recipe)
    assert values.pop("wandb") is not None
    expected.pop("wandb")
    assert parse_recipe(values, source="test") == parse_recipe(expected, source="test")


def compared() -> list[RunData]:
    return [
        *(run_of(recipe_of(seed=seed), name=f"seed{seed}") for seed in range(3)),
        run_of(recipe_of(task__alpha=0.5), name="smooth"),
        run_of(recipe_of(task__alpha=0.5, training__stage1__lr=2.0), name="slow"),
    ]


def test_groups_are_named_by_what_they_differ_in() -> None:
    grouped = groups(compared())
    differences = differing_keys(grouped)
    assert differences == {"task.alpha": [0.1, 0.5, 0.5], "training.stage1.lr": [1.0, 1.0, 2.0]}
    assert group_labels(grouped, differences) == [
        "some: alpha 0.1, lr 1.0",
        "some: alpha 0.5, lr 1.0",
        "some: alpha 0.5, lr 2.0",
    ]


def test_the_comparison_lists_runs_and_marks_differences(tmp_path: Path) -> None:
    for run in compared():
        write_run(tmp_path / run.name, run)
    write_report(tmp_path / "slow")
    assert main(["report", str(tmp_path)]) == 0
    page = Page((tmp_path / "comparison.html").read_text(encoding="utf-8"))
    links = [a["href"] for tag, a in page.attributes if tag == "a"]
    assert links == ["slow/report.html"]
    assert page.tags.count("mark") == 2  # what is not as in most of the recipes
    assert "over hand-built" in page.text
    assert "Loss above the hand-built model, nats" in page.text
    assert [run["name"] for run in page.data["runs"]] == [
        "seed0",
        "seed1",
        "seed2",
        "slow",
        "smooth",
    ]


def test_the_command_draws_one_run_where_it_lies_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", run_of(), finished=False)
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()
    assert main(["report", str(folder), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").is_file()
    capsys.readouterr()
    for arguments, message in (
        ([], "report needs a run"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "new")], "not a run folder"),
        ([str(folder), "--out", str(tmp_path)], "a folder; give the file to write"),
        ([str(folder), str(tmp_path / "new")], "not a run folder"),
    ):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_page_that_cannot_be_written_is_named_as_it_would_be_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "runs" / "one", run_of())
    for command, page in ((folder, folder / "report.html"), (folder.parent, "comparison.html")):
        path = folder.parent / page
        path.mkdir()
        assert main(["report", str(command)]) == 2
        assert capsys.readouterr().err == f"mechcausal: {path}: Is a directory\n"
        path.rmdir()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error == f"mechcausal: {folder / 'report.html'}: No space left on device\n"


def test_a_broken_run_in_a_folder_is_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "good", run_of())
    (write_run(tmp_path / "bad", run_of()) / "summary.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 0
    assert "left out" in capsys.readouterr().err
    assert "left out" in Page((tmp_path / "comparison.html").read_text(encoding="utf-8")).text
    assert main(["report", str(tmp_path / "bad"), str(tmp_path / "good")]) == 2


def test_the_page_names_the_wandb_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path, run_of())
    (folder / "wandb" / "offline-run-20260102_030405-run-a1b2").mkdir(parents=True)
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "W&B runrun-a1b2" in text


def test_the_page_says_once_what_run_json_repeats() -> None:
    recipe = recipe_of()
    facts = {"wandb_id": "id7", "recipe": recipe_to_dict(recipe), "sync": ["one", "two"]}
    words = Page(
        render(replace(run_of(recipe), facts=facts | {"environment": {"torch": "2"}}))
    ).text
    assert words.count("sequence_length") == 1
    assert "id7" not in words
    assert "environment: torch2" in words
    assert "syncone, two" in words


def test_the_recipe_on_the_page_is_the_runs() -> None:
    recipe = recipe_of(wandb__tags=["a<b", 'c"d'])
    text = Page(render(run_of(recipe))).text
    start = text.index('name = "some"')
    toml = text[start : text.index("Matrices are rounded")]
    assert parse_recipe(tomllib.loads(toml), source="page") == recipe


def test_the_end_of_a_run_reads_its_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of()
    folder = write_run(tmp_path / "run", run_of(recipe))
    record, read = RunRecord(folder, recipe, "offline"), []
    load = RunData.load

    def load_counted(path: Path) -> RunData:
        read.append(path)
        return load(path)

    monkeypatch.setattr(RunData, "load", load_counted)
    pictures = ClosingPictures(record, recipe)
    pictures.draw_page({})
    assert "panels/page" in pictures.draw_panels({}, StopSignal())
    record.warn("odd")
    pictures.draw_page({})
    assert "<li>odd</li>" in (folder / "report.html").read_text(encoding="utf-8")
    assert read == [folder]
    record.finish({}, "finished")

"""`--watch`: it draws the run, fits the terminal, and leaves the terminal as it was."""

import contextlib
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.color import Color
from rich.console import Console
from rich.text import Text

from mechcausal.cli import main as cli
from mechcausal.cli.display import LiveView, ProgressBar, display
from mechcausal.cli.parsing import RefusedError
from mechcausal.cli.watch import Clock, Watched, along_steps, duration, sparkline
from mechcausal.pictures.terminal.text_matrix import pooled
from mechcausal.recipes import Recipe, recipe_to_toml
from mechcausal.records.run_data import RunData
from mechcausal.training.run import Progress
from tests.records.test_tracking import check_interrupted
from tests.run_folders import (
    heads_recipe,
    history_of,
    matrices_of,
    recipe_of,
    two_parents_recipe,
)


def progress_of(recipe: Recipe, step: int = 40, **changes: Any) -> Progress:
    steps = [*range(0, step, 10), step]
    matrices = {name: torch.from_numpy(m) for name, m in matrices_of(recipe, step).items()}
    history = history_of(steps, recipe)
    values = {"figures": history[-1], "matrices": matrices, "history": history}
    return Progress(step=step, n_steps=40, stage="stage2", **(values | changes))


def lines_of(
    recipe: Recipe, progress: Progress, *, width: int = 100, height: int = 40, colours: bool = False
) -> list[str]:
    """What is on the screen, without colours."""
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, record=True
    )
    watched = Watched(RunData(name="run", recipe=recipe), progress, 75.0, colours=colours)
    console.print(watched)
    return console.export_text().splitlines()


# --- The picture ---


def test_matrices_stand_beside_the_graph() -> None:
    recipe = recipe_of()
    truth = torch.from_numpy(RunData(name="", recipe=recipe).truth).float()
    lines = lines_of(recipe, progress_of(recipe, matrices={"attention/layer0": truth}))
    start = next(i for i, line in enumerate(lines) if line.startswith("attention"))
    assert lines[start].split() == ["attention", "true", "graph"]
    offset = lines[start].index("true graph")
    for query, line in enumerate(lines[start + 1 : start + 9]):
        left, right = line[:16], line[offset:].ljust(16)
        assert left.ljust(16) == right[:16]
        drawn = {position // 2 for position, character in enumerate(left) if character == "█"}
        assert drawn == set(recipe.build_graph().parents[query] if query < 7 else ())


def test_a_cell_is_half_a_character_in_colour() -> None:
    recipe = recipe_of()
    plain, coloured = (
        lines_of(recipe, progress_of(recipe), width=24, colours=colours)
        for colours in (False, True)
    )
    assert sum("▀" in line for line in coloured) in (4, 5)
    assert not any("▀" in line for line in plain)


def test_colours_say_how_large_an_entry_is() -> None:
    recipe = recipe_of()
    console = Console(file=io.StringIO(), force_terminal=True, width=30, height=40)
    progress = progress_of(recipe, matrices={"attention/layer0": torch.eye(8)})
    drawn = [
        (segment.style.color, segment.style.bgcolor)
        for segment in console.render(Watched(RunData(name="", recipe=recipe), progress))
        if segment.style is not None and segment.text.startswith("▀")
    ]
    yellow, violet = (Color.from_rgb(*rgb) for rgb in ((253, 231, 36), (68, 1, 84)))  # 1 and 0
    assert drawn[0] == (yellow, violet)
    assert {colour for pair in drawn for colour in pair} == {yellow, violet}


LONG = recipe_of(graph__sequence_length=200)


@settings(max_examples=60)
@given(
    recipe=st.sampled_from([recipe_of(), two_parents_recipe(), heads_recipe(), LONG]),
    width=st.integers(1, 300),
    height=st.integers(1, 120),
    colours=st.booleans(),
)
def test_it_fits_every_terminal(recipe: Recipe, width: int, height: int, colours: bool) -> None:
    lines = lines_of(recipe, progress_of(recipe), width=width, height=height, colours=colours)
    if recipe.task.kind == "causal_graph":
        assert all(Text(line.rstrip()).cell_len <= width for line in lines)
        assert len(lines) <= max(height, 9)
    if recipe is LONG and width >= 80 and height >= 24:  # drawn smaller, and it says so
        (note,) = [line for line in lines if "200 positions" in line]
        assert re.search(r"the largest of (\d+) × \1$", note.strip())


def test_all_heads_where_there_is_room_else_the_largest() -> None:
    recipe = two_parents_recipe()
    wide = "\n".join(lines_of(recipe, progress_of(recipe), width=120))
    assert re.search(r"head 0 +head 1 +true graph", wide)
    narrow = "\n".join(lines_of(recipe, progress_of(recipe), width=40))
    assert re.search(r"largest of heads +true graph", narrow)


def test_repeated_tokens_show_their_best_heads() -> None:
    recipe = heads_recipe()
    scores = torch.tensor([[0.1, 0.9], [0.4, float("nan")]])
    matrices = {"heads/prefix_matching": scores, "heads/previous_token": 1 - scores}
    lines = lines_of(recipe, progress_of(recipe, matrices=matrices))
    start = next(i for i, line in enumerate(lines) if line.startswith("head"))
    assert [line.split()[0] for line in lines[start + 1 : start + 5]] == [
        "0.1",
        "1.0",
        "0.0",
        "1.1",
    ]
    assert "0.90" in lines[start + 1]
    assert "0.10" in lines[start + 1]
    many = {"heads/prefix_matching": torch.rand(10, 12)}
    assert "the best 8 of 120 heads" in "\n".join(
        lines_of(recipe, progress_of(recipe, matrices=many))
    )


def test_curves_name_their_newest_number() -> None:
    recipe = recipe_of()
    progress = progress_of(recipe)
    text = "\n".join(lines_of(recipe, progress))
    assert f"{progress.figures['loss/eval']:.3f}, Bayes 1.000, hand-built 1.200" in text
    assert f"{progress.figures['graph/recovered']:.3f}" in text
    # The last look had no correlation: the newest one that there is counts.
    rows = [row["gradient/pattern_theory_correlation"] for row in progress.history]
    newest = [value for value in rows if value is not None][-1]
    assert f"{newest:.3f}" in next(line for line in text.splitlines() if "gradient" in line)
    assert "stage2 · step 40 of 40 · 1:15 left" in text


def test_a_run_without_looks_shows_its_steps() -> None:
    recipe = recipe_of(probing__enabled=False)
    progress = Progress(step=3, n_steps=40, stage="stage1", figures={})
    assert "step 3 of 40" in lines_of(recipe, progress)[0]


def test_names_are_shown_as_they_are() -> None:
    recipe = recipe_of(name="a.b_-c")
    assert "a.b_-c, seed 0" in lines_of(recipe, progress_of(recipe))[0]


# --- Its parts ---


def test_sparklines_hold_their_range() -> None:
    assert sparkline(np.array([2.0, 2.0])) == "▁▁"
    assert sparkline(np.array([0.5]), low=0.0, high=1.0) == "▅"
    assert sparkline(np.array([-1.0, 1.0]), low=0.0, high=1.0) == "▁█"
    assert sparkline(np.full(3, np.nan)) == "   "


def test_curves_run_along_the_whole_training() -> None:
    rows = [{"train/step": s, "x": float(s)} for s in (0, 1, 2, 50)]
    columns = along_steps(rows, "x", 100, 11)
    assert columns[:6].tolist() == [0.0, 2.0, 2.0, 2.0, 2.0, 50.0]
    assert np.isnan(columns[6:]).all()
    assert along_steps(rows, "x", 100, 1).tolist() == [50.0]
    assert along_steps(rows[:1], "x", 100, 3)[0] == 0.0
    assert along_steps([{"train/step": 0, "x": None}], "x", 100, 2).tolist() != [0.0, 0.0]


def test_pooling_keeps_the_largest_entry_of_every_block() -> None:
    generator = np.random.default_rng(0)
    for length, block in ((7, 3), (8, 4), (5, 1), (200, 9)):
        matrix = np.tril(generator.random((length, length)))
        small = pooled(matrix, block)
        for row, column in np.ndindex(*small.shape):
            part = [
                matrix[i, j]
                for i in range(row * block, min((row + 1) * block, length))
                for j in range(column * block, min((column + 1) * block, length))
                if j <= i
            ]
            assert small[row, column] == max(part) if part else np.isnan(small[row, column])


def test_the_clock_follows_the_pace_since_the_start() -> None:
    clock = Clock()
    assert clock.seconds_left(100, 200, now=5.0) is None
    assert clock.seconds_left(110, 200, now=7.0) == pytest.approx(18.0)
    assert [duration(s) for s in (0.2, 59.6, 3600.0)] == ["0:00", "1:00", "1:00:00"]


# --- The terminal ---


def live_view(recipe: Recipe) -> tuple[LiveView, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=30, color_system="256")
    return LiveView(recipe, console), file


def test_what_is_prepared_is_named_and_starts_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("mechcausal.cli.display.time.monotonic", lambda: now[0])
    recipe = recipe_of()
    view, file = live_view(recipe)
    view.show(Progress(0, 40, "theory: 3 of 50 draws of the prior", {}, is_preparing=True))
    assert "theory: 3 of 50 draws" in file.getvalue()
    now[0] = 100.0
    view.show(progress_of(recipe, 0))
    now[0] = 110.0
    view.show(progress_of(recipe, 20))
    assert "0:10 left" in file.getvalue()
    view.close()


def test_the_bar_begins_when_all_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = ProgressBar(quiet=False)
    bar.show(Progress(0, 40, "theory: 3 of 50 draws of the prior", {}, is_preparing=True))
    assert "theory: 3 of 50 draws" in terminal.getvalue()
    bar.show(progress_of(recipe_of(), 0))
    bar.show(progress_of(recipe_of(), 40))
    bar.close()
    assert "40/40" in terminal.getvalue()


def test_it_is_drawn_again_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("mechcausal.cli.display.time.monotonic", lambda: now[0])
    recipe = recipe_of()
    view, file = live_view(recipe)
    sizes = []
    for step in range(41):  # ten seconds and a tenth, at the end two draws more at once
        view.show(progress_of(recipe, step))
        sizes.append(file.tell())
        now[0] += 0.1
    view.close()
    drawn = sum(b > a for a, b in zip([0, *sizes], sizes, strict=False))
    assert 12 <= drawn <= 16
    assert "step 40 of 40" in file.getvalue()


def test_the_cursor_comes_back_whatever_happens() -> None:
    recipe = recipe_of()
    view, file = live_view(recipe)
    view.show(progress_of(recipe, 10))
    before = sys.stdout, sys.stderr
    assert file.getvalue().startswith("\x1b[?25l")
    view.warn("odd \x1b[31m[bold]thing")
    view.close()
    view.close()
    assert file.getvalue().endswith("\x1b[?25h")
    assert "[bold]thing" in file.getvalue()
    assert "\x1b[31m[bold]" not in file.getvalue()
    assert (sys.stdout, sys.stderr) != before or sys.stdout is before[0]


def test_without_a_terminal_it_is_the_progress_bar() -> None:
    assert isinstance(display(recipe_of(), quiet=False, watch=True), ProgressBar)
    assert isinstance(display(recipe_of(), quiet=False, watch=False), ProgressBar)
    with pytest.raises(RefusedError, match=r"^--quiet and --watch: choose one"):
        display(recipe_of(), quiet=True, watch=True)


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"TERM": "xterm-256color"}, LiveView),
        ({"TERM": "dumb"}, ProgressBar),
        ({"TERM": "xterm", "NO_COLOR": "1"}, LiveView),
    ],
)
def test_a_terminal_gets_the_picture(
    environment: dict[str, str], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"  # type: ignore[assignment]

        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(display(recipe_of(), quiet=False, watch=True), kind)


@pytest.mark.slow
def test_watching_changes_nothing_of_the_run(tmp_path: Path) -> None:
    recipe = recipe_of(
        training__batch_size=8,
        evaluation__n_sequences=8,
        evaluation__theory_priors=10,
        probing__every=20,
        probing__dense=1,
        probing__images=2,
        probing__report=False,
        wandb__mode="disabled",
    )
    (tmp_path / "some.toml").write_text(recipe_to_toml(recipe))
    from mechcausal.training.run import train

    view, file = live_view(recipe)
    watched = train(recipe, out=tmp_path / "watched", on_progress=view.show)
    view.close()
    assert "step 40 of 40" in file.getvalue()
    assert cli.main(["train", str(tmp_path / "some.toml"), "--out", str(tmp_path / "plain")]) == 0
    for name in ("metrics.jsonl", "matrices.safetensors", "model/model.safetensors"):
        assert (watched.folder / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.slow
def test_ctrl_c_leaves_the_terminal_as_it_was_and_loses_no_row(
    tmp_path: Path, repository: Path
) -> None:
    recipe = recipe_of(
        training__stage1__steps=100_000_000,
        training__batch_size=16,
        evaluation__n_sequences=16,
        evaluation__bayes_draws=4,
        evaluation__theory_priors=10,
        probing__images=0,
        probing__report=False,
        wandb__mode="offline",
    )
    (tmp_path / "long.toml").write_text(recipe_to_toml(recipe))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "mechcausal.cli.main", "train", str(tmp_path / "long.toml")]
    process = subprocess.Popen(
        [*command, "--watch", "--out", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(repository), "TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    output, sent = b"", False
    os.set_blocking(ours, False)
    deadline = time.monotonic() + 180  # on a busy machine
    try:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                output += os.read(ours, 65536)
            except BlockingIOError:
                time.sleep(0.05)
            if not sent and output.count(b"true graph") >= 3:
                process.send_signal(signal.SIGINT)
                sent = True
    finally:
        process.kill()
        process.wait()
    with contextlib.suppress(OSError):
        output += os.read(ours, 10**6)
    assert termios.tcgetattr(theirs) == before
    for end in (ours, theirs):
        os.close(end)
    text = output.decode()
    assert process.returncode == 130, text[-2000:]
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "\x1b[?1049" not in text
    assert "interrupted after" in text[text.rindex("\x1b[?25h") :]
    check_interrupted(tmp_path / "run")

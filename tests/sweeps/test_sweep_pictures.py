"""Pictures of a sweep: every word lies within the picture, and names never cover lines."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechcausal.cli.main import main
from mechcausal.sweeps import driver, results
from mechcausal.sweeps.picture import draw
from mechcausal.sweeps.results import picture_names
from mechcausal.sweeps.sweep import Picture
from tests.sweeps.test_sweeps import TINY, InlineEngine


def table_of(**axes: list[Any]) -> pd.DataFrame:
    """A finished member for every combination, with a figure that falls with the length."""
    generator = np.random.default_rng(0)
    rows = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    table = pd.DataFrame(rows * 2)
    noise = 1 + 0.2 * generator.random(len(table))
    gap = noise / table["length"] if "length" in table else noise
    return table.assign(**{"state": "finished", "loss/gap": gap})


PRESETS = ["chain", "random_tree", "two_parents"]
MANY = [0.01, 0.1, 0.3, 1.0]


@pytest.mark.parametrize(
    ("axes", "asked"),
    [
        ({"preset": PRESETS}, {"x": "preset"}),
        ({"preset": PRESETS, "alpha": MANY}, {"x": "preset", "y": "alpha"}),
        ({"preset": PRESETS, "alpha": MANY}, {"x": "alpha", "y": "preset"}),
        ({"length": [10, 20, 50], "alpha": MANY}, {"x": "length", "by": "alpha", "fit": True}),
        ({"length": [10, 20, 50]}, {"x": "length", "fit": True}),
    ],
)
def test_no_word_is_cut_off(axes: dict[str, list[Any]], asked: dict[str, Any]) -> None:
    figure = draw(Picture(figure="loss/gap", **asked), table_of(**axes), title="a sweep")
    assert figure is not None
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0


def test_a_long_legend_stands_beside_the_lines() -> None:
    table = table_of(length=[10, 20, 50], alpha=MANY)
    few = draw(Picture(figure="loss/gap", x="length", by="alpha"), table)
    many = draw(Picture(figure="loss/gap", x="length", by="alpha", fit=True), table)
    for figure, beside in ((few, False), (many, True)):
        assert figure is not None
        (axis,) = figure.axes
        legend = axis.get_legend()
        assert legend is not None
        left = legend.get_window_extent().x0
        assert (left >= axis.get_window_extent().x1) == beside


def test_more_names_than_anyone_reads_are_left_out() -> None:
    table = table_of(length=[10, 20], seed=list(range(101)))
    figure = draw(Picture(figure="loss/gap", x="length", by="seed"), table)
    assert figure is not None
    assert figure.axes[0].get_legend() is None
    assert figure.get_size_inches()[0] < 8


# What only some members have: graph.lag of a lag chain, graph.parents of a graph written out.
GRAPHS = [
    {"preset": "chain", "lag": None, "parents": None},
    {"preset": "lag_chain", "lag": 2, "parents": None},
    {"preset": "lag_chain", "lag": 3, "parents": None},
    {"preset": "manual", "lag": None, "parents": "[-1, 0]"},
]


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("graphs", [GRAPHS, GRAPHS[:1], GRAPHS[2:]])
def test_a_picture_shows_the_members_that_have_its_axes(
    graphs: list[dict[str, Any]], fit: bool
) -> None:
    seeds = [{"seed": seed, "loss/gap": 1.0 + seed} for seed in range(2)]
    rows = [graph | seed for graph in graphs for seed in seeds]
    table = pd.DataFrame(rows).assign(state="finished", member=[str(n) for n in range(len(rows))])
    curve = pd.DataFrame({"train/step": [0, 1], "value": [1.0, 2.0]})
    curves = dict.fromkeys(table["member"], curve)
    names = ("preset", "lag", "parents")
    pairs = [("preset", "lag"), ("lag", "preset"), ("lag", "parents"), ("parents", "preset")]
    asked: list[dict[str, Any]] = [{"x": x} for x in names]
    asked += [{"x": x, role: other} for x, other in pairs for role in ("y", "by")]
    asked += [{"x": "train/step", "by": by} for by in names]
    for axes in asked:
        wanted = [axes[role] for role in axes if axes[role] not in (None, "train/step")]
        has_members = any(all(graph[name] is not None for name in wanted) for graph in graphs)
        picture = Picture(figure="loss/gap", fit=fit and "y" not in axes, **axes)
        figure = draw(picture, table, curves)
        assert (figure is not None) == has_members, axes


def test_pictures_have_names_of_their_own() -> None:
    def of(x: str, **others: Any) -> Picture:
        return Picture(figure="loss/gap", x=x, **others)

    alone = [of("task.alpha"), of("training.stage1.lr")]
    assert picture_names(alone) == ["loss-gap_alpha", "loss-gap_lr"]
    stages = [of("training.stage1.lr"), of("training.stage2.lr"), of("task.alpha")]
    assert picture_names(stages) == [
        "loss-gap_stage1-lr",
        "loss-gap_stage2-lr",
        "loss-gap_alpha",
    ]
    twice = [of("task.alpha"), of("task.alpha", fit=True), of("task.alpha", complement=True)]
    assert picture_names(twice) == [
        "loss-gap_alpha",
        "loss-gap_alpha-2",
        "one-minus-loss-gap_alpha",
    ]
    long = [Picture(figure=f"first/{'a' * 120}{n}", x="task.alpha") for n in range(12)]
    assert len(set(picture_names(long))) == 12
    assert max(map(len, picture_names(long))) <= 103


def test_a_picture_that_fails_is_one_warning_and_the_others_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = draw

    def fragile(picture: Picture, *arguments: Any, **options: Any) -> Any:
        figure = real(picture, *arguments, **options)
        if picture.x == "training.beta0":
            raise ValueError("no such colour\nand more")
        if picture.x == "training.epsilon":
            assert figure is not None
            figure.suptitle("$no end of mathematics}$")  # only savefig notices
        return figure

    monkeypatch.setattr("mechcausal.sweeps.results.draw", fragile)
    monkeypatch.setattr(driver, "_engine", lambda *args: InlineEngine())
    axes = ("task.alpha", "training.beta0", "training.epsilon")
    pictures = "".join(f'[[pictures]]\nfigure = "loss/eval"\nx = "{x}"\n' for x in axes)
    values = "".join(f"{axis} = [0.1, 0.2]\n" for axis in axes)
    (tmp_path / "s.toml").write_text(f"kind = 'list'\n{TINY}[axes]\n{values}{pictures}")
    out = tmp_path / "out"
    for _ in range(2):
        assert main(["sweep", str(tmp_path / "s.toml"), "--out", str(out), "--quiet"]) == 0
        first, second = capsys.readouterr().err.splitlines()
        assert first == (
            "mechcausal: warning: picture loss-eval_beta0: not drawn: ValueError: no such colour"
        )
        assert second.startswith("mechcausal: warning: picture loss-eval_epsilon: not drawn: ")
        assert [path.name for path in (out / "figures").iterdir()] == ["loss-eval_alpha.png"]
    assert main(["report", str(out)]) == 0
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "picture loss-eval_beta0: not drawn: ValueError: no such colour" in page
    with pytest.warns(UserWarning, match="picture loss-eval_beta0: not drawn"):
        assert list(results.read_results(out)[1]) == ["loss-eval_alpha", "loss-eval_epsilon"]

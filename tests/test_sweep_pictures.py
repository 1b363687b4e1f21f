"""Pictures of a sweep: every word lies within the picture, and names never cover lines."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechcausal.sweeps.picture import draw
from mechcausal.sweeps.sweep import Picture


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

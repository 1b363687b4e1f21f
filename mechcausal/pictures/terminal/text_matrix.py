"""A matrix as text in a terminal.

With colours (`half_blocks`), a cell is one character wide and half a character high, which is about
square. Without (`shaded`), a cell is two characters wide and its shade is the value.
"""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
from jaxtyping import Float
from rich.color import Color
from rich.segment import Segment
from rich.style import Style

from mechcausal.pictures.static.style import ATTENTION_COLOURS

SHADES = " ░▒▓█"
_LEVELS = 32  # number of colours


def pooled(
    matrix: Float[np.ndarray, "query key"], block: int
) -> Float[np.ndarray, "query_block key_block"]:
    """The largest entry of every block x block square; NaN if all its keys follow the query.

    Example:
        >>> pooled(np.array([[1.0, 0, 0], [0.2, 0.8, 0], [0, 0.3, 0.7]]), 2)
        array([[1. , nan],
               [0.3, 0.7]])
    """
    length = len(matrix)
    visible = np.where(np.tril(np.ones((length, length), dtype=bool)), matrix, -np.inf)
    n = math.ceil(length / block)
    padded = np.full((n * block, n * block), -np.inf)
    padded[:length, :length] = visible
    largest = padded.reshape(n, block, n, block).max((1, 3))
    return np.where(np.isneginf(largest), np.nan, largest)


def half_blocks(values: Float[np.ndarray, "row column"], scale: int) -> Iterator[list[Segment]]:
    """Lines of segments, two rows of cells per line; NaN is blank."""
    shares = np.clip(values, 0, 1) * (_LEVELS - 1)
    levels = np.where(np.isnan(values), -1, np.nan_to_num(shares).round()).astype(int)
    levels = levels.repeat(scale, 0).repeat(scale, 1)
    if len(levels) % 2:
        levels = np.vstack([levels, np.full(levels.shape[1], -1)])
    for top, bottom in zip(levels[::2].tolist(), levels[1::2].tolist(), strict=True):
        line: list[Segment] = []
        start = 0
        for end in range(1, len(top) + 1):  # equal adjacent cells share a segment
            if end == len(top) or (top[end], bottom[end]) != (top[start], bottom[start]):
                line.append(_segment(top[start], bottom[start], end - start))
                start = end
        yield line


def _segment(top: int, bottom: int, count: int) -> Segment:
    if top < 0 and bottom < 0:
        return Segment(" " * count)
    return Segment(("▄" if top < 0 else "▀") * count, _style(top, bottom))


@cache
def _style(top: int, bottom: int) -> Style:
    if top < 0:
        return Style(color=_colour(bottom))
    return Style(color=_colour(top), bgcolor=None if bottom < 0 else _colour(bottom))


@cache
def _colour(level: int) -> Color:
    from matplotlib import colormaps

    red, green, blue, _ = colormaps[ATTENTION_COLOURS](level / (_LEVELS - 1), bytes=True)
    return Color.from_rgb(int(red), int(green), int(blue))


def shaded(values: Float[np.ndarray, "row column"]) -> Iterator[list[Segment]]:
    """Lines of segments, one row of cells per line, two characters per cell; NaN is blank."""
    for row in values.tolist():
        cells = (" " if math.isnan(v) else SHADES[_shade(v)] for v in row)
        yield [Segment("".join(2 * cell for cell in cells))]


def _shade(value: float) -> int:
    return min(max(int(value * len(SHADES)), 0), len(SHADES) - 1)

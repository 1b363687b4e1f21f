from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probes import repeated_tokens


def draw(seed: int = 0, **sizes: Any) -> Tensor:
    return repeated_tokens(**sizes, generator=torch.Generator().manual_seed(seed))


@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 8),
    vocab=st.integers(2, 12),
    repeats=st.integers(1, 3),
    bos=st.none() | st.integers(0, 15),
)
def test_a_block_is_repeated_behind_the_bos(
    batch: int, length: int, vocab: int, repeats: int, bos: int | None
):
    tokens = draw(batch=batch, repeat_length=length, vocab_size=vocab, n_repeats=repeats, bos=bos)
    if bos is not None:
        assert (tokens[:, 0] == bos).all()
        tokens = tokens[:, 1:]
        assert (tokens != bos).all()
    blocks = tokens.reshape(batch, repeats, length)
    assert (blocks == blocks[:, :1]).all()
    assert ((tokens >= 0) & (tokens < vocab)).all()
    drawable = vocab - (bos is not None and bos < vocab)
    if length <= drawable:
        assert all(len(set(block.tolist())) == length for block in blocks[:, 0])


def test_the_generator_decides():
    sizes = {"batch": 3, "repeat_length": 10, "vocab_size": 100}
    assert torch.equal(draw(1, **sizes), draw(1, **sizes))
    assert not torch.equal(draw(1, **sizes), draw(2, **sizes))
    assert len({tuple(row.tolist()) for row in draw(**sizes)}) == 3


def test_every_token_is_drawn_about_equally_often():
    counts = draw(batch=3000, repeat_length=2, vocab_size=6, n_repeats=1, bos=5)[:, 1:].flatten()
    shares = counts.bincount(minlength=6) / len(counts)
    # Five standard errors around 1/5 for 6,000 draws.
    assert ((shares[:5] - 0.2).abs() < 5 * (0.2 * 0.8 / 6000) ** 0.5).all()

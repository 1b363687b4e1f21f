import math

import pytest
import torch
from torch import Tensor

from mechcausal.models.adapter import HookedTransformer
from probes import loss_by_position
from probes.heads.in_context import repeated_pairs
from probes.reading.labelled import standard_error
from probes.reading.passes import token_losses
from tests.probes.wired import VOCAB, blank, planted

close = torch.testing.assert_close


def test_losses_are_those_of_the_model(model: HookedTransformer, tokens: Tensor):
    model.double()  # float32 products depend on the size of the batch
    expected = model(tokens, return_type="loss", loss_per_token=True)
    close(token_losses(model, tokens), expected)
    close(token_losses(model, tokens, max_batch_bytes=1), expected)


def test_a_model_without_weights_has_the_loss_of_the_uniform_distribution():
    model = blank(1, 2, noise=0.0)
    model.W_U.data.zero_()
    reading = loss_by_position(model, n_sequences=4, repeat_length=5, bos=3)
    assert (reading.repeat_length, reading.first_copy) == (5, 1)
    close(reading.loss, torch.full((10,), math.log(VOCAB)))
    close(reading.stderr, torch.zeros(10))
    assert reading.in_context_gain == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("bos", [None, 3])
def test_an_induction_circuit_gains_in_the_second_copy_alone(bos: int | None):
    reading = loss_by_position(planted(0).model, repeat_length=6, bos=bos)
    start = int(bos is not None)
    # Without a BOS the first token seems to follow itself: one of the predictions is half right.
    assert reading.loss[start + 6 + (bos is None) :].max() < 1
    assert reading.loss[start : start + 5].min() > 2
    assert reading.in_context_gain > 2
    assert reading.in_context_gain_stderr < 0.2
    first = reading.loss[start : start + 5].mean() - reading.loss[start + 6 :].mean()
    assert reading.in_context_gain == pytest.approx(first.item(), abs=1e-4)


def test_repeated_pairs_against_a_loop():
    tokens = torch.randint(3, (5, 9), generator=torch.Generator().manual_seed(0))
    expected = [
        [any(row[k : k + 2] == row[i : i + 2] for k in range(i)) for i in range(len(row) - 1)]
        for row in tokens.tolist()
    ]
    assert repeated_pairs(tokens).tolist() == expected


def test_one_sequence_has_no_standard_error(model: HookedTransformer):
    assert standard_error(torch.ones(1, 3)).isnan().all()
    reading = loss_by_position(model, n_sequences=1)
    assert math.isnan(reading.in_context_gain_stderr)

"""Attention gradients on a tiny model of every family, against autograd around the softmax."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from probes import (
    AttentionGradient,
    AttentionPattern,
    ProbeError,
    ProbeWarning,
    attach,
    check_attention,
    edit_attention,
    make_uniform,
)
from probes.reading import attention_check
from tests.left_as_found import left_as_found
from tests.lens_versions import HAS_LENS_3
from tests.probes import families
from tests.probes.families import FAMILIES, examined, random_loss, some_tokens, tiny

close = torch.testing.assert_close
SHOWN_AFTER_USE = (*(["native bridge"] if HAS_LENS_3 else []), "GPT-Neo", "GPT-J", "OPT", "BERT")
SINKS = ("gpt-oss",)
# Keys that layers 0 and 1 see, where that is not all up to the query.
WINDOWS = {
    "GPT-Neo": (7, 4),
    "Mistral": (4, 4),
    "Gemma 2": (4, 7),
    "Gemma 3": (4, 4),
    "gpt-oss": (4, 7),
}
pytestmark = pytest.mark.filterwarnings("ignore::probes.ProbeWarning")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def masked(family: str) -> torch.Tensor:
    """Keys that the model cannot see, `[layer 1 query key]`, by what is known of the family."""
    query, key = torch.arange(7).unsqueeze(1), torch.arange(7)
    if family == "BERT":
        return torch.zeros(2, 1, 7, 7, dtype=torch.bool)
    windows = WINDOWS.get(family, (7, 7))
    return torch.stack([(key > query) | (key <= query - window) for window in windows]).unsqueeze(1)


def test_the_gradient_on_scores_is_autograds_before_the_softmax(family: str):
    result = examined(family).trained
    close(result.scores, result.true_scores, atol=result.rounding, rtol=0)
    assert not (result.scores * masked(family)).any()
    if family not in SINKS:
        assert result.scores.sum(-1).abs().max() <= result.rounding
    assert result.scores.abs().max() > 1000 * result.rounding


def test_the_gradient_on_patterns_is_autograds_and_zero_where_masked(family: str):
    result, hidden = examined(family).trained, masked(family)
    assert not (result.pattern * hidden).any()
    close(result.pattern, result.true_pattern.masked_fill(hidden, 0.0))


def test_dropout_is_undone_or_refused_but_never_ignored(family: str):
    result = examined(family)
    if isinstance(result.in_training, ProbeError):
        assert family in (*SHOWN_AFTER_USE, *SINKS)
        assert "attention dropout was on in layers [0, 1]" in str(result.in_training)
    else:
        training = result.in_training
        close(training.scores, training.true_scores, atol=training.rounding, rtol=0)


def test_a_frozen_model_gives_the_same_gradients(family: str):
    model, trained = tiny(family), examined(family).trained
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = AttentionGradient(), AttentionGradient("pattern")
    try:
        model.requires_grad_(False)
        with attach(model, *frozen):
            random_loss(model(some_tokens())).backward()
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
    close(frozen[0].reading().values, trained.scores, atol=trained.rounding, rtol=0)
    close(frozen[1].reading().values, trained.pattern)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_found_of_every_family(family: str):
    result, late = examined(family).check, family in SHOWN_AFTER_USE
    assert result.late == ((0, 1) if late else ())
    assert result.sink == (family in SINKS)
    assert (result.excess, result.hidden, result.unread) == (False, (), ())
    assert len(result.problems()) == late + result.sink


def test_the_documented_table_is_what_the_models_show(repository: Path):
    documented = (repository / "docs" / "models.md").read_text(encoding="utf-8")
    assert families.table() in documented, "python -m tests.probes.families prints the table"


@pytest.mark.parametrize("wrt", ["scores", "pattern"])
@pytest.mark.parametrize("family", ["native bridge", "OPT", "BERT", "GPT-2", "Mistral"])
def test_batches_of_other_sizes_and_lengths_follow_one_another(family: str, wrt: Any):
    model = tiny(family)

    def read(*batches: torch.Tensor) -> torch.Tensor:
        gradient = AttentionGradient(wrt, centred=True)
        with attach(model, gradient):
            for tokens in batches:
                random_loss(model(tokens)).backward()
        model.zero_grad()
        return gradient.reading().values

    three, two = some_tokens(3, 7), some_tokens(2, 7)
    both, sums = read(three, two), read(three) + read(two)
    size = both.abs().max().item()
    close(both, sums, atol=1e-5 * size, rtol=0)
    assert both.sum(-1).abs().max() <= 1e-5 * size
    gradient = AttentionGradient(wrt)
    with attach(model, gradient):
        for tokens in (three, some_tokens(2, 5)):
            gradient.reset()
            random_loss(model(tokens)).backward()
    model.zero_grad()
    assert gradient.reading().shape["key"] == 5


@pytest.mark.parametrize("family", [*SHOWN_AFTER_USE, *SINKS, "GPT-2"])
def test_the_first_pass_of_a_model_says_what_does_not_work(family: str):
    model = tiny(family)
    attention_check._CHECKED.discard(model)
    expected = examined(family).check.problems()
    for times in (1, 0):  # once per model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with attach(model, AttentionPattern()), torch.no_grad():
                model(some_tokens())
        lines = [str(w.message) for w in caught if w.category is ProbeWarning]
        assert len(lines) == (times if expected else 0)
        for line in lines:
            assert "\n" not in line
            name, _, findings = line.partition(": ")
            assert name.startswith("TransformerBridge")
            # The same findings; sums of rows are those of other tokens.
            assert without_numbers(findings) == [without_numbers(p)[0] for p in expected]


def without_numbers(findings: str) -> list[str]:
    return [re.sub(r"[\d.]+ to [\d.]+", "", finding) for finding in findings.split("; ")]


@pytest.mark.parametrize("family", SHOWN_AFTER_USE)
def test_an_edit_that_would_change_nothing_is_refused(family: str):
    model = tiny(family)
    with (
        torch.no_grad(),
        pytest.raises(ProbeError, match="an edit would change nothing"),
        edit_attention(model, {0: make_uniform([3])}),
    ):
        model(some_tokens())


def test_trying_a_model_out_leaves_it_as_it_was():
    model = tiny("GPT-2")
    random_loss(model(some_tokens())).backward()
    model.blocks[0].train()
    with left_as_found(model):
        check_attention(model)
    model.zero_grad()
    families.set_training(model, False)

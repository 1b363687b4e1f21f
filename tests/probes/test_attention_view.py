"""Patterns handed to circuitsvis, which the tests stand in for."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from probes import AttentionPattern, LabelledTensor, ProbeError, attach, attention_view

WORDS = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What circuitsvis gets: attention, tokens, names and options of its version 1.43."""
    calls: list[Any] = []

    def attention_heads(
        attention: Any,
        tokens: Any,
        attention_head_names: Any = None,
        max_value: Any = None,
        min_value: Any = None,
        negative_color: Any = None,
        positive_color: Any = None,
        mask_upper_tri: Any = None,
    ) -> str:
        calls.append((attention, tokens, attention_head_names, mask_upper_tri))
        return "<div>"

    package, module = ModuleType("circuitsvis"), ModuleType("circuitsvis.attention")
    module.attention_heads = attention_heads  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "circuitsvis", package)
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", module)
    return calls


def test_every_head_is_handed_over_by_name(model: Any, tokens: Any, handed: list[Any]):
    with attach(model, AttentionPattern(layers=(1,), reduce="mean")) as (pattern,):
        model(tokens)
    reading = pattern.reading()
    assert attention_view(reading, WORDS) == "<div>"
    assert attention_view(reading.sel(layer=1, head=1), WORDS) == "<div>"
    (attention, words, names, causal), (one, _, own_name, _) = handed
    assert torch.equal(attention, reading.values[0])
    assert (words, names, causal) == (WORDS, ["1.0", "1.1"], True)
    assert torch.equal(one, reading.values[0, 1:])
    assert own_name == ["head"]


def test_bad_input_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch):
    pattern = LabelledTensor("pattern", torch.eye(6), ("query", "key"))
    batch = LabelledTensor("pattern", torch.eye(6)[None], ("batch", "query", "key"))
    with pytest.raises(ValueError, match=r"choose a sequence with sel\(batch=0\)"):
        attention_view(batch, WORDS)
    with pytest.raises(ValueError, match="2 tokens for patterns over 6 positions"):
        attention_view(pattern, WORDS[:2])
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", None)
    with pytest.raises(ProbeError, match=r"pip install 'mechcausal\[circuitsvis\]'"):
        attention_view(pattern, WORDS)

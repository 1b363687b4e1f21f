"""Stimuli for a model with a tokenizer: frequent tokens and segments of a text."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from mechcausal.studies.targets import Target
from mechcausal.support.corpora import read_corpus
from probes.heads.token_sources import TokenSource, frequent_tokens, text_segments
from probes.reading.hook_names import config_of

StimulusName: TypeAlias = Literal["random", "frequent", "text"]

TEXT = "topics"
"""The text that is read where the user names none: Python's help topics."""
_CHARACTERS = 500_000


def has_tokenizer(target: Target) -> bool:
    """Whether words can be made tokens; a bridge without a tokenizer has a placeholder."""
    return target.bos == "auto" and getattr(target.model, "tokenizer", None) is not None


def encoded(target: Target, text: str) -> list[int]:
    """The tokens of a text, without special ones, for a model with a tokenizer."""
    model: Any = target.model
    ids: list[int] = model.tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
    return ids


def sources(
    target: Target, names: Sequence[StimulusName], text: str | None
) -> list[TokenSource | None]:
    """Where the tokens of each stimulus come from; None for uniformly random ids.

    Args:
        target: the model.
        names: the stimuli.
        text: a file, or one of `CORPORA`; None for `TEXT`.

    Raises:
        TextError: the text cannot be read.
        ValueError: the model has no tokenizer, or the text too few different tokens.
    """
    ids: Tensor | None = None
    made: list[TokenSource | None] = []
    for name in names:
        if name == "random":
            made.append(None)
            continue
        if not has_tokenizer(target):
            raise ValueError(f"has no tokenizer, which --stimulus {name} needs")
        if ids is None:
            ids = _tokens_of(target, read_corpus(text or TEXT).text)
        made.append(frequent_tokens(ids) if name == "frequent" else text_segments(ids))
    return made


def _tokens_of(target: Target, text: str) -> Int[Tensor, "n"]:
    """The tokens of the first half million characters, without special ones."""
    model: Any = target.model
    ids = torch.tensor(encoded(target, text[:_CHARACTERS]), dtype=torch.int64)
    special = torch.tensor(sorted(set(model.tokenizer.all_special_ids)), dtype=torch.int64)
    return ids[(ids < config_of(model).d_vocab) & ~torch.isin(ids, special)]

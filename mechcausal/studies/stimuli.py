"""Stimuli for a model with a tokenizer: frequent tokens, segments of a text, and few-shot tasks."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from mechcausal.studies.targets import Target
from mechcausal.support.corpora import read_corpus
from probes.heads.few_shot import FewShotTask
from probes.heads.token_sources import TokenSource, frequent_tokens, text_segments
from probes.reading.hook_names import config_of

StimulusName: TypeAlias = Literal["random", "frequent", "text"]

TEXT = "topics"
"""The text that is read where the user names none: Python's help topics."""
_CHARACTERS = 500_000
_FEWEST_PAIRS = 8

WORDS: dict[str, str] = {
    "antonyms": (
        "big small hot cold old young fast slow hard soft rich poor light dark high low early late "
        "open closed full empty happy sad strong weak good bad long short clean dirty"
    ),
    "past tenses": (
        "go went see saw take took give gave come came find found make made think thought know "
        "knew write wrote run ran tell told keep kept leave left buy bought speak spoke"
    ),
    "capitals": (
        "France Paris Germany Berlin Italy Rome Spain Madrid Russia Moscow Japan Tokyo China "
        "Beijing Egypt Cairo Greece Athens Cuba Havana Iran Tehran Iraq Baghdad Austria Vienna "
        "Ireland Dublin Portugal Lisbon Norway Oslo"
    ),
    "plurals": (
        "dog dogs car cars book books house houses child children man men woman women tree trees "
        "city cities day days word words hand hands year years friend friends game games song songs"
    ),
}
"""Few-shot tasks in words: item, answer, item, answer, …"""


def has_tokenizer(target: Target) -> bool:
    """Whether words can be made tokens; a bridge without a tokenizer has a placeholder."""
    return target.bos == "auto" and getattr(target.model, "tokenizer", None) is not None


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


def word_tasks(target: Target) -> tuple[list[FewShotTask], tuple[int, ...], tuple[int, ...]] | None:
    """Few-shot tasks in words that are single tokens, and the tokens between and after a pair.

    Returns None for a model without a tokenizer.

    Raises:
        ValueError: its tokenizer splits the words of all tasks but one.
    """
    if not has_tokenizer(target):
        return None
    tasks = []
    for name, text in WORDS.items():
        words = text.split()
        tokens = [_single_token(target, word) for word in words]
        pairs = dict(zip(tokens[::2], tokens[1::2], strict=True))
        known = {x: y for x, y in pairs.items() if x is not None and y is not None}
        if len(known) >= _FEWEST_PAIRS:
            tasks.append(FewShotTask(name, tuple(known), tuple(known.values())))
    if len(tasks) < 2:
        raise ValueError(
            "its tokenizer splits most words of the few-shot tasks "
            f"({', '.join(WORDS)}): two tasks in single tokens are needed"
        )
    return tasks, tuple(_encoded(target, ":")), tuple(_encoded(target, "\n"))


def _tokens_of(target: Target, text: str) -> Int[Tensor, "n"]:
    """The tokens of the first half million characters, without special ones."""
    model: Any = target.model
    ids = torch.tensor(_encoded(target, text[:_CHARACTERS]), dtype=torch.int64)
    special = torch.tensor(sorted(set(model.tokenizer.all_special_ids)), dtype=torch.int64)
    return ids[(ids < config_of(model).d_vocab) & ~torch.isin(ids, special)]


def _single_token(target: Target, word: str) -> int | None:
    model: Any = target.model
    for text in (f" {word}", word):
        ids = _encoded(target, text)
        if len(ids) == 1 and ids[0] != model.tokenizer.unk_token_id:
            return ids[0]
    return None


def _encoded(target: Target, text: str) -> list[int]:
    model: Any = target.model
    ids: list[int] = model.tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
    return ids

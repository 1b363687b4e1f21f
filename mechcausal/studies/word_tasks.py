"""Few-shot tasks in words that a model's tokenizer writes as single tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mechcausal.studies.stimuli import encoded, has_tokenizer
from mechcausal.studies.targets import Target
from probes.heads.few_shot import FewShotTask
from probes.reading.hook_names import config_of

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
FEWEST_PAIRS = 8
"""A task with fewer pairs in single tokens is left out."""


@dataclass(frozen=True)
class WordTasks:
    """Few-shot tasks in the tokens of one tokenizer.

    Attributes:
        tasks: tasks with at least `FEWEST_PAIRS` pairs in single tokens.
        between: tokens of the colon between an item and its answer.
        after: tokens of the new line after an answer.
        left_out: the other tasks, each with the reason.
    """

    tasks: list[FewShotTask]
    between: tuple[int, ...]
    after: tuple[int, ...]
    left_out: Mapping[str, str]


def word_tasks(target: Target) -> WordTasks | None:
    """The tasks of `WORDS` for a model, in prompts ` item: answer⏎ item: answer⏎ item:`.

    Every word has a space before it, or no word has one: whichever makes more words single tokens.
    A colon or a new line that the tokenizer does not know is left out of the prompts.

    Returns:
        None for a model without a tokenizer.

    Raises:
        ValueError: fewer than two tasks are in single tokens.
    """
    if not has_tokenizer(target):
        return None
    words = _Spelling.best(target)
    tasks, left_out = [], {}
    for name, text in WORDS.items():
        items, answers = text.split()[::2], text.split()[1::2]
        pairs = {
            words.tokens[item]: words.tokens[answer]
            for item, answer in zip(items, answers, strict=True)
            if item in words.tokens and answer in words.tokens
        }
        if len(pairs) >= FEWEST_PAIRS:
            tasks.append(FewShotTask(name, tuple(pairs), tuple(pairs.values())))
        else:
            left_out[name] = f"{len(pairs)} of {len(items)} pairs"
    if len(tasks) < 2:
        counts = ", ".join(f"{name}: {count}" for name, count in left_out.items())
        raise ValueError(
            f"its tokenizer splits most words of the few-shot tasks ({counts} are single tokens): "
            f"two tasks with {FEWEST_PAIRS} such pairs are needed"
        )
    reason = f"are single tokens, {FEWEST_PAIRS} are needed"
    return WordTasks(
        tasks,
        words.followed_by(":"),
        words.followed_by("\n"),
        {name: f"{count} {reason}" for name, count in left_out.items()},
    )


@dataclass(frozen=True)
class _Spelling:
    """The words of all tasks that are single tokens, if the same text is before each.

    Attributes:
        target: the model.
        before: a space, or nothing.
        tokens: the token of each of these words.
    """

    target: Target
    before: str
    tokens: Mapping[str, int]

    @classmethod
    def best(cls, target: Target) -> "_Spelling":
        """The spelling with more words; with spaces if they are equal."""
        spellings = [cls(target, before, _single_tokens(target, before)) for before in (" ", "")]
        return max(spellings, key=lambda spelling: len(spelling.tokens))

    def followed_by(self, separator: str) -> tuple[int, ...]:
        """The known tokens of a separator after a word; alone it may be written differently."""
        ids = encoded(self.target, separator)
        for word, token in self.tokens.items():
            after_word = encoded(self.target, f"{self.before}{word}{separator}")
            if after_word[:1] == [token]:
                ids = after_word[1:]
                break
        return tuple(token for token in ids if _is_known(self.target, token))


def _single_tokens(target: Target, before: str) -> dict[str, int]:
    tokens = {}
    for word in " ".join(WORDS.values()).split():
        ids = encoded(target, before + word)
        # A tokenizer may drop what it does not know: the token that is left is another word.
        if len(ids) == 1 and _is_known(target, ids[0]) and _reads(target, ids[0], word):
            tokens[word] = ids[0]
    return tokens


def _is_known(target: Target, token: int) -> bool:
    model: Any = target.model
    size: int = config_of(model).d_vocab
    return token < size and bool(token != model.tokenizer.unk_token_id)


def _reads(target: Target, token: int, word: str) -> bool:
    model: Any = target.model
    text: str = model.tokenizer.decode([token])
    return text.strip(" ▁Ġ").casefold() == word.casefold()

"""Small tokenizers of English words, as the common families of models have them."""

from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel, WordPiece
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import PreTrainedTokenizerFast

from mechcausal.studies.word_tasks import WORDS

UNKNOWN, BOS, PAD = "<unk>", "<s>", "<pad>"


def words_of(*tasks: str) -> list[str]:
    """The different words of these tasks; of all when none is named."""
    return list(dict.fromkeys(" ".join(WORDS[name] for name in tasks or WORDS).split()))


def _word_level(words: list[str]) -> Tokenizer:
    """A dictionary of words, which knows a colon and no new line."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate([UNKNOWN, ":", *words])}, UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def _byte_level(words: list[str]) -> Tokenizer:
    """BPE over bytes as in GPT-2: a word has one token after a space, and another one without."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(made, words, " {}: {}\n", initial_alphabet=alphabet)


def _metaspace(words: list[str]) -> Tokenizer:
    """BPE with a space put before the text as in Llama: ":" alone is "▁:", after a word ":"."""
    made = Tokenizer(BPE(unk_token=UNKNOWN))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # As SentencePiece: pieces begin at a space, and hold no punctuation beside letters.
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split(":", "isolated"),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _trained(made, words, "{}: {}\n", special_tokens=[UNKNOWN])


def _word_piece(words: list[str]) -> Tokenizer:
    """Lower case as in BERT; no colon and no new line."""
    made = Tokenizer(WordPiece(unk_token=UNKNOWN))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(vocab_size=4000, show_progress=False, special_tokens=[UNKNOWN])
    made.train_from_iterator(_texts(words, "{} {} "), trainer)
    return made


def _texts(words: list[str], line: str) -> Iterable[str]:
    return [line.format(word, word) for word in words] * 3


def _trained(made: Tokenizer, words: list[str], line: str, **options: Any) -> Tokenizer:
    trainer = BpeTrainer(vocab_size=4000, show_progress=False, **options)
    made.train_from_iterator(_texts(words, line), trainer)
    return made


KINDS: dict[str, Callable[[list[str]], Tokenizer]] = {
    "word level": _word_level,
    "byte level": _byte_level,
    "metaspace": _metaspace,
    "word piece": _word_piece,
}


def word_tokenizer(
    kind: str, words: list[str], *, bos: bool = False, pad: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of one of `KINDS` that knows these words as single tokens."""
    made = KINDS[kind](words)
    special = {}
    if kind != "byte level":
        special["unk_token"] = UNKNOWN
    for name, text, is_given in (("bos_token", BOS, bos), ("pad_token", PAD, pad)):
        if is_given:
            made.add_special_tokens([AddedToken(text)])
            special[name] = text
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = make(tokenizer_object=made, **special)
    return tokenizer

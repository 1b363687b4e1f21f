"""Text as data: reading a corpus, encoding and splitting it, and what counting predicts."""

import hashlib
import math
import os
import re
import sysconfig
from collections import Counter
from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from mechcausal.support import corpora
from mechcausal.support.corpora import Corpus, TextError, read_corpus
from mechcausal.tasks.predictors.ngrams import STRENGTH, NGrams
from mechcausal.tasks.text import N_PARTS, TextTask
from tests.oracles import seeded


def corpus_of(text: str) -> Corpus:
    content = text.encode()
    return Corpus("made up", text, hashlib.sha256(content).hexdigest(), len(content))


def task_of(text: str, *, vocab_size: int = 5, context: int = 8, **options: bool) -> TextTask:
    return TextTask(corpus_of(text), vocab_size=vocab_size, context=context, **options)


def random_text(n: int, alphabet: str = "abcd", seed: int = 0) -> str:
    drawn = torch.randint(len(alphabet), (n,), generator=seeded(seed)).tolist()
    return "".join(alphabet[i] for i in drawn)


# --- Corpora ---


def test_a_file_is_read_with_its_hash_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("Ein Käfer\n", encoding="utf-8")
    corpus = read_corpus(str(path))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (corpus.text, corpus.sha256, corpus.n_bytes) == ("Ein Käfer\n", expected, 11)
    assert corpus.facts == {"name": str(path), "sha256": expected, "characters": 10, "bytes": 11}
    assert not corpus.is_bundled


def test_pythons_own_texts_are_read() -> None:
    assert read_corpus("topics").text == "".join(topics.topics.values())
    source = read_corpus("stdlib")
    one = Path(sysconfig.get_path("stdlib")) / "this.py"
    assert source.is_bundled
    assert one.read_text(encoding="utf-8") in source.text


def test_another_hash_is_refused_with_both(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("one")
    first = read_corpus(str(path)).sha256
    assert read_corpus(str(path), sha256=first).text == "one"
    path.write_text("two")
    with pytest.raises(TextError) as caught:
        read_corpus(str(path), sha256=first)
    message = str(caught.value)
    assert first in message
    assert hashlib.sha256(b"two").hexdigest() in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no such file; allowed: a file, or topics or stdlib"),
        (b"", "holds no text"),
        (b" \n\t ", "holds no text"),
        (b"caf\xe9 au lait", "not UTF-8: byte 3"),
    ],
)
def test_files_without_text_are_refused(tmp_path: Path, content: bytes | None, part: str) -> None:
    path = tmp_path / "some.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=re.escape(f"{path}: {part}")):
        read_corpus(str(path))


def test_what_is_no_small_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TextError, match="is a folder"):
        read_corpus(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TextError, match="is no regular file"):
        read_corpus(str(tmp_path / "pipe"))
    with pytest.raises(TextError, match="null"):
        read_corpus("a\0b")
    monkeypatch.setattr(corpora, "MAX_BYTES", 10)
    (tmp_path / "long.txt").write_text("x" * 11)
    with pytest.raises(TextError, match="11 bytes; at most 10 are read"):
        read_corpus(str(tmp_path / "long.txt"))


# --- Characters, split and windows ---


def test_the_most_frequent_characters_are_tokens_and_the_others_share_a_bucket() -> None:
    task = task_of("aaaaa \n\n bbb cc d e" * 60, vocab_size=4)  # blanks are squeezed to one
    assert task.vocabulary == ("a", " ", "b")  # 5, 4 and 3 times
    held_out = task.held_out[0].tolist()
    text = re.sub(r"\s+", " ", "aaaaa \n\n bbb cc d e" * 60)
    part = text[: len(text) // N_PARTS]
    expected = [{"a": 0, " ": 1, "b": 2}.get(character, 3) for character in part]
    assert task.training[0].tolist() + held_out == expected
    assert len(held_out) == len(part) // 10


def test_a_small_alphabet_leaves_the_bucket_empty() -> None:
    task = task_of(random_text(900, "ab"), vocab_size=9)
    assert sorted(task.vocabulary) == ["a", "b"]
    assert set(task.training.flatten().tolist()) == {0, 1}


def test_training_windows_lie_in_the_training_parts_and_held_out_ones_do_not_overlap() -> None:
    characters = [chr(0x4E00 + i) for i in range(1000)]  # every character once: places show
    task = task_of("".join(characters), vocab_size=1001, context=8)
    place = {character: i for i, character in enumerate(characters)}
    training = torch.tensor([place[c] for c in task.vocabulary])
    assert sorted(training.tolist()) == [i for i in range(1000) if i % 100 < 90]
    drawn = task.sample(4000, seeded())
    starts = training[drawn[:, 0]]
    assert torch.equal(training[drawn], starts.unsqueeze(1) + torch.arange(8))
    assert set((starts % 100).tolist()) == set(range(83))  # 90 - 8 + 1 starts in each part
    windows = task.windows(10**6, seeded())
    assert windows.shape == (10, 8)
    assert task.windows(3, seeded()).shape == (3, 8)
    assert windows.dtype == torch.long


def test_halves_are_interleaved_within_each_part() -> None:
    characters = [chr(0x4E00 + i) for i in range(1000)]
    task = task_of("".join(characters), vocab_size=1001, interleaved=True)
    place = {character: i for i, character in enumerate(characters)}
    training = torch.tensor([place[c] for c in task.vocabulary])
    first = training[task.training[0].long()]
    assert first[:6].tolist() == [0, 45, 1, 46, 2, 47]
    assert training[task.training[3].long()][:4].tolist() == [300, 345, 301, 346]
    assert task.held_out.shape == (N_PARTS, 10)


def test_texts_that_teach_nothing_are_refused() -> None:
    with pytest.raises(TextError, match="799 characters after squeezing blanks; windows of 8 need"):
        task_of(random_text(799))
    with pytest.raises(TextError, match="all its characters are equal"):
        task_of("a" * 2000)


# --- N-grams ---


def brute_force(parts: list[str], windows: list[str], v: int, order: int, stride: int) -> float:
    """The same model by counting strings."""
    counts: Counter[str] = Counter()
    contexts: Counter[str] = Counter()
    for part in parts:
        counts.update(part)
        for n in range(2, order + 1):
            for end in range((n - 1) * stride, len(part)):
                ngram = part[end - (n - 1) * stride : end + 1 : stride]
                counts[ngram] += 1
                contexts[ngram[:-1] + "|"] += 1
    total = sum(len(part) for part in parts)

    def probability(history: str, following: str) -> float:
        if not history:
            return (counts[following] + 1) / (total + v)
        lower = probability(history[1:], following)
        seen = contexts[history + "|"]
        return (counts[history + following] + STRENGTH * lower) / (seen + STRENGTH)

    losses = []
    for window in windows:
        for end in range(1, len(window)):
            reach = min(order - 1, end // stride)
            history = window[end - reach * stride : end : stride] if reach else ""
            losses.append(-math.log(probability(history, window[end])))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("stride", [1, 2])
def test_ngram_losses_equal_counting(stride: int) -> None:
    generator = seeded(3)
    training = torch.randint(3, (2, 40), generator=generator)
    windows = torch.randint(4, (5, 7), generator=generator)  # token 3 is new
    losses = NGrams(training.short(), 4, order=4, stride=stride).losses(windows)
    parts, texts = (["".join(map(str, row)) for row in x.tolist()] for x in (training, windows))
    for order in range(1, 5):
        # Orders are told apart by length: a context never equals an n-gram of the same order.
        expected = brute_force(parts, texts, 4, order, stride)
        assert losses[order - 1].item() == pytest.approx(expected, rel=1e-12)


def test_a_copied_text_is_predicted_by_its_trigrams() -> None:
    task = task_of("the cat sat on the mat " * 100, vocab_size=12, context=16)
    losses = NGrams(task.training, 12).losses(task.windows(100, seeded()))
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.4

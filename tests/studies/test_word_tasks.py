"""Few-shot tasks in words: prompts of real tokenizers, and a wired model that does the tasks."""

import json
import warnings
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mechcausal.models.adapter import HookedTransformer
from mechcausal.studies.targets import Target, load_target
from mechcausal.studies.word_tasks import FEWEST_PAIRS, WORDS, WordTasks, word_tasks
from probes import function_vectors
from probes.heads.few_shot import draw_prompts
from probes.heads.stimuli import bos_token
from tests.commands import Command, command_in, refused
from tests.oracles import seeded
from tests.refusals import raises_one_line
from tests.word_tokenizers import KINDS, word_tokenizer, words_of

CONTEXT, SHARPNESS = 32, 40.0
LINES = {
    "word level": "{} : {} ",
    "byte level": " {}: {}\n",
    "metaspace": "{}: {}\n ",
    "word piece": "{} {} ",
}
"""A demonstration, as each kind of tokenizer reads it back: two of them know no new line."""


def target_of(tokenizer: Any, *, size: int | None = None) -> Target:
    """A target that has a tokenizer, and no model that could be run."""
    model: Any = torch.nn.Identity()
    model.tokenizer = tokenizer
    model.cfg = SimpleNamespace(d_vocab=len(tokenizer) if size is None else size)
    return Target("words", model, "auto")


def tasks_of(tokenizer: Any, **options: Any) -> WordTasks:
    tasks = word_tasks(target_of(tokenizer, **options))
    assert tasks is not None
    return tasks


# --- Prompts ---


@pytest.mark.parametrize("special", [False, True], ids=["plain", "BOS and PAD"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_what_the_tokenizer_makes_of_their_text(kind: str, special: bool) -> None:
    tokenizer = word_tokenizer(kind, words_of(), bos=special, pad=special)
    words = tasks_of(tokenizer)
    assert [task.name for task in words.tasks] == list(WORDS)
    assert words.left_out == {}
    bos = bos_token(target_of(tokenizer).model)
    assert bos == (tokenizer.bos_token_id if special else None)
    drawing: dict[str, Any] = {"n_prompts": 5, "n_shots": 3, "shows_query": False, "bos": bos}
    drawing |= {"between": words.between, "after": words.after}
    line = LINES[kind]
    question = line[: line.rindex("{}")].rstrip()
    for task, text in zip(words.tasks, WORDS.values(), strict=True):
        spelled = (text.casefold() if kind == "word piece" else text).split()
        answer_to = dict(zip(spelled[::2], spelled[1::2], strict=True))
        assert len(task.items) == len(answer_to)
        queries = range(len(task.items))
        prompts = draw_prompts(task, queries, **drawing, generator=seeded(0))
        for row, answer in zip(prompts.right.tolist(), prompts.answers.tolist(), strict=True):
            assert row[:special] == [bos] * special
            tokens = row[special:]
            read = tokenizer.decode(tokens)
            *pairs, asked = read.replace(":", " ").split()
            items = pairs[::2]
            demonstrations = [line.format(item, answer_to[item]) for item in items]
            assert read == "".join(demonstrations) + question.format(asked)
            assert tokenizer(read, add_special_tokens=False)["input_ids"] == tokens
            assert len({*items, asked}) == 4
            assert tokenizer.decode([answer]).strip() == answer_to[asked]


def test_words_are_written_as_more_of_them_are_single_tokens() -> None:
    """With a space before each, or without; never some with and some without."""
    tokenizer = word_tokenizer("byte level", words_of())
    spaced = tasks_of(tokenizer).tasks[0].items
    assert tokenizer.decode(spaced[:2]) == " big hot"
    # A model that has only the first tokens of a tokenizer: words that it learned last are gone.
    alphabet_and_few = 320
    with pytest.raises(ValueError, match="splits most words"):
        tasks_of(tokenizer, size=alphabet_and_few)


# --- Tasks that a tokenizer cannot write ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_whose_words_are_split_is_left_out_with_the_reason(kind: str) -> None:
    tokenizer = word_tokenizer(kind, words_of("antonyms", "capitals"))
    words = tasks_of(tokenizer)
    assert [task.name for task in words.tasks] == ["antonyms", "capitals"]
    assert list(words.left_out) == ["past tenses", "plurals"]
    for reason in words.left_out.values():
        assert reason == f"0 of 16 pairs are single tokens, {FEWEST_PAIRS} are needed"


@pytest.mark.parametrize("kind", KINDS)
def test_one_task_is_not_enough(kind: str) -> None:
    tokenizer = word_tokenizer(kind, words_of("capitals"))
    with raises_one_line(ValueError, match="splits most words") as caught:
        tasks_of(tokenizer)
    assert "antonyms: 0 of 16 pairs, past tenses: 0 of 16 pairs" in str(caught.value)
    assert "capitals" not in str(caught.value)


def test_a_word_that_is_read_as_another_one_is_not_used() -> None:
    """A BPE without an unknown token drops the letters that it never saw."""
    made = Tokenizer(BPE())
    made.train_from_iterator(["aris erlin"] * 9, BpeTrainer(show_progress=False))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=made)
    assert len(tokenizer("Paris")["input_ids"]) == 1
    with pytest.raises(ValueError, match="capitals: 0 of 16 pairs"):
        tasks_of(tokenizer)


def test_tokens_that_the_model_does_not_have_are_not_used() -> None:
    tokenizer = word_tokenizer("word level", words_of())
    first_two = 2 + len(words_of("antonyms", "past tenses"))  # after the unknown word and ":"
    words = tasks_of(tokenizer, size=first_two)
    assert [task.name for task in words.tasks] == ["antonyms", "past tenses"]
    assert list(words.left_out) == ["capitals", "plurals"]


def test_a_model_without_a_tokenizer_has_no_words() -> None:
    assert word_tasks(target_of(None, size=9)) is None


# --- A model that does the tasks ---


@dataclass(frozen=True)
class Speaker:
    """A wired model that does the tasks in words.

    Attributes:
        target: the model with its tokenizer.
        vector: the head that carries the task.
        copier: a head that copies the answers that it sees.
    """

    target: Target
    vector: tuple[int, int]
    copier: tuple[int, int]


def speaker(kind: str, *, special: bool = False) -> Speaker:
    """Wire two layers of three heads for the words and separators of a tokenizer.

    In layer 0, two heads copy the word before, one from an item to its answer, one from the last
    item to the end of the prompt; each neuron recognises a pair of a task and writes that task. In
    layer 1, head 2 averages this over the answers, and each neuron says the answer to one item in
    one task.
    """
    tokenizer = word_tokenizer(kind, words_of(), bos=special, pad=special)
    words = tasks_of(tokenizer)
    known = sorted({token for task in words.tasks for token in (*task.items, *task.answers)})
    sizes = (len(known), CONTEXT, len(known), len(known), len(words.tasks), len(words.tasks))
    ends = [0, *accumulate((*sizes, len(known)))]
    word, position, item, asked, evidence, task, said = map(slice, ends[:-1], ends[1:])
    pairs = [
        (number, known.index(x), known.index(y))
        for number, each in enumerate(words.tasks)
        for x, y in zip(each.items, each.answers, strict=True)
    ]
    d_head = len(known) + CONTEXT
    config: dict[str, Any] = {"n_layers": 2, "n_heads": 3, "d_model": ends[-1], "d_head": d_head}
    config |= {"d_mlp": len(pairs), "act_fn": "relu", "n_ctx": CONTEXT, "d_vocab": len(tokenizer)}
    config |= {"normalization_type": None, "use_attn_scale": False, "device": "cpu"}
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        model = HookedTransformer(config)
    (first, first_mlp), (second, second_mlp) = ((b.attn, b.mlp) for b in blocks_of(model))
    copy, places = torch.eye(len(known)), torch.eye(CONTEXT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[known, word] = copy
        model.pos_embed.W_pos[:, position] = places
        model.unembed.W_U[said, known] = 12 * copy
        gap = len(words.between)
        for head, distance, into in ((0, 1 + gap, item), (1, gap, asked)):
            first.W_Q[head, position, :CONTEXT] = places.roll(-distance, dims=1)
            first.W_K[head, position, :CONTEXT] = SHARPNESS * places
            first.W_V[head, word, : len(known)] = copy
            first.W_O[head, : len(known), into] = copy
        for head, read, into, strength in ((1, word, said, 0.3), (2, evidence, task, 1.0)):
            size = read.stop - read.start
            second.W_Q[head, position, 0] = 1
            second.W_K[head, [y for _, _, y in pairs], 0] = SHARPNESS
            second.W_V[head, read, :size] = torch.eye(size)
            second.W_O[head, :size, into] = strength * torch.eye(size)
        for mlp in (first_mlp, second_mlp):
            mlp.b_in.fill_(-1)  # a neuron is on if both of its inputs are
        for neuron, (number, x, y) in enumerate(pairs):
            first_mlp.W_in[[item.start + x, y], neuron] = 1
            first_mlp.W_out[neuron, evidence.start + number] = 1
            second_mlp.W_in[[asked.start + x, task.start + number], neuron] = 1
            second_mlp.W_out[neuron, said.start + y] = 1
    model.tokenizer = tokenizer
    return Speaker(Target("speaker", model, "auto"), vector=(1, 2), copier=(1, 1))


def blocks_of(model: Any) -> list[Any]:
    return list(model.blocks)


@pytest.mark.parametrize(
    ("kind", "special"),
    [("word level", True), ("byte level", True), ("metaspace", False), ("word piece", False)],
)
def test_the_wired_head_is_named_from_prompts_in_words(kind: str, special: bool) -> None:
    wired = speaker(kind, special=special)
    words = word_tasks(wired.target)
    assert words is not None
    options: dict[str, Any] = {"between": words.between, "after": words.after, "n_prompts": 4}
    vectors = function_vectors(wired.target.model, words.tasks, **options)
    assert vectors.heads() == [wired.vector]
    assert vectors.right > 0.99
    assert vectors.shuffled < 0.01
    assert vectors.row(wired.vector)["own"] > 0.99
    assert abs(vectors.row(wired.vector)["other"]) < 0.01
    assert abs(vectors.row(wired.copier)["effect"]) < 0.01


# --- The command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random GPT-2s as Hugging Face saves them, whose tokenizers know words."""
    folder = tmp_path_factory.mktemp("speaking")
    tokenizers = {
        "three_tasks": word_tokenizer(
            "byte level", words_of("antonyms", "capitals", "plurals"), bos=True, pad=True
        ),
        "no_special": word_tokenizer("metaspace", words_of()),
        "one_task": word_tokenizer("word level", words_of("plurals"), bos=True),
        "short": word_tokenizer("word level", words_of()),
    }
    for name, tokenizer in tokenizers.items():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 700}
        config = GPT2Config(**sizes, n_positions=12 if name == "short" else 32)
        model: Any = GPT2LMHeadModel(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run `mechcausal detect MODEL --function-vectors` beside the models, on few sequences."""
    options = ("--function-vectors", "--sequences", "4")
    return command_in(folder, monkeypatch, capsys, "detect", *options)


def test_the_command_names_the_tasks_and_those_left_out(command: Command) -> None:
    code, output, errors = command("three_tasks")
    assert (code, errors) == (0, "")
    assert "mean outputs on 3 few-shot tasks" in output
    assert "tasks: antonyms, capitals, plurals\n" in output
    reason = "0 of 16 pairs are single tokens, 8 are needed"
    assert f"task past tenses is left out: {reason}\n" in output
    assert "the model does not do these tasks" in output  # it is random
    _, output, _ = command("three_tasks", "--json")
    content = json.loads(output)["function_vectors"]
    assert content["tasks"] == ["antonyms", "capitals", "plurals"]
    assert content["left_out"] == {"past tenses": reason}
    assert not content["does_tasks"]
    assert not any(row["named"] for row in content["heads"])


def test_a_tokenizer_without_special_tokens_is_asked_without_them(command: Command) -> None:
    code, output, errors = command("no_special", "--json")
    assert (code, errors) == (0, "")
    content = json.loads(output)["function_vectors"]
    target = load_target("no_special")
    words = word_tasks(target)
    assert words is not None
    separators = {"between": words.between, "after": words.after}
    without = function_vectors(target.model, words.tasks, bos=None, **separators)
    assert bos_token(target.model) is None  # though TransformerLens gives the tokenizer one
    assert content["right"] == pytest.approx(without.right, rel=1e-5)
    assert content["shuffled"] == pytest.approx(without.shuffled, rel=1e-5)


@pytest.mark.usefixtures("command")
def test_what_cannot_be_asked_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "detect", "one_task", "--function-vectors")
    assert "one_task: its tokenizer splits most words of the few-shot tasks" in line
    line = refused(capsys, "detect", "short", "--function-vectors")
    assert "short: sequences of 17 tokens do not fit the context of 12" in line


def test_the_command_shows_the_head_that_carries_the_tasks(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired = speaker("word piece", special=True)
    monkeypatch.setattr("mechcausal.studies.targets.load_target", lambda *_, **__: wired.target)
    code, output, _ = command("speaker")
    assert code == 0
    (row,) = [line for line in output.splitlines() if line.rstrip().endswith("function vector")]
    assert row.split()[0] == "1.2"
    assert "tasks: antonyms, past tenses, capitals, plurals\n" in output
    assert "p(answer) after 5 demonstrations: 0.99" in output
    assert "is left out" not in output
    assert "does not do these tasks" not in output

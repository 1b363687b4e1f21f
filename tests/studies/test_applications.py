"""Recommendation and sentiment: the rules of the data, rating files, training, explanations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mechcausal.studies.explanations.applications import (
    CLASSIFIER,
    RECOMMENDER,
    Application,
    Recommendation,
    Sentiment,
)
from mechcausal.studies.explanations.comparison import changes, compare
from mechcausal.studies.explanations.examples import PAD
from mechcausal.studies.explanations.movielens import RatedSessions, RatingsError, load_ratings
from mechcausal.studies.explanations.recording import TableRow
from mechcausal.studies.explanations.reviews import CLASSES, CLS, NOT, WORDS, ReviewRule
from mechcausal.studies.explanations.sessions import FIRST_ITEM, MASK, ThemeRule
from probes import explain
from tests.oracles import seeded

# --- The rules ---


def test_the_next_item_is_the_sequel_of_the_theme_seen_most() -> None:
    rule = ThemeRule(themes=3, members=2, others=4, length=9, most=4)
    batch = rule.sample(300, seeded())
    assert batch.tokens.shape == (300, 9)
    assert batch.causes is not None
    sequels = FIRST_ITEM + rule.themes * rule.members
    leads = set()
    for items, target, causes in zip(
        batch.tokens.tolist(), batch.target.tolist(), batch.causes.tolist(), strict=True
    ):
        themes = [(i - FIRST_ITEM) // rule.members if i < sequels else None for i in items]
        counts = [themes.count(theme) for theme in range(rule.themes)]
        assert counts.count(max(counts)) == 1
        assert target == sequels + counts.index(max(counts))
        assert causes == [theme == counts.index(max(counts)) for theme in themes]
        ordered = sorted(counts)
        assert ordered[0] == 0 < ordered[1] < ordered[2] <= 4
        assert not any(sequels <= i < sequels + rule.themes for i in items)
        assert max(items) < rule.vocab_size
        leads.add((ordered[2], ordered[1]))
    assert leads == {(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)}


@pytest.mark.parametrize(
    ("text", "sentiment"),
    [
        ("[CLS] the film was good", "positive"),
        ("[CLS] the film was not good", "negative"),
        ("[CLS] not bad and not dull", "positive"),
        ("[CLS] good and bad", "neutral"),
        ("[CLS] not the good", "positive"),
        ("[CLS] good good bad not", "positive"),
        ("[CLS] the film", "neutral"),
    ],
)
def test_negation_flips_the_cue_word_behind_it(text: str, sentiment: str) -> None:
    tokens = torch.tensor([[WORDS.index(word) for word in text.split()]])
    assert CLASSES[int(ReviewRule().label(tokens))] == sentiment


def test_drawn_reviews_have_cue_words_and_every_not_precedes_one() -> None:
    rule = ReviewRule(length=9, most=3, negated=0.5)
    batch = rule.sample(400, seeded())
    assert batch.causes is not None
    assert batch.tokens.shape == (400, 10)
    assert (batch.tokens[:, 0] == CLS).all()
    assert (batch.target == rule.label(batch.tokens)).all()
    assert not (batch.tokens == PAD).any()
    negations = batch.tokens == NOT
    cues = batch.causes & ~negations
    assert (negations[:, :-1] == (negations[:, :-1] & cues[:, 1:])).all()
    assert set(cues.sum(1).tolist()) == {1, 2, 3}
    assert set(batch.target.tolist()) == {0, 1, 2}
    share = negations.sum() / cues.sum()
    assert abs(share - 0.5) < 4 * 0.5 / float(cues.sum()) ** 0.5


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        (ThemeRule, {"themes": 1}),
        (ThemeRule, {"members": 0}),
        (ThemeRule, {"others": 0}),
        (ThemeRule, {"most": 1}),
        (ThemeRule, {"length": 4}),
        (ReviewRule, {"most": 0}),
        (ReviewRule, {"length": 7}),
        (ReviewRule, {"negated": 1.5}),
    ],
)
def test_an_impossible_rule_is_refused(rule: Any, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least|length is 4"):
        rule(**changed)


# --- Training and explanations ---


def trained(kind: str, steps: int, **changed: Any) -> Application:
    if kind == "recommender":
        rule = ThemeRule(themes=4, members=2, others=6, length=8)
        return Recommendation(rule, replace(RECOMMENDER, steps=steps, **changed))
    return Sentiment(settings=replace(CLASSIFIER, steps=steps, **changed))


@pytest.mark.parametrize("kind", ["recommender", "sentiment"])
def test_training_repeats_from_its_seed_and_leaves_global_generators_alone(kind: str) -> None:
    application = trained(kind, 3, batch_size=8)
    before = torch.random.get_rng_state()
    weights = [application.train(seed).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["embed.W_E"], weights[2]["embed.W_E"])
    inputs = [application.inputs(4, seed).tokens for seed in (1, 1, 2)]
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0], inputs[2])


def test_a_classifier_learns_more_than_the_most_frequent_class() -> None:
    application = trained("sentiment", 40, batch_size=64)
    share = application.held_out(500, seeded()).target.bincount().max() / 500
    assert application.accuracy(application.train(3), 3) > share


@pytest.mark.slow
def test_explanations_of_a_trained_recommender_are_small_true_and_compared() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        application = trained("recommender", 200, batch_size=128, lr=5e-3)
        model = application.train(0)
        assert application.accuracy(model, 0) > 0.97
        examples = application.inputs(8, 0)
        figures = compare(application, model, examples, budget=300, n_eff=None, seed=0)
        causal = figures["causal"]
        assert causal.size <= 2.2
        assert causal.found == causal.verified == 1
        assert figures["minimum"].above_minimum == 0
        for method, values in figures.items():
            assert values.above_minimum >= 0
            assert values.calls <= 300 or method == "minimum"
    finally:
        torch.set_num_threads(threads)


def test_table_rows_average_what_is_defined() -> None:
    samples = [{"size": 1.0, "causes": float("nan")}, {"size": 3.0, "causes": None}]
    row = TableRow.over(samples, method="causal")
    assert row.as_json() == {
        "method": "causal",
        **{"size": 2.0, "size_stderr": 1.0, "causes": None, "causes_stderr": None},
    }
    assert TableRow.over(samples[:1]).stderr["size"] is None


# --- MovieLens ---

RATINGS = [  # user, item, rating, time
    ("7", "50", 5, 30),
    ("7", "10", 3, 10),
    ("7", "20", 4, 20),
    ("7", "30", 4, 40),
    ("3", "10", 1, 5),
    ("3", "50", 2, 5),
    ("3", "20", 2, 6),
    ("9", "10", 2, 1),
]


def load_written(folder: Path, separator: str, header: str = "", **options: Any) -> RatedSessions:
    path = folder / "ratings"
    path.write_text(header + "".join(separator.join(map(str, row)) + "\n" for row in RATINGS))
    return load_ratings(path, **options)


@pytest.mark.parametrize(
    ("separator", "header"),
    [("::", ""), (",", "userId,movieId,rating,timestamp\n"), ("\t", "")],
)
def test_every_movielens_format_gives_histories_in_order_of_time(
    tmp_path: Path, separator: str, header: str
) -> None:
    sessions = load_written(tmp_path, separator, header, length=3)
    names = [[sessions.item_ids[t - FIRST_ITEM] for t in h] for h in sessions.histories]
    assert names == [["10", "20", "50", "30"], ["10", "50", "20"]]  # user 9 has too few
    assert sessions.item_ids == ("10", "20", "50", "30")  # the most rated first
    assert sessions.vocab_size == FIRST_ITEM + 4
    test, train = sessions.held_out(10, seeded()), sessions.sample(200, seeded())
    rows = [
        {tuple(row) for row in torch.cat([batch.tokens, batch.target[:, None]], 1).tolist()}
        for batch in (test, train)
    ]
    assert rows[0] == {(2, 3, 4, 5), (PAD, 2, 4, 3)}
    # never what is held out
    assert rows[1] == {(PAD, PAD, 2, 3), (PAD, 2, 3, 4), (PAD, PAD, 2, 4)}
    assert train.causes is None


def test_rare_items_are_left_out(tmp_path: Path) -> None:
    sessions = load_written(tmp_path, "::", most_items=3)
    assert sessions.item_ids == ("10", "20", "50")
    assert all(len(history) == 3 for history in sessions.histories)


def test_a_recommender_trains_on_ratings_and_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "ratings.dat"
    path.write_text("".join(f"{u}::{i}::5::{i}\n" for u in range(20) for i in range(u % 3, 9)))
    sessions = load_ratings(path, length=6)
    application = Recommendation(sessions, replace(RECOMMENDER, steps=12))
    model = application.train(0)
    tokens = application.inputs(3, 0).tokens
    assert tokens[:, -1].tolist() == [MASK] * 3
    for row in tokens:
        explanation = explain(model, row, replacement=PAD, node=-1, fill=True)
        if explanation.found:
            assert changes(model, row, explanation, node=-1)


BAD = [
    ("", "empty"),
    ("\n\n", "empty"),
    ("1;2;3;4\n", "line 1: '1;2;3;4' is not UserID::MovieID"),
    ("movieId,userId,rating,timestamp\n", "is not UserID::MovieID"),
    ("1::2::3\n", "line 1: 3 fields"),
    ("1::2::3::4\n1::2::3::4::5\n", "line 2: 5 fields"),
    ("1::2::good::4\n", "rating 'good'"),
    ("1::2::3::late\n", "timestamp 'late'"),
    ("1::2::3::nan\n", "timestamp 'nan'"),
    ("::2::3::4\n", "the user is empty"),
    ("1::::3::4\n", "the item is empty"),
    ("1::2::3::4\n", "0 users with three ratings"),
    ("1::2::3::4\n1::2::3::4\n1::2::3::4\n", "1 items"),
    (None, "No such file"),
    (bytes(range(256)), "not a text file"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_a_file_without_ratings_is_refused_in_one_line(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "ratings"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RatingsError) as error:
        load_ratings(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(RatingsError, match="directory"):
        load_ratings(tmp_path)

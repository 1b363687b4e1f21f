"""Recommendation: the rule of the sessions, the file formats, a model that learns, explanations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from mechcausal.studies.explanations.comparison import changes, compare, over_seeds
from mechcausal.studies.explanations.movielens import RatingsError, load_ratings
from mechcausal.studies.explanations.recommender import (
    RecommenderSettings,
    hit_rate,
    train_recommender,
    with_mask,
)
from mechcausal.studies.explanations.sessions import FIRST_ITEM, MASK, PAD, SessionBatch, ThemeRule
from probes import explain


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_next_item_is_the_sequel_of_the_theme_seen_most() -> None:
    rule = ThemeRule(themes=3, members=2, others=4, length=9, most=4)
    batch = rule.sample(300, generator())
    assert batch.items.shape == (300, 9)
    assert batch.causes is not None
    sequels = FIRST_ITEM + rule.themes * rule.members
    leads = set()
    for items, target, causes in zip(
        batch.items.tolist(), batch.target.tolist(), batch.causes.tolist(), strict=True
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
    "changes_", [{"themes": 1}, {"members": 0}, {"others": 0}, {"most": 1}, {"length": 4}]
)
def test_a_rule_that_cannot_be_is_refused(changes_: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least|length is 4"):
        ThemeRule(**changes_)


def test_training_repeats_from_its_seed_and_leaves_global_generators_alone() -> None:
    before = torch.random.get_rng_state()
    settings = RecommenderSettings(steps=3, batch_size=8)
    weights = [
        train_recommender(ThemeRule(), seed=seed, settings=settings).state_dict()
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["embed.W_E"], weights[2]["embed.W_E"])


@pytest.mark.slow
def test_explanations_of_a_trained_recommender_are_small_true_and_compared() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rule = ThemeRule(themes=4, members=2, others=6, length=8)
        settings = RecommenderSettings(steps=200, batch_size=128, lr=5e-3)
        model = train_recommender(rule, seed=0, settings=settings)
        assert hit_rate(model, rule, n_sessions=500, seed=1) > 0.97
        batch = rule.sample(12, generator(2))
        assert batch.causes is not None
        tokens = with_mask(batch.items)
        options: dict[str, Any] = {"replacement": PAD, "node": -1}
        figures = compare(
            model,
            tokens,
            causes=pad(batch.causes, (0, 1)),
            fill=True,
            budget=300,
            n_eff=None,
            seed=0,
            **options,
        )
        causal = figures["causal"]
        assert causal.size <= 2.2
        assert causal.found == causal.verified == 1
        assert figures["minimum"].above_minimum == 0
        assert all(
            f.above_minimum >= 0 and f.calls <= 300 for m, f in figures.items() if m != "minimum"
        )
        found = explain(model, tokens[0], fill=True, **options)
        assert changes(model, tokens[0], found, **options)
        rows = over_seeds([figures, figures])
        assert rows[0].mean["size"] == pytest.approx(causal.size)
        assert rows[0].stderr["size"] == 0
    finally:
        torch.set_num_threads(threads)


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


def written(folder: Path, kind: str) -> Path:
    separator, header, name = {
        "dat": ("::", "", "ratings.dat"),
        "csv": (",", "userId,movieId,rating,timestamp\n", "ratings.csv"),
        "tab": ("\t", "", "u.data"),
    }[kind]
    lines = [separator.join(map(str, row)) for row in RATINGS]
    path = folder / name
    path.write_text(header + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["dat", "csv", "tab"])
def test_every_movielens_format_gives_histories_in_order_of_time(tmp_path: Path, kind: str) -> None:
    sessions = load_ratings(written(tmp_path, kind), length=3)
    names = [[sessions.item_ids[t - FIRST_ITEM] for t in h] for h in sessions.histories]
    assert names == [["10", "20", "50", "30"], ["10", "50", "20"]]  # user 9 has too few
    assert sessions.item_ids == ("10", "20", "50", "30")  # the most rated first
    assert sessions.vocab_size == FIRST_ITEM + 4
    test = sessions.held_out(10, generator())
    assert {tuple(row) for row in torch.cat([test.items, test.target[:, None]], 1).tolist()} == {
        (2, 3, 4, 5),
        (PAD, 2, 4, 3),
    }
    train = sessions.sample(200, generator())
    rows = {tuple(row) for row in torch.cat([train.items, train.target[:, None]], 1).tolist()}
    assert rows == {(PAD, PAD, 2, 3), (PAD, 2, 3, 4), (PAD, PAD, 2, 4)}  # never what is held out
    assert train.causes is None


def test_rare_items_are_left_out(tmp_path: Path) -> None:
    sessions = load_ratings(written(tmp_path, "dat"), most_items=3)
    assert sessions.item_ids == ("10", "20", "50")
    assert all(len(history) == 3 for history in sessions.histories)


def test_a_recommender_trains_on_ratings_and_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "ratings.dat"
    path.write_text("".join(f"{u}::{i}::5::{i}\n" for u in range(20) for i in range(u % 3, 9)))
    sessions = load_ratings(path, length=6)
    model = train_recommender(sessions, seed=0, settings=RecommenderSettings(steps=30))
    batch: SessionBatch = sessions.held_out(3, generator())
    tokens = with_mask(batch.items)
    assert tokens[:, -1].tolist() == [MASK] * 3
    for row in tokens:
        found = explain(model, row, replacement=PAD, node=-1, fill=True)
        if found.found:
            assert changes(model, row, found, replacement=PAD, node=-1)


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
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message for _, message in BAD])
def test_a_file_that_is_no_ratings_is_refused_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "ratings"
    path.write_text(text)
    with pytest.raises(RatingsError) as error:
        load_ratings(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for path, message in (
        (tmp_path / "gone", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "binary", "not a text file"),
    ):
        with pytest.raises(RatingsError, match=message):
            load_ratings(path)

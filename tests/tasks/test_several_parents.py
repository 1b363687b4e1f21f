"""Tasks with several parents: both samplers against enumeration, predictions against counting."""

import math
from itertools import product

import pytest
import torch
from scipy import stats

from mechcausal.graphs import CausalGraph, GraphError, chain, k_gram, two_parents
from mechcausal.tasks import (
    Batch,
    SeveralParentsTask,
    SingleParentTask,
    build_task,
    soft_cross_entropy,
)
from mechcausal.tasks import several_parents as module
from mechcausal.tasks.dirichlet import sample_dirichlet
from mechcausal.tasks.predictors import (
    bayes_prediction,
    bigram_prediction,
    context_prediction,
    strategies,
)
from mechcausal.tasks.predictors.unigram import smoothing_total
from mechcausal.tasks.priors import DirichletPrior, FixedTransition, PriorError
from tests.oracles import (
    MIXED,
    integrated_probability,
    seeded,
    symmetric_task,
    urn_counts,
    z_score,
)
from tests.refusals import raises_one_line

THREE_PARENTS = CausalGraph(((), (), (), (0, 1, 2), (1, 2, 3), (3,), (0, 2, 5)), (3, 4, 6))
NEW_NUMBER = CausalGraph(((), (0,), (1,), (0,)), (1, 2, 3))
STICKY = FixedTransition(((0.9, 0.1), (0.2, 0.8)))


def draw(task: SeveralParentsTask, sampler: str, n: int, seed: int) -> Batch:
    generator = seeded(seed)
    if sampler == "urn":
        return task.sample(n, generator=generator)
    return task.sample_given(task.sample_tensors(n, generator=generator), generator=generator)


@pytest.mark.parametrize("sampler", ["urn", "tensors"])
@pytest.mark.parametrize("graph", [MIXED, THREE_PARENTS, NEW_NUMBER, two_parents(6)])
@pytest.mark.parametrize("alpha", [(0.4, 1.3), (0.1, 0.1)])
def test_both_samplers_draw_tokens_and_target_from_the_integrated_law(
    graph: CausalGraph, sampler: str, alpha: tuple[float, float]
) -> None:
    """All sequences by chi-squared; the target's first two moments given each of them by z."""
    task, n = SeveralParentsTask(graph, DirichletPrior(alpha)), 60_000
    batch = draw(task, sampler, n, seed=3)
    sequences = list(product(range(2), repeat=task.sequence_length))
    expected = torch.tensor([n * integrated_probability(task, s) for s in sequences])
    assert expected.sum().item() == pytest.approx(n, rel=1e-4)
    weights = 2 ** torch.arange(task.sequence_length).flip(0)
    which = (batch.tokens * weights).sum(1)
    observed = torch.bincount(which, minlength=len(sequences))
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert stats.chi2.sf(statistic, len(sequences) - 1) > 1e-3
    scores = []
    for index, tokens in enumerate(sequences):
        if observed[index] < 50:
            continue
        context = tuple(tokens[parent] for parent in task.query_parents)
        counts = urn_counts(task, tokens).get(context, [0, 0])
        first, total = alpha[0] + counts[0], sum(alpha) + sum(counts)
        drawn = batch.target[which == index, 0].double()
        scores.append(z_score(drawn, first / total))
        second = first * (first + 1) / (total * (total + 1))
        scores.append(z_score(drawn.square(), second))
    assert len(scores) > 10
    assert max(map(abs, scores)) < 5
    assert sum(score**2 for score in scores) / len(scores) < 2


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_both_samplers_agree_on_longer_sequences(alpha: float) -> None:
    """Frequencies of pairs of equal tokens, and how often the target's context came before."""
    task, n = symmetric_task(k_gram(24, 3), alpha, 3), 20_000
    urn, given = (draw(task, sampler, n, seed=5) for sampler in ("urn", "tensors"))
    for lag in range(1, 5):
        means = [(b.tokens[:, lag:] == b.tokens[:, :-lag]).double().mean(1) for b in (urn, given)]
        spread = math.sqrt(sum(float(m.var()) for m in means) / n)
        assert abs(float(means[0].mean() - means[1].mean())) < 4.5 * spread
    counts = [task.context_counts(b.tokens).sum(1).double() for b in (urn, given)]
    spread = math.sqrt(sum(float(c.var()) for c in counts) / n)
    assert abs(float(counts[0].mean() - counts[1].mean())) < 4.5 * spread


def test_contexts_of_more_tokens_than_an_integer_numbers_are_told_apart() -> None:
    """Children of 70 roots that differ in the first or in the last root's token alone."""
    roots = 70
    graph = CausalGraph.from_parents(
        [*[()] * roots, range(roots), range(roots)], query_parents=range(roots)
    )
    task = symmetric_task(graph, 1e-3, 2)
    urns = module._Urns(task, roots, 3, torch.device("cpu"))
    same = [torch.zeros(3, dtype=torch.int64) for _ in range(roots)]
    other = [tokens.clone() for tokens in same]
    other[0][1], other[-1][2] = 1, 1
    zeros, ones = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    half = torch.full((3,), 0.5)
    urns.draw(same, zeros, half, 1e-3)
    assert urns.draw(other, ones, half, 1e-3).tolist() == [0, 1, 1]


def test_one_set_of_tensors_serves_a_whole_batch() -> None:
    task = symmetric_task(MIXED, 0.3, 3)
    one = task.sample_tensors(1, generator=seeded(1))
    shared = {k: tensor.expand(500, *tensor.shape[1:]) for k, tensor in one.items()}
    batch = task.sample_given(shared, generator=seeded(2))
    assert batch.transition is None
    for b in range(0, 500, 50):
        context = batch.tokens[b, list(task.query_parents)]
        assert torch.equal(batch.target[b], one[2][0, context[0], context[1]])


def test_sequences_follow_their_own_deterministic_tensors() -> None:
    task = symmetric_task(THREE_PARENTS, 1e-6, 4)
    tensors = task.sample_tensors(200, generator=seeded(4))
    tokens = task.sample_given(tensors, generator=seeded(5)).tokens
    for b in range(200):
        for child, parents in enumerate(task.graph.parents):
            if parents:
                row = tensors[len(parents)][(b, *tokens[b, list(parents)].tolist())]
                assert row[tokens[b, child]] > 0.99


def test_a_fixed_matrix_serves_one_parent() -> None:
    graph = CausalGraph(((), (0,), (1,)), (2,))
    task = SeveralParentsTask(graph, STICKY)
    batch = task.sample(20_000, generator=seeded(6))
    matrix = torch.tensor(STICKY.rows)
    assert torch.equal(batch.target, matrix[batch.tokens[:, 2]])
    predictions = strategies(task, batch.tokens)
    assert torch.equal(predictions["bigram"], batch.target)
    mean = torch.tensor([0.5, 0.5]) @ matrix @ matrix @ matrix  # of the token after position 2
    torch.testing.assert_close(predictions["unigram"], mean.expand(20_000, 2))
    assert abs(z_score((batch.tokens[:, 0] == 0).double(), 0.5)) < 4  # uniform, not mu
    assert abs(z_score((batch.tokens[:, 1] == 0).double(), 0.55)) < 4


@pytest.mark.parametrize(
    ("graph", "prior", "error", "words"),
    [
        (chain(4), DirichletPrior((1.0, 1.0)), GraphError, "query_parents"),
        (two_parents(4), STICKY, PriorError, "at most one parent"),
    ],
)
def test_tasks_that_make_no_sense_are_refused_in_one_line(
    graph: CausalGraph, prior: DirichletPrior | FixedTransition, error: type, words: str
) -> None:
    with raises_one_line(error, match=words):
        SeveralParentsTask(graph, prior)


def test_wrong_tensors_are_refused_in_one_line() -> None:
    task = symmetric_task(MIXED, 1.0, 3)
    tensors = task.sample_tensors(4, generator=seeded())
    with pytest.raises(PriorError, match=r"given for \[1\] parents"):
        task.sample_given({1: tensors[1]}, generator=seeded())
    with pytest.raises(PriorError, match="tensor of 2 parents has the shape"):
        task.sample_given({**tensors, 2: tensors[2][:2]}, generator=seeded())
    with pytest.raises(PriorError, match="entries"):
        symmetric_task(k_gram(12, 11), 1.0, 10).sample_tensors(1, generator=seeded())


def test_the_task_follows_from_the_graph() -> None:
    prior = DirichletPrior.symmetric(1.0, 3)
    assert isinstance(build_task(chain(4), prior), SingleParentTask)
    assert isinstance(build_task(k_gram(4, 1), prior), SeveralParentsTask)
    with pytest.raises(GraphError, match="query_parents"):
        build_task(CausalGraph(((), (), (0, 1))), prior)


def test_counts_and_strategies_of_a_hand_computed_sequence() -> None:
    # Two parents each: positions 2 to 5 and the query are drawn from the two tokens before.
    task = SeveralParentsTask(k_gram(6, 2), DirichletPrior((0.5, 1.5)))
    tokens = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1, 1]])
    both = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # after 1 0: position 3; after 1 1: 4 and 5
    assert torch.equal(task.context_counts(tokens), both)
    last = torch.tensor([[1.0, 1.0], [0.0, 3.0]])  # after 0: positions 3 and 4; after 1: 3 to 5
    assert torch.equal(task.context_counts(tokens, n_nearest=1), last)
    predictions = strategies(task, tokens)
    assert list(predictions) == ["uniform", "unigram", "bigram", "trigram"]
    total = smoothing_total(task)
    unigram = torch.tensor([[4.0, 2.0], [2.0, 4.0]]) + total * torch.tensor([0.25, 0.75])
    torch.testing.assert_close(predictions["unigram"], unigram / (6 + total))
    # An average of two rows of total 2 has the variance of a total of 2 (2 + 1) - 1 = 5.
    smoothed = last + torch.tensor([1.25, 3.75])
    torch.testing.assert_close(predictions["bigram"], smoothed / smoothed.sum(1, keepdim=True))
    exact = both + torch.tensor([0.5, 1.5])
    torch.testing.assert_close(predictions["trigram"], exact / exact.sum(1, keepdim=True))
    assert torch.equal(predictions["trigram"], bayes_prediction(task, tokens, generator=seeded()))


@pytest.mark.parametrize("graph", [MIXED, THREE_PARENTS, NEW_NUMBER])
def test_bayes_is_the_posterior_mean_by_enumeration(graph: CausalGraph) -> None:
    task = SeveralParentsTask(graph, DirichletPrior((0.3, 0.9)))
    sequences = list(product(range(2), repeat=task.sequence_length))
    bayes = bayes_prediction(task, torch.tensor(sequences), generator=seeded())
    extended = SeveralParentsTask(
        CausalGraph((*graph.parents, task.query_parents), (0,)), task.prior
    )
    for row, tokens in zip(bayes, sequences, strict=True):
        # The label's mean is the chance that the label's token comes next.
        both = [integrated_probability(extended, (*tokens, s)) for s in range(2)]
        assert row[0].item() == pytest.approx(both[0] / sum(both), abs=1e-6)


def test_the_average_of_rows_has_the_variance_that_smoothing_assumes() -> None:
    alpha, n = torch.tensor([0.2, 0.7], dtype=torch.float64), 4
    rows = sample_dirichlet(alpha, (200_000, n, 2), generator=seeded(7))
    total = n * (0.9 + 1) - 1
    mean = 0.2 / 0.9
    deviation = (rows.mean(1)[:, 0] - mean).square()
    assert abs(z_score(deviation, mean * (1 - mean) / (total + 1))) < 4


def test_knowledge_lowers_the_loss() -> None:
    task = symmetric_task(k_gram(60, 3), 0.1, 3)
    batch = task.sample(10_000, generator=seeded(8))
    predictions = strategies(task, batch.tokens)
    assert list(predictions) == ["uniform", "unigram", "bigram", "trigram", "4gram"]
    losses = [soft_cross_entropy(p, batch.target).item() for p in predictions.values()]
    assert losses == sorted(losses, reverse=True)


def test_strategies_of_the_single_parent_task_are_the_three_known_ones() -> None:
    task = SingleParentTask(chain(6), DirichletPrior.symmetric(0.5, 3))
    tokens = task.sample(5, generator=seeded()).tokens
    predictions = strategies(task, tokens)
    assert list(predictions) == ["uniform", "unigram", "bigram"]
    assert torch.equal(predictions["bigram"], bigram_prediction(task, tokens))


def test_a_context_of_no_parent_or_too_many_is_refused() -> None:
    task = symmetric_task(MIXED, 0.5, 3)
    tokens = task.sample(2, generator=seeded()).tokens
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"n_nearest is {number}: allowed are 1 to 2"):
            context_prediction(task, tokens, n_nearest=number)

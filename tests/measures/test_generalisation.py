"""Generalisation against eigenvalues, entropies and frequencies computed by other means."""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image as mpimg
from torch import Tensor

from mechcausal.graphs import CausalGraph, chain, icl_pairs, manual
from mechcausal.measures.generalisation import (
    STANDARD_FAMILIES,
    MatrixFamily,
    OODRow,
    bounded_family,
    bounded_matrices,
    counting_limit,
    dirichlet_family,
    evaluate_ood,
    fit_power,
    fixed_family,
    generalisation_table,
    lazy_matrices,
    near_deterministic_matrices,
    parent_log_odds,
    permutation_matrices,
    sup_errors,
    transplant,
    two_block_matrices,
    uniform_matrices,
)
from mechcausal.models.base import GraphModel
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.pictures.static.generalisation_figures import draw_generalisation, draw_ood
from mechcausal.tasks import SingleParentTask
from mechcausal.tasks.predictors import bayes_prediction, transition_counts
from mechcausal.tasks.priors import (
    DirichletPrior,
    FixedTransition,
    PriorError,
    stationary_distribution,
)
from tests.oracles import seeded

EVERY_FAMILY = (*STANDARD_FAMILIES, bounded_family(0.2), bounded_family(0.2, base="permutation"))


class GivenPrediction(GraphModel):
    """A model that predicts what a function of the tokens says."""

    kind = "given"
    heads = (1, 1)
    vocab_size = 0
    sequence_length = 0

    def __init__(self, task: SingleParentTask, predict: Callable[[Tensor], Tensor]) -> None:
        self.vocab_size, self.sequence_length = task.vocab_size, task.sequence_length
        self.predict = predict

    @property
    def parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.predict(tokens)

    def probabilities(self, output: Tensor) -> Tensor:
        return output[:, -1]


def trained_like(graph: CausalGraph, *, beta: float, spread: float = 0.0) -> SimplifiedTransformer:
    """What training leaves: log-odds of about 6.5 on parents in every row, and A2 near beta I."""
    model = SimplifiedTransformer(4, graph.sequence_length)
    model.initialise(beta0=beta)
    generator = seeded(5)
    with torch.no_grad():
        model.A1.add_(spread * torch.randn(model.A1.shape, generator=generator))
        model.A2.add_(spread * torch.randn(model.A2.shape, generator=generator))
        for parent, child in graph.edges:
            model.A1[child, parent] += 6.5 + math.log(child)
        for root in graph.roots:
            model.A1[root, root] -= 2.0
        model.A1[-1, -1] += 1.0
    return model


@pytest.mark.parametrize("vocab_size", [2, 5])
def test_families_give_transition_matrices_and_have_names(vocab_size: int) -> None:
    assert len({family.name for family in EVERY_FAMILY[:-1]}) == len(EVERY_FAMILY) - 1
    for family in EVERY_FAMILY:
        matrices = family.sample(50, vocab_size, seeded())
        assert matrices.shape == (50, vocab_size, vocab_size)
        assert (matrices >= 0).all()
        torch.testing.assert_close(matrices.sum(2), torch.ones(50, vocab_size))
        mu = stationary_distribution(matrices)
        torch.testing.assert_close(torch.einsum("bs,bst->bt", mu, matrices.double()), mu)
        assert torch.equal(matrices, family.sample(50, vocab_size, seeded()))
        assert len(family.description.splitlines()) == 1


def test_bounded_matrices_keep_their_bound() -> None:
    for base, gamma in itertools.product(("dirichlet", "permutation"), (0.05, 0.5, 1.0)):
        matrices = bounded_matrices(100, 5, seeded(), gamma=gamma, base=base)
        assert matrices.min() >= gamma / 5 - 1e-7
        if gamma == 1:
            torch.testing.assert_close(matrices, uniform_matrices(100, 5, seeded()))
        else:
            assert matrices.max() > 1 - gamma


def test_permutations_with_noise_are_doubly_stochastic() -> None:
    matrices = permutation_matrices(400, 4, seeded(), noise=0.04)
    torch.testing.assert_close(matrices.sum(1), torch.ones(400, 4))
    assert matrices.unique().numel() == 2
    assert matrices.min().item() == pytest.approx(0.01)
    # Uniform over the 24 permutations: each state leads to each with probability 1/4.
    share = (matrices > 0.5).double().mean(0)
    assert ((share - 0.25).abs() < 4 * (0.25 * 0.75 / 400) ** 0.5).all()


def test_near_deterministic_rows_have_one_favourite() -> None:
    matrices = near_deterministic_matrices(50, 5, seeded(), delta=0.2)
    ordered = matrices.sort(2).values
    torch.testing.assert_close(ordered[..., -1], torch.full((50, 5), 0.8))
    torch.testing.assert_close(ordered[..., :-1], torch.full((50, 5, 4), 0.05))


def test_two_blocks_and_lazy_matrices_mix_slowly() -> None:
    """The halves are a chain of their own: 1 - 2 crossing is an eigenvalue of every matrix."""
    for vocab_size in (2, 5, 6):
        matrices = two_block_matrices(20, vocab_size, seeded(), crossing=0.03).double().numpy()
        eigenvalues = np.linalg.eigvals(matrices)
        assert np.abs(eigenvalues - 0.94).min(axis=1) == pytest.approx(np.zeros(20), abs=1e-5)
    matrices = lazy_matrices(20, 5, seeded(), delta=0.05).double().numpy()
    assert np.linalg.eigvals(matrices).real.min() >= 0.9 - 1e-6
    assert np.diagonal(matrices, axis1=1, axis2=2).min() >= 0.95 - 1e-6


@pytest.mark.parametrize(
    ("sample", "named"),
    [
        (lambda: permutation_matrices(1, 3, seeded(), noise=0.0), "noise is 0.0"),
        (lambda: near_deterministic_matrices(1, 3, seeded(), delta=1.5), "delta is 1.5"),
        (lambda: two_block_matrices(1, 1, seeded()), "vocab_size is 1"),
        (lambda: lazy_matrices(1, 3, seeded(), delta=-0.1), "delta is -0.1"),
        (lambda: bounded_matrices(1, 3, seeded(), gamma=0.0), "gamma is 0.0"),
        (lambda: fixed_family("x", [[1.0, 0.0], [0.0, 1.0]]).sample(1, 3, seeded()), "2 tokens"),
        (lambda: fixed_family("x", [[1.0, 0.5], [0.0, 1.0]]), "row 0"),
    ],
)
def test_impossible_families_are_refused(sample: Any, named: str) -> None:
    with pytest.raises(PriorError, match=named):
        sample()


def evaluated(
    model: GraphModel,
    task: SingleParentTask,
    family: MatrixFamily,
    *,
    n_sequences: int = 50,
    epsilon: float = 0.0,
) -> OODRow:
    (row,) = evaluate_ood(
        model,
        task,
        families=[family],
        n_sequences=n_sequences,
        generator=seeded(),
        epsilon=epsilon,
    )
    return row


def test_figures_of_a_uniform_guess_on_a_known_matrix() -> None:
    """Only one of the two rows differs from the guess: all follows from how often it is asked."""
    task = SingleParentTask(chain(6), DirichletPrior.symmetric(1.0, 2))
    model = GivenPrediction(task, lambda tokens: torch.full((len(tokens), 2), 0.5))
    family = fixed_family("known", [[0.9, 0.1], [0.5, 0.5]])
    row = evaluated(model, task, family, n_sequences=400, epsilon=1e-3)
    asked = row.sup_error_mean / 0.4
    assert 0.4 < asked < 0.6
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    gap = math.log(2) - entropy
    assert (row.family, row.n_sequences, row.own_bayes_loss) == ("known", 400, None)
    assert row.loss == pytest.approx(math.log(2), abs=1e-6)
    assert row.oracle_loss == pytest.approx(asked * entropy + (1 - asked) * math.log(2), abs=1e-6)
    assert row.gap_to_oracle == pytest.approx(asked * gap, abs=1e-6)
    spread = gap * (asked * (1 - asked) / 399) ** 0.5
    assert row.gap_to_oracle_stderr == pytest.approx(spread, rel=1e-4)
    assert row.total_variation == pytest.approx(0.4 * asked, abs=1e-6)
    assert row.sup_error_median in (pytest.approx(0.0), pytest.approx(0.2), pytest.approx(0.4))
    assert row.gap_to_bayes == pytest.approx(row.loss - row.bayes_loss, abs=1e-9)


def test_the_oracle_of_uniform_rows_loses_their_entropy() -> None:
    task = SingleParentTask(icl_pairs(6), DirichletPrior.symmetric(0.5, 5))
    model = GivenPrediction(task, lambda tokens: torch.full((len(tokens), 5), 0.2))
    (family,) = (family for family in STANDARD_FAMILIES if family.name == "uniform_rows")
    row = evaluated(model, task, family)
    assert row.oracle_loss == pytest.approx(math.log(5), abs=1e-6)
    assert row.gap_to_oracle == pytest.approx(0.0, abs=1e-6)
    assert row.gap_to_bayes < 0  # a prior that expects structure sees some


def test_a_model_that_is_bayes_has_no_gap() -> None:
    matrix = FixedTransition.from_matrix([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    task = SingleParentTask(chain(5), matrix)
    rows = torch.tensor(matrix.rows)
    model = GivenPrediction(task, lambda tokens: rows[tokens[:, -1]])
    figures = asdict(evaluated(model, task, fixed_family("itself", matrix.rows)))
    names = ("gap_to_bayes", "gap_to_oracle", "total_variation", "sup_error_mean")
    assert [figures[name] for name in names] == pytest.approx([0.0] * 4, abs=1e-7)


def test_bayes_under_the_training_prior_wins_only_there() -> None:
    task = SingleParentTask(chain(12), DirichletPrior.symmetric(0.1, 4))
    other = seeded(9)
    model = GivenPrediction(
        task, lambda tokens: bayes_prediction(task, tokens, generator=other, n_draws=64)
    )
    inside, outside = evaluate_ood(
        model,
        task,
        families=[dirichlet_family(0.1), dirichlet_family(3.0)],
        n_sequences=1000,
        generator=seeded(),
        epsilon=0.0,
        bayes_draws=64,
    )
    # The same predictor with other draws, twice: what is left is the noise of the draws.
    for row in (inside, outside):
        assert abs(row.gap_to_bayes) < 4 * row.gap_to_bayes_stderr + 1e-3
    assert inside.own_bayes_loss is not None
    assert outside.own_bayes_loss is not None
    assert inside.own_bayes_loss == pytest.approx(inside.bayes_loss, abs=5e-3)
    assert outside.own_bayes_loss < outside.bayes_loss - 10 * outside.gap_to_bayes_stderr
    assert inside.oracle_loss < inside.own_bayes_loss


@pytest.mark.parametrize("graph", [chain(39), icl_pairs(39)])
def test_the_ideal_model_predicts_empirical_frequencies(graph: CausalGraph) -> None:
    task = SingleParentTask(graph, DirichletPrior.symmetric(1.0, 4))
    model = SimplifiedTransformer(4, 40)
    model.set_ideal(graph)
    tokens = task.sample(400, generator=seeded()).tokens
    counts = transition_counts(task, tokens)[torch.arange(400), tokens[:, -1]]
    # Where the query's token was never a parent there are no frequencies. A root's row attends to
    # everything before it evenly: left out is where that is mostly the query's token, as it is
    # whenever position 0 holds it.
    n_keys = torch.arange(1, 41)
    share = (tokens == tokens[:, -1:]).cumsum(1) / n_keys
    blurred = share[:, [*graph.roots, 39]].amax(1) > 0.6
    defined = (counts.sum(1) > 0) & ~blurred
    assert defined.sum() > 60
    frequencies = counts[defined] / counts[defined].sum(1, keepdim=True)
    torch.testing.assert_close(model(tokens[defined]), frequencies, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("preset", [chain, icl_pairs])
def test_transplants_keep_attention_at_every_length(preset: Any) -> None:
    model = trained_like(preset(11), beta=2.0)
    carried = transplant(model, preset, 12)
    torch.testing.assert_close(carried.attention1(), model.attention1(), atol=1e-6, rtol=1e-5)
    assert torch.equal(carried.A2, model.A2)
    longer = transplant(model, preset, 90)
    attention = longer.attention1().detach()
    on_parents = [attention[child, parent].item() for parent, child in preset(89).edges]
    assert on_parents == pytest.approx([1 / (1 + math.exp(-6.5))] * len(on_parents), abs=1e-6)
    assert parent_log_odds(longer, preset(89)) == pytest.approx(6.5, abs=1e-4)
    assert (attention[-1, -1] / attention[-1, 0]).item() == pytest.approx(math.e, rel=1e-5)
    if preset is icl_pairs:
        assert (attention[2, 2] / attention[2, 0]).item() == pytest.approx(math.exp(-2), rel=1e-5)


def test_a_transplant_to_the_same_length_predicts_nearly_the_same() -> None:
    """Rows that differ by noise are averaged: the prediction moves by a few thousandths."""
    model = trained_like(chain(19), beta=3.0, spread=0.2)
    before = model.A1.detach().clone()
    task = SingleParentTask(chain(19), DirichletPrior.symmetric(0.1, 4))
    tokens = task.sample(500, generator=seeded()).tokens
    carried = transplant(model, chain, 20)
    assert sup_errors(carried(tokens), model(tokens)).mean() < 0.005
    assert torch.equal(model.A1, before)


def test_log_odds_stay_finite_where_attention_rounds_to_one() -> None:
    model = SimplifiedTransformer(3, 8)
    model.set_ideal(chain(7))
    expected = 50 - sum(math.log(i) for i in range(1, 7)) / 6
    assert parent_log_odds(model, chain(7)) == pytest.approx(expected)


def test_the_counting_limit_of_sharp_and_of_blind_matching() -> None:
    transition = bounded_matrices(30, 4, seeded(), gamma=0.3)
    query = torch.randint(4, (30,), generator=seeded())
    settings = {"parent_attention": 1.0, "root_share": 0.0}
    sharp = counting_limit(50 * torch.eye(4), transition, query, **settings)
    rows = transition[torch.arange(30), query].double()
    torch.testing.assert_close(sharp, rows, atol=1e-9, rtol=0.0)
    blind = counting_limit(torch.zeros(4, 4), transition, query, **settings)
    torch.testing.assert_close(blind, stationary_distribution(transition))
    only_roots = counting_limit(
        50 * torch.eye(4), transition, query, parent_attention=1.0, root_share=1.0
    )
    torch.testing.assert_close(only_roots, stationary_distribution(transition))


@pytest.mark.parametrize("preset", [chain, icl_pairs])
def test_long_sequences_approach_the_counting_limit(preset: Any) -> None:
    model = trained_like(preset(11), beta=2.0, spread=0.3)
    attention = 1 / (1 + math.exp(-parent_log_odds(model, preset(11))))
    transition = bounded_matrices(100, 4, seeded(), gamma=0.3)
    distances = []
    for length in (30, 120, 480):
        graph = preset(length - 1)
        task = SingleParentTask(graph, DirichletPrior.symmetric(1.0, 4))
        batch = task.sample_given(transition, generator=seeded(1))
        limit = counting_limit(
            model.A2.detach(),
            transition,
            batch.query,
            parent_attention=attention,
            root_share=len(graph.roots) / graph.n_positions,
        )
        prediction = transplant(model, preset, length)(batch.tokens).detach().double()
        distances.append(sup_errors(prediction, limit).mean().item())
    # Noise of frequencies: halved by four times as many tokens.
    assert distances[2] < 0.06
    assert fit_power((30, 120, 480), distances).slope == pytest.approx(-0.5, abs=0.15)


def test_powers_are_recovered_within_their_standard_error() -> None:
    lengths = [20, 40, 80, 160, 320]
    slopes, spreads = [], []
    for seed in range(40):
        noise = 0.05 * torch.randn(5, generator=seeded(seed), dtype=torch.float64)
        fit = fit_power(
            lengths, [3 * t**-0.4 * math.exp(z) for t, z in zip(lengths, noise, strict=True)]
        )
        slopes.append(fit.slope)
        spreads.append(fit.stderr)
    stderr = np.std(slopes, ddof=1)
    assert abs(np.mean(slopes) + 0.4) < 4 * stderr / 40**0.5
    assert np.sqrt(np.mean(np.square(spreads))) == pytest.approx(stderr, rel=0.3)
    assert math.isnan(fit_power(lengths, [0.5, 0.4, 0.3, 0.2, 0.0]).slope)


def test_the_table_shows_noise_that_falls_and_bias_that_stays() -> None:
    model = trained_like(chain(11), beta=2.0)
    table = generalisation_table(
        model, chain, (20, 80, 320), (0.2, 1.0), n_sequences=400, generator=seeded()
    )
    cells = [(row.gamma, row.length) for row in table.rows]
    assert cells == [(g, t) for g in (0.2, 1.0) for t in (20, 80, 320)]
    biased, unbiased = table.rows[:3], table.rows[3:]
    assert biased[2].floor_median > 0.1
    assert biased[2].error_median == pytest.approx(biased[2].floor_median, rel=0.2)
    assert biased[2].ideal_median < 0.5 * biased[2].error_median
    assert all(row.floor_median < 1e-6 for row in unbiased)
    assert table.ideal_fits[0.2].slope == pytest.approx(-0.5, abs=0.15)
    assert table.fits[1.0].slope == pytest.approx(-0.5, abs=0.15)
    assert table.fits[0.2].slope > -0.3
    for row in table.rows:
        assert row.error_median <= row.error_q90
        assert row.ideal_median <= row.ideal_q90
        assert row.excess_loss > 0
        assert row.excess_loss_stderr < 0.1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: transplant(m, lambda n: chain(11), 30), "needed are 30"),
        (lambda m: transplant(m, lambda n: manual([-1] * n), 30), "0 edges"),
        (lambda m: parent_log_odds(m, chain(5)), "sequences of 6"),
        (
            lambda m: generalisation_table(m, chain, (9, 9), n_sequences=5, generator=seeded()),
            "at least 3",
        ),
        (lambda m: generalisation_table(m, chain, n_sequences=1, generator=seeded()), "is 1"),
        (
            lambda m: evaluate_ood(
                m,
                SingleParentTask(chain(9), DirichletPrior.symmetric(1.0, 4)),
                n_sequences=5,
                generator=seeded(),
                epsilon=0.0,
            ),
            "must be equal",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(trained_like(chain(11), beta=2.0))


def test_figures_are_drawn(tmp_path: Path) -> None:
    model = trained_like(chain(11), beta=2.0)
    task = SingleParentTask(chain(11), DirichletPrior.symmetric(0.1, 4))
    rows = evaluate_ood(
        model, task, n_sequences=10, generator=seeded(), epsilon=1e-3, bayes_draws=8
    )
    gammas = (0.1, 0.5, 1.0)
    table = generalisation_table(
        model, chain, (12, 20, 40), gammas, n_sequences=10, generator=seeded()
    )
    for name, figure in {
        "ood": draw_ood(rows),
        "one": draw_ood(rows[-1:]),
        "table": draw_generalisation(table),
    }.items():
        figure.savefig(tmp_path / f"{name}.png")
        pixels = mpimg.imread(tmp_path / f"{name}.png")
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.01
    left, right = draw_generalisation(table).axes
    assert left.get_xscale() == left.get_yscale() == "log"
    dashed = [line for line in right.lines if line.get_linestyle() == "--"]
    assert len(dashed) == len(gammas) + 1  # and one for the legend
    assert len(draw_ood(rows).axes[0].patches) == len(rows)

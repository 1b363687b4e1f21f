"""Predictions for the single-parent task: uniform, bigram and Bayes.

The bigram prediction counts transitions along the edges of the graph. The Bayes predictor also
uses the likelihood of the roots, by Monte Carlo.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.tasks import GraphTask, SingleParentTask
from mechcausal.tasks.dirichlet import PROBABILITY_FLOOR, normalised_exponentials, sample_log_gamma
from mechcausal.tasks.priors import DirichletPrior, PriorError, stationary_with_first_row
from mechcausal.tasks.protocol import PriorWithPosterior


def transition_counts(
    task: SingleParentTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab vocab"]:
    """How often each transition occurs along the edges of the graph; roots are not counted."""
    vocab = task.vocab_size
    edges = torch.tensor(task.graph.edges, dtype=torch.int64, device=tokens.device).view(-1, 2)
    cells = tokens[:, edges[:, 0]] * vocab + tokens[:, edges[:, 1]]
    counts = torch.zeros(tokens.shape[0], vocab * vocab, device=tokens.device)
    counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=counts.dtype))
    return counts.view(-1, vocab, vocab)


def root_counts(
    task: SingleParentTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab"]:
    """How often each token occurs at a root of the graph."""
    at_roots = tokens[:, list(task.graph.roots)]
    counts = torch.zeros(tokens.shape[0], task.vocab_size, device=tokens.device)
    return counts.scatter_add_(1, at_roots, torch.ones_like(at_roots, dtype=counts.dtype))


def uniform_prediction(
    task: GraphTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab"]:
    """1/S for every token."""
    shape = (tokens.shape[0], task.vocab_size)
    return torch.full(shape, 1 / task.vocab_size, device=tokens.device)


def bigram_prediction(
    task: SingleParentTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab"]:
    """Posterior mean of `pi(. | query)` given the transitions along the edges.

    `(alpha_s' + N(query, s')) / sum_s (alpha_s + N(query, s))`, where N counts non-root positions
    only: the likelihood of the roots, which are drawn from `mu`, is ignored. For a fixed matrix,
    the prediction is its row; for another prior, what its `posterior_mean` says.

    Raises:
        PriorError: the prior has no `posterior_mean`.
    """
    prior = task.prior
    if not isinstance(prior, PriorWithPosterior):
        raise PriorError(f"{type(prior).__name__}: has no posterior_mean")
    mean = prior.posterior_mean(transition_counts(task, tokens), root_counts(task, tokens))
    return mean[torch.arange(len(tokens), device=tokens.device), tokens[:, -1]]


def bayes_prediction(
    task: SingleParentTask,
    tokens: Int[Tensor, "batch pos"],
    *,
    generator: torch.Generator,
    n_draws: int = 256,
    max_elements: int = 4_000_000,
) -> Float[Tensor, "batch vocab"]:
    """The Bayes predictor `E[pi(. | query) | sequence]`, including the likelihood of the roots.

    Given the transitions, the rows of `pi` are independent Dirichlet; the factor `mu(s_r)` of
    every root r couples the rows and has no closed form. With the weight
    `W(c) = E_{pi ~ Dirichlet(c)} prod_r mu(s_r)` of posterior concentrations c, exactly

        E[pi(s' | query) | sequence] = mean(s') W(c + one at (query, s')) / W(c),

    where mean is `bigram_prediction`. W is estimated by draws from the posterior. A draw for
    c + one is a draw for c with an exponential variable added to one gamma variable, so numerator
    and denominator share their noise. The result is positive; it is exact for a fixed matrix.

    Args:
        task: graph and prior.
        tokens: sequences, on the generator's device.
        generator: source of the draws.
        n_draws: draws for each sequence; the cost is `batch * n_draws * S^2` gamma draws and about
            four eliminations for each draw.
        max_elements: most gamma draws held in memory at a time.
    """
    if not isinstance(task.prior, DirichletPrior):
        return bigram_prediction(task, tokens)
    weights = RootWeights(task, tokens, max_elements=max_elements)
    return weights.prediction(weights.draw(n_draws, generator))


class RootWeights:
    """What the roots of some sequences say about the row of their query, averaged over draws.

    Attributes:
        seconds_per_draw: about what a draw for one sequence takes on a busy core.
    """

    def __init__(
        self,
        task: SingleParentTask,
        tokens: Int[Tensor, "batch pos"],
        *,
        max_elements: int = 4_000_000,
    ) -> None:
        """Count the transitions.

        Args:
            task: with a Dirichlet prior.
            tokens: sequences.
            max_elements: most gamma draws held in memory at a time.
        """
        assert isinstance(task.prior, DirichletPrior)
        self._tokens = tokens
        self._posterior = task.prior.posterior_concentration(transition_counts(task, tokens))
        self._mean = _mean_of_query_row(self._posterior, tokens)
        self._roots = torch.tensor(task.graph.roots, device=tokens.device)
        self._max_elements = max_elements
        vocab = task.vocab_size  # S^2 gamma draws, and S^3 multiplications in the eliminations
        self.seconds_per_draw = 6e-8 * vocab**2 + 2e-9 * vocab**3

    def draw(
        self,
        n_draws: int,
        generator: torch.Generator,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Float[Tensor, "batch vocab"]:
        """`log W(c + one at (query, s'))` of `bayes_prediction`, W summed over that many draws.

        Up to a constant of each sequence, so that the sums of several calls may be added.
        """
        total, size = self._tokens.shape[0], self._posterior.shape[-1] ** 2
        chunk = max(1, self._max_elements // (n_draws * size))
        parts = []
        for start in range(0, total, chunk):
            rows = slice(start, start + chunk)
            parts.append(
                _root_log_weights(
                    self._posterior[rows], self._tokens[rows], self._roots, n_draws, generator
                )
            )
            if on_progress is not None:
                on_progress(min(start + chunk, total), total)
        return torch.cat(parts)

    def prediction(self, log_weights: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """The Bayes predictor from what `draw` gave."""
        prediction = (self._mean.log() + log_weights).softmax(-1).to(self._mean.dtype)
        return prediction.clamp_(min=PROBABILITY_FLOOR)  # as the entries it is a mean of


def _root_log_weights(
    posterior: Tensor, tokens: Tensor, roots: Tensor, n_draws: int, generator: torch.Generator
) -> Tensor:
    """`log W(c + one at (query, s'))` for every s', up to a constant: `[batch vocab]`."""
    batch, vocab, _ = posterior.shape
    # Swap the query's token with token 0: `stationary_with_first_row` replaces row 0.
    exchange = torch.arange(vocab, device=tokens.device).repeat(batch, 1)
    exchange.scatter_(1, tokens[:, -1:], 0)
    exchange[:, 0] = tokens[:, -1]
    first = torch.arange(batch, device=tokens.device).view(-1, 1, 1)
    posterior = posterior[first, exchange.unsqueeze(2), exchange.unsqueeze(1)].unsqueeze(1)
    shape = (batch, n_draws, vocab, vocab)
    log_gamma = sample_log_gamma(posterior, shape, generator=generator)
    extra = sample_log_gamma(posterior.new_ones(()), shape[:-1], generator=generator)
    query_rows = log_gamma[:, :, :1].repeat(1, 1, vocab, 1)
    diagonal = query_rows.diagonal(dim1=2, dim2=3)
    diagonal.copy_(torch.logaddexp(diagonal, extra))
    draws, query_rows = (
        normalised_exponentials(values).flatten(0, 1) for values in (log_gamma, query_rows)
    )
    mu = stationary_with_first_row(draws, query_rows).view(shape)
    at_roots = exchange.gather(1, tokens[:, roots]).view(batch, 1, 1, -1)
    log_weights = mu.log().gather(3, at_roots.expand(-1, n_draws, vocab, -1)).sum(-1)
    return log_weights.logsumexp(1).gather(1, exchange)


def _mean_of_query_row(posterior: Tensor, tokens: Tensor) -> Tensor:
    rows = posterior[torch.arange(len(tokens), device=tokens.device), tokens[:, -1]]
    return rows / rows.sum(-1, keepdim=True)

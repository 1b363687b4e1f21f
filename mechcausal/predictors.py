"""What can be predicted from a sequence: the Bayes predictor and the strategies below it.

A model that learns in context passes through recognisable strategies: the uniform distribution,
the token frequencies of the context (unigram), and the transitions along the edges of the graph
(bigram), which is the Bayes predictor up to what the roots tell.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.priors import DirichletPrior, sample_dirichlet, stationary_distribution
from mechcausal.tasks import SingleParentTask


def transition_counts(
    task: SingleParentTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab vocab"]:
    """How often each transition was seen along the edges of the graph; roots count nowhere."""
    vocab = task.vocab_size
    edges = torch.tensor(task.graph.edges, dtype=torch.int64, device=tokens.device).view(-1, 2)
    cells = tokens[:, edges[:, 0]] * vocab + tokens[:, edges[:, 1]]
    counts = torch.zeros(tokens.shape[0], vocab * vocab, device=tokens.device)
    counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=counts.dtype))
    return counts.view(-1, vocab, vocab)


def uniform_prediction(
    task: SingleParentTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab"]:
    """1/S for every token."""
    shape = (tokens.shape[0], task.vocab_size)
    return torch.full(shape, 1 / task.vocab_size, device=tokens.device)


def unigram_prediction(
    task: SingleParentTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab"]:
    """Frequencies of the context's tokens, smoothed by the prior; `mu` for a fixed matrix."""
    prior = task.prior
    if not isinstance(prior, DirichletPrior):
        return stationary_distribution(_fixed_rows(task, tokens)).float()
    context = tokens[:, :-1]
    counts = torch.zeros(tokens.shape[0], prior.vocab_size, device=tokens.device)
    counts.scatter_add_(1, context, torch.ones_like(context, dtype=counts.dtype))
    return _normalised(counts + torch.tensor(prior.concentration, device=tokens.device))


def bigram_prediction(
    task: SingleParentTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab"]:
    """Posterior mean of `pi(. | query)` given the transitions along the edges.

    `(alpha_s' + N(query, s')) / sum_s (alpha_s + N(query, s))`, N counted over non-root positions
    only. This is the Bayes predictor of an observer who disregards that roots were drawn from
    `mu`. For a fixed matrix, its row.
    """
    prior, rows = task.prior, torch.arange(tokens.shape[0], device=tokens.device)
    if not isinstance(prior, DirichletPrior):
        return _fixed_rows(task, tokens)[rows, tokens[:, -1]]
    posterior = prior.posterior_concentration(transition_counts(task, tokens))
    return _normalised(posterior[rows, tokens[:, -1]])


def bayes_prediction(
    task: SingleParentTask,
    tokens: Int[Tensor, "batch pos"],
    *,
    generator: torch.Generator,
    n_draws: int = 256,
    max_elements: int = 4_000_000,
) -> Float[Tensor, "batch vocab"]:
    """The Bayes predictor `E[pi(. | query) | sequence]`, with what the roots say about `pi`.

    Given the transitions seen, the rows of `pi` are independent Dirichlet; the factor `mu(s_r)` of
    every root r ties them together and has no closed form. It is integrated by self-normalised
    importance sampling from the Dirichlet posterior, with the posterior mean as control variate,
    so that the error vanishes where the roots say nothing. Exact for a fixed matrix.

    Args:
        task: graph and prior.
        tokens: sequences, on the generator's device.
        generator: source of the draws.
        n_draws: draws for each sequence; the cost is `batch * n_draws * S^2` gamma draws.
        max_elements: most gamma draws held in memory at a time.
    """
    mean = bigram_prediction(task, tokens)
    if not isinstance(task.prior, DirichletPrior):
        return mean
    posterior = task.prior.posterior_concentration(transition_counts(task, tokens))
    roots = torch.tensor(task.graph.roots, device=tokens.device)
    chunk = max(1, max_elements // (n_draws * task.vocab_size**2))
    parts = []
    for start in range(0, tokens.shape[0], chunk):
        rows = slice(start, start + chunk)
        concentration = posterior[rows].unsqueeze(1)
        shape = (concentration.shape[0], n_draws, task.vocab_size, task.vocab_size)
        draws = sample_dirichlet(concentration, shape, generator=generator)
        parts.append(_reweighted(mean[rows], draws, tokens[rows], roots))
    return torch.cat(parts)


def _reweighted(mean: Tensor, draws: Tensor, tokens: Tensor, roots: Tensor) -> Tensor:
    batch, n_draws, vocab, _ = draws.shape
    mu = stationary_distribution(draws.reshape(-1, vocab, vocab)).view(batch, n_draws, vocab)
    at_roots = tokens[:, roots].unsqueeze(1).expand(-1, n_draws, -1)
    weights = mu.gather(2, at_roots).log().sum(-1).softmax(-1)  # float64
    rows = draws[torch.arange(batch, device=draws.device), :, tokens[:, -1]]
    shift = torch.einsum("bk,bks->bs", weights - 1 / n_draws, rows.to(weights.dtype))
    return _normalised((mean + shift).clamp(min=mean * 1e-3)).to(mean.dtype)


def _fixed_rows(task: SingleParentTask, tokens: Tensor) -> Tensor:
    return task.prior.sample(tokens.shape[0], generator=torch.Generator(device=tokens.device))


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)

"""Draws of Gamma and Dirichlet distributions that no concentration breaks."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Dirichlet rows of a tiny concentration underflow to exact zeros, which would make chains
# reducible. Probabilities are kept above this floor: far below anything that can be sampled, and
# far enough above the smallest float32 for products of a few of them.
PROBABILITY_FLOOR = 1e-30
# Proposals at a time for the few draws rejected twice: nearly always one of them will do.
_RETRIES = 4


def sample_log_gamma(
    concentration: Float[Tensor, "*any"],
    shape: Sequence[int],
    *,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Float[Tensor, "*shape"]:
    """Logarithms of independent Gamma(concentration, 1) draws, safe for any concentration > 0.

    Marsaglia and Tsang (2000), vectorised; below 1 through Gamma(a) = Gamma(a + 1) U^(1/a), whose
    logarithm cannot underflow. (torch's own gamma sampler takes twice as long, on one thread, and
    returns 0 for small concentrations.)

    Args:
        concentration: broadcast to `shape`, on the generators' device.
        shape: of the draws.
        generator: source of randomness; of several, each draws its equal share along the first
            axis, and nothing that it draws depends on the others.
    """
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    share = math.prod(shape) // len(generators)
    dtype = concentration.dtype
    normal, uniform = (
        draw_for_each(generators, draw, [share] * len(generators), dtype=dtype).view(*shape)
        for draw in (torch.randn, torch.rand)
    )
    log_draw, accepted = _propose_log_gamma(concentration, normal, uniform)
    flat = log_draw.view(-1)
    rejected = accepted.logical_not_().view(-1).nonzero().squeeze(1)  # one in twenty
    concentration = _entries(concentration, shape, rejected).view(-1, 1)
    n_tries = 1
    while len(rejected):
        counts = [len(rejected)]
        if len(generators) > 1:
            counts = (rejected // share).bincount(minlength=len(generators)).tolist()
        normal, uniform = (
            draw_for_each(generators, draw, [n_tries * n for n in counts], dtype=dtype)
            for draw in (torch.randn, torch.rand)
        )
        proposals, accepted = _propose_log_gamma(
            concentration, normal.view(-1, n_tries), uniform.view(-1, n_tries)
        )
        is_accepted, first = accepted.max(1)
        flat[rejected] = proposals.gather(1, first.unsqueeze(1)).squeeze(1)
        rejected, concentration = rejected[~is_accepted], concentration[~is_accepted]
        n_tries = _RETRIES
    return log_draw


def _entries(values: Tensor, shape: Sequence[int], index: Tensor) -> Tensor:
    """Entries of `values` broadcast to a shape, by their numbers there."""
    values = values.contiguous()
    offset, size = torch.zeros_like(index), 1
    for length, stride in zip(shape[::-1], values.expand(tuple(shape)).stride()[::-1], strict=True):
        if stride:
            offset += (index // size if size > 1 else index) % length * stride
        size *= length
    return values.view(-1)[offset]


def draw_for_each(
    generators: Sequence[torch.Generator],
    draw: Callable[..., Tensor],
    counts: Sequence[int],
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "all"]:
    """Draws of each generator one after another, as many as each is to give.

    Args:
        generators: on one device.
        draw: torch.rand, torch.randn.
        counts: of each generator.
        dtype: of the draws.
    """
    drawn = torch.empty(sum(counts), dtype=dtype, device=generators[0].device)
    for part, count, generator in zip(drawn.split(list(counts)), counts, generators, strict=True):
        if count:
            draw(count, generator=generator, out=part)
    return drawn


def _propose_log_gamma(
    concentration: Float[Tensor, "*any"],
    normal: Float[Tensor, "*shape"],
    uniform: Float[Tensor, "*shape"],
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Candidates for log Gamma(concentration), and which of them are accepted.

    Args:
        concentration: broadcast to the draws.
        normal: standard normal draws, overwritten.
        uniform: draws from [0, 1), overwritten.
    """
    is_small = concentration < 1
    scale = torch.where(is_small, concentration + 1, concentration) - 1 / 3
    root = (normal * (9 * scale).rsqrt()).add_(1)
    cube = root.square().mul_(root)
    log_draw = root.log_().mul_(3)  # NaN where the root is negative: no comparison accepts that
    log_chance = normal.square_().mul_(0.5).add_((log_draw - cube).add_(1).mul_(scale))
    log_uniform = uniform.neg_().add_(1).log_()  # of (0, 1]: finite
    accepted = log_uniform < log_chance
    log_draw.add_(scale.log())
    if bool(is_small.any()):
        # Where U was accepted against a chance c, U / min(c, 1) is uniform and says nothing of the
        # draw: it serves as the U of Gamma(a + 1) U^(1/a).
        inverse = torch.where(is_small, 1 / concentration, 0.0)
        inverse.clamp_(
            max=torch.finfo(inverse.dtype).max / 128
        )  # no log(U) of floats is below -128
        log_draw.add_(log_uniform.sub_(log_chance.clamp_(max=0)).mul_(inverse))
    return log_draw, accepted


def normalised_exponentials(
    log_weights: Float[Tensor, "*any vocab"],
) -> Float[Tensor, "*any vocab"]:
    """The softmax along the last axis, no entry below `PROBABILITY_FLOOR`; overwrites its argument.

    torch's own takes many times as long for axes of a few entries.
    """
    weights = log_weights.sub_(log_weights.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True)).clamp_(min=PROBABILITY_FLOOR)


def sample_dirichlet(
    concentration: Float[Tensor, "*any vocab"],
    shape: Sequence[int],
    *,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Float[Tensor, "*shape vocab"]:
    """Independent Dirichlet draws along the last axis, no entry below `PROBABILITY_FLOOR`.

    Args:
        concentration: broadcast to `shape`, on the generators' device.
        shape: of the draws, the last axis the tokens.
        generator: source of randomness, or several, see `sample_log_gamma`.
    """
    return normalised_exponentials(sample_log_gamma(concentration, shape, generator=generator))

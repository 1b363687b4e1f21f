"""Induction heads in a standard attention-only transformer on repeated random tokens."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.measures.figures import History
from mechcausal.measures.head_figures import head_figures
from mechcausal.measures.observation import Observation
from mechcausal.measures.strategies import strategy_figures
from mechcausal.models.adapter import HookedTransformer, save_model
from mechcausal.pictures.static import run_figures as report
from mechcausal.recipes import Recipe
from mechcausal.training.experiments.base import Experiment, Generators
from mechcausal.training.experiments.models import build_standard
from probes import HeadScores, repeated_tokens, score_heads

BOS = 0


class RepeatedTokens(Experiment):
    """Next-token prediction on `[BOS r r]` with r random tokens, of a new length in every batch.

    Only the second copy of r can be predicted; the loss on the first stays at log(S - 1). The
    varying length keeps heads from attending a fixed number of positions back.

    Attributes:
        hooked: the model.
    """

    kind = "repeated_tokens"

    def __init__(self, recipe: Recipe, generators: Generators) -> None:
        """Build and initialise the model, and draw the evaluation sequences."""
        assert recipe.task.repeat_lengths is not None  # checked when the recipe was parsed
        super().__init__(recipe, generators)
        self._shortest, self._longest = recipe.task.repeat_lengths
        self._data = generators.data
        self._probe_seed = generators.probes
        device = generators.data.device
        self._model = build_standard(
            recipe.model,
            recipe.task.vocab_size,
            2 * self._longest + 1,
            seed=generators.init,
            device=device,
        )
        n_sequences = recipe.evaluation.n_sequences
        self._evaluation = self._sample(n_sequences, self._longest, generators.evaluation)

    @property
    def hooked(self) -> HookedTransformer:
        """The HookedTransformer, which is trained directly."""
        return self._model.hooked

    def training_loss(self, n_sequences: int) -> Tensor:
        """Next-token loss on fresh sequences, over all positions."""
        span = (self._shortest, self._longest + 1)
        length = int(torch.randint(*span, (1,), generator=self._data, device=self._data.device))
        tokens = self._sample(n_sequences, length, self._data)
        return _token_losses(self._log_probabilities(tokens), tokens).mean()

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean loss over both copies, over each, and their difference, the in-context gain."""
        return self._losses(self._log_probabilities(self._evaluation))

    def _losses(self, predicted: Float[Tensor, "batch next_pos vocab"]) -> dict[str, float]:
        by_position = _token_losses(predicted, self._evaluation).mean(0)
        first, second = by_position[: self._longest], by_position[self._longest :]
        return {
            "loss/eval": by_position.mean().item(),
            "loss/first_copy": first.mean().item(),
            "loss/second_copy": second.mean().item(),
            "loss/in_context_gain": (first.mean() - second.mean()).item(),
            "loss/chance": math.log(self.recipe.task.vocab_size - 1),
        }

    def evaluation_tokens(self) -> Int[Tensor, "batch pos"]:
        """The evaluation sequences."""
        return self._evaluation

    def observe(self) -> Observation:
        """Score every head; `induction/score` is the best head's score above chance."""
        heads, matrices = head_figures(self._scores())
        with torch.no_grad():
            predicted = self._log_probabilities(self._evaluation)
        return Observation(self._losses(predicted) | self._strategies(predicted) | heads, matrices)

    def _strategies(self, predicted: Float[Tensor, "batch next_pos vocab"]) -> dict[str, float]:
        """The model on the second copy beside guessing and beside copying, see `strategy_figures`.

        Copying predicts the token that followed in the first copy, from the second copy's second
        token on: before, nothing says that the block has ended.
        """
        tokens, longest = self._evaluation, self._longest
        model = predicted[:, longest + 1 :].exp()
        uniform = torch.full_like(model, 1 / (model.shape[-1] - 1))
        uniform[..., BOS] = 0.0
        copied = torch.nn.functional.one_hot(tokens[:, longest + 2 :], model.shape[-1])
        strategies = {"uniform": uniform, "copy": copied.to(model)}
        return strategy_figures(model, strategies, epsilon=self.recipe.training.epsilon)

    def heatmaps(self, matrices: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Scores by layer (rows) and head (columns)."""
        return {name: report.heatmap(matrix.numpy()) for name, matrix in matrices.items()}

    def draw_figures(
        self,
        folder: Path,
        *,
        history: History,
        matrices: Mapping[int, Mapping[str, Tensor]],
        stage_starts: Sequence[int],
    ) -> dict[str, Path]:
        """heads.png: loss, and the scores of every head, over training."""
        return report.draw_head_figures(folder, recipe=self.recipe, history=history)

    def save_model(self, folder: Path) -> None:
        """Write weights and config; `load_model` reads them."""
        fixed = self._model.fixed_embeddings
        extra = {"kind": self._model.kind, "bos": BOS, "fixed_embeddings": fixed}
        save_model(self._model.hooked, folder, extra=extra)

    def _scores(self) -> HeadScores:
        # The same sequences at every probe step, so that only learning changes the scores.
        generator = torch.Generator(device=self._data.device).manual_seed(self._probe_seed)
        lengths = np.linspace(max(3, self._shortest), max(3, self._longest), 4).astype(int)
        return score_heads(
            self._model.hooked,
            n_sequences=16,
            repeat_lengths=sorted(set(lengths.tolist())),
            generator=generator,
            bos=BOS,
        )

    def _sample(
        self, batch: int, length: int, generator: torch.Generator
    ) -> Int[Tensor, "batch pos"]:
        drawn = repeated_tokens(batch, length, self.recipe.task.vocab_size - 1, generator=generator)
        return torch.nn.functional.pad(drawn + 1, (1, 0), value=BOS)

    def _log_probabilities(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos-1 vocab"]:
        logits: Tensor = self._model.hooked(tokens)[:, :-1]
        return logits.log_softmax(-1)


def _token_losses(
    predicted: Float[Tensor, "batch next_pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch next_pos"]:
    return -predicted.gather(-1, tokens[:, 1:, None]).squeeze(-1)

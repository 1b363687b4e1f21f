"""The residual law on real text: a standard transformer that predicts the next character."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.measures.figures import History
from mechcausal.measures.head_figures import head_figures
from mechcausal.measures.observation import Observation
from mechcausal.measures.residual_law import law_in_window, read_law
from mechcausal.measures.strategies import strategy_figures
from mechcausal.models.adapter import HookedTransformer, save_model
from mechcausal.pictures.static import law_figures
from mechcausal.recipes import Recipe
from mechcausal.tasks.predictors.ngrams import NGrams
from mechcausal.training.experiments.base import Experiment, Generators
from mechcausal.training.experiments.models import build_standard
from probes import pairwise_information, score_heads
from probes.reading.passes import MAX_BATCH_BYTES, batch_rows, next_token_losses, undisturbed

_LEVELS = ("unigram", "bigram", "trigram")
_MAX_ENTRIES = 12_000  # characters on which the model is compared with n-grams


class TextExperiment(Experiment):
    """Next-character prediction on windows of a text, compared with n-grams and the residual law.

    Attributes:
        task: the text.
        windows: held-out windows, on which everything is measured.
        information: χ²-information of the windows, by lag.
    """

    kind = "text"

    def __init__(self, recipe: Recipe, generators: Generators) -> None:
        """Read the text, fit the n-grams, and build and initialise the model.

        Raises:
            RecipeError: the text cannot be read, is another one than the recipe's, or too short.
        """
        super().__init__(recipe, generators)
        self.task = recipe.build_text(device=generators.data.device)
        self._data, self._probe_seed = generators.data, generators.probes
        self._model = build_standard(
            recipe.model,
            self.task.vocab_size,
            self.task.context,
            seed=generators.init,
            device=generators.data.device,
        )
        n_asked = recipe.evaluation.n_sequences
        self.windows = self.task.windows(n_asked, generators.evaluation)
        if len(self.windows) < n_asked:
            self.notes = [
                f"the held-out text has {len(self.windows):,} windows of {self.task.context} "
                f"characters; evaluation.n_sequences asks for {n_asked:,}"
            ]
        ngrams = NGrams(
            self.task.training,
            self.task.vocab_size,
            order=len(_LEVELS),
            stride=2 if self.task.interleaved else 1,
        )
        losses = ngrams.losses(self.windows).tolist()
        self._levels = {f"loss/{name}": loss for name, loss in zip(_LEVELS, losses, strict=True)}
        self._n_compared = max(1, _MAX_ENTRIES // self.windows.shape[1])
        predictions = ngrams.predictions(self.windows[: self._n_compared])
        self._strategies = dict(zip(_LEVELS, predictions, strict=True))
        self.information = pairwise_information(
            self.windows,
            vocab_size=self.task.vocab_size,
            by="lag",
            max_lag=min(recipe.evaluation.max_lag, self.task.context - 1),
        )

    @property
    def hooked(self) -> HookedTransformer:
        """The HookedTransformer, which is trained directly."""
        return self._model.hooked

    def training_loss(self, n_sequences: int) -> Tensor:
        """Next-character loss on fresh windows of the training part, over all positions."""
        loss: Tensor = self.hooked(self.task.sample(n_sequences, self._data), return_type="loss")
        return loss

    def losses(self) -> dict[str, float]:
        """Loss on the held-out windows, the in-context score, and the losses of n-grams."""
        return self._losses(self._pass()[0])

    def _losses(self, token_losses: Float[Tensor, "window next_pos"]) -> dict[str, float]:
        by_position = token_losses.double().mean(0)
        quarter = len(by_position) // 4
        early, late = by_position[quarter : 2 * quarter], by_position[-quarter:]
        return {
            "loss/eval": by_position.mean().item(),
            "loss/in_context": (late.mean() - early.mean()).item(),
            **self._levels,
        }

    def _pass(
        self,
    ) -> tuple[Float[Tensor, "window next_pos"], Float[Tensor, "compared next_pos vocab"]]:
        """Losses on the windows, and predictions on those that n-grams are compared on."""
        rows = batch_rows(self.hooked, self.windows.shape[1], MAX_BATCH_BYTES, logits=True)
        losses, predictions, n_left = [], [], self._n_compared
        with undisturbed(self.hooked):
            for part in self.windows.split(rows):
                logits = self.hooked(part)
                losses.append(next_token_losses(logits, part))
                predictions.append(logits[:n_left, :-1].softmax(-1))
                n_left = max(0, n_left - len(part))
        return torch.cat(losses), torch.cat(predictions)

    def evaluation_tokens(self) -> Int[Tensor, "batch pos"]:
        """The held-out windows."""
        return self.windows

    def observe(self) -> Observation:
        """The residual law on the held-out windows, and head scores on random repeated tokens."""
        law = read_law(self.hooked, self.windows, self.information)
        # The same sequences at every probe step, so that only learning changes the scores.
        generator = torch.Generator(device=self._data.device).manual_seed(self._probe_seed)
        scores = score_heads(self.hooked, n_sequences=16, generator=generator, bos=None)
        heads, score_matrices = head_figures(scores)
        token_losses, predicted = self._pass()
        epsilon = self.recipe.training.epsilon
        strategies = strategy_figures(predicted, self._strategies, epsilon=epsilon)
        figures = self._losses(token_losses) | law.figures | heads | strategies
        return Observation(figures, law.matrices | score_matrices)

    def heatmaps(self, matrices: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Gradients by head (rows) and lag (columns), and scores by layer and head."""
        return law_figures.heatmaps(matrices)

    def draw_figures(
        self,
        folder: Path,
        *,
        history: History,
        matrices: Mapping[int, Mapping[str, Tensor]],
        stage_starts: Sequence[int],
    ) -> dict[str, Path]:
        """law.png: losses, residual information by lag, and the gradient against it."""
        return law_figures.draw_figures(
            folder, recipe=self.recipe, history=history, matrices=matrices
        )

    def save_model(self, folder: Path) -> None:
        """Write weights and config; `load_model` reads them."""
        fixed = self._model.fixed_embeddings
        extra = {"kind": self._model.kind, "bos": None, "fixed_embeddings": fixed}
        save_model(self.hooked, folder, extra=extra)

    def conclusions(self, history: History) -> dict[str, Any]:
        """What the text was, and the law's mean correlations between unigram and bigram loss."""
        return {"text": self.task.facts, **law_in_window(history)}

    def reference_matrices(self) -> dict[str, Tensor]:
        """χ²-information of the text by lag, in one row."""
        return {"text/chi2": self.information.chi2.unsqueeze(0).float().cpu()}

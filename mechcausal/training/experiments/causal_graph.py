"""The paper's experiments: a transformer learns the causal graph of its data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.measures.closed_form_observer import ClosedFormObserver
from mechcausal.measures.figures import History
from mechcausal.measures.observation import Observation
from mechcausal.measures.observer import Observer
from mechcausal.measures.plateaus import find_drops, find_plateaus, steepest_drop
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.predicting import graph_model
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.pictures.static import paper_figures
from mechcausal.pictures.static import run_figures as report
from mechcausal.recipes import Recipe
from mechcausal.recipes.clamp_checks import is_on
from mechcausal.tasks import (
    Batch,
    GraphTask,
    Prior,
    SingleParentTask,
    build_task,
    soft_cross_entropy,
)
from mechcausal.tasks.predictors import bayes_prediction
from mechcausal.tasks.single_parent import sample_each
from mechcausal.theory import (
    Information,
    PairwiseTheory,
    pairwise_theory,
    parent_information,
    theory_notes,
)
from mechcausal.training.experiments.base import (
    Experiment,
    Generators,
    ModelExperiment,
    Tell,
    tell_nobody,
)
from mechcausal.training.experiments.models import ModelBuilder, build_model
from mechcausal.training.objective import Objective

# If probing through hooks takes longer, on a busy core, a simplified model's closed form is read.
_MOST_SECONDS = 20.0
_MULTIPLICATIONS_PER_SECOND = 1e10  # float32


class CausalGraphExperiment(ModelExperiment):
    """A model trained in closed form on sequences of a graph and probed through hooks.

    Prior and model may be the caller's:
    `mechcausal.train(recipe, experiment=partial(CausalGraphExperiment, prior=...))`.

    Attributes:
        task: graph and prior.
        theory: pairwise information of graph and prior.
        model: the trained model.
        observer: probes the model on a fixed evaluation batch.
    """

    kind = "causal_graph"

    def __init__(
        self,
        recipe: Recipe,
        generators: Generators,
        tell: Tell = tell_nobody,
        *,
        prior: Prior | None = None,
        model: ModelBuilder | None = None,
        closed_form: bool = False,
    ) -> None:
        """Build the task, its theory, the model at its start, and the observer.

        Args:
            recipe: the recipe.
            generators: of the run.
            tell: called with what is being prepared.
            prior: of the transition matrices; the recipe's when absent.
            model: builds the model; the recipe's when absent.
            closed_form: probe a simplified model in closed form instead of through hooks.

        Raises:
            ModelError: the caller's model does not fit the task.
        """
        super().__init__(recipe, generators)
        training, evaluation = recipe.training, recipe.evaluation
        self.task = build_task(recipe.build_graph(), prior or recipe.build_prior())
        self.theory = _theory(self.task, recipe, generators, tell)
        built = model or partial(build_model, recipe)
        self.model = graph_model(
            built(self.task, seed=generators.init, device=generators.data.device), self.task
        )
        self.notes = theory_notes(self.theory, "evaluation.theory_seconds")
        # Clamped models are probed through hooks alone.
        has_other_probes = isinstance(self.model, SimplifiedTransformer) and not is_on(recipe.clamp)
        closed_form = closed_form and has_other_probes
        seconds = hooked_look_seconds(self.model, evaluation.n_sequences)
        if seconds > _MOST_SECONDS and recipe.probing.enabled and not closed_form:
            self.notes.append(_look_note(seconds, evaluation.n_sequences, closed=has_other_probes))
            closed_form = has_other_probes
        observer_type: type[Observer] = ClosedFormObserver if closed_form else Observer
        self.observer = observer_type(
            self.model,
            self.task,
            self.theory,
            n_sequences=evaluation.n_sequences,
            epsilon=training.epsilon,
            bayes_draws=evaluation.bayes_draws,
            generator=generators.evaluation,
            max_seconds=evaluation.theory_seconds,
            on_progress=_counted(tell, "the Bayes loss: {:,} of {:,} sequences"),
        )
        bayes = self.observer.bayes
        if bayes is None:
            self.notes.append(
                f"{type(self.task.prior).__name__} has no posterior_mean: the Bayes loss and the "
                "bigram strategy are left out"
            )
        elif bayes.n_draws < evaluation.bayes_draws and bayes.excess > bayes.stderr / 10:
            self.notes.append(
                f"the Bayes loss rests on {bayes.n_draws} of {evaluation.bayes_draws} draws, as "
                f"many as take about {evaluation.theory_seconds:g} s (evaluation.theory_seconds), "
                f"and is about {bayes.excess:.2g} nats too high"
            )
        self.objective = Objective(
            self.model,
            self.task,
            generator=generators.data,
            epsilon=training.epsilon,
            relabel=self._with_posterior if training.target == "posterior" else None,
        )

    @classmethod
    def training_losses(
        cls, experiments: Sequence[Experiment], n_sequences: int
    ) -> Float[Tensor, "run"]:
        """`training_loss` of each experiment; simplified models of equal shape in one pass."""
        ours = [e for e in experiments if isinstance(e, CausalGraphExperiment)]
        models = [e.model for e in ours if isinstance(e.model, SimplifiedTransformer)]
        tasks = [e.task for e in ours if isinstance(e.task, SingleParentTask)]
        if len(experiments) == 1 or len(models) < len(experiments):
            return super().training_losses(experiments, n_sequences)
        batch = sample_each(tasks, n_sequences, generators=[e.generators.data for e in ours])
        prediction = SimplifiedTransformer.predict_each(models, batch.tokens)
        epsilon = [experiment.recipe.training.epsilon for experiment in experiments]
        return soft_cross_entropy(prediction, batch.target, epsilon=prediction.new_tensor(epsilon))

    def _with_posterior(self, batch: Batch) -> Batch:
        """The batch with the mean of its labels given the sequences."""
        generator = self.generators.data
        return replace(batch, target=bayes_prediction(self.task, batch.tokens, generator=generator))

    def losses(self) -> dict[str, float]:
        """Evaluation loss, the losses of Bayes and of the construction, and the gaps to both."""
        return self.observer.losses()

    def evaluation_tokens(self) -> Int[Tensor, "batch pos"]:
        """The evaluation sequences."""
        return self.observer.batch.tokens

    def observe(self) -> Observation:
        """All probes in one forward and backward pass of the hooked model."""
        return self.observer.observe()

    def heatmaps(self, matrices: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Attention beside the graph; gradients beside the predicted gradient or information."""
        pairs = {name: m for name, m in matrices.items() if name != "attention/examples"}
        return report.heatmaps(pairs, self.theory)

    def draw_figures(
        self,
        folder: Path,
        *,
        history: History,
        matrices: Mapping[int, Mapping[str, Tensor]],
        stage_starts: Sequence[int],
    ) -> dict[str, Path]:
        """attention.png, gradient.png, curves.png, and blocks.png of a disentangled model."""
        files = report.draw_figures(
            folder,
            recipe=self.recipe,
            theory=self.theory,
            history=history,
            matrices=matrices,
            stage_starts=stage_starts,
        )
        if isinstance(self.model, DisentangledTransformer):
            figure = paper_figures.draw_blocks(
                self.model, self.task.graph if len(self.model.heads) == 2 else None
            )
            files["figures/blocks"] = folder / "blocks.png"
            figure.savefig(folder / "blocks.png", dpi=110)
        return files

    def conclusions(self, history: History) -> dict[str, Any]:
        """Plateaus of the loss with the model's strategy on each, and the drops between them."""
        steepest = steepest_drop(history)
        return {
            "plateaus": [asdict(plateau) for plateau in find_plateaus(history)],
            "drops": [asdict(drop) for drop in find_drops(history)],
            "steepest_drop": None if steepest is None else asdict(steepest[1]),
        }

    def reference_matrices(self) -> dict[str, Tensor]:
        """Information, the predicted gradient (one parent only), and the example sequences."""
        theory = self.theory
        matrices = {"theory/chi2": theory.chi2, "theory/shannon": theory.shannon}
        matrices["examples/tokens"] = self.observer.examples.cpu()
        if isinstance(theory, PairwiseTheory):
            matrices |= {"theory/g": theory.g, "theory/gradient": theory.predicted_gradient}
        return matrices


def _theory(task: GraphTask, recipe: Recipe, generators: Generators, tell: Tell) -> Information:
    n_priors = recipe.evaluation.theory_priors
    options: dict[str, Any] = {
        "generator": generators.theory,
        "max_seconds": recipe.evaluation.theory_seconds,
        "on_progress": _counted(tell, "theory: {:,} of {:,} draws of the prior"),
    }
    if isinstance(task, SingleParentTask):
        beta0 = recipe.training.beta0
        return pairwise_theory(task.graph, task.prior, n_priors=n_priors, beta0=beta0, **options)
    # A set of tensors costs more than a matrix, but holds S^k rows: a tenth is enough.
    return parent_information(task, n_priors=max(2, n_priors // 10), **options)


def _counted(tell: Tell, text: str) -> Callable[[int, int], None]:
    def count(done: int, total: int) -> None:
        if done < total:
            tell(text.format(done, total))

    return count


def hooked_look_seconds(model: GraphModel, n_sequences: int) -> float:
    """Estimate of the seconds for one probe step through hooks, forward and backward."""
    config = model.hooked.cfg
    width = config.n_heads * config.d_head
    layer = 4 * config.d_model * width + 2 * config.n_ctx * width
    layer += 2 * config.d_model * (config.d_mlp or 0)
    multiplications = 3 * config.n_layers * config.n_ctx * layer
    return n_sequences * multiplications / _MULTIPLICATIONS_PER_SECOND


def _look_note(seconds: float, n_sequences: int, *, closed: bool) -> str:
    takes = f"probing {n_sequences:,} sequences through hooks would take about {seconds:,.0f} s"
    if closed:
        return f"{takes}: attention and gradients are computed in closed form instead"
    return takes.replace("would take", "takes") + ": reduce evaluation.n_sequences or probe less"

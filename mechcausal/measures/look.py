"""One look at a model on a task: what a run records at a probe step, without a run."""

import torch

from mechcausal.measures.observation import Observation
from mechcausal.measures.observer import Observer
from mechcausal.measures.task_observer import TaskObserver
from mechcausal.models.adapter import HookedTransformer
from mechcausal.models.base import GraphModel
from mechcausal.models.predicting import graph_model
from mechcausal.tasks import SeveralParentsTask, SingleParentTask, Task
from mechcausal.theory import Information, pairwise_theory, parent_information


def observe(
    model: GraphModel | HookedTransformer,
    task: Task,
    *,
    generator: torch.Generator,
    n_sequences: int = 1024,
    epsilon: float = 1e-3,
    theory: Information | None = None,
    bayes_draws: int = 128,
    max_seconds: float = 60.0,
) -> Observation:
    """Figures and matrices of a model on a task, as a run records them at a probe step.

    On the task of a causal graph: losses, the graph in layer 1's attention, gradients against
    theory, induction, strategies, and what the weights say. On any other task: what
    `TaskExperiment` records.

    Args:
        model: not changed, nor are its gradients.
        task: any task.
        generator: source of the sequences, on the model's device.
        n_sequences: how many sequences are drawn.
        epsilon: smoothing of predictions, as in training.
        theory: of a causal graph and its prior; computed when absent, see `pairwise_theory`.
        bayes_draws: of the Bayes loss, see `bayes_loss`.
        max_seconds: limit for the theory, and for the Bayes loss.

    Returns:
        Figures by the names of docs/figures.md, and matrices on the CPU.

    Raises:
        ModelError, TaskError: they do not fit together, or batches make no sense.

    Example:
        >>> from mechcausal.graphs import chain
        >>> from mechcausal.models.simplified import SimplifiedTransformer
        >>> from mechcausal.tasks.priors import DirichletPrior
        >>> task = SingleParentTask(chain(7), DirichletPrior.symmetric(0.1, vocab_size=3))
        >>> model = SimplifiedTransformer(3, 8)
        >>> model.initialise(beta0=1.0)
        >>> generator = torch.Generator().manual_seed(0)
        >>> look = observe(model, task, generator=generator, n_sequences=256)
        >>> look.figures["gradient/edge_hits"], look.matrices["attention/layer0"].shape
        (1.0, torch.Size([8, 8]))
    """
    model = graph_model(model, task)
    if isinstance(task, SingleParentTask):
        theory = theory or pairwise_theory(task.graph, task.prior, max_seconds=max_seconds)
    elif isinstance(task, SeveralParentsTask):
        theory = theory or parent_information(task, max_seconds=max_seconds)
    else:
        other = TaskObserver(
            model, task, n_sequences=n_sequences, epsilon=epsilon, generator=generator
        )
        return other.observe()
    return Observer(
        model,
        task,
        theory,
        n_sequences=n_sequences,
        epsilon=epsilon,
        bayes_draws=bayes_draws,
        generator=generator,
        max_seconds=max_seconds,
    ).observe()

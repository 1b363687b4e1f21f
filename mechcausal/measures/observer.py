"""Measure a model during training: all gradient probes share one forward and backward pass.

The hooked model always runs on the same evaluation batch, so figures of different steps differ
only because the model has changed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechcausal.measures import metrics
from mechcausal.measures.blocks import block_shares, solution_share
from mechcausal.measures.construction import best_construction
from mechcausal.measures.matching import matching_figures
from mechcausal.measures.observation import Observation
from mechcausal.measures.strategies import strategy_figures
from mechcausal.models.base import GraphModel
from mechcausal.models.disentangled import DisentangledTransformer
from mechcausal.models.predicting import parts_of
from mechcausal.models.simplified import SimplifiedTransformer
from mechcausal.tasks import GraphTask, PriorWithPosterior, predictors, soft_cross_entropy
from mechcausal.theory import Information, PairwiseTheory, named_edges
from probes import (
    AttentionGradient,
    AttentionPattern,
    AttentionTo,
    InductionScores,
    above_chance,
    attach,
    copying_score,
    k_composition,
    repeated_tokens,
)

# Sequences whose last-layer attention is recorded individually, for pictures.
_N_EXAMPLES = 4


@dataclass(frozen=True)
class ProbeReadings:
    """The readings of all probes at one step, on the CPU except the prediction.

    Attributes:
        attention: layer 1's patterns, mean over sequences.
        scores: descent direction on layer 1's scores.
        pattern: descent direction on layer 1's patterns, centred by row.
        pattern_stderr: standard error of `pattern`.
        induction: attention of each last-layer head on the keys of `metrics.induction_mask`.
        matching: prefix-matching score of each last-layer head on repeated tokens.
        examples: last-layer attention from the last position on a few sequences.
        prediction: the model's output on the evaluation batch.
    """

    attention: Float[Tensor, "head query key"]
    scores: Float[Tensor, "head query key"]
    pattern: Float[Tensor, "head query key"]
    pattern_stderr: Float[Tensor, "head query key"]
    induction: Float[Tensor, "last_head"]
    matching: Float[Tensor, "last_head"]
    examples: Float[Tensor, "example last_head key"]
    prediction: Float[Tensor, "batch vocab"]


class Observer:
    """Measures a model on a fixed evaluation batch, as often as `observe` is called.

    Attributes:
        batch: the evaluation sequences.
        examples: the first few of them, whose attention is recorded individually.
        bayes: the Bayes loss on them; None if the prior does not know its posterior.
        construction: the hand-built solution of the model's kind on them; None if it has none.
        strategy_losses: cross entropy of every strategy on them, nats.
        uniform_induction: `induction/attention` of a last-layer query with uniform attention; NaN
            if no query has a target.
        repeated: sequences of random tokens, repeated.
    """

    def __init__(
        self,
        model: GraphModel,
        task: GraphTask,
        theory: Information,
        *,
        n_sequences: int,
        epsilon: float,
        bayes_draws: int,
        generator: torch.Generator,
        max_seconds: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Draw the evaluation batch and compute the losses to compare with.

        Args:
            model: the model to observe; never changed.
            task: graph and prior.
            theory: for the same graph and prior.
            n_sequences: size of the evaluation batch.
            epsilon: smoothing of predictions, as in training.
            bayes_draws: see `predictors.bayes_loss`.
            generator: of the evaluation alone.
            max_seconds: limit for the Bayes loss, see `predictors.bayes_loss`.
            on_progress: called with the number of sequences done for the Bayes loss, and their
                total.
        """
        self.model = model
        self.task = task
        self.theory = theory
        self.epsilon = epsilon
        self.batch = task.sample(n_sequences, generator=generator)
        tokens, target = self.batch.tokens, self.batch.target
        self.examples = tokens[:_N_EXAMPLES]
        self.bayes: predictors.BayesLoss | None = None
        if isinstance(task.prior, PriorWithPosterior):
            self.bayes = predictors.bayes_loss(
                task,
                self.batch,
                generator=generator,
                max_draws=bayes_draws,
                max_seconds=max_seconds,
                on_progress=on_progress,
            )
        self.construction = best_construction(model, task.graph, self.batch, epsilon=epsilon)
        self._strategies = predictors.strategies(task, tokens)
        self.strategy_losses = {
            name: soft_cross_entropy(prediction, target).item()
            for name, prediction in self._strategies.items()
        }
        keys = metrics.induction_keys(tokens, task.graph)
        # The last position sees every key; a query without targets is not scored.
        self.uniform_induction = keys[keys.any(1)].double().mean().item()
        self.repeated = repeated_tokens(
            64, task.sequence_length // 2, task.vocab_size, generator=generator
        )

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Losses of the model, of Bayes and of the hand-built solution, and both gaps, in nats."""
        prediction = self.model(self.batch.tokens)
        return self._losses(prediction)

    def observe(self) -> Observation:
        """Run the hooked model on the evaluation batch with every probe attached.

        The matrices are `attention/layer0` and the descent directions `gradient/scores` and
        `gradient/pattern` (centred by row), each [query, key], or [head, query, key] if layer 1 has
        several heads. `attention/examples` [example, head, key] is the last layer's attention from
        the last position of `examples`.
        """
        graph, model = self.task.graph, self.model
        last = len(model.heads) - 1
        pattern = AttentionPattern(0, reduce="mean")
        by_scores = AttentionGradient("scores", 0)
        by_pattern = AttentionGradient("pattern", 0, centred=True)
        induction = AttentionTo(last, lambda tokens: metrics.induction_mask(tokens, graph))
        with model.frozen():
            with attach(model.hooked, pattern, by_scores, by_pattern, induction):
                prediction = self._backward()
            repeated = InductionScores(last)
            with torch.no_grad(), attach(model.hooked, repeated):
                model.hooked(self.repeated, return_type=None)
            last_pattern = AttentionPattern(last)
            with torch.no_grad(), attach(model.hooked, last_pattern):
                model.hooked(self.examples, return_type=None)
        heads = slice(model.heads[0])
        last_heads = slice(model.heads[last])
        scores = induction.reading().sel(layer=last).values[:, last_heads]
        matching = repeated.reading().sel(score="prefix_matching", layer=last).values[:, last_heads]
        readings = ProbeReadings(
            attention=pattern.reading().sel(layer=0).values[heads].cpu(),
            scores=-by_scores.reading().sel(layer=0).values[heads].cpu(),
            pattern=-by_pattern.reading().sel(layer=0).values[heads].cpu(),
            pattern_stderr=by_pattern.stderr().sel(layer=0).values[heads].cpu(),
            induction=scores.nanmean(0),
            matching=matching.nanmean(0),
            examples=last_pattern.reading().sel(layer=last).values[:, last_heads, -1].cpu(),
            prediction=prediction,
        )
        return self.figures_of(readings)

    def figures_of(self, readings: ProbeReadings) -> Observation:
        """Compute the figures from the readings of the probes."""
        model, last = self.model, len(self.model.heads) - 1
        matrices = {
            "attention/layer0": readings.attention,
            "gradient/scores": readings.scores,
            "gradient/pattern": readings.pattern,
        }
        figures = self._losses(readings.prediction)
        figures |= matching_figures(readings.attention, self.task.graph)
        figures |= self._gradient_figures(matrices, readings.pattern_stderr)
        attention = readings.induction.max().cpu().double()
        figures |= {  # of the best head
            "induction/score": above_chance(
                attention, attention.new_tensor(self.uniform_induction)
            ).item(),
            "induction/attention": attention.item(),
            "induction/prefix_matching": readings.matching.max().item(),
            "induction/copying": copying_score(model.hooked, last)[: model.heads[last]]
            .max()
            .item(),
        }
        figures |= strategy_figures(readings.prediction, self._strategies, epsilon=self.epsilon)
        figures |= self._weight_figures()
        if model.heads[0] == 1:
            matrices = {name: matrix.squeeze(0) for name, matrix in matrices.items()}
        matrices["attention/examples"] = readings.examples
        return Observation(figures, matrices, readings.prediction)

    def _backward(self) -> Tensor:
        """Run forward and backward passes over the evaluation batch; return the predictions."""
        model, total = self.model, len(self.batch)
        predictions = []
        for part in parts_of(self.batch, model):
            prediction = model.probabilities(model.hooked(part.tokens))
            loss = soft_cross_entropy(prediction, part.target, epsilon=self.epsilon)
            # Weighted so that the parts sum to the mean loss of the batch.
            (loss * (len(part) / total)).backward()
            predictions.append(prediction.detach())
        return torch.cat(predictions)

    def _gradient_figures(self, matrices: dict[str, Tensor], stderr: Tensor) -> dict[str, float]:
        """Compare gradients with information, for the sum over heads and for each head."""
        graph, n = self.task.graph, self.task.graph.n_positions
        scores, pattern = matrices["gradient/scores"], matrices["gradient/pattern"]
        figures = metrics.gradient_figures(scores.sum(0), self.theory)
        # With saturated attention the gradient on the scores vanishes. That on the pattern, divided
        # by the number of keys, is the score gradient that uniform attention would have.
        n_keys = torch.arange(1, pattern.shape[-1] + 1).unsqueeze(1)
        at_uniform = pattern / n_keys
        figures |= metrics.gradient_figures(
            at_uniform.sum(0), self.theory, prefix="gradient/pattern_"
        )
        if len(scores) > 1:
            for head in range(len(scores)):
                head_figures = metrics.gradient_figures(
                    at_uniform[head], self.theory, prefix=f"gradient/head{head}/pattern_"
                )
                figures |= {k: v for k, v in head_figures.items() if not k.endswith("_spearman")}
        if isinstance(self.theory, PairwiseTheory) and len(scores) == 1:
            named = named_edges(pattern[0, :n, :n], stderr[0, :n, :n])
            figures["graph/f1"] = metrics.edge_f1(named, graph)
        return figures

    def _weight_figures(self) -> dict[str, float]:
        """Weight shares by block, and K-composition of the last layer with earlier heads."""
        model = self.model
        figures: dict[str, float] = {}
        if isinstance(model, DisentangledTransformer):
            figures |= block_shares(model)
            if len(model.heads) == 2:  # the paper's solution has two layers
                figures["blocks/solution_share"] = solution_share(model, self.task.graph)
        if not isinstance(model, SimplifiedTransformer) and len(model.heads) > 1:
            last = len(model.heads) - 1
            later = [(last, head) for head in range(model.heads[last])]
            earlier = [(layer, head) for layer in range(last) for head in range(model.heads[layer])]
            excess = k_composition(model.hooked, later, earlier).excess
            for row, (layer, head) in enumerate(later):
                for column, (source, writer) in enumerate(earlier):
                    name = f"composition/L{layer}H{head}_reads_L{source}H{writer}"
                    figures[name] = excess[row, column].item()
        return figures

    def _losses(self, prediction: Tensor) -> dict[str, float]:
        loss = soft_cross_entropy(prediction, self.batch.target, epsilon=self.epsilon).item()
        losses = {"loss/eval": loss}
        if self.bayes is not None:
            losses |= {"loss/bayes": self.bayes.mean, "loss/gap": loss - self.bayes.mean}
        if self.construction is not None:
            losses["loss/construction"] = self.construction.loss
            losses["loss/construction_gap"] = loss - self.construction.loss
        return losses

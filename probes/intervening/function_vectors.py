"""Function-vector heads: whose mean output over few-shot prompts carries the task.

Cost: two passes over the prompts of a task for every head, from its layer on, made in batches.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.heads.few_shot import FewShotTask, Prompts, draw_prompts, random_mappings
from probes.heads.stimuli import Bos, bos_token
from probes.reading.activation import Activation
from probes.reading.attach import attach
from probes.reading.errors import ProbeError
from probes.reading.hook_names import Head, config_of, hook_name, hook_points, layers_with
from probes.reading.hooking import Hooks
from probes.reading.labelled import standard_error
from probes.reading.layer_passes import logits_from, starts_at_layers, stream_before
from probes.reading.passes import (
    MAX_BATCH_BYTES,
    attends_ahead,
    batch_rows,
    checked_tokens,
    run,
    undisturbed,
)

STANDARD_ERRORS = 5.0
NEGLIGIBLE = 0.02
"""The smallest effect that counts, as a probability."""


@dataclass(frozen=True, eq=False, repr=False)
class FunctionVectors:
    """The causal effect of every head's mean output over few-shot prompts.

    All effects are rises of the probability of the right answer, on prompts whose demonstrations
    have shuffled answers, when one head's output at the last position is replaced by its mean over
    prompts of a task with right answers. Means over prompts of all tasks.

    A high effect says: what this head writes on average, whatever the item asked for, makes the
    model do this task and not another. It does not say that the head is needed (others may write
    the same: ablate it), that the model learns new functions in context (it may only recognise
    tasks it knows), nor anything about tasks that were not tried. If `right` is not above
    `shuffled`, the model does not do the tasks, and no effect means anything.

    Attributes:
        layers: the layer number of each row.
        effect: the rise with the mean of the prompt's task, minus the rise with that of another
            task, `[layer, head]`.
        stderr: its standard error, paired over prompts.
        own: the rise with the mean of the prompt's task (the average indirect effect of Todd et
            al.).
        other: the rise with the mean of another task.
        right: mean probability of the right answer after demonstrations with right answers.
        shuffled: the same after demonstrations with shuffled answers.
        tasks: the names of the tasks.
        prompts: number of prompts, over all tasks.
        n_shots: demonstrations in a prompt.
    """

    layers: tuple[int, ...]
    effect: Float[Tensor, "layer head"]
    stderr: Float[Tensor, "layer head"]
    own: Float[Tensor, "layer head"]
    other: Float[Tensor, "layer head"]
    right: float
    shuffled: float
    tasks: tuple[str, ...]
    prompts: int
    n_shots: int

    @property
    def does_tasks(self) -> bool:
        """Whether right demonstrations help: `right - shuffled` exceeds 0.05."""
        return self.right - self.shuffled > 0.05

    def heads(self) -> list[Head]:
        """The function-vector heads, the largest effect first.

        Those whose effect exceeds 5 standard errors and 0.02, and whose `own` exceeds 0.02; none if
        the model does not do the tasks.
        """
        passes = (self.effect > STANDARD_ERRORS * self.stderr) & (self.effect > NEGLIGIBLE)
        passes &= self.own > NEGLIGIBLE
        if not self.does_tasks:
            return []
        return [head for head in self.top(passes.numel()) if passes[self._index(head)]]

    def top(self, n: int) -> list[Head]:
        """The n heads with the largest effects, as (layer, head)."""
        order = self.effect.flatten().argsort(descending=True, stable=True)[:n].tolist()
        n_heads = self.effect.shape[1]
        return [(self.layers[i // n_heads], i % n_heads) for i in order]

    def row(self, head: Head) -> dict[str, Any]:
        """The numbers of one head, and whether it is a function-vector head."""
        index = self._index(head)
        names = ("effect", "stderr", "own", "other")
        values = {name: getattr(self, name)[index].item() for name in names}
        return {"layer": head[0], "head": head[1], **values, "named": head in self.heads()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; heads sorted by effect."""
        rows = [self.row(head) for head in self.top(self.effect.numel())]
        for row in rows:
            row["stderr"] = None if row["stderr"] != row["stderr"] else row["stderr"]
        names = ("right", "shuffled", "does_tasks", "prompts", "n_shots")
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "tasks": list(self.tasks), "heads": rows}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def _index(self, head: Head) -> tuple[int, int]:
        return self.layers.index(head[0]), head[1]

    def __repr__(self) -> str:
        named = ", ".join(f"{layer}.{head}" for layer, head in self.heads()) or "no head"
        return (
            f"FunctionVectors({len(self.tasks)} tasks, {self.prompts} prompts, p(answer) "
            f"{self.right:.2f}, shuffled {self.shuffled:.2f}: {named})"
        )


def function_vectors(
    model: nn.Module,
    tasks: Sequence[FewShotTask] | None = None,
    *,
    n_prompts: int = 16,
    n_shots: int = 5,
    between: tuple[int, ...] = (),
    after: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    max_batch_bytes: int = MAX_BATCH_BYTES,
    bos: Bos = "auto",
) -> FunctionVectors:
    """Which heads carry a few-shot task in their mean output.

    For task t, `m_t[h]` is the mean of head h's z at the last position over prompts
    `[bos] x1 y1 … xn yn x` with right answers, x from one half of the items. On prompts with
    shuffled answers and x from the other half, z is replaced by `m_t[h]`, and as a control by that
    of another task: `effect = E[p(y | m_t[h]) - p(y | m_t'[h])]`. If all tasks have the same
    answers, x runs through all items on both sides: every mean then holds every answer alike. An
    induction head, which copies the answer to the item asked for, has no effect: over the items its
    output averages out.

    Args:
        model: a HookedTransformer or TransformerBridge; left as it was.
        tasks: at least two, best with the same items or answers. None for random mappings of four
            items, whose last item is also among the demonstrations: without words, that is all that
            an unknown model can be asked. A model that solves them by induction gets no
            function-vector head.
        n_prompts: prompts of each task for the mean, and as many for the effect.
        n_shots: demonstrations in a prompt: at least two, and at most one fewer than the items of
            any task.
        between: tokens between item and answer.
        after: tokens after an answer.
        generator: the source of randomness; None for a new one with seed 0.
        max_batch_bytes: bound on the estimated activations of one pass, in bytes.
        bos: token at the start: a token, None, or "auto" for the tokenizer's BOS.

    Returns:
        Effects `[layer, head]` with standard errors over prompts.

    Raises:
        ValueError: fewer than two tasks, a number that is too small, or too many demonstrations.
        ProbeError: the prompts do not fit the model, or it attends to later tokens.

    Source:
        Todd et al. 2024, "Function Vectors in Large Language Models".

    >>> from mechcausal.models.adapter import HookedTransformer
    >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 16, "d_vocab": 20}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> function_vectors(model, n_shots=3, n_prompts=4).heads()
    []
    """
    if n_prompts < 1 or n_shots < 2:
        raise ValueError(
            f"n_prompts is {n_prompts}, n_shots {n_shots}; at least one prompt is needed, and two "
            "demonstrations, whose answers can be shuffled"
        )
    if attends_ahead(model):
        raise ProbeError(
            f"{type(model).__name__} attends to later tokens: it has no next-token prediction"
        )
    random = torch.Generator().manual_seed(0) if generator is None else generator
    front = bos_token(model, bos)
    shows_query = tasks is None
    if tasks is None:
        usable = [token for token in range(config_of(model).d_vocab) if token != front]
        tasks = random_mappings(usable, n_items=max(4, n_shots), n_tasks=4, generator=random)
    if len(tasks) < 2:
        raise ValueError("one task has no other whose mean could be its control: give two or more")
    fewest = min(len(task.items) for task in tasks) - (not shows_query)
    if n_shots > fewest:
        raise ValueError(f"n_shots is {n_shots}; these tasks allow at most {fewest}")
    drawing: dict[str, Any] = {"n_prompts": n_prompts, "n_shots": n_shots, "bos": front}
    drawing |= {"between": between, "after": after, "shows_query": shows_query}
    share_answers = len({frozenset(task.answers) for task in tasks}) == 1
    seen: list[Prompts] = []
    tried: list[Prompts] = []
    for task in tasks:
        order = torch.randperm(len(task.items), generator=random).tolist()
        half = len(order) // 2
        halves = (order, order) if share_answers else (order[:half], order[half:])
        for drawn, queries in zip((seen, tried), halves, strict=True):
            drawn.append(draw_prompts(task, queries, **drawing, generator=random))
    patching = _TaskPatching(model, max_batch_bytes)
    means = [patching.means(prompts.right) for prompts in seen]
    own: list[Tensor] = []
    other: list[Tensor] = []
    right, shuffled = [], []
    for number, prompts in enumerate(tried):
        right.append(patching.probabilities(prompts.right, prompts.answers))
        before = patching.probabilities(prompts.shuffled, prompts.answers)
        shuffled.append(before)
        both = torch.stack([means[number], means[number - 1]])
        for rises, patched in zip((own, other), patching.patched(prompts, both), strict=True):
            rises.append(patched - before)
    own_rise, other_rise = torch.cat(own, dim=2), torch.cat(other, dim=2)
    difference = own_rise - other_rise
    return FunctionVectors(
        layers=patching.layers,
        effect=difference.mean(2),
        stderr=standard_error(difference, 2),
        own=own_rise.mean(2),
        other=other_rise.mean(2),
        right=torch.cat(right).mean().item(),
        shuffled=torch.cat(shuffled).mean().item(),
        tasks=tuple(task.name for task in tasks),
        prompts=n_prompts * len(tasks),
        n_shots=n_shots,
    )


class _TaskPatching:
    """Passes over few-shot prompts, in which a head's last output may be replaced."""

    def __init__(self, model: nn.Module, max_batch_bytes: int) -> None:
        self._model, self._points = model, hook_points(model)
        self._max_batch_bytes = max_batch_bytes
        self._starts_at_layers = starts_at_layers(model)
        self.layers = layers_with(model, "z")

    def means(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "layer head d_head"]:
        """Mean z of every head at the last position."""
        tokens = checked_tokens(self._model, tokens)
        last = Activation("z", self.layers, reduce=lambda z: z[:, -1], axes=("head", "d_head"))
        with undisturbed(self._model), attach(self._model, last):
            for batch in tokens.split(self._rows(tokens)):
                run(self._model, batch)
        return last.reading().values

    def probabilities(
        self, tokens: Int[Tensor, "batch pos"], answers: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch"]:
        """The probability of each answer as the next token, in float64."""
        tokens = checked_tokens(self._model, tokens)
        rows = self._rows(tokens)
        with undisturbed(self._model):
            parts = [
                self._probability(batch, right)
                for batch, right in zip(tokens.split(rows), answers.split(rows), strict=True)
            ]
        return torch.cat(parts)

    def patched(
        self, prompts: Prompts, means: Float[Tensor, "task layer head d_head"]
    ) -> Float[Tensor, "task layer head batch"]:
        """Those probabilities with each head's mean in its place, one head at a time."""
        tokens = checked_tokens(self._model, prompts.shuffled)
        n_tasks, n_heads, batch = len(means), means.shape[2], len(tokens)
        rows = self._rows(tokens)
        by_layer = []
        for index, layer in enumerate(self.layers):
            stream = None
            if self._starts_at_layers:
                stream = stream_before(self._model, layer, tokens, rows)
            # All heads and tasks in one long batch, in the order [task head batch].
            replacements = means[:, index].flatten(0, 1).repeat_interleave(batch, 0)
            parts = []
            for start in range(0, len(replacements), rows):
                new = replacements[start : start + rows]
                numbers = torch.arange(start, start + len(new))
                sequences = (numbers % batch).to(tokens.device)
                replace = partial(_with_last, numbers // batch % n_heads, new)
                with undisturbed(self._model), Hooks() as hooks:
                    hooks.edit(self._points[hook_name("z", layer)], replace)
                    parts.append(
                        self._probability(
                            tokens[sequences],
                            prompts.answers[numbers % batch],
                            None if stream is None else stream[sequences],
                            layer,
                        )
                    )
            by_layer.append(torch.cat(parts).view(n_tasks, n_heads, batch))
        return torch.stack(by_layer, dim=1)

    def _probability(
        self,
        tokens: Tensor,
        answers: Tensor,
        stream: Tensor | None = None,
        layer: int = 0,
    ) -> Tensor:
        logits = logits_from(self._model, tokens, stream, layer, "a function vector")
        right = answers.to(logits.device).unsqueeze(1)
        return logits[:, -1].double().softmax(-1).gather(1, right)[:, 0].cpu()

    def _rows(self, tokens: Tensor) -> int:
        return batch_rows(self._model, tokens.shape[1], self._max_batch_bytes, logits=True)


def _with_last(heads: Int[Tensor, "row"], values: Float[Tensor, "row d_head"], z: Tensor) -> Tensor:
    """Replace one head's z at the last position of every row."""
    changed = z.clone()
    rows = torch.arange(len(z), device=z.device)
    changed[rows, -1, heads.to(z.device)] = values.to(z)
    return changed

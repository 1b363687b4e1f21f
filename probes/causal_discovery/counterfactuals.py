"""Run a model with some of its tokens replaced, within a budget and no input twice."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.reading.errors import ProbeError

Logits: TypeAlias = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch cls"]]
"""One row of logits (or log-probabilities) per sequence; the largest is the prediction."""

Replace: TypeAlias = Callable[
    [Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]], Int[Tensor, "batch pos"]
]
"""Replaces the tokens at the marked positions and keeps the shape."""


@dataclass(frozen=True)
class Outcome:
    """The model's prediction for a sequence with some tokens replaced.

    Attributes:
        positions: the replaced positions, ascending.
        prediction: the class with the largest logit.
        log_probability: log-probability of the class predicted from the original sequence, in nats.
    """

    positions: tuple[int, ...]
    prediction: int
    log_probability: float


def replace_by(token: int) -> Replace:
    """Put one token, such as PAD or MASK, at every marked position.

    >>> tokens, marked = torch.tensor([[5, 6, 7]]), torch.tensor([[True, False, True]])
    >>> replace_by(0)(tokens, marked)
    tensor([[0, 6, 0]])
    """

    def replace(
        tokens: Int[Tensor, "batch pos"], marked: Bool[Tensor, "batch pos"]
    ) -> Int[Tensor, "batch pos"]:
        return tokens.masked_fill(marked, token)

    return replace


class Counterfactuals:
    """Runs one sequence with sets of tokens replaced, and counts the runs.

    Attributes:
        tokens: the original sequence, `[pos]`.
        prediction: the class predicted from the original sequence.
        calls: number of sequences run so far, including the original.
        budget: the largest number of calls.
    """

    def __init__(
        self,
        logits: Logits,
        tokens: Int[Tensor, "pos"],
        replace: Replace,
        *,
        budget: int,
        batch_size: int,
    ) -> None:
        """Run the original sequence."""
        self.tokens = tokens
        self.budget = budget
        self.calls = 0
        self._logits = logits
        self._replace = replace
        self._batch_size = batch_size
        # A replacement function may turn distinct sets into the same tokens.
        self._seen = {tuple(tokens.tolist())}
        self.prediction = int(self._run(tokens.unsqueeze(0)).argmax())

    @property
    def left(self) -> int:
        """The number of sequences that may still be run."""
        return self.budget - self.calls

    def spend(self) -> None:
        """Count a sequence that the caller ran to read its attention."""
        self.calls += 1

    def effective(self, positions: Sequence[int]) -> tuple[int, ...]:
        """The positions whose replacement changes the tokens; does not run the model."""
        if not positions:
            return ()
        changed = self._replaced([(position,) for position in positions]) != self.tokens
        return tuple(p for p, any_ in zip(positions, changed.any(1).tolist(), strict=True) if any_)

    def first_change(self, sets: Iterable[tuple[int, ...]], *, keep: int = 0) -> Outcome | None:
        """The first set whose replacement changes the prediction, or None.

        Args:
            sets: sets of positions to replace; consumed only as far as needed.
            keep: number of calls of the budget to leave unspent.
        """
        outcomes = self.outcomes(sets, keep=keep)
        return next((o for o in outcomes if o.prediction != self.prediction), None)

    def outcomes(self, sets: Iterable[tuple[int, ...]], *, keep: int = 0) -> Iterator[Outcome]:
        """Run sets in order, in batches, until only `keep` calls of the budget are left.

        Sets whose tokens have been run before are skipped.
        """
        fresh = self._fresh(iter(sets))
        while self.left > keep:
            batch = list(islice(fresh, min(self._batch_size, self.left - keep)))
            if not batch:
                return
            logits = self._run(torch.stack([tokens for _, tokens in batch]))
            log_probabilities = logits.log_softmax(-1)[:, self.prediction].tolist()
            for (chosen, _), prediction, value in zip(
                batch, logits.argmax(-1).tolist(), log_probabilities, strict=True
            ):
                yield Outcome(chosen, prediction, value)

    def _fresh(
        self, sets: Iterator[tuple[int, ...]]
    ) -> Iterator[tuple[tuple[int, ...], Int[Tensor, "pos"]]]:
        for positions in sets:
            chosen = tuple(sorted(positions))
            tokens = self._replaced([chosen])[0]
            key = tuple(tokens.tolist())
            if key not in self._seen:
                self._seen.add(key)
                yield chosen, tokens

    def _replaced(self, sets: Sequence[tuple[int, ...]]) -> Int[Tensor, "batch pos"]:
        marked = torch.zeros(
            len(sets), len(self.tokens), dtype=torch.bool, device=self.tokens.device
        )
        for row, positions in enumerate(sets):
            marked[row, list(positions)] = True
        before = self.tokens.expand(len(sets), -1)
        after = self._replace(before.clone(), marked)
        if after.shape != before.shape:
            raise ProbeError(
                f"replacement returns shape {tuple(after.shape)} for tokens of shape "
                f"{tuple(before.shape)}"
            )
        return after.to(before)

    def _run(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch cls"]:
        logits = self._logits(tokens)
        self.calls += len(tokens)
        if logits.ndim != 2 or len(logits) != len(tokens) or logits.shape[1] < 2:
            raise ProbeError(
                f"logits of {len(tokens)} sequences have shape {tuple(logits.shape)}; "
                "expected [batch, class] with at least two classes"
            )
        if bool(logits.isnan().any()):
            raise ProbeError("the model's logits contain NaN: they give no prediction")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

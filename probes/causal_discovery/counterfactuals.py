"""Run a model with some of its tokens replaced: within a budget, and no input twice."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.reading.errors import ProbeError

Logits: TypeAlias = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch cls"]]
"""One row of logits (or log-probabilities) a sequence; its largest entry is the prediction."""

Replace: TypeAlias = Callable[
    [Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]], Int[Tensor, "batch pos"]
]
"""The tokens with those at the marked positions replaced; the shape stays."""


@dataclass(frozen=True)
class Outcome:
    """What the model makes of a sequence with some positions replaced.

    Attributes:
        positions: the replaced ones, ascending.
        prediction: the class with the largest logit.
        log_probability: of the class predicted from the whole sequence, nats.
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
    """The runs of one sequence's counterfactuals; every sequence run is a call.

    Attributes:
        tokens: the sequence, `[pos]`.
        prediction: the class that the model predicts from the whole sequence.
        calls: sequences run so far, that first one included.
        budget: the most that may be run.
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
        """Run the whole sequence."""
        self.tokens = tokens
        self.budget = budget
        self.calls = 0
        self._logits = logits
        self._replace = replace
        self._batch_size = batch_size
        # Distinct sets may make the same tokens, under a replacement that is a function.
        self._seen = {tuple(tokens.tolist())}
        self.prediction = int(self._run(tokens.unsqueeze(0)).argmax())

    @property
    def left(self) -> int:
        """Sequences that may still be run."""
        return self.budget - self.calls

    def spend(self) -> None:
        """Count a sequence that was run elsewhere, to read its attention."""
        self.calls += 1

    def effective(self, positions: Sequence[int]) -> tuple[int, ...]:
        """The positions at which a replacement alone changes the tokens; runs nothing."""
        if not positions:
            return ()
        changed = self._replaced([(position,) for position in positions]) != self.tokens
        return tuple(p for p, any_ in zip(positions, changed.any(1).tolist(), strict=True) if any_)

    def first_change(self, sets: Iterable[tuple[int, ...]], *, keep: int = 0) -> Outcome | None:
        """The first set whose replacement changes the prediction, None if none did.

        Args:
            sets: positions to replace together; taken one by one, as far as needed.
            keep: calls of the budget to leave.
        """
        outcomes = self.outcomes(sets, keep=keep)
        return next((found for found in outcomes if found.prediction != self.prediction), None)

    def outcomes(self, sets: Iterable[tuple[int, ...]], *, keep: int = 0) -> Iterator[Outcome]:
        """Run sets in batches, in their order, until the budget is spent but for `keep` calls.

        Sets whose tokens were run before are passed over.
        """
        fresh = self._fresh(iter(sets))
        while self.left > keep:
            batch = list(islice(fresh, min(self._batch_size, self.left - keep)))
            if not batch:
                return
            logits = self._run(torch.stack([tokens for _, tokens in batch]))
            own = logits.log_softmax(-1)[:, self.prediction].tolist()
            for (chosen, _), prediction, value in zip(
                batch, logits.argmax(-1).tolist(), own, strict=True
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
                f"replacement makes shape {tuple(after.shape)} of tokens of shape "
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
            raise ProbeError("the model's logits hold NaN: no prediction can be read from them")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

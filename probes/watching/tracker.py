"""Watch the heads of a model while somebody else trains it."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from probes.heads.formation import Formation, track_formation
from probes.heads.head_scores import score_heads
from probes.heads.head_table import HeadScores
from probes.heads.in_context import in_context_score
from probes.reading.errors import ProbeWarning
from probes.reading.hook_names import Layers, layers_with
from probes.reading.labelled import LabelledTensor
from probes.reading.padding import real_positions
from probes.reading.passes import MAX_BATCH_BYTES, checked_tokens
from probes.watching.agreement import Target, agreement
from probes.watching.gradient import Loss, attention_gradient
from probes.watching.information import PairwiseInformation, pairwise_information
from probes.watching.look import Look
from probes.watching.shadow import Shadow
from probes.watching.unwrap import is_observing_process, unwrapped

Log = Callable[..., Any]

_LOGGED_SCORES = ("prefix_matching", "previous_token", "duplicate_token")
_MAX_LOGGED_HEADS = 8
# Of longer sequences, information is estimated by lag: pairs of positions grow with their square.
_MAX_POSITIONS, _MAX_LAG = 64, 32


class Tracker:
    """Looks at a model every so many steps: head scores, in-context learning, gradient.

    A look runs a few passes in evaluation mode with frozen parameters. It changes no weight, no
    `.grad`, no mode and no random state: training goes on as if it had not happened. A part of a
    look that fails warns once and never stops training.

    Figures, by their names without the prefix (`L1H0` is head 0 of layer 1):

    - `prefix_matching/max` and `prefix_matching/L1H0`, likewise `previous_token` and
      `duplicate_token`: scores on random repeated tokens; of more than 8 heads only the 8 highest.
    - `in_context/score`: loss late minus loss early in the held-out sequences, in nats, below 0 if
      the model learns from context; `in_context/early_loss`, `in_context/late_loss`.
    - `gradient/layer0/signal_to_noise`, and from a ratio of 3 `gradient/layer0/correlation`,
      `.../edge_hits` and `.../chance`: see `agreement`.

    Example:
        >>> from mechcausal.models.adapter import HookedTransformer
        >>> sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "n_ctx": 8}
        >>> model = HookedTransformer({**sizes, "d_vocab": 5, "attn_only": True, "device": "cpu"})
        >>> held_out = torch.randint(5, (64, 8), generator=torch.Generator().manual_seed(0))
        >>> track = Tracker(model, held_out, every=10)
        >>> [step for step in range(25) if track(step)]
        [0, 1, 2, 4, 8, 10, 20]
        >>> track.looks[-1].scores
        HeadScores(1 layers × 2 heads, 32 sequences: no head reaches 0.4)
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "sequence pos"],
        *,
        every: int,
        dense: bool = True,
        loss: Loss | None = None,
        layers: Layers = None,
        information: PairwiseInformation | None = None,
        target: Target = "next",
        edges: Sequence[int | Sequence[int]] | None = None,
        n_sequences: int = 512,
        groups: Int[Tensor, "sequence"] | None = None,
        attention_mask: Shaped[Tensor, "sequence pos"] | None = None,
        tokenizer: Any = None,
        log: Log | None = None,
        prefix: str = "probes/",
        step_key: str = "step",
        max_batch_bytes: int = MAX_BATCH_BYTES,
    ) -> None:
        """Check model and data, and estimate the information of the data if it is not given.

        Args:
            model: a HookedTransformer or TransformerBridge, or a Hugging Face language model, which
                a `Shadow` follows; also compiled or inside DistributedDataParallel, where rank 0
                looks.
            tokens: held-out sequences.
            every: steps between looks.
            dense: look at steps 0, 1, 2, 4, 8, ... too, up to `every`.
            loss: for the gradient; see `attention_gradient`.
            layers: whose gradient is read; None for the first layer with attention.
            information: None for `pairwise_information` of all held-out tokens, by position for
                sequences of at most 64 tokens, by lag (up to 32) for longer ones.
            target: which information belongs to a query; see `agreement`.
            edges: the true parents of each position, where they are known; see `agreement`.
            n_sequences: held-out sequences that a look runs the model on, at most.
            groups: see `pairwise_information`.
            attention_mask: 0 at padding of `tokens`; None to find padding by the PAD token of the
                model's tokenizer.
            tokenizer: of a Hugging Face model; its PAD token marks padding.
            log: called with a dict of figures at every look, such as `wandb.log`. A function that
                takes `commit` gets `commit=False`, so that the caller's own next call logs them
                and W&B's steps stay the caller's.
            prefix: of every logged figure.
            step_key: name under which the step is logged.
            max_batch_bytes: bound on the estimated activations of one pass, in bytes.

        Raises:
            ValueError: `every` or `n_sequences` is too small, or tokens of the wrong shape.
            ProbeError: a model without attention that probes can read, or sharded by FSDP, or
                tokens outside its vocabulary or context.
        """
        for name, value, least in (("every", every, 1), ("n_sequences", n_sequences, 2)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        model = unwrapped(model)
        self._shadow = None if hasattr(model, "hook_dict") else Shadow(model, tokenizer)
        self.model = model if self._shadow is None else self._shadow.bridge
        self._layers = layers_with(self.model, "pattern", layers)
        if layers is None:
            self._layers = self._layers[:1]
        tokens = checked_tokens(self.model, tokens)
        if len(tokens) < 2:
            raise ValueError("a tracker needs at least two held-out sequences")
        if information is None and tokens.shape[1] > 1:
            by_position = tokens.shape[1] <= _MAX_POSITIONS
            information = pairwise_information(
                tokens,
                groups=groups,
                mask=real_positions(self.model, tokens, attention_mask),
                by="position" if by_position else "lag",
                max_lag=None if by_position else _MAX_LAG,
            )
        self.information = information
        self.tokens = tokens[:n_sequences]
        self._mask = None if attention_mask is None else attention_mask[:n_sequences]
        self._every, self._dense = every, dense
        self._loss, self._target, self._edges = loss, target, edges
        self._log, self._prefix, self._step_key = log, prefix, step_key
        self._max_batch_bytes = max_batch_bytes
        self._warned: set[str] = set()
        self.looks: list[Look] = []

    def due(self, step: int) -> bool:
        """Whether `track(step)` looks: at multiples of `every`, and at early powers of two."""
        if step % self._every == 0:
            return True
        return self._dense and step < self._every and step & (step - 1) == 0

    def __call__(self, step: int) -> Look | None:
        """Look at the model if this step is due and was not looked at yet.

        Args:
            step: the caller's count of optimizer steps, rising.

        Returns:
            The look; None if none was due, or this process is not rank 0.
        """
        if not self.due(step) or not is_observing_process():
            return None
        if self.looks and step <= self.looks[-1].step:
            return None
        figures: dict[str, float] = {}
        devices = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices):  # a user's hooks may draw even in evaluation
            if self._shadow is not None:
                bridge = self._guarded("copy of the model", self._shadow.sync, self.tokens[:2])
                if bridge is None:
                    return None
                self.model = bridge
            scores = self._guarded("head scores", self._read_scores, figures)
            self._guarded("in-context loss", self._read_in_context, figures)
            descent = self._guarded("gradient", self._read_gradient, figures)
        look = Look(step, dict(sorted(figures.items())), scores, descent)
        if self.looks and self.looks[-1].descent is not None:  # keep one gradient, not one per look
            self.looks[-1] = replace(self.looks[-1], descent=None)
        self.looks.append(look)
        if self._log is not None:
            self._guarded("log function", self._write, look)
        return look

    def _guarded(self, part: str, work: Callable[[Any], Any], argument: Any) -> Any:
        """Do a part of a look; if it fails, warn the first time and return None."""
        try:
            return work(argument)
        except Exception as error:
            if part not in self._warned:
                self._warned.add(part)
                reason = " ".join(str(error).split()) or type(error).__name__
                warnings.warn(
                    f"tracking goes on without the {part}: {reason}", ProbeWarning, stacklevel=3
                )
            return None

    def _read_scores(self, figures: dict[str, float]) -> HeadScores:
        # The same sequences at every look: figures differ only because the model does.
        scores = score_heads(
            self.model,
            generator=torch.Generator().manual_seed(0),
            max_batch_bytes=self._max_batch_bytes,
        )
        for name in _LOGGED_SCORES:
            highest = scores.top(name, _MAX_LOGGED_HEADS)
            values = getattr(scores, name)
            for layer, head in highest:
                figures[f"{name}/L{layer}H{head}"] = values[scores.layers.index(layer), head].item()
            layer, head = highest[0]
            figures[f"{name}/max"] = figures[f"{name}/L{layer}H{head}"]
        return scores

    def _read_in_context(self, figures: dict[str, float]) -> None:
        last = self.tokens.shape[1] - 1
        if last < 2:
            return
        late = min(500, last)
        reading = in_context_score(
            self.model,
            self.tokens,
            early=max(1, late // 10),
            late=late,
            attention_mask=self._mask,
            max_batch_bytes=self._max_batch_bytes,
        )
        figures["in_context/score"] = reading.score
        figures["in_context/early_loss"] = reading.early_loss
        figures["in_context/late_loss"] = reading.late_loss

    def _read_gradient(self, figures: dict[str, float]) -> LabelledTensor:
        gradient = attention_gradient(
            self.model,
            self.tokens,
            loss=self._loss,
            layers=self._layers,
            attention_mask=self._mask,
            max_batch_bytes=self._max_batch_bytes,
        )
        if self.information is not None:
            for layer in self._layers:
                result = agreement(
                    gradient,
                    self.information,
                    target=self._target,
                    layer=layer,
                    edges=self._edges,
                )
                name = f"gradient/layer{layer}"
                figures[f"{name}/signal_to_noise"] = result.signal_to_noise
                if result.measurable:
                    figures[f"{name}/correlation"] = result.pearson
                    if result.n_rows:
                        figures[f"{name}/edge_hits"] = result.edge_hits
                        figures[f"{name}/chance"] = result.chance
        summed = gradient.summed
        return LabelledTensor("descent_on_scores", -summed.values.cpu(), summed.axes, summed.coords)

    def _write(self, look: Look) -> None:
        assert self._log is not None
        row = {self._prefix + name: value for name, value in look.figures.items()}
        row[self._step_key] = look.step
        if "commit" in inspect.signature(self._log).parameters:
            self._log(row, commit=False)
        else:
            self._log(row)

    def formation(self, *, score: str = "prefix_matching", threshold: float = 0.4) -> Formation:
        """When each head formed, from the scores of all looks; see `track_formation`.

        Raises:
            ValueError: no look has scores, or no such score.
        """
        tables = [(look.step, look.scores) for look in self.looks if look.scores is not None]
        return track_formation(tables, score=score, threshold=threshold)

    def to_frame(self) -> Any:
        """A pandas frame of the figures: one row per look, with a column `step`."""
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        return pd.DataFrame([{"step": look.step, **look.figures} for look in self.looks])

    def pictures(self) -> dict[str, Any]:
        """Plotly figures by name, ready for `wandb.log`; empty before the first look.

        Every head's prefix matching over training, the agreement of the gradient with information,
        and both as matrices at the last look.
        """
        from probes.watching.pictures import tracker_pictures

        return tracker_pictures(self.looks, self.information, self._target, self._prefix)

    def state_dict(self) -> dict[str, Any]:
        """Every look as tensors and plain numbers, for `torch.save` beside a checkpoint."""
        return {
            "looks": [
                {
                    "step": look.step,
                    "figures": dict(look.figures),
                    "scores": None if look.scores is None else _plain(look.scores),
                }
                for look in self.looks
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the looks of `state_dict`, so that a resumed run continues its curves.

        Raises:
            ValueError: not the state of a tracker.
        """
        try:
            self.looks = [
                Look(
                    look["step"],
                    look["figures"],
                    None if look["scores"] is None else HeadScores(**look["scores"]),
                    None,
                )
                for look in state["looks"]
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not the state of a tracker: {error!r}") from None


def _plain(scores: HeadScores) -> dict[str, Any]:
    return {part.name: getattr(scores, part.name) for part in fields(scores)}

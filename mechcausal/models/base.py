"""The interface of a model that learns a causal graph."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechcausal.graphs import CausalGraph
from mechcausal.models import CONFIG_FILE, WEIGHTS_FILE
from mechcausal.models.adapter import (
    HookedTransformer,
    HookedTransformerConfig,
    ModelFileError,
    load_with_extra,
    save_model,
)
from mechcausal.support.messages import excerpt
from probes import AttentionPattern, attach, clamp
from probes.intervening.attention_edits import Edit
from probes.intervening.clamp_kinds import Clamp
from probes.intervening.clamps import Clamps, checked_clamps

# Keys of a config that do not change what the model computes.
_IRRELEVANT_KEYS = ("device", "n_devices", "seed", "model_name", "init_weights", "tokenizer_name")

Model = TypeVar("Model", bound="GraphModel")


class ModelError(ValueError):
    """A model that cannot do what is asked of it; the message is one line for the user."""


class GraphModel(ABC):
    """A HookedTransformer that owns all parameters, with a faster way to compute the same function.

    Use `model.hooked` for hooks and TransformerLens tools, `model(tokens)` for training.
    `model(tokens)` and `model.probabilities(model.hooked(tokens))` are the same distribution of the
    next token.

    Attributes:
        kind: the model's name in recipes and files.
        hooked: the HookedTransformer; owns all parameters.
        heads: number of heads used in each layer; the HookedTransformer may have more, unused.
    """

    kind: ClassVar[str]
    closed_form_is_clamped: ClassVar[bool] = False
    """Whether `__call__` holds what `clamped` holds."""
    hooked: HookedTransformer
    heads: tuple[int, ...]
    _clamps: Mapping[int, tuple[Edit, ...]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of tokens S."""
        return int(self.hooked.cfg.d_vocab)

    @property
    def sequence_length(self) -> int:
        """Number of positions T."""
        return int(self.hooked.cfg.n_ctx)

    @property
    @abstractmethod
    def parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters, by the names that training stages use."""

    @abstractmethod
    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """The predicted distribution, differentiable in the parameters."""

    def probabilities(
        self, output: Float[Tensor, "batch pos vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """The predicted distribution, from the hooked model: softmax of the last position."""
        return output[:, -1].softmax(-1)

    def probabilities_by_position(
        self, output: Float[Tensor, "batch pos vocab"]
    ) -> Float[Tensor, "batch pos vocab"]:
        """The predicted distribution at every position, from the output of the hooked model.

        Raises:
            ModelError: it predicts at the last position alone.
        """
        raise ModelError(
            f"a {self.kind} model predicts at the last position alone, and the task has labels at "
            "every position: train a standard one"
        )

    def predict_positions(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos vocab"]:
        """The predicted distribution at every position, differentiable in the parameters.

        By default from the hooked model; a model with a closed form overrides it.

        Raises:
            ModelError: it predicts at the last position alone.
        """
        return self.probabilities_by_position(self.hooked(tokens))

    def layer1_attention(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch head query key"]:
        """Layer 1's attention patterns, computed by the hooked model without gradients."""
        with torch.no_grad(), attach(self.hooked, AttentionPattern(0)) as (pattern,):
            self.hooked(tokens, return_type=None)
        return pattern.reading().sel(layer=0).values[:, : self.heads[0]]

    @contextmanager
    def training_only(self, names: tuple[str, ...]) -> Iterator[None]:
        """Context manager in which only the named parameters require gradients."""
        parameters = self.parameters_by_name
        before = {name: parameter.requires_grad for name, parameter in parameters.items()}
        try:
            _set_trained(parameters, {name: name in names for name in parameters})
            yield
        finally:
            try:
                _set_trained(parameters, before)
            finally:  # Ctrl-C may interrupt the line above: repeat it
                _set_trained(parameters, before)

    def frozen(self) -> AbstractContextManager[None]:
        """Context manager in which no parameter requires gradients; probes add their own."""
        return self.training_only(())

    @property
    def is_clamped(self) -> bool:
        """Whether a `clamped` block is open."""
        return bool(self._clamps)

    @contextmanager
    def clamped(self, clamps: Clamps) -> Iterator[None]:
        """Hold parts of attention fixed inside the block, through hooks and in closed form alike.

        Blocks nest; see `probes.clamp`.

        Raises:
            ValueError, ProbeError: as `probes.clamp`.
            ModelError: the model's closed form cannot be clamped.
        """
        if not self.closed_form_is_clamped:
            raise ModelError(
                f"{type(self).__name__} computes attention in a closed form, which clamps do not "
                "reach"
            )
        before, given = self._clamps, checked_clamps(self.hooked, clamps)
        for layer, edits in given.items():
            for edit in edits:
                if isinstance(edit, Clamp):  # the hooked model may have more heads, unused
                    edit.check(layer, self.heads[layer], self.sequence_length)
        layers = before.keys() | given.keys()
        both = {layer: (*before.get(layer, ()), *given.get(layer, ())) for layer in layers}
        with clamp(self.hooked, given):
            try:
                self._clamps = both
                yield
            finally:
                self._clamps = before

    def _held(
        self, layer: int, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """A layer's pattern of the closed form, with what is clamped of it."""
        for edit in self._clamps.get(layer, ()):
            pattern = edit(pattern)
        return pattern

    def _held_last_row(
        self, layer: int, row: Float[Tensor, "batch head key"]
    ) -> Float[Tensor, "batch head key"]:
        """The last row of a layer's pattern, with what is clamped of it."""
        if layer not in self._clamps:
            return row
        # Edits take whole patterns; they change row by row, so that other rows may be anything.
        above = row.new_zeros(*row.shape[:2], row.shape[-1] - 1, row.shape[-1])
        return self._held(layer, torch.cat([above, row.unsqueeze(2)], dim=2))[:, :, -1]

    def save(self, folder: str | Path) -> None:
        """Write weights and config; read them back with `load` or `load_model`."""
        save_model(self.hooked, folder, extra={"kind": self.kind, **self._saved()})

    @classmethod
    def load(cls: type[Model], folder: str | Path, *, device: str = "cpu") -> Model:
        """Read a model that `save` wrote.

        Raises:
            ModelFileError: not a readable model of this kind, or its wiring was changed.
        """
        return cls.from_saved(folder, *load_with_extra(folder, device=device))

    @classmethod
    def from_saved(
        cls: type[Model], folder: str | Path, hooked: HookedTransformer, saved: Mapping[str, Any]
    ) -> Model:
        """The model of this kind that was read from a folder; errors as in `load`."""
        if saved.get("kind") != cls.kind:
            saved_kind = excerpt(saved.get("kind", "another HookedTransformer"))
            raise ModelFileError(f"{folder}: not a {cls.kind} model but {saved_kind}")
        model = cls.__new__(cls)
        try:
            model._adopt(hooked, saved)
        except ValueError as error:
            raise ModelFileError(f"{folder}: {error}") from None
        return model

    def _adopt(self, hooked: HookedTransformer, saved: Mapping[str, Any]) -> None:
        """Set the attributes from what was saved; ValueError if it was not saved by this class."""
        self.hooked = hooked

    def _saved(self) -> dict[str, Any]:
        """Values to save that the HookedTransformer's config lacks."""
        return {}

    def _wire(self) -> None:
        """Set the weights that are not trained; all weights were 0 before."""
        return

    def _trained_blocks(self) -> list[Tensor]:
        """Views of the trained parts of the parameters (not the wiring)."""
        return list(self.hooked.parameters())

    @torch.no_grad()
    def _reset(self) -> None:
        """Set every weight to 0, then the wiring; only `parameters_by_name` require gradients."""
        trained = {id(parameter) for parameter in self.parameters_by_name.values()}
        for parameter in self.hooked.parameters():
            parameter.zero_()
            parameter.requires_grad_(id(parameter) in trained)
        self._wire()

    def _check_config(self, config: HookedTransformerConfig) -> None:
        """Raise ValueError if a loaded model's config is not that of a new model of its size."""
        expected, loaded = config.to_dict(), self.hooked.cfg.to_dict()
        for key in sorted(expected.keys() | loaded.keys()):
            if key not in _IRRELEVANT_KEYS and expected.get(key) != loaded.get(key):
                raise ValueError(
                    f"{CONFIG_FILE}: {excerpt(key)} is {excerpt(loaded.get(key))}, "
                    f"a {self.kind} model of this size has {excerpt(expected.get(key))}"
                )

    @torch.no_grad()
    def _check_wiring(self) -> None:
        """Raise ValueError if a loaded weight that is not trained is not that of a new model."""
        trained = [(block, block.clone()) for block in self._trained_blocks()]
        for block, _ in trained:
            block.zero_()
        loaded = {name: weight.clone() for name, weight in self.hooked.named_parameters()}
        self._reset()
        for name, weight in self.hooked.named_parameters():
            if not torch.equal(weight, loaded[name]):
                raise ValueError(
                    f"{WEIGHTS_FILE}: {name} is not wired as in a {self.kind} model: "
                    "the file was changed or is damaged"
                )
        for block, values in trained:
            block.copy_(values)

    def _check_length(self, graph: CausalGraph) -> None:
        if graph.sequence_length != self.sequence_length:
            raise ValueError(
                f"the graph has sequences of {graph.sequence_length} tokens, "
                f"the model of {self.sequence_length}"
            )


def _set_trained(parameters: dict[str, torch.nn.Parameter], trained: dict[str, bool]) -> None:
    for name, parameter in parameters.items():
        parameter.requires_grad_(trained[name])

"""The interface of a model that learns a causal graph."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from mechcausal.graphs import CausalGraph
from mechcausal.models.adapter import ModelFileError, build_from_files, save_model
from mechcausal.models.file_names import CONFIG_FILE, WEIGHTS_FILE
from mechcausal.support.messages import excerpt
from probes import AttentionPattern, attach

# Keys of a config that do not change what the model computes.
_IRRELEVANT_KEYS = ("device", "n_devices", "seed", "model_name", "init_weights", "tokenizer_name")


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
    hooked: HookedTransformer
    heads: tuple[int, ...]

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

    @abstractmethod
    def probabilities(
        self, output: Float[Tensor, "batch pos vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """The predicted distribution, from the output of the hooked model."""

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

    def save(self, folder: str | Path) -> None:
        """Write weights and config; read them back with `load` or `load_model`."""
        save_model(self.hooked, folder, extra={"kind": self.kind, **self._saved()})

    def _check_length(self, graph: CausalGraph) -> None:
        if graph.sequence_length != self.sequence_length:
            raise ValueError(
                f"the graph has sequences of {graph.sequence_length} tokens, "
                f"the model of {self.sequence_length}"
            )

    def _blank(self) -> None:
        """Set every weight to 0 before wiring; only `parameters_by_name` require gradients."""
        trained = {id(parameter) for parameter in self.parameters_by_name.values()}
        with torch.no_grad():
            for parameter in self.hooked.parameters():
                parameter.zero_()
                parameter.requires_grad_(id(parameter) in trained)

    def _take_weights(self, hooked: HookedTransformer, folder: str | Path) -> None:
        """Copy the weights of a saved model with the same architecture and wiring.

        Raises:
            ModelFileError: the architecture or the wiring differs.
        """
        ours, theirs = self.hooked.cfg.to_dict(), hooked.cfg.to_dict()
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in _IRRELEVANT_KEYS and ours.get(key) != theirs.get(key):
                raise ModelFileError(
                    f"{folder}: {CONFIG_FILE}: {excerpt(key)} is {excerpt(theirs.get(key))}, "
                    f"a {self.kind} model of this size has {excerpt(ours.get(key))}"
                )
        wired = {name: value.clone() for name, value in self.hooked.named_parameters()}
        try:
            self.hooked.load_state_dict(hooked.state_dict())
        except RuntimeError:
            raise ModelFileError(f"{folder}: the weights are not a {self.kind} model's") from None
        with torch.no_grad():
            trained = [(block, block.clone()) for block in self._trained_blocks()]
            for block, _ in trained:
                block.zero_()
            for name, value in self.hooked.named_parameters():
                if not torch.equal(value, wired[name]):
                    raise ModelFileError(
                        f"{folder}: {WEIGHTS_FILE}: {name} is not wired as in a {self.kind} model: "
                        "the file was changed or is damaged"
                    )
            for block, values in trained:
                block.copy_(values)

    def _trained_blocks(self) -> list[Tensor]:
        """Views of the trained parts of the parameters (not the wiring); 0 in a new model."""
        return []

    def _saved(self) -> dict[str, Any]:
        """Values to save that the HookedTransformer's config lacks."""
        return {}


def _set_trained(parameters: dict[str, torch.nn.Parameter], trained: dict[str, bool]) -> None:
    for name, parameter in parameters.items():
        parameter.requires_grad_(trained[name])


def read_hooked(
    folder: str | Path, kind: str, *, device: str
) -> tuple[HookedTransformer, dict[str, Any]]:
    """Read the HookedTransformer and the extra values of a saved model of the given kind.

    Raises:
        ModelFileError: not a readable model of this kind.
    """
    hooked, extra = build_from_files(folder, device=device)
    if extra.get("kind") != kind:
        saved_kind = excerpt(extra.get("kind", "another HookedTransformer"))
        raise ModelFileError(f"{folder}: not a {kind} model but {saved_kind}")
    return hooked, extra

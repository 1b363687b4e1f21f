"""What the laboratory asks of a model that learns a causal graph."""

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

# What a config says about where and by whom a model was made, not about what it computes.
_OF_THE_MACHINE = ("device", "n_devices", "seed", "model_name", "init_weights", "tokenizer_name")


class GraphModel(ABC):
    """A HookedTransformer that owns all parameters, and a faster way to compute the same function.

    `model.hooked` is for hooks and TransformerLens tools; `model(tokens)` is for training. Both
    give a distribution over the token that follows: `model(tokens)` directly, the hooked model
    through `model.probabilities(model.hooked(tokens))`.

    Attributes:
        kind: names the model in recipes and files.
        hooked: owner of all parameters.
        heads: number of heads that each layer uses; the HookedTransformer may hold more, idle.
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
        """The trained parameters, by the names that stages of training use."""

    @abstractmethod
    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """The predicted distribution, differentiable in the parameters."""

    @abstractmethod
    def probabilities(
        self, output: Float[Tensor, "batch pos vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """The same distribution, from what the hooked model returns for the same tokens."""

    def layer1_attention(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch head query key"]:
        """Layer 1's attention patterns, from the hooked model without gradients."""
        with torch.no_grad(), attach(self.hooked, AttentionPattern(0)) as (pattern,):
            self.hooked(tokens, return_type=None)
        return pattern.reading().sel(layer=0).values[:, : self.heads[0]]

    @contextmanager
    def training_only(self, names: tuple[str, ...]) -> Iterator[None]:
        """Within the block only the named parameters take gradients."""
        parameters = self.parameters_by_name
        before = {name: parameter.requires_grad for name, parameter in parameters.items()}
        try:
            _set_trained(parameters, {name: name in names for name in parameters})
            yield
        finally:
            try:
                _set_trained(parameters, before)
            finally:  # once more after Ctrl-C in the middle of it
                _set_trained(parameters, before)

    def frozen(self) -> AbstractContextManager[None]:
        """Within the block no parameter takes gradients: probes see the gradient of attention."""
        return self.training_only(())

    def save(self, folder: str | Path) -> None:
        """Write weights and config, readable by `load` and by `load_model`."""
        save_model(self.hooked, folder, extra={"kind": self.kind, **self._saved()})

    def _check_length(self, graph: CausalGraph) -> None:
        if graph.sequence_length != self.sequence_length:
            raise ValueError(
                f"the graph has sequences of {graph.sequence_length} tokens, "
                f"the model of {self.sequence_length}"
            )

    def _blank(self) -> None:
        """Every weight 0, the named ones trained and the others not: wiring starts from here."""
        trained = {id(parameter) for parameter in self.parameters_by_name.values()}
        with torch.no_grad():
            for parameter in self.hooked.parameters():
                parameter.zero_()
                parameter.requires_grad_(id(parameter) in trained)

    def _take_weights(self, hooked: HookedTransformer, folder: str | Path) -> None:
        """Take the weights of a saved model of this kind, if it is wired as this one is.

        Raises:
            ModelFileError: another architecture, or wiring that was changed.
        """
        ours, theirs = self.hooked.cfg.to_dict(), hooked.cfg.to_dict()
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in _OF_THE_MACHINE and ours.get(key) != theirs.get(key):
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
        """The parts of the parameters that are not wiring, as views; 0 in a new model."""
        return []

    def _saved(self) -> dict[str, Any]:
        """What the config of the HookedTransformer does not say about this model."""
        return {}


def _set_trained(parameters: dict[str, torch.nn.Parameter], trained: dict[str, bool]) -> None:
    for name, parameter in parameters.items():
        parameter.requires_grad_(trained[name])


def read_hooked(
    folder: str | Path, kind: str, *, device: str
) -> tuple[HookedTransformer, dict[str, Any]]:
    """The HookedTransformer and the extra values of a saved model of one kind.

    Raises:
        ModelFileError: not a readable model of that kind.
    """
    hooked, extra = build_from_files(folder, device=device)
    if extra.get("kind") != kind:
        found = excerpt(extra.get("kind", "another HookedTransformer"))
        raise ModelFileError(f"{folder}: not a {kind} model but {found}")
    return hooked, extra

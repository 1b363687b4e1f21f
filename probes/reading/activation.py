"""Read activations: the residual stream, MLPs, queries, keys and values, attention patterns."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeAlias

from torch import Tensor, nn

from probes.reading.attach import ForwardHook
from probes.reading.hook_names import LAYER_HOOKS, Layers, hook_name
from probes.reading.labelled import LabelledTensor
from probes.reading.records import Concatenated, LayerProbe, Sum

Reduce: TypeAlias = Literal["mean"] | Callable[[Tensor], Tensor] | None


class Activation(LayerProbe[Concatenated | Sum]):
    """The activation at one hook point of every layer.

    - `resid_pre`, `resid_mid`, `resid_post`: the residual stream before the layer, between
      attention and MLP, and after the layer; `[batch pos d_model]`;
    - `attn_out`, `mlp_out`: what attention and MLP add to it, `[batch pos d_model]`;
    - `q`, `k`, `v`: queries, keys and values, `[batch pos head d_head]`;
    - `attn_scores`, `pattern`: attention before and after the softmax, `[batch head query key]`;
    - `z`: the values that attention has mixed, before W_O, `[batch pos head d_head]`;
    - `pre`, `post`: the MLP's neurons before and after the activation function,
      `[batch pos d_mlp]`.

    The reading has these axes after `layer`; several batches are concatenated along `batch`.
    Without `reduce`, memory grows with every sequence.

    Args:
        hook: one of the names above.
        layers: one layer, several, or None for every layer that has the hook point.
        reduce: None keeps the sequences apart, "mean" averages them. Or a function from the
            activation of one pass to a tensor `[row ...]`: the reading is the mean over the rows
            of all passes. With a function or "mean", memory does not grow.
        axes: the names of a row's axes; only with a function.

    Raises:
        ValueError: `hook` or `reduce` is not allowed, or a function comes without `axes`.

    >>> import torch
    >>> from mechcausal.models.adapter import HookedTransformer
    >>> from probes import attach
    >>> sizes = {"n_layers": 2, "n_heads": 1, "d_model": 4, "d_head": 4, "n_ctx": 5, "d_vocab": 3}
    >>> model = HookedTransformer({**sizes, "attn_only": True, "device": "cpu"})
    >>> tokens = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]])
    >>> norms = Activation("resid_post", reduce=lambda x: x.norm(dim=-1), axes=("pos",))
    >>> with attach(model, Activation("z", layers=1), norms) as (mixed, _):
    ...     _ = model(tokens)
    >>> mixed.reading()
    LabelledTensor(z: layer=1 (1,), batch=2, pos=5, head=1, d_head=4; float32)
    >>> norms.reading()
    LabelledTensor(resid_post: layer=2 (0, 1), pos=5; float32)
    """

    _reading_name: str | None = None

    def __init__(
        self,
        hook: str,
        layers: Layers = None,
        *,
        reduce: Reduce = None,
        axes: tuple[str, ...] | None = None,
    ) -> None:
        if hook not in LAYER_HOOKS:
            raise ValueError(f"hook is {hook!r}; allowed: {', '.join(LAYER_HOOKS)}")
        if not (reduce in (None, "mean") or callable(reduce)):
            raise ValueError(f'reduce is {reduce!r}; allowed: None, "mean", a function')
        if callable(reduce) != (axes is not None):
            raise ValueError("a function as reduce needs axes, the names of a row's axes")
        super().__init__(layers, Concatenated if reduce is None else Sum, hook)
        self._rows = reduce if callable(reduce) else None
        self._axes = LAYER_HOOKS[hook][1][reduce is not None :] if axes is None else axes

    def hooks(self, model: nn.Module) -> Mapping[str, ForwardHook]:
        """One hook in every chosen layer."""
        return {
            hook_name(self._hook, layer): partial(self._read, layer)
            for layer in self._layers(model)
        }

    def _read(self, layer: int, activation: Tensor) -> None:
        rows = activation if self._rows is None else self._rows(activation)
        self._records[layer].add(rows)

    def reading(self) -> LabelledTensor:
        """The activations of all passes, or their mean.

        Raises:
            ProbeError: there was no forward pass yet.
        """
        records = self._complete_records()
        values = self._stack(
            {
                layer: record.mean() if isinstance(record, Sum) else record.values()
                for layer, record in records.items()
            }
        )
        name = self._reading_name or self._hook
        return LabelledTensor(name, values, ("layer", *self._axes), {"layer": tuple(records)})


class AttentionPattern(Activation):
    """The attention pattern `softmax(scores)` of every head: `Activation("pattern")`.

    The reading has axes `("layer", "batch", "head", "query", "key")`, its rows sum to 1. With
    `reduce="mean"` it is the mean over all sequences, without a `batch` axis.

    Args:
        layers: one layer, several, or None for every layer that has attention.
        reduce: None keeps the sequences apart, "mean" averages them.

    Raises:
        ValueError: `reduce` is neither None nor "mean".
    """

    _reading_name = "attention_pattern"

    def __init__(self, layers: Layers = None, *, reduce: Literal["mean"] | None = None) -> None:
        super().__init__("pattern", layers, reduce=reduce)

"""A TransformerBridge that follows a live Hugging Face model without touching it.

A bridge around the live model itself would rename its parameters, so that checkpoints no longer
load. The shadow wraps a copy, and takes over the live model's parameters by name before each look.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from probes.reading.errors import ProbeError
from probes.reading.passes import undisturbed

_TOLERANCE = 1e-3


class Shadow:
    """A bridge around a copy of a model.

    The first `sync` after a change of weights compares the logits of both. If they differ, as for
    architectures whose bridge keeps weights of its own (gpt-neox), the shadow is made anew at every
    `sync` from then on.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Copy a model.

        Args:
            model: a Hugging Face causal language model; left as it was.
            tokenizer: its tokenizer, whose PAD token then marks padding; None without padding.

        Raises:
            ProbeError: TransformerLens has no bridge for this architecture.
        """
        self._live, self._tokenizer = model, tokenizer
        self._makes_anew = False
        self._checked = False
        self._make()

    def _make(self) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        kind = type(self._live).__name__
        if not hasattr(self._live, "set_attn_implementation"):
            raise ProbeError(
                f"{kind} has no hook points: probes read a HookedTransformer, a TransformerBridge, "
                "or a language model of Hugging Face"
            )
        duplicate: Any = copy.deepcopy(self._live).float()
        duplicate.zero_grad(set_to_none=True)
        duplicate.config.architectures = [kind]
        duplicate.set_attn_implementation("eager")  # the others never compute a pattern
        for module in duplicate.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        self._copies = dict(duplicate.named_parameters())
        try:
            with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=_cuda()):
                self.bridge: Any = TransformerBridge.boot_transformers(
                    kind,
                    hf_model=duplicate,
                    tokenizer=_without_words() if self._tokenizer is None else self._tokenizer,
                    device=next(duplicate.parameters()).device,
                )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ProbeError(f"{kind} cannot be bridged to TransformerLens: {reason}") from None
        self.bridge.eval()
        if self._tokenizer is None:
            self.bridge.tokenizer = None  # its PAD token would count as padding

    @torch.no_grad()
    def sync(self, tokens: Tensor) -> Any:
        """Take over the live weights.

        Args:
            tokens: a few sequences on which the two models are compared once.

        Returns:
            The bridge, which now computes what the live model does.

        Raises:
            ProbeError: even a new bridge computes other logits than the live model.
        """
        if self._makes_anew:
            self._make()
            return self.bridge
        changed = False
        for name, parameter in self._live.named_parameters():
            mine = self._copies[name]
            if not self._checked:
                changed |= not torch.equal(mine, parameter.to(mine))
            mine.copy_(parameter)
        if changed:
            self._checked = True
            if not self._agrees(tokens):
                self._makes_anew = True
                self._make()
                if not self._agrees(tokens):
                    raise ProbeError(
                        f"the bridge of {type(self._live).__name__} computes other logits than the "
                        "model itself"
                    )
        return self.bridge

    def _agrees(self, tokens: Tensor) -> bool:
        with undisturbed(self._live):
            expected = self._live(input_ids=tokens).logits.float()
        computed = self.bridge(tokens, return_type="logits").float()
        scale = expected.abs().max().clamp(min=1.0)
        return bool((computed - expected).abs().max() <= _TOLERANCE * scale)


def _cuda() -> list[int]:
    return list(range(torch.cuda.device_count()))


def _without_words() -> Any:
    """A tokenizer of one token, since a bridge needs one to exist."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=Tokenizer(WordLevel({"-": 0}, unk_token="-")),
        unk_token="-",
        pad_token="-",
        eos_token="-",
    )

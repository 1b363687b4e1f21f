"""Explain what a local Hugging Face classifier makes of a text.

Weights come from safetensors alone, code that comes with a model is never run, nothing is fetched.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechcausal.studies.targets import TOKENIZER_FILES, TargetError, check_weights
from probes import ProbeError
from probes.causal_discovery.explain import Explanation, Method, explain

_MORE_TOKENIZERS = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class TextExplanation:
    """The words without which a classifier decides otherwise.

    Attributes:
        text: what was classified.
        label: of the whole text.
        new_label: without the words; None if no set was found.
        words: tokens of the set, as the tokenizer writes them.
        explanation: positions, calls and graphs.
    """

    text: str
    label: str
    new_label: str | None
    words: tuple[str, ...]
    explanation: Explanation

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found = self.explanation
        return {
            "text": self.text,
            "method": found.method,
            "label": self.label,
            "new_label": self.new_label,
            "words": list(self.words),
            "positions": list(found.positions),
            "size": found.size,
            "found": found.found,
            "calls": found.calls,
        }


class TextClassifier:
    """A sequence classifier with its tokenizer.

    Attributes:
        model: in evaluation mode, with attention that can be read.
        tokenizer: from the same folder.
        labels: names of the classes.
        replacement: MASK where the tokenizer has one, else PAD, else the unknown token.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        """Load a folder.

        Raises:
            TargetError: no classifier with its tokenizer, or weights that are no safetensors.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        path = Path(folder)
        config_path = path / "config.json"
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or "not readable as JSON"
            raise TargetError(f"{config_path}: {reason}") from None
        if not isinstance(config, dict) or "model_type" not in config:
            raise TargetError(f"{config_path}: not written by Hugging Face")
        check_weights(path, config)
        # Without one of them transformers makes up a tokenizer that knows no word.
        if not any((path / name).is_file() for name in (*TOKENIZER_FILES, *_MORE_TOKENIZERS)):
            raise TargetError(f"{path}: no tokenizer in it, such as {TOKENIZER_FILES[0]}")
        its_logging: Any = logging
        its_logging.set_verbosity_error()
        shows_progress = its_logging.is_progress_bar_enabled()
        its_logging.disable_progress_bar()
        auto_model: Any = AutoModelForSequenceClassification
        auto_tokenizer: Any = AutoTokenizer
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, found = auto_model.from_pretrained(
                    str(path),
                    use_safetensors=True,
                    attn_implementation="eager",  # the only one that shows its pattern
                    output_loading_info=True,
                    **options,
                )
                tokenizer = auto_tokenizer.from_pretrained(str(path), **options)
        except Exception as error:  # whatever the library raises: the user gets one line
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = lines[0] if lines else type(error).__name__
            raise TargetError(f"{path}: not loaded by transformers: {reason}") from None
        finally:
            if shows_progress:
                its_logging.enable_progress_bar()
        if missing := sorted(found["missing_keys"]):
            raise TargetError(
                f"{path}: no classifier: {len(missing)} of its weights are missing: "
                f"{missing[0]}, ..."
            )
        if model.config.num_labels < 2:
            raise TargetError(f"{path}: the classifier has {model.config.num_labels} label; not 2")
        self.model: nn.Module = model.to(device).eval()
        self.tokenizer: Any = tokenizer
        self.labels = tuple(
            str(model.config.id2label.get(i, i)) for i in range(model.config.num_labels)
        )
        tokens = (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        chosen = next((token for token in tokens if token is not None), None)
        if chosen is None:
            raise TargetError(f"{path}: the tokenizer has no MASK, PAD or unknown token to put in")
        self.replacement = int(chosen)
        self._device = device
        self._path = path

    def explain(self, text: str, *, method: Method = "causal", **options: Any) -> TextExplanation:
        """The smallest set of tokens whose replacement changes the label.

        Args:
            text: to classify; special tokens around it are never replaced.
            method: see `probes.explain`.
            **options: of `probes.explain`.

        Raises:
            TargetError: no token to replace, or a text that the model cannot take.
            ValueError: as `probes.explain`.
        """
        encoded = self.tokenizer(text, return_special_tokens_mask=True)
        ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
        candidates = [i for i, is_special in enumerate(special) if not is_special]
        if not candidates:
            raise TargetError(f"{text!r}: no token that could be replaced")
        cls = self.tokenizer.cls_token_id
        # Without a CLS the last token decides, as in GPT-like classifiers.
        node = ids.index(cls) if cls in ids else len(ids) - 1
        candidates = [i for i in candidates if i != node]
        tokens = torch.tensor(ids, device=self._device)
        config: Any = self.model.config
        width = getattr(config, "hidden_size", 0) // max(
            1, getattr(config, "num_attention_heads", 1)
        )
        if options.get("n_eff") is None:
            options["n_eff"] = max(width, 8)
        if config.pad_token_id is None:  # GPT-like classifiers then take one text at a time
            options.setdefault("batch_size", 1)
        try:
            found = explain(
                self.model,
                tokens,
                replacement=self.replacement,
                method=method,
                node=node,
                candidates=candidates,
                logits=self._logits,
                attention=self._attention,
                **options,
            )
        except (IndexError, RuntimeError, ProbeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise TargetError(
                f"{self._path}: cannot take a text of {len(ids)} tokens: {first}"
            ) from None
        words = self.tokenizer.convert_ids_to_tokens(list(found.tokens))
        new = found.new_prediction
        return TextExplanation(
            text=text,
            label=self.labels[found.prediction],
            new_label=None if new is None else self.labels[new],
            words=tuple(words),
            explanation=found,
        )

    def _logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch cls"]:
        logits: Tensor = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        return logits

    def _attention(self, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "head query key"]:
        output: Any = self.model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), output_attentions=True
        )
        if not output.attentions:
            raise ProbeError("the model shows no attention")
        pattern: Tensor = output.attentions[-1][0]
        return pattern

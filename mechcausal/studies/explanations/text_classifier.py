"""Explain a local Hugging Face classifier's prediction for a text.

Only safetensors are read, a model's own code is never run, and nothing is downloaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechcausal.models.adapter import ModelFileError
from mechcausal.studies.hugging_face import (
    TOKENIZER_FILES,
    TargetError,
    load_complete,
    loading,
    read_model_config,
)
from mechcausal.support.messages import first_line
from probes import ProbeError
from probes.causal_discovery.explanation import Explanation, Method, explain

_MORE_TOKENIZERS = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class TextExplanation:
    """The smallest set of words whose replacement changes the label.

    Attributes:
        text: the classified text.
        label: label of the text.
        new_label: label without the words; None if no set was found.
        words: tokens of the set, as the tokenizer writes them.
        explanation: positions, calls and graphs.
    """

    text: str
    label: str
    new_label: str | None
    words: tuple[str, ...]
    explanation: Explanation

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        explanation = self.explanation
        return {
            "text": self.text,
            "method": explanation.method,
            "label": self.label,
            "new_label": self.new_label,
            "words": list(self.words),
            "positions": list(explanation.positions),
            "size": explanation.size,
            "found": explanation.found,
            "calls": explanation.calls,
        }


class TextClassifier:
    """A sequence classifier with its tokenizer.

    Attributes:
        model: the classifier, in evaluation mode, with readable attention.
        tokenizer: the tokenizer from the same folder.
        labels: names of the classes.
        replacement: the tokenizer's MASK, else its PAD, else its unknown token.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        """Load classifier and tokenizer from a folder.

        Raises:
            TargetError: one of them is missing, or the weights are not safetensors.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        path = Path(folder)
        try:
            read_model_config(path)
        except ModelFileError as error:
            raise TargetError(str(error)) from None
        # Without these files transformers creates a tokenizer with no words.
        if not any((path / name).is_file() for name in (*TOKENIZER_FILES, *_MORE_TOKENIZERS)):
            raise TargetError(f"{path}: no tokenizer in it, such as {TOKENIZER_FILES[0]}")
        auto_tokenizer: Any = AutoTokenizer
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        with loading(f"{path}: not loaded by transformers"):
            model = load_complete(
                AutoModelForSequenceClassification,
                str(path),
                attn_implementation="eager",  # the only one that returns its pattern
                **options,
            )
            tokenizer = auto_tokenizer.from_pretrained(str(path), **options)
        if model.config.num_labels < 2:
            raise TargetError(
                f"{path}: the classifier has {model.config.num_labels} label: at least 2"
            )
        self.model: nn.Module = model.to(device).eval()
        self.tokenizer: Any = tokenizer
        self.labels = tuple(
            str(model.config.id2label.get(i, i)) for i in range(model.config.num_labels)
        )
        tokens = (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        chosen = next((token for token in tokens if token is not None), None)
        if chosen is None:
            raise TargetError(f"{path}: the tokenizer has no MASK, PAD or unknown token")
        self.replacement = int(chosen)
        self._device = device
        self._path = path

    def explain(self, text: str, *, method: Method = "causal", **options: Any) -> TextExplanation:
        """The smallest set of tokens whose replacement changes the label.

        Args:
            text: text to classify; special tokens are never replaced.
            method: see `probes.explain`.
            **options: further arguments of `probes.explain`.

        Raises:
            TargetError: the text has no token to replace, or the model cannot take it.
            ValueError: see `probes.explain`.
        """
        encoded = self.tokenizer(text, return_special_tokens_mask=True)
        ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
        candidates = [i for i, is_special in enumerate(special) if not is_special]
        if not candidates:
            raise TargetError(f"{text!r}: no token that could be replaced")
        cls = self.tokenizer.cls_token_id
        # GPT-like classifiers have no CLS and predict at the last token.
        node = ids.index(cls) if cls in ids else len(ids) - 1
        candidates = [i for i in candidates if i != node]
        tokens = torch.tensor(ids, device=self._device)
        config: Any = self.model.config
        width = getattr(config, "hidden_size", 0) // max(
            1, getattr(config, "num_attention_heads", 1)
        )
        if options.get("n_eff") is None:
            options["n_eff"] = max(width, 8)
        if config.pad_token_id is None:  # without PAD, GPT-like classifiers take one text at a time
            options.setdefault("batch_size", 1)
        try:
            explanation = explain(
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
            reason = first_line(error)
            raise TargetError(
                f"{self._path}: cannot take a text of {len(ids)} tokens: {reason}"
            ) from None
        words = self.tokenizer.convert_ids_to_tokens(list(explanation.tokens))
        new = explanation.new_prediction
        return TextExplanation(
            text=text,
            label=self.labels[explanation.prediction],
            new_label=None if new is None else self.labels[new],
            words=tuple(words),
            explanation=explanation,
        )

    def _logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch cls"]:
        logits: Tensor = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        return logits

    def _attention(self, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "head query key"]:
        output: Any = self.model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), output_attentions=True
        )
        if not output.attentions:
            raise ProbeError("the model returns no attention")
        pattern: Tensor = output.attentions[-1][0]
        return pattern

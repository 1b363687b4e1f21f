"""Hugging Face folders small enough to build in a test, and pickles that tell when they run."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCAB = 30
BOS = 29


def save_gpt2(folder: Path, *, tokenizer: bool = False, seed: int = 0, splits: bool = False) -> Any:
    """A random GPT-2 of two layers and two heads, written as Hugging Face does.

    With `splits`, its tokenizer splits a text into words t0 to t29.
    """
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 32}
    config = GPT2Config(**sizes, vocab_size=VOCAB, bos_token_id=BOS, eos_token_id=BOS)
    model: Any = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    if tokenizer:
        words = WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0")
        special = {f"{kind}_token": f"t{BOS}" for kind in ("bos", "eos", "pad")}
        make: Any = PreTrainedTokenizerFast
        model_of_words = Tokenizer(words)
        if splits:
            model_of_words.pre_tokenizer = Whitespace()
        made = make(tokenizer_object=model_of_words, unk_token="t0", **special)
        made.save_pretrained(folder)
    return model


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def malicious_pickle(path: Path) -> Path:
    """Write a pickle that makes a file beside it when it is opened; return that file's path."""
    marker = path.with_name(f"{path.name}.was_run")
    path.write_bytes(pickle.dumps(Payload(marker)))
    return marker

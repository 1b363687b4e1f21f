"""A tiny random model of every family that probes are checked on, and what holds of each.

`python -m tests.probes.families` prints the table of docs/models.md.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from mechcausal.models.adapter import HookedTransformer
from probes import (
    AttentionCheck,
    AttentionGradient,
    AttentionPattern,
    ProbeError,
    attach,
    check_attention,
)
from probes.reading.hooking import Hooks
from tests.lens_versions import HAS_LENS_3

VOCAB, N_LAYERS, N_HEADS = 11, 2, 2
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# Every name that a config may have for it; off in evaluation mode.
_DROPOUT = dict.fromkeys(("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"), 0.3)
_USUAL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": 32,
}
_GROUPED = _USUAL | {"num_key_value_heads": 1}
_WIDE_HEADS = _GROUPED | {"head_dim": 8}
_OLDER = {"n_layer": N_LAYERS, "n_head": N_HEADS, "n_embd": 16, "n_positions": 32}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_NEO = {
    "num_layers": N_LAYERS,
    "num_heads": N_HEADS,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
}
_OPT = {"ffn_dim": 16, "word_embed_proj_dim": 16}

HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", _OLDER),
    "GPT-Neo": ("GPTNeoForCausalLM", "GPTNeoConfig", _USUAL | _NEO),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", _OLDER | {"rotary_dim": 4}),
    "Pythia (GPT-NeoX)": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _USUAL),
    "OPT": ("OPTForCausalLM", "OPTConfig", _USUAL | _OPT),
    "BERT": ("BertForMaskedLM", "BertConfig", _USUAL),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", _OLDER | {"hidden_size": 16}),
    "Falcon": ("FalconForCausalLM", "FalconConfig", _USUAL),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": 4}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", _GROUPED | _EXPERTS),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _WIDE_HEADS),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", _WIDE_HEADS),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", _WIDE_HEADS | {"sliding_window": 4}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _WIDE_HEADS | {"sliding_window": 4}),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "Phi": ("PhiForCausalLM", "PhiConfig", _USUAL),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", _GROUPED),
    "Cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", _GROUPED),
    "SmolLM3": ("SmolLM3ForCausalLM", "SmolLM3Config", _GROUPED),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        _WIDE_HEADS | _EXPERTS | {"sliding_window": 4},
    ),
}


def _hooked() -> Any:
    sizes = {"n_layers": N_LAYERS, "n_heads": N_HEADS, "d_model": 16, "d_head": 8, "n_ctx": 32}
    model = HookedTransformer(
        {**sizes, "d_vocab": VOCAB, "act_fn": "gelu", "seed": 0, "device": "cpu"}
    )
    for parameter in model.parameters():  # the default is so small that patterns are uniform
        parameter.data.mul_(1.5)
    return model


def _native() -> Any:
    sizes = {"n_layers": N_LAYERS, "n_heads": N_HEADS, "d_model": 16, "d_head": 8, "n_ctx": 32}
    config = TransformerBridgeConfig(**sizes, d_vocab=VOCAB, d_mlp=16, act_fn="gelu", seed=0)
    return TransformerBridge.boot_native(config)


def hugging_face_model(name: str) -> tuple[Any, Any]:
    """A family's random model as Hugging Face has it, and a tokenizer."""
    model_class, config_class, sizes = HUGGING_FACE[name]
    library: Any = transformers
    config = getattr(library, config_class)(**sizes, **_SPECIAL, **_DROPOUT, vocab_size=VOCAB)
    config._attn_implementation = "eager"
    model = getattr(library, model_class)(config)
    model.config.architectures = [model_class]
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # trained models attend more sharply than fresh ones
            parameter.data.normal_(std=0.4)
        elif parameter_name.endswith("sinks"):
            parameter.data.normal_()
    words = WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0")
    make: Any = transformers.PreTrainedTokenizerFast
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "t0")
    return model.eval(), make(tokenizer_object=Tokenizer(words), **special)


def _bridge(name: str) -> Any:
    model, tokenizer = hugging_face_model(name)
    return TransformerBridge.boot_transformers(
        f"tiny-{type(model).__name__}", hf_model=model, tokenizer=tokenizer, device="cpu"
    )


# Cells that depend on the version of TransformerLens: with 3.9, with 4.3.
EDITS_OF_NATIVE = ("not guaranteed: refused", "guaranteed")

FAMILIES: dict[str, Callable[[], Any]] = {
    "HookedTransformer": _hooked,
    "native bridge": _native,
} | {name: lambda name=name: _bridge(name) for name in HUGGING_FACE}


@lru_cache
def tiny(family: str) -> Any:
    """The family's model, in evaluation mode; whoever changes it changes it back."""
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]()
    set_training(model, False)
    return model


def set_training(model: Any, training: bool) -> None:
    """Set the mode; a bridge keeps the wrapped model outside of its own tree."""
    model.train(training)
    if hasattr(model, "original_model"):
        model.original_model.train(training)


def some_tokens(batch: int = 2, pos: int = 7) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(1, VOCAB, (batch, pos), generator=torch.Generator().manual_seed(batch))


@contextmanager
def softmaxes() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What attention's softmax is given and gives, in the order of the layers, beyond doubt."""
    original, seen = torch.nn.functional.softmax, []

    def recording(values: Tensor, *arguments: Any, **options: Any) -> Tensor:
        result = original(values, *arguments, **options)
        if values.ndim == 4 and values.requires_grad:
            values.retain_grad()
            result.retain_grad()
            seen.append((values, result))
        return result

    torch.nn.functional.softmax = recording  # type: ignore[assignment]
    try:
        yield seen
    finally:
        torch.nn.functional.softmax = original


@dataclass(frozen=True)
class Measured:
    """Sums of gradients over sequences, `[layer head query key]`.

    Attributes:
        attention: the patterns, `[layer batch head query key]`.
        scores, pattern: as the probe reads them.
        true_scores, true_pattern: as autograd has them on both sides of the softmax.
        rounding: how far two ways to the gradient on scores may be apart.
    """

    attention: Tensor
    scores: Tensor
    pattern: Tensor
    true_scores: Tensor
    true_pattern: Tensor
    rounding: float


def random_loss(logits: Tensor) -> Tensor:
    """A fixed random function of the logits."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return (logits * weights).sum()


def measured(model: Any, tokens: Tensor) -> Measured:
    """The gradients of `random_loss`.

    Raises:
        ProbeError: the probe refuses to say.
    """
    probes = AttentionPattern(), AttentionGradient(), AttentionGradient("pattern")
    with attach(model, *probes), softmaxes() as seen:
        random_loss(model(tokens)).backward()
    model.zero_grad()
    attention, scores, pattern = (probe.reading().values for probe in probes)
    pos = tokens.shape[1]  # a sink is one more key
    true_scores, true_pattern = (
        torch.stack([values.grad[..., :pos].sum(0) for values in side])  # type: ignore[index]
        for side in zip(*seen, strict=True)
    )
    terms = (attention.sum(1) * pattern.abs()).sum(-1).max().item()
    rounding = 64 * torch.finfo(torch.float32).eps * terms
    return Measured(attention, scores, pattern, true_scores, true_pattern, rounding)


@dataclass(frozen=True)
class Examined:
    """What a family's model shows.

    Attributes:
        check: what `check_attention` says of it.
        trained: gradients in evaluation mode.
        in_training: gradients in training mode, or the probe's refusal.
        has_attention_dropout: whether patterns are dropped in training mode.
        scores_hook_holds_pattern: whether `hook_attn_scores` carries the pattern once more.
    """

    check: AttentionCheck
    trained: Measured
    in_training: Measured | ProbeError
    has_attention_dropout: bool
    scores_hook_holds_pattern: bool


@lru_cache
def examined(family: str) -> Examined:
    """Run a family's model in evaluation and in training mode."""
    model, tokens = tiny(family), some_tokens()
    with warnings.catch_warnings(action="ignore"):
        check = check_attention(model)
        activations: dict[str, Tensor] = {}
        with Hooks() as hooks:
            for name in ("attn_scores", "pattern"):
                point = model.hook_dict[f"blocks.0.attn.hook_{name}"]
                hooks.add(
                    point, lambda _, __, output, name=name: activations.update({name: output})
                )
            trained = measured(model, tokens)
        set_training(model, True)
        in_training: Measured | ProbeError
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                with attach(model, AttentionPattern()) as (pattern,):
                    in_training = measured(model, tokens)
            except ProbeError as error:
                in_training = error
        set_training(model, False)
        model.zero_grad()
    excess = pattern.reading().values.sum(-1).max().item() > 1.1
    same = torch.equal(activations["attn_scores"], activations["pattern"])
    return Examined(check, trained, in_training, excess, same)


def right(measured: Measured) -> bool:
    """Whether the probe's gradient on scores is autograd's, but for rounding."""
    return bool(((measured.scores - measured.true_scores).abs() <= measured.rounding).all())


def table() -> str:
    """What is guaranteed of which family, as Markdown."""
    head = (
        "family",
        "rows of a pattern",
        "gradient on pattern and scores",
        "… under attention dropout",
        "editing a pattern",
        "`hook_attn_scores` holds",
    )
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for family in FAMILIES:
        result = examined(family)
        dropout = "wrong"
        if isinstance(result.in_training, ProbeError):
            dropout = "not guaranteed: refused"
        elif right(result.in_training):
            dropout = "guaranteed" if result.has_attention_dropout else "has none"
        edits = "not guaranteed: refused" if result.check.late else "guaranteed"
        if family == "native bridge" and edits == EDITS_OF_NATIVE[not HAS_LENS_3]:
            edits = "{} (3.9); {} (4.3)".format(*EDITS_OF_NATIVE)
        row = (
            family,
            "sum to less than 1 (sink)" if result.check.sink else "sum to 1",
            "guaranteed" if right(result.trained) and result.check.unread == () else "wrong",
            dropout,
            edits,
            "the pattern" if result.scores_hook_holds_pattern else "scores",
        )
        lines.append(" | ".join(row))
    return "".join(f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    print(table(), end="")

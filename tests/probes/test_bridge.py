"""The same probes on Hugging Face models through TransformerBridge, built offline from a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from probes import (
    AttentionGradient,
    AttentionPattern,
    InductionScores,
    attach,
    copying_score,
    prefix_matching_score,
)

close = torch.testing.assert_close
VOCAB = 11


def gpt2() -> Any:
    sizes: dict[str, Any] = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "n_positions": 16,
        "vocab_size": VOCAB,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=10, eos_token_id=10))


def llama_with_grouped_queries() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": VOCAB}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes, **heads))


@pytest.fixture(params=[gpt2, llama_with_grouped_queries])
def bridge(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path)
    words = WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0")
    special = {"bos_token": "t10", "eos_token": "t10", "pad_token": "t10", "unk_token": "t0"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(tmp_path)
    return TransformerBridge.boot_transformers(str(tmp_path), device="cpu")


def test_probes_read_a_bridge(bridge: Any):
    tokens = torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
    pattern, scores = AttentionPattern(), InductionScores()
    before, after = AttentionGradient("scores"), AttentionGradient("pattern")
    with attach(bridge, pattern, scores, before, after):
        bridge(tokens).square().sum().backward()
    attention = pattern.reading().values
    close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    close(
        scores.reading().sel(score="prefix_matching").values,
        torch.stack([prefix_matching_score(layer, tokens) for layer in attention]),
        equal_nan=True,
    )
    masked = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for gradient in (before, after):
        values = gradient.reading().values
        assert values.shape == attention[:, 0].shape
        assert values.isfinite().all()
        assert not values[..., masked].any()
        assert values.any()


def test_copying_through_grouped_queries(bridge: Any):
    n_heads = bridge.cfg.n_heads
    attention = bridge.blocks[1].attn
    scores = copying_score(bridge, 1)
    assert scores.shape == (n_heads,)
    share = n_heads // len(attention.W_V)
    for head in range(n_heads):
        circuit = (
            bridge.W_E @ attention.W_V[head // share] @ attention.W_O[head] @ bridge.W_U
        ).double()
        values = torch.linalg.eigvals(circuit)
        expected = values.sum().real / values.abs().sum()
        assert scores[head].item() == pytest.approx(expected.item(), abs=1e-4)

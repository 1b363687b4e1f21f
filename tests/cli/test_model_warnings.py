"""What does not work on a user's model reaches the terminal as one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from mechcausal.cli.main import main


@pytest.mark.parametrize(
    "command", [["detect", "--sequences", "2"], ["discover", "--tokens", "1,2,3"]]
)
def test_a_command_says_in_one_line_what_does_not_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "hidden_size": 16, "vocab_size": 30}
    config = GPTNeoConfig(
        **sizes,
        max_position_embeddings=32,
        attention_types=[[["global", "local"], 1]],
        bos_token_id=29,
        eos_token_id=29,
    )
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main([command[0], str(tmp_path), *command[1:]]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    (line,) = lines
    assert line.startswith("mechcausal: warning: TransformerBridge")
    assert line.endswith(
        ": editing a pattern changes nothing in layers 0, 1, which run hook_pattern after use"
    )

"""What the probes of order, position and structure show on small trained models, over seeds.

python -m pytest -s tests/benchmarks/bench_probes_for_tasks.py
"""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechcausal import load_model
from mechcausal.models.adapter import HookedTransformer
from mechcausal.tasks.hierarchy import Grammar, Hierarchy, evidence_of
from mechcausal.training.checkpoints import checkpoint_folders
from probes import (
    ablation_effects,
    attention_by_class,
    order_sensitivity,
    positional_share,
    repeated_tokens,
    score_heads,
    tree_projection,
)
from tests.oracles import seeded

pytestmark = pytest.mark.benchmark

SEEDS = (0, 1, 2)
VOCAB, BOS, LENGTH = 64, 0, 33
LENGTHS = tuple(range(7, 17))


def blocks(n: int, lengths: tuple[int, ...], seed: int) -> Tensor:
    """BOS and 32 tokens of random repeated blocks, as many sequences of each block length."""
    source = seeded(seed)
    return torch.cat(
        [
            repeated_tokens(n, length, VOCAB, generator=source, n_repeats=5, bos=BOS)[:, :LENGTH]
            for length in lengths
        ]
    )


@pytest.mark.timeout(0)
def test_induction_model(tmp_path: Path) -> None:
    """The recipe repeated_tokens: order, positions, and ablation beside a control."""
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        command = [sys.executable, "-m", "mechcausal.cli.main", "train", "repeated_tokens"]
        options = ["--quiet", "--seed", str(seed), "--out", str(folder), "--wandb-mode", "disabled"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        saved = checkpoint_folders(folder)
        untrained, trained = (load_model(saved[step]) for step in (min(saved), max(saved)))
        print(f"\nseed {seed}, steps {min(saved)} and {max(saved)}")
        tokens = blocks(256, (16,), seed)[:, :25]  # the last token is in the middle of a copy
        for name, model in (("untrained", untrained), ("trained", trained)):
            order = order_sensitivity(model, tokens)
            print(f"  order sensitivity, {name:9}: {order.kl:.3f} ± {order.stderr:.3f} nats")
        scores = score_heads(trained, bos=BOS)
        previous, induction = scores.heads("previous_token"), scores.heads("induction")
        fixed = positional_share(trained, blocks(200, (16,), seed))
        varied = positional_share(trained, blocks(20, LENGTHS, seed))
        by_lag = attention_by_class(trained, lags(LENGTH), blocks(20, LENGTHS, seed))
        for kind, heads in (("previous token", previous), ("induction", induction)):
            for head in heads:
                print(
                    f"  {kind} head {head[0]}.{head[1]}: positional share "
                    f"{fixed.share[head]:.3f} ± {fixed.stderr[head]:.3f} (blocks of 16), "
                    f"{varied.share[head]:.3f} ± {varied.stderr[head]:.3f} (of 7 to 16); attention "
                    f"to lag 1 {by_lag.mass[head][1]:.3f}, "
                    f"{by_lag.ratio[head][1]:.1f} ± {by_lag.ratio_stderr[head][1]:.1f} × uniform"
                )
        batches = {f"blocks of {n}": blocks(128, (n,), seed) for n in (8, 12, 16)}
        effects = ablation_effects(trained, previous + induction, tokens=batches)
        for name, rows in effects.items():
            rises = ", ".join(f"{e.layer}.{e.head} {e.rise:+.2f} ± {e.stderr:.2f}" for e in rows)
            print(f"  rise of the loss without a head, {name}: {rises} (loss {rows[0].loss:.2f})")


def lags(pos: int) -> Tensor:
    position = torch.arange(pos)
    return (position[:, None] - position).clamp(min=-1)


# --- A tree over eight leaves ---

SYMBOLS, DEPTH = 4, 3
LEAVES = 2**DEPTH
MASK = SYMBOLS
BRACKETS = [(i, i + 2**h) for h in range(1, DEPTH) for i in range(0, LEAVES, 2**h)]


def tree_model(seed: int) -> HookedTransformer:
    config: dict[str, Any] = {
        "n_layers": DEPTH,
        "n_heads": 1,
        "d_model": 64,
        "d_head": 64,
        "d_mlp": 256,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "attention_dir": "bidirectional",
        "n_ctx": LEAVES,
        "d_vocab": SYMBOLS + 1,
        "d_vocab_out": SYMBOLS,
        "device": "cpu",
        "seed": seed,
    }
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return HookedTransformer(config)


def train(model: HookedTransformer, tree: Hierarchy, steps: int, seed: int) -> float:
    """Predict a masked leaf; returns the last divergence from belief propagation, in nats."""
    generator = seeded(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    divergences: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 if step < 0.75 * steps else 1e-4
        leaves, _ = tree.sample(256, generator=generator)
        hidden = torch.randint(LEAVES, (256, 1), generator=generator)
        row = torch.arange(256)
        posteriors = tree.infer(evidence_of(leaves, SYMBOLS)).leaves
        truth = posteriors[row, hidden[:, 0]].float()
        masked = leaves.scatter(1, hidden, MASK)
        predicted = model(masked)[row, hidden[:, 0]].log_softmax(-1)
        loss = -(truth * predicted).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropy = -torch.special.xlogy(truth, truth).sum(-1).mean()
        divergences.append((loss.detach() - entropy).item())
    last = divergences[-100:]
    return sum(last) / len(last)


@pytest.mark.timeout(0)
def test_tree_model() -> None:
    """Brackets by tree projection, and attention by height in the tree."""
    position = range(LEAVES)
    heights = torch.tensor([[(q ^ k).bit_length() for k in position] for q in position])
    for seed in SEEDS:
        tree = Hierarchy(Grammar.random(SYMBOLS, generator=seeded(seed)), DEPTH)
        model = tree_model(seed)
        tokens, _ = tree.sample(256, generator=seeded(100 + seed))
        untrained = tree_projection(model, tokens).recall(BRACKETS)
        divergence = train(model, tree, 2000, seed)
        print(f"\nseed {seed}: KL from belief propagation {divergence:.4f} nats")
        print(f"  untrained: brackets {untrained[0]:.2f}, per sequence {untrained[1].mean():.3f}")
        for from_layer in range(DEPTH):
            trees = tree_projection(model, tokens, from_layer=from_layer)
            of_mean, of_each = trees.recall(BRACKETS)
            error = of_each.std().item() / len(of_each) ** 0.5
            print(
                f"  τ = {from_layer}: brackets of the mean chart {of_mean:.2f}, per sequence "
                f"{of_each.mean():.3f} ± {error:.3f}, tscore {trees.mean_tscore:.3f}"
            )
        hidden = torch.randint(LEAVES, (256, 1), generator=seeded(seed))
        by_height = attention_by_class(model, heights, tokens.scatter(1, hidden, MASK))
        for layer in range(DEPTH):
            rows = ", ".join(
                f"height {h} {by_height.mass[layer, 0, h]:.2f} = "
                f"{by_height.ratio[layer, 0, h]:.2f} ± {by_height.ratio_stderr[layer, 0, h]:.2f} ×"
                for h in by_height.classes
            )
            print(f"  attention of layer {layer}: {rows} uniform")

"""Run folders and runs in memory without any training, for tests of what is drawn from them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mechcausal.recipes import Recipe, parse_recipe, recipe_to_toml
from mechcausal.records.run_data import RunData
from mechcausal.records.run_folder import read_metrics
from mechcausal.training.run import Progress


def recipe_of(**changes: Any) -> Recipe:
    """A chain of eight tokens, two stages of 20 steps."""
    base: dict[str, Any] = {
        "name": "some",
        "graph": {"preset": "chain", "sequence_length": 8},
        "task": {"vocab_size": 3},
        "training": {"stage1": {"steps": 20}, "stage2": {"steps": 20}},
    }
    return parse_recipe(base, source="test").with_overrides(**changes)


def tiny_recipe(**changes: Any) -> Recipe:
    """The same with few and small batches, recorded by W&B offline: a training of two seconds."""
    values: dict[str, Any] = {
        **{"training__batch_size": 8, "evaluation__n_sequences": 8, "evaluation__bayes_draws": 4},
        **{"evaluation__theory_priors": 10, "probing__every": 10, "probing__dense": 1},
        **{"probing__images": 2, "wandb__mode": "offline"},
    }
    return recipe_of(**values | changes)


def two_parents_recipe(length: int = 8) -> Recipe:
    """Two parents, two heads in layer 1."""
    data = {
        "name": "two",
        "graph": {"preset": "two_parents", "sequence_length": length},
        "task": {"vocab_size": 3},
        "model": {"kind": "disentangled", "heads": [2, 1], "initial_scale": 0.1},
        "training": {"algorithm": "joint", "joint": {"steps": 40}},
    }
    return parse_recipe(data, source="test")


def heads_recipe() -> Recipe:
    """Repeated tokens, two layers of two heads."""
    data = {
        "name": "grown",
        "task": {"kind": "repeated_tokens", "vocab_size": 9, "repeat_lengths": [3, 4]},
        "model": {"kind": "standard"},
        "training": {"algorithm": "joint", "joint": {"steps": 40}},
    }
    return parse_recipe(data, source="test")


def tree_recipe() -> Recipe:
    """A masked leaf of trees with four leaves."""
    data = {
        "name": "small-tree",
        "task": {"kind": "tree", "vocab_size": 3, "depth": 2},
        "model": {"kind": "standard", "attention": "bidirectional", "n_heads": 1, "d_model": 16},
        "training": {"algorithm": "joint", "epsilon": 1e-4, "joint": {"steps": 40}},
    }
    return parse_recipe(data, source="test")


def lags_recipe() -> Recipe:
    """Lags 1 and 2 in sequences of 12 tokens."""
    data = {
        "name": "lags",
        "task": {"kind": "selective_lags", "vocab_size": 3, "lags": [1, 2], "context": 12},
        "model": {"kind": "standard", "d_model": 16},
        "training": {"algorithm": "joint", "joint": {"steps": 40}},
    }
    return parse_recipe(data, source="test")


def contexts_recipe() -> Recipe:
    """Trees of four tokens, three examples and one to predict, and the model tailored to them."""
    data = {
        "name": "contexts",
        "task": {"kind": "in_context_graphs", "vocab_size": 3, "positions": 4, "examples": 3},
        "model": {"kind": "in_context_graphs", "n_heads": 3, "initial_scale": 0.1},
        "training": {"algorithm": "joint", "joint": {"steps": 40, "optimizer": "adam"}},
    }
    return parse_recipe(data, source="test")


def matrices_of(recipe: Recipe, seed: int) -> dict[str, np.ndarray]:
    """Random attention and gradients, or scores of heads, of the right shapes."""
    generator = np.random.default_rng(seed)
    if recipe.task.kind == "repeated_tokens":
        kinds = ("prefix_matching", "previous_token", "duplicate_token")
        return {f"heads/{kind}": generator.random((2, 2), dtype=np.float32) for kind in kinds}
    length = recipe.build_graph().sequence_length
    n_heads = recipe.model.heads[0] if recipe.model.kind == "disentangled" else 1
    shape = (n_heads, length, length)
    visible = np.tril(np.ones((length, length), dtype=bool))
    weights = np.where(visible, generator.random(shape) ** 4 + 1e-6, 0)
    matrices = {
        "attention/layer0": weights / weights.sum(-1, keepdims=True),
        "gradient/scores": np.where(visible, generator.normal(size=shape) * 1e-4, 0),
        "gradient/pattern": np.where(visible, generator.normal(size=shape) * 1e-3, 0),
    }
    if n_heads == 1:
        matrices = {name: matrix[0] for name, matrix in matrices.items()}
    asks = generator.random((4, 1, length))
    matrices["attention/examples"] = asks / asks.sum(-1, keepdims=True)
    return {name: matrix.astype(np.float32) for name, matrix in matrices.items()}


def references_of(recipe: Recipe) -> dict[str, np.ndarray]:
    """Random information, with a prediction where there is one, and example tokens."""
    if recipe.task.kind == "repeated_tokens":
        return {}
    generator = np.random.default_rng(0)
    graph = recipe.build_graph()
    n, length = graph.n_positions, graph.sequence_length
    tokens = generator.integers(0, recipe.task.vocab_size, (4, length))
    references = {
        "theory/chi2": generator.random((n, n)),
        "theory/shannon": generator.random((n, n)),
    }
    if graph.query_parents is None:
        gradient = generator.normal(size=(length, length)) * 1e-4
        references |= {"theory/g": generator.random((n, n)), "theory/gradient": gradient}
    return references | {"examples/tokens": tokens}


def history_of(steps: Sequence[int], recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of figures; some are null."""
    rows: list[dict[str, Any]] = []
    for i, step in enumerate(steps):
        share = 1 / 3 + i / (2 * len(steps))
        formed = next(
            (s for n, s in enumerate(steps[: i + 1]) if 1 / 3 + n / (2 * len(steps)) >= 0.5), None
        )
        row: dict[str, Any] = {
            "train/step": step,
            "loss/train": 2 - share,
            "loss/eval": 1.9 - share,
        }
        if recipe.task.kind == "repeated_tokens":
            row |= {"loss/chance": 2.0, "loss/second_copy": 1.0 - share / 2}
            row |= {f"heads/L0H{head}/prefix_matching": share * head for head in range(2)}
        else:
            row |= {"loss/bayes": 1.0, "loss/gap": 0.9 - share, "graph/recovered": share}
            row |= {"loss/construction": 1.2, "loss/construction_gap": 0.7 - share}
            row |= {"gradient/pattern_theory_correlation": None if i % 3 else share / 7}
            row |= {"strategy/kl_bigram": share * 1e-5}
        rows.append(row | {"induction/score": share, "induction/formation_step": formed})
    return rows


def run_of(recipe: Recipe | None = None, *, n_frames: int = 4, name: str = "run") -> RunData:
    """A run in memory."""
    recipe = recipe or recipe_of()
    steps = [round(step) for step in np.linspace(0, 40, n_frames)]
    return RunData(
        name=name,
        recipe=recipe,
        history=history_of(steps, recipe),
        frames={step: matrices_of(recipe, step) for step in steps},
        references=references_of(recipe),
        summary={"state": "finished", "train/steps": 40},
    )


def write_run(folder: Path, run: RunData, *, finished: bool = True) -> Path:
    """The run's folder, as training leaves it, or as it is in the middle of training."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(recipe_to_toml(run.recipe), encoding="utf-8")
    lines = [json.dumps(dict(row)) for row in run.history]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if finished:
        tensors = dict(run.references) | _stepwise(run.frames)
        save_file(tensors, folder / "matrices.safetensors")
        (folder / "summary.json").write_text(json.dumps(dict(run.summary)), encoding="utf-8")
    else:
        (folder / "matrices").mkdir()
        for step, matrices in run.frames.items():
            save_file(dict(matrices), folder / "matrices" / f"{step:08d}.safetensors")
        save_file(dict(run.references), folder / "matrices" / "references.safetensors")
    return folder


def steps_of(folder: Path) -> list[int]:
    """The steps of a run's rows."""
    return [int(row["train/step"] or 0) for row in read_metrics(folder)]


def at(step: int, action: Callable[[], Any]) -> Callable[[Progress], None]:
    """As `on_progress`: do something at a step."""

    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            action()

    return on_progress


def _stepwise(frames: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {
        f"{step:08d}/{name}": matrix
        for step, matrices in frames.items()
        for name, matrix in matrices.items()
    }

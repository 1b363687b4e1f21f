"""What finding induction heads costs beside the forward passes it needs: `make bench`.

Nothing here asserts a figure; each is printed with the target it is held against. Times take turns
in one process. Memory is the peak of resident memory over what the process held just before, each
side in a process of its own.
"""

import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mechcausal.models.adapter import HookedTransformer
from probes import frequent_tokens, score_heads, text_segments
from probes.heads.head_scores import score_heads_on
from probes.heads.stimuli import draw_stimuli
from probes.reading.passes import run, undisturbed

pytestmark = pytest.mark.benchmark

STIMULI: dict[str, Any] = {"n_sequences": 10, "repeat_lengths": (50,), "bos": 50256}
SIDES = ("bare", "score_heads", "run_with_cache")


def _gpt2_sized() -> HookedTransformer:
    sizes = {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_head": 64, "d_mlp": 3072}
    config = {**sizes, "n_ctx": 1024, "d_vocab": 50257, "act_fn": "gelu_new", "device": "cpu"}
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return HookedTransformer(config)


def _sides(model: HookedTransformer) -> dict[str, Callable[[], object]]:
    """The same 10 × 101 repeated tokens and 10 × 101 controls, three ways."""
    (stimulus,) = draw_stimuli(model, **STIMULI)
    batches = (stimulus.tokens, stimulus.control)

    def bare() -> None:
        with undisturbed(model):
            for batch in batches:
                run(model, batch)

    def cached() -> None:
        with undisturbed(model):
            for batch in batches:
                model.run_with_cache(batch, return_type=None)

    return dict(zip(SIDES, (bare, lambda: score_heads(model, **STIMULI), cached), strict=True))


def _three_sources() -> list[Any]:
    """Random ids, frequent tokens and segments of a made-up text."""
    weights = 1 / torch.arange(1.0, 5001)
    text = torch.multinomial(
        weights, 20_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    return [None, frequent_tokens(text), text_segments(text)]


def test_time_of_three_stimuli_against_their_bare_passes():
    model, sources = _gpt2_sized(), _three_sources()
    batches = []
    for source in sources:
        (stimulus,) = draw_stimuli(model, source=source, **STIMULI)
        batches += [stimulus.tokens, stimulus.control]

    def bare() -> None:
        with undisturbed(model):
            for batch in batches:
                run(model, batch)

    def one_by_one() -> None:
        for source in sources:
            score_heads(model, source=source, **STIMULI)

    sides = {
        "bare": bare,
        "together": lambda: score_heads_on(model, sources, **STIMULI),
        "one by one": one_by_one,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(4):
        for name, action in sides.items():
            start = time.perf_counter()
            action()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    base, together, alone = (statistics.median(seconds[name]) for name in sides)
    fastest = min(seconds["together"]) / min(seconds["bare"])
    print(
        f"\nthree stimuli, 3 × 2 × 10 × 101 tokens: bare {base:.2f} s, score_heads_on "
        f"{together:.2f} s = {together / base:.2f}× (fastest turns {fastest:.2f}×), score_heads "
        f"three times {alone:.2f} s = {alone / base:.2f}×"
    )


def test_time_against_the_bare_forward_passes():
    sides = _sides(_gpt2_sized())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(8):
        for name, action in sides.items():
            start = time.perf_counter()
            action()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    bare, ours, cached = (statistics.median(seconds[name]) for name in SIDES)
    # A busy machine slows single turns: the fastest ones tell most about the work itself.
    fastest = min(seconds["score_heads"]) / min(seconds["bare"])
    print(
        f"\n12 × 12 heads, d_model 768, 2 × 10 × 101 tokens: bare {bare:.2f} s, score_heads "
        f"{ours:.2f} s = {ours / bare:.2f}× (target ≤ 1.15; fastest turns {fastest:.2f}×), "
        f"run_with_cache {cached:.2f} s = {cached / bare:.2f}×"
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_peak_memory_against_run_with_cache():
    peaks = {}
    for side in SIDES:
        command = [sys.executable, "-m", "tests.benchmarks.bench_detect", side]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[side] = float(done.stdout.split()[-1])
    print(
        f"\nextra peak memory, same passes: bare {peaks['bare']:.0f} MB, score_heads "
        f"{peaks['score_heads']:.0f} MB (target ≤ 200), run_with_cache "
        f"{peaks['run_with_cache']:.0f} MB"
    )


def _resident(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith(field))
    return int(kilobytes) * 1024 / 1e6


def main(side: str) -> None:
    """Print by how many MB one side raises this process's resident memory at its peak."""
    model = _gpt2_sized()
    action = _sides(model)[side]
    with undisturbed(model):
        run(model, torch.zeros(1, 2, dtype=torch.int64))  # what the first pass alone sets up
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = _resident("VmRSS")
    action()
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1])

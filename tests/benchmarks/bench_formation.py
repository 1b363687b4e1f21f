"""Whether sparse checkpoints name the step of formation that dense ones do, over seeds.

python -m pytest -s tests/benchmarks/bench_formation.py

Trains `repeated_tokens` with a checkpoint every 20 steps and follows its heads over all of them,
over every fifth and over every tenth. Prints, for each head and score that forms, the step from all
checkpoints and the two sparse ones between which the head forms. The acceptance: the step lies
between them. A line with "falls back" names the steps at which a score is below the threshold again
after its first crossing, which is how it can fail.
"""

from pathlib import Path

import pytest

from mechcausal.recipes import load_recipe
from mechcausal.studies.formation import (
    FormationResult,
    HeadFormation,
    follow_formation,
    open_series,
)
from mechcausal.studies.formation.driver import Scoring, plan_formation
from mechcausal.studies.formation.series import choose
from mechcausal.training.run import train

pytestmark = pytest.mark.benchmark

SEEDS = (0, 1, 2)
STEPS, DENSE = 800, 20
THRESHOLD = 0.4
SPARSE = (5 * DENSE, 10 * DENSE)

Score = tuple[int, int, str]


def trained(seed: int, folder: Path) -> Path:
    """A run that keeps a checkpoint every `DENSE` steps."""
    recipe = load_recipe("repeated_tokens").with_overrides(
        seed=seed,
        training__joint__steps=STEPS,
        probing__every=DENSE,
        probing__report=False,
        wandb__mode="disabled",
    )
    return train(recipe, out=folder).folder


def followed(run: Path, folder: Path, every: int) -> FormationResult:
    """The study over checkpoints that many steps apart; `folder` keeps the scores of each."""
    series = open_series(str(run), scratch=folder / "download")
    plan = plan_formation(series, choose(series.revisions(), every=every), folder)
    return follow_formation(series, plan, folder, scoring=Scoring(threshold=THRESHOLD))


def by_score(result: FormationResult) -> dict[Score, HeadFormation]:
    """The heads that formed."""
    return {(head.layer, head.head, head.score): head for head in result.heads()}


def bracket(head: HeadFormation | None) -> str:
    """The checkpoints between which a head forms."""
    if head is None:
        return "never"
    return f"{'–' if head.not_before is None else head.not_before} to {head.first_crossing}"


def is_within(dense: HeadFormation | None, sparse: HeadFormation | None) -> bool:
    """Whether the step from all checkpoints lies between the sparse ones."""
    if dense is None or sparse is None:
        return False
    before = -1 if sparse.not_before is None else sparse.not_before
    return before < dense.first_crossing <= sparse.first_crossing


def holds_midpoint(dense: HeadFormation | None, sparse: HeadFormation | None) -> bool | None:
    """Whether the sparse interval holds the midpoint from all checkpoints; None without a fit."""
    if dense is None or sparse is None or dense.midpoint is None or sparse.midpoint_low is None:
        return None
    assert sparse.midpoint_high is not None
    return sparse.midpoint_low <= dense.midpoint <= sparse.midpoint_high


def falls_back(result: FormationResult, head: HeadFormation) -> list[int]:
    """Steps after the first crossing at which the score is below the threshold again."""
    formation = result.formations[head.score]
    row = formation.layers.index(head.layer)
    scores = dict(zip(formation.steps, formation.scores[:, row, head.head].tolist(), strict=True))
    return [
        step for step, score in scores.items() if step > head.first_crossing and score < THRESHOLD
    ]


@pytest.mark.timeout(0)
def test_formation_from_sparse_checkpoints(tmp_path: Path) -> None:
    """Steps of formation from all checkpoints against those from a fifth and a tenth of them."""
    within: dict[int, list[bool]] = {every: [] for every in SPARSE}
    held: dict[int, list[bool]] = {every: [] for every in SPARSE}
    columns = "".join(f"{f'every {every}':>14}" for every in SPARSE)
    print(f"\nrepeated_tokens, {STEPS} steps: head, score, first step at {THRESHOLD}")
    print(f"{'seed':>6}  {'head':4}  {'score':16}{f'every {DENSE}':>10}{columns}")
    for seed in SEEDS:
        run, folder = trained(seed, tmp_path / f"run{seed}"), tmp_path / f"study{seed}"
        result = followed(run, folder, DENSE)
        dense = by_score(result)
        sparse = {every: by_score(followed(run, folder, every)) for every in SPARSE}
        for key in sorted({*dense, *(key for heads in sparse.values() for key in heads)}):
            head = dense.get(key)
            cells = ""
            for every in SPARSE:
                other = sparse[every].get(key)
                within[every].append(is_within(head, other))
                if (holds := holds_midpoint(head, other)) is not None:
                    held[every].append(holds)
                cells += f"{bracket(other):>14}"
            step = "never" if head is None else str(head.first_crossing)
            print(f"{seed:6}  {f'{key[0]}.{key[1]}':4}  {key[2]:16}{step:>10}{cells}")
            if head is not None and (steps := falls_back(result, head)):
                print(f"{'':14}falls back at {', '.join(map(str, steps))}")
    for every in SPARSE:
        print(
            f"every {every} steps: within {sum(within[every])} of {len(within[every])}; intervals "
            f"that hold the midpoint from all checkpoints: {sum(held[every])} of {len(held[every])}"
        )

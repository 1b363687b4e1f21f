"""The residual law on real text, three seeds, and its control; about a minute a run.

python -m pytest -s tests/benchmarks/bench_text.py
"""

import pytest
import torch

from mechcausal.measures.residual_law import read_law
from mechcausal.recipes import load_recipe
from mechcausal.training.experiments import Generators, build_experiment
from mechcausal.training.experiments.text import TextExperiment

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(0)]

WINDOW = range(45, 151, 15)


@pytest.mark.parametrize("name", ["text", "text_interleaved"])
def test_the_law_on_text(name: str) -> None:
    """Means over heads and steps 45-150 of correlations over lags, and residual χ² at odd lags."""
    print(f"\n{name}: seed; r with residual χ², the text's χ², the direct path; residual χ² at")
    print("odd lags, mean and largest of the means over steps; the text's own; misfit")
    for seed in range(3):
        recipe = load_recipe(name).with_overrides(seed=seed, evaluation__n_sequences=900)
        generators = Generators.from_seed(seed, torch.device("cpu"))
        experiment = build_experiment(recipe, generators)
        assert isinstance(experiment, TextExperiment)
        stage = recipe.training.joint
        optimizer = torch.optim.Adam(experiment.parameters(["all"]), lr=stage.lr)
        rows, odd = [], []
        for step in range(WINDOW[-1] + 1):
            if step in WINDOW:
                law = read_law(experiment.hooked, experiment.windows, experiment.information)
                rows.append(law.figures)
                odd.append(law.residual.centred_chi2[0::2])
            optimizer.zero_grad()
            experiment.training_loss(recipe.training.batch_size).backward()
            optimizer.step()
        means = [
            sum(row[f"gradient/{key}_correlation"] for row in rows) / len(rows)
            for key in ("residual", "raw", "direct_path")
        ]
        at_odd = torch.stack(odd)
        own = experiment.information.chi2[0::2]
        misfit = sum(row["residual/misfit"] for row in rows) / len(rows)
        by_step = " ".join(f"{value:.4f}" for value in at_odd.mean(1).tolist())
        print(
            f"{seed}  {means[0]:.2f} {means[1]:.2f} {means[2]:.2f}  {at_odd.mean():.4f} "
            f"{at_odd.mean(0).abs().max():.4f}  {own.mean():.4f}  {misfit:.3f}  [{by_step}]",
            flush=True,
        )

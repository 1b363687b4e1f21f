"""What is heavy is loaded when it is used, so that help, refusals and graphs do not wait for it."""

import subprocess
import sys

# One process, from the lightest import to that of a training.
SCRIPT = """
import sys

def check(*absent):
    assert not {*absent} & {*sys.modules}, {*absent} & {*sys.modules}

import mechcausal.graphs
mechcausal.graphs.chain(5).levels
check("torch", "networkx", "numpy", "jaxtyping")
import mechcausal.recipes
from mechcausal.cli.main import main
main(["--help"])
check("torch", "transformer_lens", "wandb", "matplotlib", "scipy")
main(["theory", "--parents", "-1,0", "--priors", "2"])
check("transformer_lens", "wandb", "scipy")
import mechcausal.theory, mechcausal.training.run
check("transformer_lens", "transformers", "wandb", "matplotlib", "scipy.stats", "plotly")
"""


def test_each_stage_loads_what_it_uses() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

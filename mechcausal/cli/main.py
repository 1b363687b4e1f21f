"""The `mechcausal` command: dispatch to a subcommand and print its errors.

Heavy imports stay inside the subcommands, so that `mechcausal --help` does not wait for torch.
"""

import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from mechcausal.cli.parsing import RefusedError
from mechcausal.recipes import packaged_recipes
from mechcausal.support.messages import printable
from mechcausal.support.startup import prepare_process

BAD_INPUT = 2
COMMANDS = (
    *("train", "resume", "sweep", "runs", "report", "sync", "publish"),
    *("theory", "detect", "formation", "discover", "explain", "replicate"),
)

USAGE = """usage: mechcausal COMMAND ...

Watch a transformer learn causal structure.

commands:
  train RECIPE     train a recipe's model, watched by hooks, recorded to W&B and files
  resume RUN       resume a run that was interrupted, killed or failed
  sweep SWEEP      many runs: axes over a recipe's fields, on cores or on a cluster
  runs [FOLDER]    list runs: recipe, state, step, figures
  report RUN ...   the page of a run, or the comparison of several
  sync RUN         upload a run's offline W&B fragments in order
  publish RUN REPO upload a run's checkpoints to the Hugging Face Hub, with a model card
  theory           pairwise information of a causal graph and the attention gradient it predicts
  detect TARGET    the induction heads of any model, verified by intervention
  formation MODEL  when the heads of a model formed: its public or own checkpoints, one by one
  discover TARGET  a causal graph over the tokens of one input, from any model's attention
  explain WHAT     the tokens that change a prediction: recommender, sentiment; or the bridge
  replicate        reproduce the paper's figures: its values, ours, the theory's, and a verdict

options:
  -h, --help       this text; `mechcausal COMMAND --help` for a command's options
  --version        the version

bundled recipes: {recipes}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 (run failed), 2 (bad input) or 128 + signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # print "?" where the terminal lacks "→" or "χ"
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE.format(recipes=", ".join(packaged_recipes())), end="")
        return 0
    if command == "--version":
        from mechcausal import __version__

        print(f"mechcausal {__version__}")
        return 0
    if command not in COMMANDS:
        return _print_error(f"{command}: unknown command; allowed: {', '.join(COMMANDS)}")
    prepare_process()
    try:
        main_of_command = import_module(f"mechcausal.cli.{command}").main
        with _probe_warnings_as_lines():
            return int(main_of_command(rest))
    except RefusedError as refusal:
        return _print_error(str(refusal))
    except KeyboardInterrupt as stop:
        print(f"mechcausal: {str(stop) or 'stopped'}", file=sys.stderr)
        return 128 + getattr(stop, "number", 2)
    except BrokenPipeError:  # the reader of our output has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextmanager
def _probe_warnings_as_lines() -> Iterator[None]:
    """Print each ProbeWarning as one line, without file and line number."""
    show = warnings.showwarning

    def show_line(
        message: Warning | str, category: type[Warning], *position: Any, **options: Any
    ) -> None:
        if category.__name__ == "ProbeWarning":  # by name: importing probes would import torch
            print(f"mechcausal: warning: {printable(str(message))}", file=sys.stderr)
        else:
            show(message, category, *position, **options)

    with warnings.catch_warnings():
        warnings.showwarning = show_line
        yield


def _print_error(message: str) -> int:
    line = printable(" ".join(message.split()))
    print(f"mechcausal: {line}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())

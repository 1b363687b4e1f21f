"""Runs `mechcausal detect` and one look of a Tracker on a tiny model of every family.

`python -m tests.studies.every_family` prints the second table of docs/models.md.
"""

import contextlib
import io
import json
import tempfile
import warnings
from pathlib import Path

import torch

from mechcausal.cli.main import main
from mechcausal.models.adapter import save_model
from probes import Tracker
from tests.probes.families import FAMILIES, HUGGING_FACE, VOCAB, hugging_face_model, tiny


def detected(family: str, folder: Path) -> str:
    """What `mechcausal detect FOLDER` says of the saved model."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        if family in HUGGING_FACE:
            torch.manual_seed(0)
            for part in hugging_face_model(family):
                part.save_pretrained(folder)
        elif family == "HookedTransformer":
            save_model(tiny(family), folder)
        else:
            return "has no folder"
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(["detect", str(folder), "--json"])
    if code:
        return " ".join(errors.getvalue().split()).replace(str(folder), "FOLDER")
    scores = [head["prefix_matching"] for head in json.loads(output.getvalue())["heads"]]
    return f"{len(scores)} heads, prefix matching at most {max(scores):.3f}"


def looked(family: str) -> str:
    """The parts that a look reads, and why it goes on without the others."""
    tokens = torch.randint(VOCAB, (32, 12), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        look = Tracker(tiny(family), tokens, every=1)(0)
    assert look is not None
    names = ("prefix_matching/max", "in_context/score")
    parts = [name.partition("/")[0] for name in names if name in look.figures]
    parts += ["gradient"] if look.descent is not None else []
    lines = [str(warning.message) for warning in caught]
    refused = [line.rpartition(": ")[2] for line in lines if line.startswith("tracking")]
    return "; ".join([", ".join(parts), *refused])


def table() -> str:
    """A row for each family, as Markdown."""
    rows = ["family | `mechcausal detect` | a look of `Tracker`", "--- | --- | ---"]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(f"{family} | {detected(family, Path(folder))} | {looked(family)}")
    return "".join(f"| {row} |\n" for row in rows)


if __name__ == "__main__":
    print(table(), end="")

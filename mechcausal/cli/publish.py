"""`mechcausal publish`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.support.messages import printable

if TYPE_CHECKING:
    from mechcausal.studies.publishing import Publication, PublishedRevision

CARD_FILE = "model_card.md"


@dataclass
class Publish:
    """Upload a run to the Hugging Face Hub: a revision for every checkpoint, and a model card."""

    run: tyro.conf.Positional[str] = ""
    """Folder of a finished run."""
    repo: tyro.conf.Positional[str] = ""
    """Name of the model on the Hub, owner/name."""
    private: tyro.conf.FlagCreatePairsOff[bool] = False
    """Create the model as a private one."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the card into the run folder, list what would be uploaded, and send nothing."""
    json: bool = False
    """Print one JSON object."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, or 2 by way of `RefusedError`."""
    options = parse(Publish, arguments, command="publish")
    if not options.run or not options.repo:
        raise RefusedError("publish needs a run folder and a name on the Hub, owner/name")
    from mechcausal.recipes import RecipeError
    from mechcausal.studies.publishing import plan_publication
    from mechcausal.studies.targets import TargetError
    from mechcausal.support.files import write_atomically

    commits: dict[str, str] = {}
    card = Path(options.run) / CARD_FILE
    try:
        publication = plan_publication(options.run, options.repo)
        write_atomically(card, publication.card)
        if not options.dry_run:
            commits = _upload(publication, private=options.private)
    except (TargetError, RecipeError) as error:
        raise RefusedError(str(error)) from None
    except OSError as error:
        raise RefusedError(f"{card}: cannot be written: {error.strerror or error}") from None
    if options.json:
        print(json.dumps(_content(publication, commits, card), indent=2))
    else:
        _print_table(publication, commits, card)
    return 0


def _upload(publication: "Publication", *, private: bool) -> dict[str, str]:
    from mechcausal.cli.display import bar_on_terminal
    from mechcausal.studies.publishing import publish

    with bar_on_terminal() as bar:
        task = bar.add_task("", total=len(publication.revisions), figures="")

        def show(done: int, revision: "PublishedRevision") -> None:
            bar.update(task, completed=done, description=printable(f"uploading {revision.branch}"))

        return publish(publication, private=private, on_progress=show)


def _content(
    publication: "Publication", commits: Mapping[str, str], card: Path
) -> dict[str, object]:
    return {
        "run": str(publication.run),
        "repo": publication.repo,
        "card": str(card),
        "recipe_sha256": publication.recipe_sha256,
        "uploaded": bool(commits),
        "revisions": [
            {
                "branch": revision.branch,
                "step": revision.step,
                "bytes": revision.size,
                "commit": commits.get(revision.branch),
            }
            for revision in publication.revisions
        ],
        "files_of_main": sorted(["README.md", *publication.extra]),
    }


def _print_table(publication: "Publication", commits: Mapping[str, str], card: Path) -> None:
    from rich.console import Console

    from mechcausal.cli.tables import make_table, print_locations

    console = Console()
    done = "uploaded" if commits else "to upload; nothing was sent"
    title = f"{printable(str(publication.run))} as {publication.repo}: {done}"
    table = make_table(("branch", "step", "bytes", "commit"), title=title)
    for revision in publication.revisions:
        commit = commits.get(revision.branch, "")[:12] or "–"
        table.add_row(revision.branch, f"{revision.step:,}", f"{revision.size:,}", commit)
    console.print(table)
    names = ", ".join(sorted(["README.md", *publication.extra]))
    print_locations({"main also": names, "card": card})

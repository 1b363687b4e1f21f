"""README and docs: marked examples run, and the commands they name exist with their options.

A block of Python is run when the line before it is `<!-- test -->`; every other one has to be
valid Python at least.
"""

import re
import runpy
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mechcausal.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.is_file()
]
README_BYTES = 7000
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
MARK = "<!-- test -->"
SHELL = ("sh", "bash", "shell", "console")


def blocks(text: str, *languages: str) -> list[tuple[int, str, bool]]:
    """Line number, content and mark of every fenced block in one of the languages."""
    fenced = []
    for match in FENCE.finditer(text):
        if match[2] in languages:
            before = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1].strip()
            line = text.count("\n", 0, match.start()) + 1
            fenced.append((line, match[3], before == MARK))
    return fenced


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """The arguments of every `mechcausal ...` in a page's shell blocks, by line number."""
    for line, content, _ in blocks(text, *SHELL):
        # Of a loop, what is checked is its first turn.
        first = {
            name: words.split()[0] for name, words in re.findall(r"for (\w+) in ([^;\n]+)", content)
        }
        joined = content.replace("\\\n", " ")
        for name, value in first.items():
            joined = re.sub(rf"\$\{{{name}\}}|\${name}\b", value, joined)
        for row in joined.splitlines():
            words = shlex.split(row.removeprefix("$ "), comments=True)
            for start, word in enumerate(words):
                if word.rsplit("/", 1)[-1] == "mechcausal" and "install" not in words[:start]:
                    rest = words[start + 1 :]
                    ends = [
                        i for i, w in enumerate(rest) if w in ("|", ">", "&&", "&", ";", "done")
                    ]
                    yield line, [w.rstrip(";") for w in rest[: min(ends, default=len(rest))]]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


PYTHON = [(page, *block) for page in PAGES for block in blocks(text(page), "python")]
EXAMPLES = [(page, line, content) for page, line, content, marked in PYTHON if marked]
COMMANDS = [(page, *command) for page in PAGES for command in commands(text(page))]


def name(value: object) -> str | None:
    """Of a parameter: a page's name, a command's words."""
    if isinstance(value, Path):
        return value.stem
    return " ".join(value) if isinstance(value, list) else None


# Where commands begin to work.
WORKERS = (
    "training.run.train",
    "training.resuming.resume",
    "theory.pairwise_theory",
    "studies.targets.load_target",
    "studies.formation.open_series",
    "studies.publishing.plan_publication",
    "cli.discover._from_matrix",
    "studies.replication.driver.replicate",
    "studies.explanations.driver.run_application",
    "studies.explanations.bridge.bridge",
    "studies.explanations.text_classifier.TextClassifier",
    "studies.explanations.movielens.load_ratings",
    "cli.runs.find_runs",
    "cli.sync.find_runs",
    "records.run_folder.find_runs",
    "sweeps.driver.run_sweep",
    "sweeps.wandb_sweep.write_wandb_sweep",
)


class ReachedError(Exception):
    """A command that parsed and would now start to work."""


def test_pages_have_examples_and_commands() -> None:
    assert {page.stem for page, _, _ in EXAMPLES} >= {"README", "detect", "discover", "explain"}
    named = {arguments[0] for _, _, arguments in COMMANDS if arguments}
    assert {"train", "theory", "detect", "sweep", "replicate"} <= named


def test_the_readme_is_short() -> None:
    assert len(text(ROOT / "README.md").encode()) <= README_BYTES


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line", "content"), EXAMPLES, ids=name)
def test_example_runs(
    page: Path, line: int, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / f"{page.stem}_line_{line}.py"
    script.write_text(content, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize(("page", "line", "content", "marked"), PYTHON, ids=name)
def test_every_python_block_is_valid(page: Path, line: int, content: str, marked: bool) -> None:
    compile(content, f"{page.name}:{line}", "exec")


@pytest.mark.parametrize(("page", "line", "arguments"), COMMANDS, ids=name)
def test_command_exists_with_its_options(
    page: Path,
    line: int,
    arguments: list[str],
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "recipe.toml").write_text((repository / "runs" / "markov_chain.toml").read_text())
    (tmp_path / "metrics.jsonl").touch()
    arguments = [str(tmp_path) if "<run-id>" in word else word for word in arguments]

    # Imported while something is patched, these would keep what stands in its place.
    for module in (
        "studies.explanations.bridge",
        "training.experiments.causal_graph",
        "studies.replication.driver",
        "studies.formation",
        "studies.publishing",
    ):
        import_module(f"mechcausal.{module}")

    def reach(*args: Any, **options: Any) -> None:
        raise ReachedError

    monkeypatch.chdir(repository)
    for worker in WORKERS:
        monkeypatch.setattr(f"mechcausal.{worker}", reach)
    try:
        code = main(arguments)
    except ReachedError:
        return
    except SystemExit as exit_:  # --help
        code = int(exit_.code or 0)
    assert code == 0, f"{page.name}:{line}: {capsys.readouterr().err}"


def test_recipe_files_that_pages_name_exist(repository: Path) -> None:
    named = {name for page in PAGES for name in re.findall(r"\bruns/[\w-]+\.toml", text(page))}
    assert named
    assert not {name for name in named if not (repository / name).is_file()}


def test_commands_are_found_in_shell_blocks() -> None:
    """What the test itself relies on."""
    page = (
        "```sh\npip install mechcausal\n"
        "$ WANDB_MODE=offline mechcausal train a \\\n  --seed 1 # x\n"
        "for r in a b; do\n  for s in 0 1; do mechcausal train runs/$r.toml --seed $s; done\ndone\n"
        ".venv/bin/mechcausal theory --parents '-1,0' | head\n```\n"
    )
    assert [arguments for _, arguments in commands(page)] == [
        ["train", "a", "--seed", "1"],
        ["train", "runs/a.toml", "--seed", "0"],
        ["theory", "--parents", "-1,0"],
    ]
    marked = f"{MARK}\n```python\n1\n```\n\n```python\n2\n```\n"
    assert blocks(marked, "python") == [(2, "1\n", True), (6, "2\n", False)]

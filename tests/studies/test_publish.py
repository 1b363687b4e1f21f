"""`mechcausal publish`: a run becomes a model on the Hub, from which it is read back."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load

from mechcausal import __version__
from mechcausal.recipes import load_recipe, parse_recipe, recipe_to_toml
from mechcausal.records.run_data import RunData
from mechcausal.studies.publishing.card import model_card
from mechcausal.studies.publishing.publication import without_folders
from mechcausal.training.run import RunResult
from tests.commands import Command, command_in, refused
from tests.hub_server import HubServer, client_of

REPO = "lab/lean"
BRANCHES = ["step-0", "step-2", "step-4", "main"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """An empty Hub, and the client that talks to it."""
    with HubServer() as server, client_of(server, tmp_path / "cache"):
        yield server


@pytest.fixture
def run(lean_run: RunResult, tmp_path: Path) -> Path:
    """A run with checkpoints at 0, 2 and 4."""
    folder = tmp_path / "run"
    shutil.copytree(lean_run.folder, folder)
    return folder


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run `mechcausal` in an empty folder: exit code, output, error output."""
    for name in ("draw_formation", "write_formation_page"):
        monkeypatch.setattr(
            f"mechcausal.studies.formation.pictures.{name}", lambda result, path: None
        )
    return command_in(tmp_path, monkeypatch, capsys)


def test_a_published_run_is_read_back_by_detect_and_formation(
    command: Command, hub: HubServer, run: Path, tmp_path: Path
) -> None:
    code, output, errors = command("publish", str(run), REPO, "--private", "--json")
    assert (code, errors) == (0, "")
    content = json.loads(output)
    repo = hub.repos[REPO]
    assert repo.private
    assert [row["branch"] for row in content["revisions"]] == BRANCHES
    assert {r["branch"]: r["commit"] for r in content["revisions"]} == repo.branches

    sent = {branch: repo.commits[repo.branches[branch]] for branch in BRANCHES}
    recipe = sent["main"]["recipe.toml"]
    assert content["recipe_sha256"] == hashlib.sha256(recipe).hexdigest()
    assert recipe.decode() == recipe_to_toml(load_recipe(run / "recipe.toml"))
    for branch, step in zip(BRANCHES, (0, 2, 4, 4), strict=True):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(sent[branch]["model.safetensors"])
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {
                "format": "pt",
                "mechcausal": __version__,
                "step": str(step),
                "recipe_sha256": content["recipe_sha256"],
            }
        saved = run / f"checkpoints/{step:08d}/model.safetensors"
        tensors, ours = load(saved.read_bytes()), load(path.read_bytes())
        assert all(tensors[name].equal(value) for name, value in ours.items())
        assert tensors.keys() == ours.keys()
        assert sent[branch]["recipe.toml"] == recipe
    assert "README.md" not in sent["step-2"]
    assert (run / "model_card.md").read_bytes() == sent["main"]["README.md"]
    assert sent["main"]["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()

    def as_json(*arguments: str) -> dict[str, Any]:
        code, output, errors = command(*arguments, "--json")
        assert code == 0, errors
        content: dict[str, Any] = json.loads(output)
        return content

    here, there = (as_json("detect", target, "--seed", "1") for target in (str(run), REPO))
    assert (here["heads"], here["in_context"]) == (there["heads"], there["in_context"])
    assert there["commit"] == repo.branches["main"]
    options = ("--sequences", "8", "--threshold", "0.05")
    here, there = (as_json("formation", target, *options) for target in (str(run), REPO))
    assert here["scores"] == there["scores"]
    assert here["heads"] == there["heads"]
    assert there["left_out"] == []
    same = ("step", "weights_sha256", "in_context_gain")
    for ours, theirs in zip(here["revisions"], there["revisions"], strict=True):
        assert [ours[key] for key in same] == [theirs[key] for key in same]


def test_an_upload_that_broke_off_goes_on_and_sends_nothing_twice(
    command: Command, hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    commit: Any = HfApi.create_commit

    def fail_at_4(api: HfApi, repo: str, operations: list[Any], **options: Any) -> Any:
        if options["revision"] == "step-4":
            raise ConnectionError("reset by peer")
        return commit(api, repo, operations, **options)

    with monkeypatch.context() as failing:
        failing.setattr(HfApi, "create_commit", fail_at_4)
        code, output, errors = command("publish", str(run), REPO)
    assert (code, output) == (2, "")
    assert errors == (
        f"mechcausal: {REPO}@step-4: the upload broke off: ConnectionError: reset by peer\n"
    )
    first = dict(hub.repos[REPO].branches)
    hub.requests.clear()
    assert command("publish", str(run), REPO)[::2] == (0, "")
    again = hub.repos[REPO].branches
    assert [again[branch] for branch in ("step-0", "step-2")] == [
        first[branch] for branch in ("step-0", "step-2")
    ]
    # One upload of weights: `main` has those of step 4.
    uploads = [path for method, path in hub.requests if method == "PUT"]
    weights = hashlib.sha256(
        hub.repos[REPO].commits[again["main"]]["model.safetensors"]
    ).hexdigest()
    assert uploads.count(f"/lfs/{weights}") == 1
    # A third time nothing changes.
    before = dict(again)
    assert command("publish", str(run), REPO)[0] == 0
    assert hub.repos[REPO].branches == before


def test_a_dry_run_writes_the_card_and_sends_nothing(
    command: Command, hub: HubServer, run: Path
) -> None:
    code, output, errors = command("publish", str(run), REPO, "--dry-run")
    assert (code, errors) == (0, "")
    assert hub.requests == []
    assert "to upload;" in output
    assert "uploaded" not in output
    for branch in BRANCHES:
        assert f" {branch} " in output
    card = (run / "model_card.md").read_text()
    assert card.startswith("---\nlibrary_name: mechcausal\n")
    for part in (
        "# lean, seed 0",
        "## Figures at the end of training",
        "| evaluation loss |",
        "| head | verdict | prefix matching |",
        "`step-0`, `step-2`, `step-4`",
        f"mechcausal formation {REPO}",
        'kind = "repeated_tokens"',
        "(figures/heads.png)",
        "not that the model needs it",
    ):
        assert part in card
    assert str(run.parent) not in card


def test_a_card_shows_neither_folders_nor_markup_of_the_recipe(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret/notes.txt"
    task = {"kind": "text", "text": str(secret), "text_sha256": "0" * 64, "context": 16}
    name = "evil](http://example.org)<b>\n```"
    model = {"kind": "standard", "embeddings": "learned"}
    training = {"algorithm": "joint"}
    recipe = parse_recipe(
        {"name": "some", "task": task, "model": model, "training": training}, source="test"
    )
    published = without_folders(recipe)
    assert published.task.text == "notes.txt"
    assert published.task.text_sha256 == "0" * 64
    assert without_folders(published) is published
    card = model_card(
        RunData.load(run),
        dataclasses.replace(published, name=name),
        f"name = {json.dumps(name)}\n",
        repo=REPO,
        steps=[0],
        recipe_sha256="0" * 64,
        detection=None,
        pictures=[],
    )
    assert "secret" not in card
    assert "# evil(http://example.org)b, seed 0\n" in card
    assert "````toml\n" in card


def test_what_cannot_be_published_is_one_line(
    hub: HubServer,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusal(*arguments: object) -> str:
        return refused(capsys, "publish", *arguments)

    (tmp_path / "empty").mkdir()
    assert "publish needs a run folder" in refusal(run)
    assert "not a run folder" in refusal(tmp_path / "empty", REPO)
    assert "no such folder" in refusal(tmp_path / "absent", REPO)
    for name in ("lean", "a/b/c", "lab/le an", "../lean"):
        assert "not a name of a model on the Hub: owner/name is needed" in refusal(run, name)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "state": "interrupted"}))
    assert "has not finished" in refusal(other, REPO)

    hub.add("lab/taken", {"main": {"model.safetensors": b"other"}})
    assert "lab/taken: holds another model already" in refusal(run, "lab/taken")
    hub.add("lab/public", {})
    assert "exists and is public" in refusal(run, "lab/public", "--private")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert f"{REPO}: the Hub does not let you write there" in refusal(run, REPO)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert f"{REPO}: nobody is logged in" in refusal(run, REPO)
    assert REPO not in hub.repos


def test_a_damaged_checkpoint_stops_the_upload(
    hub: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run / "checkpoints/00000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    line = refused(capsys, "publish", run, REPO)
    assert "00000002/model.safetensors: damaged: its checksum is not that of" in line
    assert "step-2" not in hub.repos[REPO].branches

"""`mechcausal formation`: heads whose step of formation is known, and a Hub that fails."""

import csv
import errno
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from mechcausal.models.adapter import load_model, save_model
from mechcausal.records.wandb_fragments import count_wandb_rows
from mechcausal.studies.formation import FormationResult, follow_formation, open_series
from mechcausal.studies.formation.driver import Scoring, plan_formation
from mechcausal.studies.formation.pictures import draw_formation, write_formation_page
from mechcausal.studies.hub import fetch
from mechcausal.studies.weights import copies, weight_digests
from mechcausal.training.checkpoints import checkpoint_folders
from mechcausal.training.run import RunResult
from probes import track_formation
from tests.commands import Command, command_in, outcome, refused
from tests.hub_server import HubRepo, HubServer, client_of, environment_of
from tests.hugging_face import malicious_pickle, save_gpt2
from tests.probes.wired import Planted, planted

STEPS = (0, 100, 200, 300, 400, 500, 1000)
FORMED = 300
"""The first step at which the wired model has its heads."""
REPO = "tests/wired"
FAST = ("--sequences", "8")


@pytest.fixture(scope="module")
def wiring() -> Planted:
    """An induction circuit and one head of each other kind."""
    return planted(3, n_layers=2, n_heads=4)


@pytest.fixture(scope="module")
def series(wiring: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints in which the planted heads sharpen: asleep before step 300, awake from there."""
    folder = tmp_path_factory.mktemp("series")
    attention = {
        name: value.clone() for name, value in wiring.model.state_dict().items() if ".W_K" in name
    }
    with torch.no_grad():
        for at, step in enumerate(STEPS):
            sharpness = (1.0 if step >= FORMED else 0.0) + at * 1e-3
            for name, value in attention.items():
                wiring.model.get_parameter(name).copy_(sharpness * value)
            save_model(wiring.model, folder / f"step{step}")
        for name, value in attention.items():
            wiring.model.get_parameter(name).copy_(value)
    return folder


@pytest.fixture
def hub(series: Path, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with the series as the branches of one model, and the client that talks to it."""
    with HubServer() as server, client_of(server, tmp_path / "cache"):
        server.add(REPO, {f"step{step}": series / f"step{step}" for step in STEPS})
        server.repos[REPO].commit("main", read(series / "step1000"))
        yield server


@pytest.fixture
def repo(hub: HubServer) -> HubRepo:
    """The model on that Hub."""
    return hub.repos[REPO]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run `mechcausal formation` in an empty folder: exit code, output, error output.

    Without picture and page, which take longer than the scores of these models.
    """
    for name in ("draw_formation", "write_formation_page"):
        monkeypatch.setattr(f"mechcausal.studies.formation.pictures.{name}", draw_nothing)
    return command_in(tmp_path, monkeypatch, capsys, "formation")


def draw_nothing(result: FormationResult, path: Path) -> None:
    """In place of a picture or a page."""


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def result_of(command: Command, *arguments: str) -> dict[str, Any]:
    code, output, errors = command(*arguments, "--json")
    assert code == 0, errors
    content: dict[str, Any] = json.loads(output, parse_constant=pytest.fail)
    return content


def verdicts(content: dict[str, Any]) -> dict[tuple[int, int], set[str]]:
    """The scores in which each head formed."""
    formed: dict[tuple[int, int], set[str]] = {}
    for head in content["heads"]:
        formed.setdefault((head["layer"], head["head"]), set()).add(head["score"])
    return formed


# --- What it finds ---


def test_a_folder_of_checkpoints_gives_every_planted_head_its_step(
    command: Command,
    series: Path,
    wiring: Planted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # with picture and page
    monkeypatch.chdir(tmp_path)
    content = result_of(command, str(series), *FAST)
    scores = {
        "induction": "prefix_matching",
        "previous_token": "previous_token",
        "duplicate_token": "duplicate_token",
    }
    expected = {
        head: {scores[verdict] for verdict in names if verdict in scores}
        for head, names in wiring.verdicts.items()
    }
    assert verdicts(content) == {head: names for head, names in expected.items() if names}
    for head in content["heads"]:
        assert (head["not_before"], head["first_crossing"]) == (200, FORMED)
        # A rise sharper than the checkpoints: the interval covers the two on either side.
        assert head["midpoint_low"] <= 200
        assert head["midpoint_high"] >= FORMED
        assert head["last"] > 0.85
    rows = content["revisions"]
    assert [row["step"] for row in rows] == list(STEPS)
    gains = [row["in_context_gain"] for row in rows]
    assert min(gains[3:]) > max(gains[:3]) + 1
    for row in rows:
        gain = row["loss_first_copy"] - row["loss_second_copy"]
        assert gain == pytest.approx(row["in_context_gain"], abs=1e-4)
        folder = series / row["revision"]
        assert row["weights_sha256"] == weight_digests(folder).sha256
    assert content["left_out"] == []

    out = tmp_path / f"runs/formation_{series.name}"
    assert json.loads((out / "formation.json").read_text()) == content
    with (out / "scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(STEPS) * 8
    assert imread(out / "formation.png").ndim == 3
    page = (out / "formation.html").read_text()
    assert "when its heads formed" in page
    assert "https://" not in page.split("<script", 1)[0]


def test_picture_and_page_have_the_axis_of_the_fit(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_series(str(series), scratch=tmp_path / "download")
    chosen = opened.revisions()
    plan = plan_formation(opened, chosen, tmp_path / "study")
    scoring = Scoring(n_sequences=2)
    followed = follow_formation(opened, plan, tmp_path / "study", scoring=scoring)
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for axis, positions in (("step", np.asarray), ("log", np.log1p)):
        result = replace(followed, axis=axis)
        write_formation_page(result, tmp_path / "formation.html")
        draw_formation(result, tmp_path / "formation.png")
        page = (tmp_path / "formation.html").read_text()
        content = json.loads(page.split('id="data">')[1].split("</script>")[0])
        assert len(content["figures"]) == 4
        for figure in content["figures"]:
            for curve in figure["data"]:
                assert curve["x"] == pytest.approx(positions(STEPS))
                assert curve["customdata"] == list(STEPS)
            for line in figure["layout"].get("shapes", []):
                at_crossing = line["x0"] == pytest.approx(float(positions(FORMED)))
                assert at_crossing or line["xref"] == "x domain"  # a threshold
        for axes in drawn[-1].axes:
            pixels = axes.transData.transform([(step, 0) for step in STEPS])
            x = (pixels[:, 0] - pixels[0, 0]) / (pixels[-1, 0] - pixels[0, 0])
            assert x == pytest.approx(positions(STEPS) / positions(STEPS[-1]))
        if axis == "log":
            named = [0, 1, 10, 100, 1000]
            xaxis = content["figures"][0]["layout"]["xaxis"]
            assert xaxis["ticktext"] == [f"{step:,}" for step in named]
            assert xaxis["tickvals"] == pytest.approx(np.log1p(named))
            assert list(drawn[-1].axes[0].get_xticks()) == named


def test_a_run_is_followed_along_its_checkpoints(
    command: Command, lean_run: RunResult, tmp_path: Path
) -> None:
    run = str(lean_run.folder)
    content = result_of(command, run, *FAST, "--threshold", "0.05")
    assert (content["kind"], [row["step"] for row in content["revisions"]]) == ("run", [0, 2, 4])
    recorded = {row["train/step"]: row["loss/eval"] for row in lean_run.history}
    assert [row["loss"] for row in content["revisions"]] == [recorded[step] for step in (0, 2, 4)]
    saved = checkpoint_folders(lean_run.folder)
    models = ((step, load_model(folder)) for step, folder in saved.items())
    dense = track_formation(models, threshold=0.05, bos=0, n_sequences=8)
    assert torch.tensor(content["scores"]["prefix_matching"]).allclose(dense.scores, atol=1e-6)

    copy = tmp_path / "damaged"
    shutil.copytree(lean_run.folder, copy)
    weights = copy / "checkpoints/00000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, _, errors = command(str(copy), *FAST)
    assert (code, errors.count("\n")) == (2, 1)
    assert "00000002/model.safetensors: damaged: its checksum" in errors


def test_sparse_checkpoints_name_the_step_of_dense_ones_within_their_spacing(
    command: Command, series: Path
) -> None:
    dense = result_of(command, str(series), *FAST, "--out", "dense")
    sparse = result_of(command, str(series), *FAST, "--out", "sparse", "--every", "250")
    assert [row["step"] for row in sparse["revisions"]] == [0, 300, 1000]
    steps = {(h["layer"], h["head"], h["score"]): h["first_crossing"] for h in dense["heads"]}
    assert len(steps) == len(sparse["heads"])
    for head in sparse["heads"]:
        step = steps[head["layer"], head["head"], head["score"]]
        assert head["not_before"] < step <= head["first_crossing"]


# --- The Hub ---


def test_a_hub_model_is_followed_one_download_at_a_time(
    command: Command, hub: HubServer, repo: HubRepo, series: Path, tmp_path: Path
) -> None:
    local = result_of(command, str(series), *FAST, "--out", "local")
    code, output, errors = command(REPO, *FAST, "--json")
    assert code == 0
    content = json.loads(output)
    assert content["heads"] == local["heads"]
    assert content["scores"] == local["scores"]
    for row in content["revisions"]:
        assert row["commit"] == repo.branches[row["revision"]]
        assert row["weights_sha256"] == weight_digests(series / row["revision"]).sha256
    (warning,) = errors.splitlines()
    assert "7 revisions, 0 of them scored already" in warning
    assert "one revision at a time, then deleted: at most" in warning
    assert hub.downloads() == [repo.branches[f"step{step}"] for step in STEPS]
    out = tmp_path / "runs/formation_tests-wired"
    assert not (out / "download").exists()
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]

    # The same command again downloads nothing, and says the same.
    assert result_of(command, REPO, *FAST) == content
    assert len(hub.downloads()) == len(STEPS)


def test_kept_downloads_lie_in_the_cache_and_are_used_again(
    command: Command, hub: HubServer, tmp_path: Path
) -> None:
    chosen = (REPO, *FAST, "--revisions", "step[12]00", "1000")
    content = result_of(command, *chosen, "--keep", "--out", "kept")
    assert [row["step"] for row in content["revisions"]] == [100, 200, 1000]
    assert len([*(tmp_path / "cache").rglob("snapshots/*/model.safetensors")]) == 3
    again = result_of(command, *chosen, "--out", "again")
    assert again["scores"] == content["scores"]
    assert len(hub.downloads()) == 3


def test_detect_scores_a_revision_and_records_what_it_is(
    hub: HubServer,
    repo: HubRepo,
    series: Path,
    capsys: pytest.CaptureFixture[str],
    wiring: Planted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def detected(*arguments: str) -> dict[str, Any]:
        code, output, errors = outcome(capsys, "detect", *arguments, "--json")
        assert (code, errors) == (0, "")
        content: dict[str, Any] = json.loads(output)
        return content

    asleep, awake = detected(REPO, "--revision", "step200"), detected(REPO)
    assert asleep["model"] == f"{REPO}, revision step200"
    assert (asleep["revision"], asleep["commit"]) == ("step200", repo.branches["step200"])
    assert asleep["weights_sha256"] == weight_digests(series / "step200").sha256
    induction = [(h["layer"], h["head"]) for h in awake["heads"] if "induction" in h["verdict"]]
    assert sorted(induction) == sorted([wiring.induction, wiring.useless])
    assert not any("induction" in head["verdict"] for head in asleep["heads"])
    assert detected(REPO, "--revision", repo.branches["step200"])["heads"] == asleep["heads"]
    # What the cache has is there without the Hub, too.
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert detected(REPO, "--revision", "step200") == asleep
        assert detected(REPO) == awake
        line = refused(capsys, "detect", REPO, "--revision", "step300")
        assert "step300: the Hub is not reached" in line
    line = refused(capsys, "detect", series, "--revision", "main")
    assert "--revision goes with a model on the Hub" in line
    assert "no such revision" in refused(capsys, "detect", REPO, "--revision", "step7")


def test_a_transformers_model_with_tokenizer_is_followed(
    command: Command, hub: HubServer, tmp_path: Path
) -> None:
    for step in (0, 10):
        save_gpt2(tmp_path / f"checkpoint-{step}", tokenizer=True, seed=step)
    (tmp_path / "checkpoint-10/modeling.py").write_text("raise SystemExit(3)")
    folders = {f"checkpoint-{step}": tmp_path / f"checkpoint-{step}" for step in (0, 10)}
    hub.add("tests/gpt", folders)
    content = result_of(command, "tests/gpt", *FAST)
    local = result_of(command, str(tmp_path), *FAST, "--out", "local")
    assert content["scores"] == local["scores"]
    assert not any(path.endswith(".py") for _, path in hub.requests)


@pytest.mark.slow
def test_the_real_endpoint_variable_leads_the_command_to_the_hub(
    hub: HubServer, tmp_path: Path, repository: Path
) -> None:
    environment = {"PYTHONPATH": str(repository), "PATH": "", "OMP_NUM_THREADS": "1"}
    python = (sys.executable, "-m", "mechcausal.cli.main")
    done = subprocess.run(
        [*python, "formation", REPO, *FAST, "--revisions", "step0", "step1000", "--csv"],
        cwd=tmp_path,
        env=environment | environment_of(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert {int(row["first_crossing"]) for row in rows} == {1000}
    assert not (tmp_path / "home/hub").exists()


# --- What goes wrong ---


def test_a_connection_that_drops_is_taken_up_again(
    command: Command, hub: HubServer, repo: HubRepo
) -> None:
    hub.drops = 2
    content = result_of(command, REPO, *FAST, "--revisions", "step0", "step300")
    assert [row["step"] for row in content["revisions"]] == [0, 300]
    first = repo.branches["step0"]
    assert hub.downloads() == [first, first, first, repo.branches["step300"]]


def test_a_study_whose_connection_fails_goes_on_where_it_was(
    command: Command, hub: HubServer, repo: HubRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_300(revision, *arguments):
        hub.keeps_dropping = revision.name == "step300"
        return fetch(revision, *arguments)

    with monkeypatch.context() as failing:
        failing.setattr("mechcausal.studies.formation.hub_series.fetch", fail_at_300)
        code, output, errors = command(REPO, *FAST, "--json")
    assert (code, output) == (2, "")
    assert f"{REPO}@step300: the download broke off" in errors.splitlines()[-1]
    hub.keeps_dropping = False
    hub.requests.clear()
    content = result_of(command, REPO, *FAST)
    assert [row["step"] for row in content["revisions"]] == list(STEPS)
    fetched = [repo.branches[f"step{step}"] for step in STEPS if step >= FORMED]
    assert hub.downloads() == fetched


def test_a_full_disk_is_one_line_and_leaves_no_download(
    command: Command, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr("huggingface_hub.file_download.http_get", full)
        code, output, errors = command(REPO, *FAST)
    assert (code, output) == (2, "")
    assert errors.splitlines()[-1] == f"mechcausal: {REPO}@step0: no space left on the disk"
    out = tmp_path / "runs/formation_tests-wired"
    assert not (out / "download").exists()

    with monkeypatch.context() as failing:
        failing.setattr("mechcausal.studies.formation.driver.free_bytes", lambda folder: 10_000)
        code, output, errors = command(REPO, *FAST)
    assert (code, output) == (2, "")
    assert "0.01 MB are free, " in errors.splitlines()[-1]
    assert "nothing was downloaded" in errors.splitlines()[-1]
    assert hub.downloads() == []

    real: Any = Path.open
    with monkeypatch.context() as failing:

        def open_records(path: Path, mode: str = "r", *rest: object, **more: object):
            if "w" in mode and path.parent.name == "revisions":
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path, mode, *rest, **more)

        failing.setattr(Path, "open", open_records)
        code, output, errors = command(REPO, *FAST, "--revisions", "step0", "step1000")
    assert (code, output) == (2, "")
    assert "No space left on device" in errors.splitlines()[-1]
    assert len(result_of(command, REPO, *FAST, "--revisions", "step0", "1000")["revisions"]) == 2


def test_a_file_with_another_checksum_than_declared_is_refused_and_deleted(
    command: Command, repo: HubRepo, series: Path, tmp_path: Path
) -> None:
    commit = repo.branches["step400"]
    other = (series / "step0/model.safetensors").read_bytes()
    repo.lies[commit, "model.safetensors"] = other
    chosen = (REPO, *FAST, "--revisions", "step0", "step[4]00", "step1000")
    for options in ((), ("--keep",)):
        code, output, errors = command(*chosen, *options)
        assert (code, output) == (2, "")
        line = errors.splitlines()[-1]
        assert f"{REPO}@step400: model.safetensors: its SHA-256 is " in line
        assert "the Hub declares" in line
        kept = (tmp_path / "cache").rglob(f"snapshots/{commit}/model.safetensors")
        assert not [*kept]
    content = result_of(command, *chosen, "--without", "step400")
    assert [row["step"] for row in content["revisions"]] == [0, 1000]
    repo.lies.clear()
    assert len(result_of(command, *chosen)["revisions"]) == 3

    repo.lies[repo.branches["step0"], "config.json"] = b"{" + b" " * 5000
    code, _, errors = command(REPO, *FAST, "--out", "other")
    assert code == 2
    assert "step0" in errors.splitlines()[-1]


def test_revisions_with_the_weights_of_another_step_are_left_out_by_name(
    command: Command, repo: HubRepo, series: Path, hub: HubServer
) -> None:
    # As pythia-2.8b: early steps hold the final weights, and step 1 is the untrained model too.
    final = read(series / "step1000")
    for step in (100, 400):
        repo.commit(f"step{step}", final)
    repo.commit("step1", read(series / "step0"))
    code, output, errors = command(REPO, *FAST, "--json")
    assert code == 0
    content = json.loads(output)
    assert [row["step"] for row in content["revisions"]] == [0, 200, 300, 500, 1000]
    assert {row["revision"]: row["reason"] for row in content["left_out"]} == {
        "step1": "holds the weights of step0",
        "step100": "holds the weights of step1000",
        "step400": "holds the weights of step1000",
    }
    assert "warning: step100 is left out: holds the weights of step1000" in errors
    assert repo.branches["step100"] not in hub.downloads()
    assert {head["first_crossing"] for head in content["heads"]} == {FORMED}
    # With them the heads would form at step 100; that has to be asked for.
    content = result_of(command, REPO, *FAST, "--with-copies")
    assert {head["first_crossing"] for head in content["heads"]} == {100}
    # Also if neither the last step nor any other is compared.
    code, _, errors = command(REPO, *FAST, "--revisions", "step100", "--out", "one")
    assert code == 2
    assert "step100: holds the weights of step1000; no revision is left" in errors


def test_copies_in_other_files_are_known_by_their_tensors(
    command: Command, series: Path, tmp_path: Path
) -> None:
    shutil.copytree(series, tmp_path / "copies")
    from safetensors.torch import load_file, save_file

    last = load_file(series / "step1000/model.safetensors")
    save_file(last, tmp_path / "copies/step100/model.safetensors", metadata={"step": "100"})
    # As pythia-12b: one part is that of the final model.
    part = load_file(series / "step400/model.safetensors")
    part["blocks.0.attn.W_K"] = last["blocks.0.attn.W_K"]
    save_file(part, tmp_path / "copies/step400/model.safetensors")
    code, output, errors = command("copies", *FAST, "--json")
    assert code == 0
    content = json.loads(output)
    assert {row["revision"]: row["reason"] for row in content["left_out"]} == {
        "step100": "holds the weights of step1000",
        "step400": "holds blocks.0.attn.W_K of step1000",
    }
    assert errors.count("is left out") == 2


def test_weights_nobody_can_assign_are_all_left_out() -> None:
    series = [("0", {"W": "a"}), ("1", {"W": "b"}), ("2", {"W": "a"}), ("3", {"W": "c"})]
    assert set(copies(series)) == {"0", "2"}
    # A part that is not trained stays, and so does one that is trained only for a while.
    frozen = [(str(at), {"W": str(at), "P": "p", "A": str(min(at, 1))}) for at in range(4)]
    assert copies(frozen) == {}
    assert copies([("0", {}), ("1", {})]) == {}


def test_pickled_revisions_are_left_out_and_never_fetched(
    command: Command, repo: HubRepo, hub: HubServer, tmp_path: Path
) -> None:
    pickled = read_of_pickle(tmp_path)
    repo.branches["step50"] = repo.branches["step2000"] = ""
    repo.commit("step50", pickled)
    repo.commit("step2000", {"README.md": b"nothing"})
    chosen = ("--revisions", "step0", "step50", "1000", "2000")
    content = result_of(command, REPO, *FAST, *chosen)
    assert {row["revision"]: row["reason"] for row in content["left_out"]} == {
        "step50": "holds no safetensors: pytorch_model.bin is a pickle, never opened",
        "step2000": "holds no weights",
    }
    assert not any(path.endswith(".bin") for _, path in hub.requests)
    code, _, errors = command(REPO, *FAST, "--revisions", "step50")
    assert code == 2
    assert "step50: holds no safetensors" in errors.splitlines()[-1]


def read_of_pickle(folder: Path) -> dict[str, bytes]:
    malicious_pickle(folder / "pytorch_model.bin")
    content = (folder / "pytorch_model.bin").read_bytes()
    return {"pytorch_model.bin": content, "config.json": b"{}"}


def test_no_such_model_revision_or_access_is_one_line(
    hub: HubServer, repo: HubRepo, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("tests/unnamed", {"v1.0": {"a": b"b"}})
    hub.add("tests/twice", {"stage1-step5": {"a": b"b"}, "stage2-step5": {"a": b"b"}})
    hub.add("tests/gated", {}).refusal = (403, "GatedRepo")
    hub.add("tests/denied", {}).refusal = (403, "")
    hub.add("tests/ill", {}).refusal = (418, "")
    for arguments, parts in (
        (["tests/absent"], ["tests/absent: no such model on the Hub"]),
        (["tests/unnamed"], ["no revision is named by its step"]),
        (["tests/twice"], ["stage1-step5 and stage2-step5 are both step 5", "--without"]),
        (["tests/gated"], ["tests/gated: gated: accept its terms"]),
        (["tests/denied"], ["tests/denied: the Hub denies access (403)"]),
        (["tests/ill"], ["tests/ill: the Hub answers 418"]),
        ([REPO, "--revisions", "step7"], ["no revision step7", "step0, step100, step200, ..."]),
        ([REPO, "--revisions", "step0", "--without", "0"], ["no revision is left"]),
        (["a b c"], ["a b c: not a model's name"]),
        (["no/such/folder"], ["no/such/folder: no such folder"]),
    ):
        line = refused(capsys, "formation", *arguments)
        for part in parts:
            assert part in line
    assert hub.downloads() == []


def test_bad_options_are_one_line_and_exit_code_2(
    command: Command, capsys: pytest.CaptureFixture[str], series: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for arguments, part in (
        ([], "formation needs a model"),
        (["empty"], "neither a run nor a folder of checkpoints"),
        (["file"], "file: a file"),
        ([series, "--every", "0"], "--every is 0"),
        ([series, "--threshold", "2"], "--threshold is 2.0"),
        ([series, "--sequences", "0"], "--sequences is 0"),
        ([series, "--repeat-lengths", "2"], "--repeat-lengths: 2 is below 3"),
        ([series, "--json", "--csv"], "--json and --csv"),
        ([series, "--wandb-mode", "offline"], "--wandb-mode goes with --wandb"),
        ([series, "--seed", "-1"], "--seed is -1"),
        ([series, "--device", "tpu"], "tpu"),
        ([series, "--out", "file"], "file"),
    ):
        assert part in refused(capsys, "formation", *arguments)


def test_scores_of_other_settings_are_not_mixed(
    command: Command, capsys: pytest.CaptureFixture[str], series: Path
) -> None:
    result_of(command, str(series), *FAST, "--revisions", "0", "--out", "scores")
    line = refused(capsys, "formation", series, *FAST, "--seed", "1", "--out", "scores")
    assert "holds scores with seed 0, now it is 1: choose another folder with --out" in line
    # A checkpoint whose weights have changed is scored again.
    record = next(Path("scores/revisions").iterdir())
    before = json.loads(record.read_text())
    record.write_text(json.dumps({**before, "weights_sha256": "0"}))
    result_of(command, str(series), *FAST, "--revisions", "0", "--out", "scores")
    assert json.loads(record.read_text()) == before


def test_the_table_and_the_wandb_run_show_the_steps(
    command: Command,
    series: Path,
    wiring: Planted,
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draw(result: FormationResult, path: Path) -> None:
        shutil.copy(repository / "docs/gradient.png", path)

    monkeypatch.setattr("mechcausal.studies.formation.pictures.draw_formation", draw)
    code, output, errors = command(str(series), *FAST, "--out", "out", "--wandb")
    assert (code, errors) == (0, "")
    layer, head = wiring.induction
    (line,) = [line for line in output.splitlines() if f" {layer}.{head} " in line]
    assert "prefix matching" in line
    assert line.split()[3:5] == ["300", "200"]
    (run,) = (tmp_path / "out/wandb").glob("offline-run-*")
    assert count_wandb_rows(run) == len(STEPS)
    assert [*(run / "files/media").rglob("*.png")]
    code, output, _ = command(str(series), *FAST, "--out", "out", "--revisions", "0", "100")
    assert code == 0
    assert "no head formed" in output

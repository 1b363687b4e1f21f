"""`mechcausal detect`: planted heads get their verdicts, bad input is refused in one line."""

import csv
import errno
import io
import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
import wandb
from matplotlib.image import imread
from transformers import MambaConfig, MambaForCausalLM

from mechcausal.models.adapter import save_model
from mechcausal.records.wandb_fragments import count_wandb_rows
from mechcausal.studies.detection import Detection, detect
from mechcausal.studies.targets import load_target
from mechcausal.training.run import RunResult
from tests.commands import Command, check_refused, command_in
from tests.hugging_face import malicious_pickle, save_gpt2
from tests.probes.wired import Planted, blank, planted

KEYS = ["model", "n_layers", "n_heads", "sequences", "threshold", "heads"]
HEAD_KEYS = [
    *(
        "layer",
        "head",
        "prefix_matching",
        "prefix_matching_stderr",
        "positional_control",
        "previous_token",
    ),
    *("duplicate_token", "copying", "uniform_baseline"),
    *("duplicate_control", "positional", "positional_offset", "verdict"),
]


@pytest.fixture(scope="module")
def wiring() -> Planted:
    """Two layers of four heads: an induction circuit and one head of each other kind."""
    return planted(3, n_layers=2, n_heads=4)


@pytest.fixture(scope="module")
def folder(
    wiring: Planted,
    lean_run: RunResult,
    graph_run: RunResult,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Targets, good ones and bad ones."""
    folder = tmp_path_factory.mktemp("targets")
    save_model(wiring.model, folder / "wired")
    save_model(blank(3, 4), folder / "random")
    copytree(lean_run.folder, folder / "run")
    copytree(graph_run.folder, folder / "graph")
    short = blank(1, 1)
    short.cfg.n_ctx = 5
    short.pos_embed.W_pos.data = short.pos_embed.W_pos.data[:5]
    save_model(short, folder / "short")
    save_gpt2(folder / "gpt2_folder", tokenizer=True)
    save_gpt2(folder / "words", tokenizer=True, splits=True)
    (folder / "text.txt").write_text(" ".join(f"t{i * i % 29}" for i in range(400)))
    (folder / "wide.txt").write_text(" ".join(f"t{i * 7 % 29}" for i in range(400)))
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    save_gpt2(folder / "pickled")
    (folder / "pickled" / "model.safetensors").unlink()
    malicious_pickle(folder / "pickled" / "pytorch_model.bin")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 12, "state_size": 4}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(folder / "mamba")
    (folder / "empty").mkdir()
    (folder / "folder.png").mkdir()
    return folder


@pytest.fixture
def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run `mechcausal detect` beside the targets: exit code, output, error output."""
    return command_in(folder, monkeypatch, capsys, "detect")


@pytest.fixture(scope="module")
def detection(folder: Path) -> Detection:
    """Everything that can be detected in the wired model, with the options of the command."""
    return detect(load_target(str(folder / "wired")), ablate=True, compose=True)


def test_the_command_prints_what_detect_returns(as_json, detection: Detection) -> None:
    content = as_json("wired", "--ablate", "--compose")
    assert list(content) == [*KEYS, "in_context", "ablations", "composition"]
    assert set(content["in_context"]) == {"loss", "repeat_length", "gain"}
    assert all(list(row) == HEAD_KEYS for row in content["heads"])
    assert set(content["ablations"][0]) == {
        *("layer", "head", "rise", "stderr", "loss", "removable")
    }
    assert set(content["composition"][0]) == {"layer", "head", "reads"}
    ours = json.loads(json.dumps(detection.to_dict()))
    assert content.pop("model") == "wired"
    assert Path(ours.pop("model")).name == "wired"
    assert content == ours


def test_every_planted_head_gets_its_verdict_and_no_other(
    detection: Detection, wiring: Planted
) -> None:
    content = detection.to_dict()
    verdicts = {(row["layer"], row["head"]): tuple(row["verdict"]) for row in content["heads"]}
    assert {head: verdict for head, verdict in verdicts.items() if verdict} == wiring.verdicts
    assert (content["n_layers"], content["n_heads"], len(verdicts)) == (2, 4, 8)
    assert (content["sequences"], content["threshold"]) == (32, 0.4)
    scores = [row["prefix_matching"] for row in content["heads"]]
    assert scores == sorted(scores, reverse=True)
    assert content["in_context"]["gain"] > 1
    n_losses = 2 * content["in_context"]["repeat_length"] - 1
    assert len(content["in_context"]["loss"]) == n_losses


def test_ablation_tells_removable_induction_heads_from_others(
    detection: Detection, wiring: Planted
) -> None:
    effects = {(row.layer, row.head): row for row in detection.ablations or ()}
    assert set(effects) == {wiring.induction, wiring.useless, wiring.partner, wiring.previous}
    for head in (wiring.induction, wiring.partner):
        assert effects[head].rise > 1
        assert not effects[head].removable
    for head in (wiring.useless, wiring.previous):
        assert effects[head].removable


def test_composition_names_the_previous_token_head_that_is_read(
    detection: Detection, wiring: Planted
) -> None:
    rows = detection.to_dict()["composition"]
    assert {(row["layer"], row["head"]) for row in rows} == {wiring.induction, wiring.useless}
    for row in rows:
        first = row["reads"][0]
        assert (first["layer"], first["head"]) == wiring.partner
        assert first["previous_token"]
        scores = [read["score"] for read in row["reads"]]
        assert scores == sorted(scores, reverse=True)
        assert all(read["layer"] < row["layer"] for read in row["reads"])


def test_the_circuit_is_named_with_its_effects(command: Command, as_json, wiring: Planted) -> None:
    options = ("wired", "--sequences", "16", "--circuit")
    content = as_json(*options)["circuit"]
    named = [path for path in content["paths"] if path["named"]]
    assert [(tuple(p["sender"]), tuple(p["receiver"]), p["input"]) for p in named] == [
        (wiring.partner, wiring.induction, "k")
    ]
    everything = as_json("wired", "--sequences", "16", "--circuit-all")["circuit"]
    (only,) = [path for path in everything["paths"] if path["named"]]
    assert (only["sender"], only["input"]) == (named[0]["sender"], "k")
    assert only["rise"] == pytest.approx(named[0]["rise"], rel=1e-3)  # float32, other batches
    assert len(everything["paths"]) > len(content["paths"])
    _, output, errors = command(*options)
    sender, receiver = ("{}.{}".format(*head) for head in (wiring.partner, wiring.induction))
    line = next(line for line in output.splitlines() if "→" in line)
    assert line.startswith(f"previous token {sender} → keys of induction {receiver}: +")
    assert f"{named[0]['rise']:+.3f} ± {named[0]['rise_stderr']:.3f} nats" in line
    assert not errors
    _, table, _ = command(*options, "--csv")
    rows = {
        (int(row["layer"]), int(row["head"])): row for row in csv.DictReader(io.StringIO(table))
    }
    row = rows[wiring.induction]
    assert row["reads_k"] == "L{}H{}".format(*wiring.partner)
    assert float(row["reads_k_rise"]) == pytest.approx(named[0]["rise"])
    assert float(row["logit"]) > 5
    assert not rows[wiring.duplicate]["logit"]


def test_several_stimuli_stand_beside_each_other(command: Command, as_json) -> None:
    options = ("words", "--text", "wide.txt", "--sequences", "6", "--stimulus")
    content = as_json(*options, "random", "frequent", "text")
    assert content["stimulus"] == "random"
    assert list(content["others"]) == ["frequent", "text"]
    assert content["heads"] == as_json("words", "--sequences", "6")["heads"]
    alone = as_json(*options, "text")
    assert alone["stimulus"] == "text"
    assert alone["heads"] == content["others"]["text"]["heads"]
    _, output, errors = command(*options, "frequent", "text", "--ablate", "--circuit")
    assert "prefix matching by stimulus" in output
    assert not errors
    _, table, _ = command(*options, "random", "text", "--csv")
    (row, *_) = csv.DictReader(io.StringIO(table))
    assert 0 <= float(row["prefix_matching_text"]) <= 1


def test_function_vectors_of_a_model_without_words(command: Command, as_json) -> None:
    content = as_json("wired", "--sequences", "4", "--function-vectors")["function_vectors"]
    assert content["tasks"][0] == "mapping 1"
    assert content["right"] > 0.5 > content["shuffled"]
    assert not any(row["named"] for row in content["heads"])
    _, output, _ = command("wired", "--sequences", "4", "--function-vectors")
    assert "mean outputs on 4 few-shot tasks" in output
    assert f"p(answer) after 4 demonstrations: {content['right']:.3f}" in output
    _, table, _ = command("wired", "--sequences", "4", "--function-vectors", "--csv")
    (row, *_) = csv.DictReader(io.StringIO(table))
    assert -1 <= float(row["function_vector"]) <= 1


def test_seed_and_step_choose_the_numbers(as_json) -> None:
    final = as_json("run")
    assert as_json("run", "--seed", "0") == final
    assert as_json("run", "--seed", "1") != final
    start = as_json("run", "--step", "0")
    assert start["model"] == "run, step 0"
    assert start["heads"] != final["heads"]
    assert as_json("run", "--step", "4")["heads"] == final["heads"]


def test_every_kind_of_target_is_scored(as_json) -> None:
    # A model that predicts its last token alone has no loss by position.
    for target, more in (("gpt2_folder", ["in_context"]), ("graph", [])):
        content = as_json(target)
        assert content["model"] == target
        assert list(content) == [*KEYS, *more]
        assert len(content["heads"]) == content["n_layers"] * content["n_heads"]
        assert all(0 <= row["prefix_matching"] <= 1 for row in content["heads"])


def test_one_sequence_has_no_standard_error(as_json) -> None:
    content = as_json("wired", "--sequences", "1", "--ablate", "--threshold", "0.3")
    assert {row["prefix_matching_stderr"] for row in content["heads"]} == {None}
    assert {row["stderr"] for row in content["ablations"]} <= {None}
    assert (content["sequences"], content["threshold"]) == (1, 0.3)


def test_csv_has_a_row_for_every_head(
    command: Command, detection: Detection, tmp_path: Path
) -> None:
    code, output, errors = command("wired", "--csv", "--heatmap", str(tmp_path / "heads.png"))
    assert (code, errors) == (0, "")
    assert imread(tmp_path / "heads.png").ndim == 3
    rows = list(csv.DictReader(io.StringIO(output)))
    assert list(rows[0])[:12] == HEAD_KEYS[:-1]
    for row, other in zip(rows, detection.to_dict()["heads"], strict=True):
        assert (int(row["layer"]), int(row["head"])) == (other["layer"], other["head"])
        assert float(row["prefix_matching"]) == pytest.approx(other["prefix_matching"])
        for verdict in other["verdict"]:
            assert verdict in row["verdict"]


def test_the_table_shows_verdicts_the_scores_behind_them_and_interventions(
    command: Command, detection: Detection, wiring: Planted, tmp_path: Path
) -> None:
    path = tmp_path / "heads.png"
    code, output, errors = command("wired", "--ablate", "--compose", "--heatmap", str(path))
    assert (code, errors) == (0, "")
    assert "wired: 8 heads, 32 sequences, threshold 0.4" in output
    for layer, head in wiring.verdicts:
        assert f" {layer}.{head} " in output
    for part in ("induction", "previous token", "duplicate token", "positional", "in-context gain"):
        assert part in output
    assert "removable without loss" in output
    for later in (wiring.induction, wiring.useless):
        assert f"keys of induction head {later[0]}.{later[1]} read: " in output
    assert f"read: {wiring.partner[0]}.{wiring.partner[1]} (" in output

    heading = next(line for line in output.splitlines() if "prefix" in line)
    for column in ("prefix", "previous", "dupl.", "positional", "copying", "verdict"):
        assert column in heading
    assert heading.count("control") == 2
    rows = {(row["layer"], row["head"]): row for row in detection.to_dict()["heads"]}
    row = rows[wiring.positional]
    assert row["positional"] > 0.9
    assert row["positional_offset"] == wiring.offset
    assert f"{row['positional']:.3f} at {wiring.offset}" in output
    assert f"{rows[wiring.duplicate]['duplicate_control']:.3f}" in output
    assert f"uniform attention scores {row['uniform_baseline']:.3f}" in output

    assert "heatmap:" in output
    pixels = imread(path)
    assert pixels.ndim == 3
    assert min(pixels.shape[:2]) > 100
    assert np.ptp(pixels) > 0.5


def test_the_table_fits_a_narrow_terminal(
    command: Command, wiring: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, output, _ = command("wired")
    assert all(len(line) <= 80 for line in output.splitlines())
    for layer, head in wiring.verdicts:
        assert f"{layer}.{head} " in output
    for word in ("induction", "positional", "previous", "duplicate", "copying", "verdict"):
        assert word in output


def test_heads_without_a_verdict_are_counted_or_shown(command: Command) -> None:
    _, short, _ = command("gpt2_folder", "--threshold", "1")
    _, all_, _ = command("gpt2_folder", "--threshold", "1", "--all")
    assert short.count("±") - 1 == all_.count("±") - 1 == 4  # under five heads all are shown
    _, short, _ = command("random", "--threshold", "1")
    _, all_, _ = command("random", "--threshold", "1", "--all")
    assert "7 more heads without a verdict: --all shows them" in short
    assert "--all" not in all_
    assert all_.count("±") - 1 == 12


def test_it_says_when_no_head_can_be_ablated_or_read(command: Command) -> None:
    _, output, _ = command("run", "--step", "0", "--ablate", "--compose", "--circuit")
    assert "no induction or previous-token head to ablate" in output
    assert "circuit: no previous-token or induction head" in output
    assert "composition: no induction head" in output


def test_wandb_gets_a_run_inside_the_run_folder(command: Command, folder: Path) -> None:
    code, output, errors = command("run", "--wandb", "--ablate", "--compose")
    assert (code, errors) == (0, "")
    (run,) = (folder / "run" / "wandb").glob("offline-run-*")
    assert run.name in output.replace("\n", "")
    assert count_wandb_rows(run) == 1
    (table,) = (run / "files" / "media" / "table").rglob("*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:3] == ["layer", "head", "prefix_matching"]
    assert len(content["data"]) == 4
    assert list((run / "files" / "media" / "images").rglob("*.png"))


# --- Refusals ---

BAD = [
    ([], ["detect needs a target", "gpt2"]),
    (["wired", "--sequences", "0"], ["wired", "n_sequences is 0"]),
    (["wired", "--sequences", "x"], ["--sequences", "'x'"]),
    (["short"], ["short", "a context of 5 is too short for two repeats"]),
    (["wired", "--repeat-lengths", "9"], ["too short for two repeats of 9"]),
    (["wired", "--repeat-lengths", "2"], ["repeat_lengths", "at least 3"]),
    (["wired", "--step", "3"], ["wired: --step goes with a run folder"]),
    (["run", "--step", "3"], ["no checkpoint at step 3; there are: 0, 2, 4"]),
    (["graph", "--step", "0"], ["no checkpoint at step 0", "there are: 1"]),
    (["wired", "--threshold", "2"], ["threshold is 2"]),
    (["wired", "--threshold", "nan"], ["threshold is nan"]),
    (["wired", "--heatmap", "x.jpg"], ["--heatmap is x.jpg", ".png"]),
    (["wired", "--heatmap", "absent/x.png"], ["--heatmap: absent is no folder"]),
    (["wired", "--heatmap", "folder.png"], ["--heatmap: folder.png"]),
    (["wired", "--json", "--csv"], ["--json and --csv"]),
    (["wired", "--device", "gpu"], ["device: gpu is no device"]),
    (["wired", "--device", "cuda:99"], ["cuda:99 is not there"]),
    (["wired", "--seed", "x"], ["--seed"]),
    (["wired", "--seed", "-1"], ["--seed is -1"]),
    (["wired", "--seed", "1" + "0" * 30], ["--seed is 1"]),
    (["wired", "--jsn"], ["--jsn", "did you mean --json"]),
    (["empty"], ["empty: no config.json or recipe.toml"]),
    (["pickled"], ["pytorch_model.bin is a pickle, which is never opened"]),
    (["mamba"], ["mamba", "attention"]),
    (["graph", "--ablate"], ["graph: --ablate needs next-token predictions"]),
    (["graph", "--circuit"], ["graph: --circuit needs next-token predictions"]),
    (["graph", "--function-vectors"], ["--function-vectors needs next-token predictions"]),
    (["words", "--function-vectors"], ["words: its tokenizer splits most words"]),
    (["wired", "--stimulus", "text"], ["wired: has no tokenizer, which --stimulus text needs"]),
    (["words", "--stimulus", "books"], ["--stimulus", "books"]),
    (["words", "--stimulus"], ["--stimulus"]),
    (["words", "--text", "wide.txt"], ["--text goes with --stimulus frequent or text"]),
    (["words", "--stimulus", "text", "--text", "absent.txt"], ["absent.txt: no such file"]),
    (["words", "--stimulus", "text", "--text", "binary.txt"], ["binary.txt: not UTF-8"]),
    (["words", "--stimulus", "text", "--text", "text.txt"], ["words: the text has 14 different"]),
    (["wired", "--wandb", "--wandb-mode", "bogus"], ["bogus"]),
    (["wired", "--wandb-mode", "offline"], ["--wandb-mode goes with --wandb"]),
    (["wired", "run"], ["run"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=lambda v: " ".join(v)[:60])
@pytest.mark.usefixtures("command")
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    check_refused(capsys, ["detect", *arguments], parts, folder)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied\nat c10"), "mat1 and mat2 shapes"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
        (IndexError("index out of range in self"), "index out of range in self"),
        (MemoryError(), "MemoryError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_cannot_be_run_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mechcausal.models.adapter.HookedTransformer.forward", fail)
    code, output, errors = command("random")
    assert (code, output) == (2, "")
    assert errors.startswith(f"mechcausal: random: cannot be run: {message}")
    assert errors.count("\n") == 1


def test_a_heatmap_that_wandb_cannot_be_given_costs_neither_the_run_nor_the_result(
    command: Command, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = set((folder / "run").glob("wandb/offline-run-*-*"))
    monkeypatch.setattr("mechcausal.studies.detection.draw_heatmap", fail)
    code, output, errors = command("run", "--wandb", "--wandb-mode", "offline", "--json")
    assert code == 0
    assert json.loads(output)["n_layers"] == 2
    assert "No space left on device" in errors
    assert errors.count("\n") == 1
    (fragment,) = set((folder / "run").glob("wandb/offline-run-*-*")) - before
    assert count_wandb_rows(fragment) == 1


def test_help_names_the_options(command: Command) -> None:
    code, output, _ = command("--help")
    assert code == 0
    for option in ("--step", "--threshold", "--sequences", "--ablate", "--compose", "--heatmap"):
        assert option in output


LOST = "no connection; the run goes on without it, the scores are in its output"


@pytest.mark.parametrize(
    ("owner", "step", "mode", "warnings"),
    [
        (
            wandb,
            "init",
            "online",
            [f"W&B could not start {mode}: no connection" for mode in ("online", "offline")],
        ),
        (wandb.Run, "log", "offline", [f"W&B failed at step 0: {LOST}"]),
        (wandb.Run, "finish", "offline", [f"W&B failed at its end: {LOST}"]),
    ],
    ids=["start", "log", "finish"],
)
def test_wandb_that_fails_does_not_cost_the_result(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    step: str,
    mode: str,
    warnings: list[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise wandb.errors.CommError("no connection\nat all")

    monkeypatch.setattr(owner, step, fail)
    code, output, errors = command("run", "--wandb", "--wandb-mode", mode, "--json")
    assert code == 0
    assert json.loads(output)["n_layers"] == 2
    assert errors.splitlines() == [f"mechcausal: warning: {warning}" for warning in warnings]

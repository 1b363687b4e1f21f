"""`mechcausal discover`: its graph, in every form, and one line for every wrong input."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from mechcausal.models.adapter import load_model, save_model
from probes import discover_attention
from tests.commands import Command, check_refused, command_in
from tests.hugging_face import save_gpt2
from tests.probes.latent_dags import attention_with_sink
from tests.probes.wired import blank

CHAIN = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets, good ones and bad ones."""
    folder = tmp_path_factory.mktemp("targets")
    save_model(blank(2, 2), folder / "model")
    save_gpt2(folder / "gpt2_folder", tokenizer=True)
    save_gpt2(folder / "no_tokenizer")
    bad = attention_with_sink(6)
    for name, matrix in {
        "chain": CHAIN,
        "half": CHAIN.astype(np.float16),
        "sink": attention_with_sink(12),
        "oblong": bad[:3],
        "heads": np.stack([bad, bad]),
        "words": np.array([["a"]]),
    }.items():
        np.save(folder / f"{name}.npy", matrix)
    np.save(folder / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "junk.npy").write_bytes(b"junk")
    (folder / "nothing.npy").write_bytes(b"")
    (folder / "folder.npy").mkdir()
    (folder / "cut.npy").write_bytes((folder / "sink.npy").read_bytes()[:200])
    np.savez(folder / "archive.npz", a=CHAIN)
    (folder / "archive.npz").rename(folder / "archive.npy")
    return folder


@pytest.fixture
def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run `mechcausal discover` beside the targets: exit code, output, error output."""
    return command_in(folder, monkeypatch, capsys, "discover", columns=100)


def test_json_of_a_matrix(as_json) -> None:
    content = as_json("chain.npy", "--n-eff", "1000")
    assert content["nodes"] == [0, 1, 2]
    assert content["edges"] == [
        {"from": 0, "to": 1, "marks": "o->"},
        {"from": 1, "to": 2, "marks": "-->"},
    ]
    assert content["separating_sets"] == [{"pair": [0, 2], "given": [1]}]
    assert (content["n_eff"], content["alpha"], content["tests"]) == (1000, 0.01, 4)
    assert as_json("half.npy", "--n-eff", "1000")["edges"] == content["edges"]
    unordered = as_json("chain.npy", "--n-eff", "1000", "--no-ordered")
    assert [edge["marks"] for edge in unordered["edges"]] == ["o-o", "o-o"]


def test_the_stability_of_every_edge_in_table_json_and_picture(
    command: Command, as_json, folder: Path
) -> None:
    options = ("chain.npy", "--n-eff", "1000", "--bootstrap", "8")
    content = as_json(*options)
    plain = as_json("chain.npy", "--n-eff", "1000")
    judged = content.pop("bootstrap")
    assert content == plain
    assert (judged["replicates"], judged["over"]) == (8, ["n_eff", "values"])
    assert judged["n_eff"] == [500, 1000, 2000]
    edges = [pair for pair in judged["pairs"] if pair["marks"]]
    assert [{key: pair[key] for key in ("from", "to", "marks")} for pair in edges] == plain["edges"]
    assert all(pair["joined"] == 1 for pair in edges)
    _, output, errors = command(*options, "--picture", "stable.png")
    assert "joined" in output
    assert "100%" in output
    assert "shares of 8 replicates over n_eff, values (n_eff 500, 1000, 2000)" in output
    assert not errors
    assert imread(folder / "stable.png").ndim == 3
    of_model = as_json("model", "--tokens", "1,2,3,4", "--n-eff", "64", "--bootstrap", "5")
    assert of_model["bootstrap"]["over"] == ["heads", "layers", "n_eff", "values"]
    again = as_json("model", "--tokens", "1,2,3,4", "--n-eff", "64", "--bootstrap", "5")
    assert again == of_model


def test_options_reach_the_search(as_json, folder: Path) -> None:
    arguments = ("--sink", "conditioned", "--max-cond", "2", "--alpha", "0.05", "--stable")
    content = as_json("sink.npy", "--n-eff", "128", *arguments, "--positions", "1", "4", "6", "9")
    expected = discover_attention(
        np.load(folder / "sink.npy"),
        n_eff=128,
        alpha=0.05,
        sink="conditioned",
        max_cond=2,
        stable=True,
        positions=(1, 4, 6, 9),
    )
    assert content == json.loads(json.dumps(expected.to_dict()))
    assert as_json("sink.npy", "--n-eff", "128", "--engine", "pc")["engine"] == "pc"
    stopped = as_json("sink.npy", "--n-eff", "128", "--time-budget", "0")
    assert (stopped["complete"], len(stopped["edges"])) == (False, 66)


def test_a_sweep_over_n_eff(command: Command, as_json) -> None:
    sweep = as_json("sink.npy", "--n-eff", "16,64,1000")["sweep"]
    assert [one["n_eff"] for one in sweep] == [16, 64, 1000]
    code, output, _ = command("sink.npy", "--n-eff", "16,64,1000")
    assert code == 0
    for one in sweep:
        assert str(len(one["edges"])) in output


def test_a_saved_model_is_read(as_json, command: Command, folder: Path) -> None:
    content = as_json("model", "--tokens", "1,2, 3 4", "--layer", "0", "--head", "1")
    model = load_model(folder / "model")
    assert content["n_eff"] == model.cfg.d_head
    assert (content["layer"], content["head"], content["ordered"]) == (0, 1, True)
    assert content["nodes"] == [0, 1, 2, 3]
    code, output, _ = command("model", "--tokens", "1,2,3,4", "--values")
    assert code == 0
    assert "layer 1, head 0" in output


def test_a_graph_is_printed_and_drawn(command: Command, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    code, output, errors = command(
        *("gpt2_folder", "--text", "t1", "--n-eff", "1000", "--alpha", "0.5"),
        *("--picture", str(picture)),
    )
    assert (code, errors) == (0, "")
    assert "'t29'" in output  # the tokenizer's BOS
    assert "'t1'" in output or "'t0'" in output
    assert "a.png" in output
    assert imread(picture).std() > 0
    code, output, _ = command("sink.npy", "--n-eff", "64", "--time-budget", "0")
    assert code == 0
    assert "stopped early" in output
    _, output, _ = command("--help")
    assert "sets the sparsity" in " ".join(output.split())


N = ("--n-eff", "64")
T = ("--tokens", "1,2,3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs a target"),
        (("oblong.npy", *N), "shape (3, 6); one square matrix"),
        (("heads.npy", *N), "one square matrix"),
        (("words.npy", *N), "real numbers"),
        (("pickled.npy", *N), "pickled.npy: not a .npy file"),
        (("junk.npy", *N), "junk.npy: not a .npy file"),
        (("nothing.npy", *N), "nothing.npy: not a .npy file"),
        (("cut.npy", *N), "cut.npy: not a .npy file"),
        (("folder.npy", *N), "folder.npy: not read"),
        (("archive.npy", *N), "an archive"),
        (("absent.npy", *N), "absent.npy: no such file"),
        (("sink.npy",), "give --n-eff"),
        (("sink.npy", *N, *T), "--tokens goes with a model"),
        (("sink.npy", *N, "--head", "0"), "--head goes with a model"),
        (("sink.npy", "--n-eff", "0"), "n_eff is 0"),
        (("sink.npy", "--n-eff", "many"), "--n-eff is 'many'"),
        (("sink.npy", "--n-eff=-inf", "--max-cond", "1"), "n_eff is -inf"),
        (("sink.npy", "--n-eff", "nan", "--max-cond", "1"), "n_eff is nan"),
        (("sink.npy", "--n-eff", "8", "--max-cond", "5"), "max_cond is 5 with n_eff 8"),
        (("sink.npy", "--n-eff", "5", "--alpha", "0.9"), "at most 1 (max_cond)"),
        (("sink.npy", *N, "--alpha", "0"), "alpha is 0"),
        (("sink.npy", *N, "--sink", "gone"), "--sink"),
        (("sink.npy", *N, "--sink", "conditioned", "--sink-position", "12"), "positions 0 to 11"),
        (("sink.npy", *N, "--sink-position", "1"), "--sink-position goes with --sink conditioned"),
        (("sink.npy", *N, "--device", "cuda"), "--device goes with a model"),
        (("sink.npy", *N, "--positions", "1", "1"), "positions are [1, 1]"),
        (("sink.npy", *N, "--bootstrap=-1"), "--bootstrap is -1"),
        (("sink.npy", *N, "--bootstrap-over", "values"), "--bootstrap-over goes with --bootstrap"),
        (
            ("sink.npy", *N, "--bootstrap", "2", "--bootstrap-over", "heads"),
            "--bootstrap-over heads goes with a model",
        ),
        (("sink.npy", "--n-eff", "32,64", "--bootstrap", "2"), "give one --n-eff"),
        (("sink.npy", *N, "--bootstrap", "2", "--seed=-1"), "--seed is -1"),
        (("sink.npy", *N, "--picture", "a.txt"), "--picture is a.txt"),
        (("sink.npy", *N, "--picture", "no/a.png"), "--picture: no is no folder"),
        (("sink.npy", "--n-eff", "8,16", "--picture", "a.png"), "one --n-eff"),
        (("sink.npy", *N, "--engine", "fci", "--time-budget", "1"), "time_budget goes with"),
        (("model",), "neither is given"),
        (("model", *T, "--text", "a"), "both are given"),
        (("model", "--tokens", ""), "--tokens is empty"),
        (("model", "--tokens", "1,x"), "--tokens is '1,x'"),
        (("model", "--tokens", "99999999999999999999999"), "whole numbers"),
        (("model", "--tokens", "1,500000"), "vocabulary"),
        (("model", "--tokens", "-1,2"), "vocabulary"),
        (("model", "--tokens", ",".join("1" * 5000)), "do not fit the context"),
        (("model", "--text", "a b"), "has no tokenizer"),
        (("no_tokenizer", "--text", "a b"), "has no tokenizer"),
        (("gpt2_folder", "--text", "  "), "--text is empty"),
        (("gpt2_folder", "--tokens", ",".join("1" * 33)), "do not fit the context of 32"),
        (("sink.npy", *N, "--ordered", "--no-ordered"), "only one of them"),
        (("model", *T, "--layer", "2"), "layer 2 does not exist"),
        (("model", *T, "--head", "2"), "head 2 does not exist"),
        (("model", *T, "--step", "3"), "--step goes with a run folder"),
        (("absent/model/x", *T), "no such folder"),
    ],
)
@pytest.mark.usefixtures("command")
def test_wrong_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments, message: str
) -> None:
    check_refused(capsys, ["discover", *arguments], [message], folder)


def test_a_model_that_cannot_be_run_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nat c10")

    monkeypatch.setattr("mechcausal.models.adapter.HookedTransformer.forward", fail)
    code, output, errors = command("model", "--tokens", "1,2,3")
    assert (code, output) == (2, "")
    assert errors == "mechcausal: model: cannot be run: mat1 and mat2 shapes cannot be multiplied\n"

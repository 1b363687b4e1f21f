"""The command: what it prints, what it leaves behind, and how it refuses what makes no sense."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechcausal import __version__
from mechcausal.cli.main import main
from mechcausal.recipes import Recipe, RecipeError, load_recipe, packaged_recipes
from mechcausal.records.run_folder import read_metrics, read_summary
from mechcausal.records.wandb_fragments import count_wandb_rows
from tests.commands import check_refused, outcome

# A run of a few steps, S = 3, T = 6.
LEAN = """
[graph]
preset = "manual"
parents = [-1, 0, 0, 1, 2]
[task]
vocab_size = 3
[training]
batch_size = 32
[training.stage1]
steps = 4
lr = 200
[training.stage2]
steps = 2
lr = 10
[evaluation]
n_sequences = 32
bayes_draws = 4
theory_priors = 10
[probing]
every = 3
dense = 1
images = 2
report = false
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a command, with `lean.toml` and some files that are no recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "lean.toml").write_text(LEAN)
    (tmp_path / "torn.toml").write_text("seed = \n")
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)))
    (tmp_path / "wrong.toml").write_text(LEAN.replace("vocab_size = 3", 'vocab_size = "3"'))
    (tmp_path / "unknown.toml").write_text(LEAN.replace("lr = 10", "lrr = 10"))
    (tmp_path / "forward.toml").write_text(LEAN.replace("[-1, 0, 0, 1, 2]", "[-1, 2, 0]"))
    (tmp_path / "cycle.toml").write_text('[graph]\npreset = "edge_list"\nedge_list = "cycle.txt"\n')
    (tmp_path / "cycle.txt").write_text("0 1\n1 2\n2 1\n")
    (tmp_path / "gone.toml").write_text('[graph]\npreset = "edge_list"\nedge_list = "gone.txt"\n')
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "metrics.jsonl").touch()
    return tmp_path


# --- Help ---


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_commands_and_recipes(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    code, output, errors = outcome(capsys, *arguments)
    assert (code, errors) == (0, "")
    for word in ("train", "theory", *packaged_recipes()):
        assert word in output


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "--version") == (0, f"mechcausal {__version__}\n", "")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "train",
            ["--out", "--seed", "--device", "--wandb-mode", "--training.stage1.lr", "--quiet"],
        ),
        ("theory", ["--parents", "--vocab-size", "--alpha", "--priors", "--seed", "--json"]),
        ("replicate", ["--quick", "--json", "--out", "--workers", "--wandb-mode", "figure9"]),
    ],
)
def test_help_of_a_command_names_its_options(
    capsys: pytest.CaptureFixture[str], command: str, words: list[str]
) -> None:
    code, output, _ = outcome(capsys, command, "--help")
    assert code == 0
    for word in words:
        assert word in output


# --- Refusals ---

BAD = [
    (["trian"], ["trian: unknown command", "train, resume"]),
    (["--bogus"], ["unknown command"]),
    (["train"], ["needs a recipe", "markov_chain"]),
    (["train", "absent.toml"], ["absent.toml: no such file", "markov_chain"]),
    (["train", "markov_chian"], ["did you mean markov_chain?"]),
    (["train", "done"], ["done"]),
    (["train", "./done"], ["done"]),
    (["train", "torn.toml"], ["torn.toml: not valid TOML"]),
    (["train", "binary.toml"], ["binary.toml: not"]),
    (["train", "wrong.toml"], ["wrong.toml: task.vocab_size", "integer", '"3"']),
    (["train", "unknown.toml"], ["unknown.toml: training.stage2.lrr: unknown key", "mean lr?"]),
    (["train", "forward.toml"], ["forward.toml", "parent 2 of position 1"]),
    (["train", "cycle.toml"], ["cycle.t", "2", "1"]),
    (["train", "gone.toml"], ["gone.txt"]),
    (["train", "lean.toml", "markov_chain"], ["markov_chain"]),
    (["train", "lean.toml", "--sead", "3"], ["--sead", "did you mean --seed"]),
    (["train", "lean.toml", "--training.stage1.stepz", "3"], ["--training.stage1.steps"]),
    (["train", "lean.toml", "--seed", "x"], ["--seed", "'x'"]),
    (["train", "lean.toml", "--seed", "1.5"], ["--seed"]),
    (["train", "lean.toml", "--seed"], ["--seed"]),
    (["train", "lean.toml", "--seed", "-1"], ["seed"]),
    (["train", "lean.toml", "--task.alpha", "0"], ["task.alpha", "greater than 0"]),
    (["train", "lean.toml", "--task.alpha", "nan"], ["task.alpha", "finite"]),
    (["train", "lean.toml", "--task.alpha", "1", "-1", "1"], ["task.alpha.1", "greater than 0"]),
    (["train", "lean.toml", "--task.vocab-size", "1"], ["task.vocab_size", "equal to 2"]),
    (["train", "lean.toml", "--graph.parents", "-1", "2", "0"], ["parent 2 of position 1"]),
    (["train", "lean.toml", "--graph.preset", "chain"], ["graph.parents", "preset chain"]),
    (["train", "lean.toml", "--name", "../x"], ["name", '"../x"']),
    (["train", "lean.toml", "--device", "gpu"], ["device", "cpu, cuda or cuda:N"]),
    (["train", "lean.toml", "--device", "cuda:99"], ["cuda:99 is not there", "cpu"]),
    (["train", "lean.toml", "--wandb-mode", "bogus"], ["bogus", "offline"]),
    (["train", "lean.toml", "--training.stage1.lr", "1e300"], ["training.stage1.lr"]),
    (
        ["train", "lean.toml", "--training.stage1.steps", "0", "--training.stage2.steps", "0"],
        ["nothing to train"],
    ),
    (["train", "lean.toml", "--out", "done"], ["done: already holds a run"]),
    (["train", "lean.toml", "--out", "lean.toml"], ["lean.toml: not writable"]),
    (["train", "lean.toml", "--out", "lean.toml/x"], ["lean.toml/x: not writable"]),
    (["train", "lean.toml", "--out", "/proc/mechcausal/x"], ["/proc/mechcausal/x: not writable"]),
    (["theory"], ["a recipe or --parents"]),
    (["theory", "lean.toml", "--parents", "-1,0"], ["either a recipe or --parents"]),
    (["theory", "lean.toml", "--alpha", "1"], ["--alpha"]),
    (["theory", "lean.toml", "--priors", "1"], ["--priors is 1", "2"]),
    (["theory", "--parents", "-1,0", "--priors", "x"], ["--priors"]),
    (["theory", "--parents", "-1,a"], ["--parents is '-1,a'", "-1,0,0,1,2"]),
    (["theory", "--parents", ""], ["--parents is ''"]),
    (["theory", "--parents="], ["--parents is ''"]),
    (["theory", "--parents"], ["--parents"]),
    (["theory", "--parents", "-1,2,0"], ["parent 2 of position 1"]),
    (["theory", "--parents", "-2"], ["-2"]),
    (["theory", "--parents", "-1,0", "--alpha", "0"], ["alpha", "greater than 0"]),
    (["theory", "--parents", "-1,0", "--vocab-size", "1"], ["vocab_size", "equal to 2"]),
    (["theory", "--parents", "-1,0", "--seed", "-1"], ["seed"]),
    (["theory", "--parents", "-1,0", "--jsn"], ["--jsn", "did you mean --json"]),
    (["theory", "cycle.toml"], ["cycle.t"]),
    (["theory", "lean.toml", "--graph.k", "2"], ["--graph.k"]),
    (["train", "lean.toml", "--model.heads", "2", "1"], ["model.heads", "belongs to disentangled"]),
    (["train", "lean.toml", "--model.kind", "standard"], ["training.algorithm", "needs joint"]),
    (["train", "figure5_trigrams", "--graph.k", "0"], ["graph.k", "equal to 1"]),
    (["train", "figure5_trigrams", "--graph.k", "33"], ["k must be", "32"]),
    (["train", "figure5_trigrams", "--model.kind", "simplified"], ["model.", "disentangled"]),
    (["train", "figure2_chain", "--training.target", "posterior"], ["training.target", "query"]),
    (["replicate", "figure3"], ["figure3: no such figure", "interventions", "tasks, all"]),
    (["replicate", "figure2", "all"], ["all stands for every figure", "figure2"]),
    (["replicate", "figure2", "--workers", "0"], ["--workers is 0"]),
    (["replicate", "figure2", "--device", "gpu"], ["gpu", "cuda"]),
    (["replicate", "figure2", "--out", "lean.toml"], ["lean.toml"]),
    (["replicate", "--quik"], ["--quik", "did you mean --quick"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=lambda v: " ".join(v)[:60])
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    check_refused(capsys, arguments, parts, folder)


def test_invalid_wandb_mode_in_the_environment_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")
    part = "mechcausal: WANDB_MODE is 'bogus': allowed are online, offline, disabled\n"
    check_refused(capsys, ["train", "lean.toml"], [part], folder)


def test_a_reader_that_goes_away_is_no_error(repository: Path) -> None:
    command = (
        f"{sys.executable} -m mechcausal.cli.main theory manual --json --priors 20 | head -c 1"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=repository, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


@pytest.mark.parametrize(
    ("arguments", "code", "errors"),
    [
        (["train", "manual", "--sead", "3"], 2, "Unrecognized options: --sead, 3; did you mean"),
        (["theory", "--parents", "-1,0", "--priors", "5"], 0, ""),
    ],
)
def test_output_does_not_depend_on_the_encoding_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, errors: str
) -> None:
    """Every other test has UTF-8."""
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, file in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(file, encoding="ascii", newline=""))
    assert main(arguments) == code
    sys.stdout.flush()
    sys.stderr.flush()
    assert bool(written["stdout"].getvalue()) == (code == 0)
    text = written["stderr"].getvalue().decode("ascii")
    assert text.startswith(f"mechcausal: {errors}" if errors else "")
    assert text.count("\n") == bool(errors)


# --- theory ---


def theory(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, output, errors = outcome(capsys, "theory", *arguments, "--json")
    assert (code, errors) == (0, "")
    content: dict[str, Any] = json.loads(output)
    return content


@pytest.mark.parametrize(
    "arguments",
    [["--parents", "-1,0,0,1,2"], ["--parents=-1,0,0,1,2"], ["manual"]],
    ids=["space", "equals", "recipe"],
)
def test_theory_prints_json_of_the_documented_shape(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    content = theory(capsys, *arguments, "--priors", "50")
    assert list(content) == [
        *("parents", "n_priors", "chi2", "chi2_stderr", "shannon", "g"),
        *("predicted_gradient", "edges"),
    ]
    assert content["parents"] == [-1, 0, 0, 1, 2]
    assert content["edges"] == [[0, 1], [0, 2], [1, 3], [2, 4]]
    for key in ("chi2", "chi2_stderr", "shannon"):
        matrix = np.array(content[key])
        assert matrix.shape == (5, 5)
        assert np.array_equal(matrix, matrix.T)
        assert (matrix >= -1e-12).all()
    g = np.array(content["g"])
    assert g.shape == (5, 5)
    assert not np.triu(g, 1).any()
    predicted = np.array(content["predicted_gradient"])
    assert predicted.shape == (6, 6)
    assert not np.triu(predicted, 1).any()
    assert np.abs(predicted.sum(1)).max() < 1e-9  # a softmax passes on no common shift


def test_theory_of_several_parents_prints_information_with_their_set(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "several.toml").write_text(
        "[graph]\npreset = 'manual'\nparents = [-1, 0, [0, 1], 2]\nquery_parents = [1, 3]\n"
        "[task]\nvocab_size = 2\n[model]\nkind = 'disentangled'\n[training]\nalgorithm = 'joint'\n"
    )
    content = theory(capsys, "several.toml", "--priors", "50")
    assert content["parents"] == [[], [0], [0, 1], [2]]
    assert content["query_parents"] == [1, 3]
    assert content["method"] == "exact"
    for name in ("chi2", "chi2_stderr", "shannon", "shannon_stderr"):
        assert np.array(content[name]).shape == (5, 5)
    of_set, of_one = content["set_shannon"], content["shannon"]
    assert of_set[0] == 0
    assert of_set[2] >= max(of_one[2][0], of_one[2][1])
    assert of_set[4] >= max(of_one[4][1], of_one[4][3])
    code, output, _ = outcome(capsys, "theory", "several.toml", "--priors", "50")
    assert code == 0
    for text in ("0, 1 → 2", "1, 3 → predicted token", "exact"):
        assert text in output


def test_theory_takes_about_a_minute_unless_told_how_many_draws(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechcausal.theory.pairwise._MAX_ELEMENTS", 1)
    (folder / "short.toml").write_text(
        LEAN.replace("theory_priors = 10", "theory_priors = 10\ntheory_seconds = 1e-9")
    )
    code, output, errors = outcome(capsys, "theory", "short.toml", "--json")
    assert (code, json.loads(output)["n_priors"]) == (0, 2)
    assert "theory was averaged over 2 draws of the prior in place of 1,000" in errors
    assert "raise --priors" in errors
    code, output, errors = outcome(capsys, "theory", "short.toml", "--json", "--priors", "5")
    assert (code, json.loads(output)["n_priors"], errors) == (0, 5, "")


def test_theory_repeats_from_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--parents", "-1,0,1", "--vocab-size", "4", "--alpha", "0.5", "--priors", "20"]
    first = theory(capsys, *arguments, "--seed", "3")
    assert theory(capsys, *arguments, "--seed", "3") == first
    assert theory(capsys, *arguments, "--seed", "4")["chi2"] != first["chi2"]
    assert theory(capsys, *arguments) == theory(capsys, *arguments, "--seed", "0")


def test_theory_of_a_random_graph_follows_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    graphs = [
        theory(capsys, "random_tree", "--priors", "2", "--seed", seed)["parents"] for seed in "001"
    ]
    assert graphs[0] == graphs[1] != graphs[2]


def test_options_of_theory_default_to_those_of_a_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chi2 = np.array(theory(capsys, "--parents", "-1,0", "--priors", "20")["chi2"])
    assert np.allclose(chi2.diagonal(), 9)  # S - 1 with the default of ten tokens
    explicit = ["--vocab-size", "10", "--alpha", "0.1"]
    again = theory(capsys, "--parents", "-1,0", "--priors", "20", *explicit)
    assert np.array_equal(again["chi2"], chi2)


def test_theory_prints_a_table_of_edges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, errors = outcome(capsys, "theory", "lean.toml", "--priors", "20")
    assert (code, errors) == (0, "")
    assert "4 edges picked" in output
    for edge in ("0 → 1", "0 → 2", "1 → 3", "2 → 4"):
        assert edge in output


# --- train ---

OVERRIDES = {
    "name": "mine",
    "seed": 5,
    "graph__preset": "chain",
    "graph__parents": None,
    "graph__sequence_length": 4,
    "task__vocab_size": 2,
    "task__alpha": (0.5, 2.0),
    "training__epsilon": 0.01,
    "training__stage1__steps": 2,
    "training__stage1__optimizer": "adam",
    "training__stage1__lr": 0.5,
    "evaluation__n_sequences": 9,
    "probing__schedule": "geometric",
    "wandb__mode": "offline",
    "wandb__tags": ("a", "b"),
    "wandb__group": "ours",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str, list[str]]:
    """A training in a process of its own: folder, output, error output, imports in order."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "lean.toml").write_text(LEAN)
    words = ["train", "lean.toml", "--out", "here/run", "--wandb-mode", "offline"]
    for key, value in OVERRIDES.items():
        if key != "wandb__mode":
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{key.replace('__', '.').replace('_', '-')}", *map(str, values)]
    code = (
        "import sys; from pathlib import Path; from mechcausal.cli.main import main\n"
        "code = main(sys.argv[1:]); Path('imports').write_text(' '.join(sys.modules))\n"
        "sys.exit(code)"
    )
    # The short --wandb-mode beats the environment.
    environment = {**os.environ, "WANDB_MODE": "disabled", "COLUMNS": "100"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return (
        folder,
        done.stdout.decode(),
        done.stderr.decode(),
        (folder / "imports").read_text().split(),
    )


def test_train_prints_a_table_and_where_everything_is(
    trained: tuple[Path, str, str, list[str]],
) -> None:
    folder, output, errors, _ = trained
    assert errors == ""  # no progress bar: this is no terminal
    assert "mine (seed 5, cpu)" in output
    for part in ("finished after 4 steps", "graph/recovered", "loss/gap", "gradient/edge_hits"):
        assert part in output
    assert re.search(r"loss/construction +│ +\d\.\d{4} │", output)
    assert re.search(r"loss/construction_gap +│ +-?\d\.\d{4} │ loss above the hand-built", output)
    run = folder / "here" / "run"
    (wandb_folder,) = (run / "wandb").glob("offline-run-*")
    for name in ("here/run", "here/run/figures", wandb_folder.name):
        assert name in output
    assert read_summary(run)["state"] == "finished"
    assert count_wandb_rows(wandb_folder) == len(read_metrics(run)) == read_summary(run)["rows"]
    assert {path.suffix for path in (run / "figures").iterdir()} == {".png"}
    assert not (folder / "runs").exists()


def test_values_on_the_command_line_override_the_recipe_and_are_recorded(
    trained: tuple[Path, str, str, list[str]],
) -> None:
    folder, *_ = trained
    expected = load_recipe(folder / "lean.toml").with_overrides(**OVERRIDES)
    assert load_recipe(folder / "here" / "run" / "recipe.toml") == expected


def test_a_run_loads_what_it_uses_in_the_order_that_is_quickest(
    trained: tuple[Path, str, str, list[str]],
) -> None:
    *_, imports = trained
    assert imports.index("wandb.apis.public") < imports.index("transformer_lens")
    assert not {"scipy.stats", "dask"} & {*imports}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_run_repeats_from_its_recorded_recipe_in_a_folder_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal with a progress bar, unless --quiet."""
    off = ("--wandb-mode", "disabled")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", "lean.toml", "--seed", "3", *off]) == 0
    for part in ("stage2", "6/6", "gap=", "edges=", "loss="):
        assert part in terminal.getvalue()
    (first,) = (folder / "runs" / "lean").iterdir()
    monkeypatch.setattr(sys, "stderr", quiet := Terminal())
    assert main(["train", str(first / "recipe.toml"), "--quiet"]) == 0
    assert quiet.getvalue() == ""
    first, second = (folder / "runs" / "lean").iterdir()
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert load_recipe(second / "recipe.toml").wandb.mode == "disabled"
    assert not list(folder.rglob("wandb"))


def test_switches_on_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []

    def train(recipe: Recipe, **options: Any) -> None:
        recipes.append(recipe)
        raise RecipeError("left out")

    monkeypatch.setattr("mechcausal.training.run.train", train)
    for switch in ("--probing.no-enabled", "--probing.enabled=False"):  # the latter W&B's agents
        assert outcome(capsys, "train", "lean.toml", switch)[0] == 2
    assert [recipe.probing.enabled for recipe in recipes] == [False, False]
    code, _, errors = outcome(capsys, "train", "lean.toml", "--no-probing.enabled")
    assert code == 2
    assert "did you mean --probing.enabled?" in errors


def test_a_loss_that_is_not_finite_is_said_with_exit_code_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = outcome(
        capsys, "train", "lean.toml", "--training.epsilon", "0", "--out", "run"
    )
    assert code == 1
    assert errors.startswith("mechcausal: the loss became inf at step 0 (stage1, sgd with lr 200)")
    assert errors.count("\n") == 1
    assert read_summary("run")["state"] == "failed"


def test_warnings_about_the_record_are_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = outcome(
        capsys, "train", "lean.toml", "--wandb.project", "a/b", "--out", "run"
    )
    assert code == 0
    lines = errors.splitlines()
    assert lines[0].startswith("mechcausal: warning: W&B could not start offline: ")
    assert "metrics.jsonl alone" in lines[-1]

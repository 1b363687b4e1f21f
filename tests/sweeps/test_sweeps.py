"""Sweeps: what is planned, refused, skipped, resumed and tabulated."""

import io
import json
import tarfile
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
import yaml

from mechcausal.cli.main import main
from mechcausal.recipes import Recipe, load_recipe, recipe_to_toml
from mechcausal.records.run_folder import RunFolderError, find_runs, read_summary, run_info
from mechcausal.support.signals import StopSignal
from mechcausal.sweeps import driver
from mechcausal.sweeps.archive import pack, unpack
from mechcausal.sweeps.definition import load_sweep, packaged_sweeps, sweep_to_dict
from mechcausal.sweeps.driver import SweepResult, run_sweep
from mechcausal.sweeps.engine_names import check_engine_options
from mechcausal.sweeps.member import Done, Job, run_job
from mechcausal.sweeps.picture import power_law
from mechcausal.sweeps.plan import plan, size
from mechcausal.sweeps.sweep import Sweep, SweepError
from mechcausal.sweeps.wandb_sweep import wandb_config
from mechcausal.training.run import train
from tests.commands import refused

pytestmark = pytest.mark.usefixtures("no_figures")

TINY = """
recipe = "manual"
[changes]
training = { batch_size = 16, stage1.steps = 3, stage2.steps = 3 }
evaluation = { n_sequences = 16, bayes_draws = 4, theory_priors = 10 }
probing = { dense = 1, frames = 0, images = 0, report = false }
checkpoints.every = 2
wandb.mode = "disabled"
"""


class InlineEngine:
    """Runs every job here, at once; after `stop_after` jobs it tells members to stop."""

    n_workers = 1
    is_lost = False

    def __init__(self, stop_after: int = 10**6) -> None:
        self.ran: list[str] = []
        self.stop_after = stop_after

    def submit(self, job: Job) -> "Future[Done]":
        future: Future[Done] = Future()
        stop = len(self.ran) >= self.stop_after
        self.ran += [Path(folder).name for folder in job.folders]
        future.set_result(run_job(job, lambda: stop))
        return future

    def stop(self) -> None: ...

    def problem(self) -> str:
        return ""

    def __enter__(self) -> "InlineEngine":
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> InlineEngine:
    engine = InlineEngine()
    monkeypatch.setattr(driver, "_engine", lambda *args: engine)
    return engine


def write(folder: Path, text: str, name: str = "s.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def sweep_of(folder: Path, axes: str, head: str = "") -> Sweep:
    return load_sweep(write(folder, f"{head}\n{TINY}\n[axes]\n{axes}\n"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """A sweep of two points with two seeds each, for tests that only look at one."""
    folder = tmp_path_factory.mktemp("finished")
    axes = "task.alpha = [0.1, 1]\ntraining.beta0 = [0.5, 1.0]"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(driver, "_engine", lambda *args: InlineEngine())
        return run_sweep(sweep_of(folder, axes, 'kind = "list"\nseeds = 2'), folder / "out")


def test_a_grid_has_every_combination_with_every_seed(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "task.alpha = [0.1, 1]\ntraining.beta0 = [0.5, 1.0, 2.0]", "seeds=2")
    members = plan(sweep, tmp_path)
    assert len(members) == size(sweep) == 12
    points = {(m.recipe.task.alpha, m.recipe.training.beta0, m.recipe.seed) for m in members}
    assert points == {(a, b, s) for a in (0.1, 1.0) for b in (0.5, 1.0, 2.0) for s in (0, 1)}
    assert len({m.name for m in members}) == 12
    assert all(m.recipe.wandb.group == "s" and m.folder == tmp_path / m.name for m in members)
    assert members[0].recipe.training.stage1.lr == sweep.base.training.stage1.lr


def test_a_list_takes_axes_side_by_side(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "seed = [3, 4]\ntask.alpha = [0.1, 1]", 'kind = "list"')
    assert [(m.recipe.seed, m.recipe.task.alpha) for m in plan(sweep, tmp_path)] == [
        (3, 0.1),
        (4, 1.0),
    ]


def test_random_draws_follow_their_seed_and_stay_within_their_ranges(tmp_path: Path) -> None:
    axes = """
    task.alpha = { low = 0.01, high = 10.0, log = true }
    task.vocab_size = { low = 2, high = 4 }
    training.stage1.optimizer = ["sgd", "adam"]
    """
    head = 'kind = "random"\nsamples = 300\nsampling_seed = {}'
    first, again, other = (
        plan(sweep_of(tmp_path, axes, head.format(seed)), tmp_path) for seed in (1, 1, 2)
    )
    assert [m.recipe for m in first] == [m.recipe for m in again] != [m.recipe for m in other]
    alphas = np.array([m.recipe.task.alpha for m in first])
    assert alphas.min() >= 0.01
    assert alphas.max() <= 10
    # Half of a log-uniform draw lies below the geometric mean: 150 ± 4 standard errors.
    assert abs((alphas < 0.1**0.5).sum() - 150) < 4 * (300 / 4) ** 0.5
    counts = np.bincount([m.recipe.task.vocab_size for m in first], minlength=5)
    assert np.abs(counts[2:] - 100).max() < 4 * (300 * 2 / 9) ** 0.5
    assert counts[:2].sum() == 0


def test_a_table_on_an_axis_is_laid_over_its_section(tmp_path: Path) -> None:
    text = """
    recipe = "markov_chain"
    [axes]
    graph = [{ preset = "chain" }, { preset = "lag_chain", lag = 2 }]
    """
    members = plan(load_sweep(write(tmp_path, text)), tmp_path)
    assert [m.recipe.graph.preset for m in members] == ["chain", "lag_chain"]
    assert {m.recipe.graph.sequence_length for m in members} == {20}
    assert members[1].name == "1_graphlag_chain-2_seed0"


def test_members_draw_no_page_unless_they_are_asked_to(
    tmp_path: Path, engine: InlineEngine
) -> None:
    # A file of the user's may hold every field, as the recipe.toml of a run does.
    write(tmp_path, recipe_to_toml(load_recipe("manual")), "full.toml")
    graph = 'graph = { preset = "chain", sequence_length = 5 }'
    bases = {
        'recipe = "manual"': False,
        f'recipe = "{tmp_path / "full.toml"}"': False,
        f"recipe = {{ {graph} }}": False,
        f"recipe = {{ {graph}, probing = {{ report = true }} }}": True,
        'recipe = "manual"\nchanges.probing.report = true': True,
        'recipe = "manual"\naxes.probing.report = [true]': True,
    }
    for base, drawn in bases.items():
        sweep = load_sweep(write(tmp_path, f"seeds = 2\n{base}"))
        assert {m.recipe.probing.report for m in plan(sweep, tmp_path)} == {drawn}, base
        # The sweep's copy of itself says the same.
        copy = write(tmp_path, json.dumps(sweep_to_dict(sweep)), "copy.json")
        assert load_sweep(copy).base == sweep.base
        # So do W&B's agents.
        assert ("--probing.no-report" in wandb_config(sweep, "r.toml")["command"]) == (not drawn)
    sweep = load_sweep(write(tmp_path, TINY.replace(", report = false", "") + "[axes]\nseed = [0]"))
    (member,) = run_sweep(sweep, tmp_path / "out").members
    assert not list(member.folder.rglob("*.html"))
    assert sum(path.stat().st_size for path in member.folder.rglob("*")) < 2_000_000


REFUSED = {
    "unknown field": ("[axes]\ntask.alhpa = [1]", "axes.task.alhpa", "did you mean task.alpha?"),
    "unknown section": ("[axes]\nx = [1]", "axes.x", "not a recipe field"),
    "empty axis": ("[axes]\ntask.alpha = []", "axes.task.alpha", "is empty"),
    "unequal lengths": (
        'kind = "list"\n[axes]\ntask.alpha = [1, 2]\nseed = [1]',
        "equal lengths",
        "task.alpha has 2, seed has 1",
    ),
    "no list": ("[axes]\ntask.alpha = 1", "axes.task.alpha", "a list of values"),
    "a value twice": ("[axes]\ntask.alpha = [1, 2, 1]", "axes.task.alpha", "1 occurs twice"),
    "member that is none": ("[axes]\ntask.alpha = [1, -1]", "member 1_alpha-1", "greater than 0"),
    "wrong type": ('[axes]\ntask.alpha = ["a"]', "task.alpha", 'found "a"'),
    "values that do not go together": (
        '[axes]\nmodel.kind = ["disentangled"]',
        "member 0_",
        "training.algorithm",
    ),
    "range in a grid": ("[axes]\ntask.alpha = {low=1, high=2}", "axes.task.alpha", "kind random"),
    "range upside down": (
        'kind="random"\nsamples=2\n[axes]\ntask.alpha = {low=2, high=1}',
        "axes.task.alpha",
        "not below high",
    ),
    "logarithm of nothing": (
        'kind="random"\nsamples=2\n[axes]\ntask.alpha = {low=0, high=1, log=true}',
        "axes.task.alpha",
        "starts above 0",
    ),
    "range without an end": (
        'kind="random"\nsamples=2\n[axes]\ntask.alpha = {low=1}',
        "axes.task.alpha",
        "high",
    ),
    "samples missing": ('kind="random"\n[axes]\ntask.alpha = [1]', "samples", "needed"),
    "samples in a grid": ("samples=2\n[axes]\ntask.alpha = [1]", "samples", "kind random"),
    "seeds twice": ("seeds = [1, 1]\n[axes]\ntask.alpha = [1]", "seeds", "twice"),
    "seeds beside seed": ("seeds = 2\n[axes]\nseed = [1]", "seeds", "axis `seed`"),
    "no seeds": ("seeds = 0\n[axes]\ntask.alpha = [1]", "seeds", "found 0"),
    "nothing varies": ("[axes]", "axes", "nothing to vary"),
    "axis within an axis": (
        '[axes]\ngraph = [{preset="chain"}]\n"graph.lag" = [1]',
        "axes.graph.lag",
        "within the axis graph",
    ),
    "name on an axis": ('[axes]\nname = ["a"]', "axes.name", "the sweep sets this field"),
    "unknown key": ("kinds = 1\n[axes]\ntask.alpha = [1]", "kinds", "did you mean kind?"),
    "unknown recipe": ('recipe = "no"\n[axes]\ntask.alpha = [1]', "no", "no such file or recipe"),
    "bad picture": (
        '[axes]\ntask.alpha = [1]\n[[pictures]]\nfigure="a"\nx="task.alhpa"',
        "pictures.0.x",
        "did you mean task.alpha?",
    ),
    "not TOML": ("[axes", "not valid TOML", ""),
    "too many": (
        "seeds = 1000000\n[axes]\ntask.alpha = [1, 2]",
        "2,000,000 members",
        "1,000,000",
    ),
    "a graph that is none": ("[axes]\ngraph.parents = [[-1, 2, 0]]", "member 0_", "2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_nothing_is_started(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: InlineEngine
) -> None:
    text, *parts = REFUSED[case]
    head = "" if text.startswith("recipe") else 'recipe = "manual"\n'
    file, out = write(tmp_path, head + text), tmp_path / "out"
    error = refused(capsys, "sweep", file, "--out", out)
    assert all(part in error for part in parts), error
    assert not engine.ran
    assert not out.exists()


def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, 'recipe = "manual"\n[axes]\nseed = [1]')
    scheduler = ["--address", "tcp://127.0.0.1:1"]
    for options, message in (
        (scheduler, "--address belongs to --engine dask, found local"),
        (["--engine", "batched"], "--engine batched is now the option --batch"),
        (["--engine=batched"], "--engine batched is now the option --batch"),
        (["--address="], "--address belongs to --engine dask, found local"),
        (["--collect"], "--collect belongs to --engine dask, found local"),
        (["--engine", "dask", *scheduler, "--workers", "2"], "--workers belongs to --engine local"),
        (["--host", "0.0.0.0"], "--host"),
        (["--workers", "0"], "--workers is 0"),
        (["--engine", "slurm"], "slurm"),
    ):
        assert message in refused(capsys, "sweep", file, *options)


def test_dask_needs_an_address_and_no_scheduler_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    for started in ("LocalCluster", "Scheduler", "Client"):
        monkeypatch.delattr(distributed, started)
    file = write(tmp_path, 'recipe = "manual"\n[axes]\nseed = [1]')
    for options in ([], ["--address", ""]):
        command = ["sweep", file, "--engine", "dask", "--out", tmp_path / "out", *options]
        assert "mechcausal: --engine dask needs --address, " in refused(capsys, *command)
    with pytest.raises(SweepError, match="needs --address"):
        run_sweep(load_sweep(file), tmp_path / "out", engine="dask")
    with pytest.raises(SweepError, match="--engine batched is now the option --batch"):
        check_engine_options("batched", workers=None, address=None, collect=False)
    with pytest.raises(SweepError, match="--address belongs to --engine dask, found local"):
        run_sweep(load_sweep(file), tmp_path / "out", address="tcp://127.0.0.1:1")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, 'recipe = "manual"\nseeds = 12\n[axes]\ntask.alpha = [0.1, 1]')
    assert main(["sweep", str(file), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "24 members" in output
    assert "and 14 more" in output
    assert not (tmp_path / "out").exists()


def test_every_member_is_an_ordinary_run_and_a_row_of_the_table(finished: SweepResult) -> None:
    members = finished.members
    assert not finished.failed
    assert find_runs(finished.folder) == [member.folder for member in members]
    assert {run_info(member.folder).state for member in members} == {"finished"}
    assert run_info(members[0].folder).recipe == members[0].recipe
    table = pd.read_csv(finished.files["table"])
    assert table["member"].tolist() == [member.name for member in members]
    assert list(table.columns[:6]) == [
        *("member", "state", "error", "seed", "task.alpha", "training.beta0")
    ]
    summary = read_summary(members[3].folder)
    assert table["loss/eval"][3] == pytest.approx(summary["loss/eval"])
    key = "gradient/theory_correlation"
    assert table[f"first/{key}"][3] == pytest.approx(summary["first"][key])
    pictures = [path for path in finished.files.values() if path.suffix == ".png"]
    assert len(pictures) == 2
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


class LostEngine(InlineEngine):
    """Is lost with its second job, of which nothing is heard again."""

    def submit(self, job: Job) -> "Future[Done]":
        if self.ran:
            self.is_lost = True
            return Future()
        return super().submit(job)

    def problem(self) -> str:
        return "the scheduler is gone" if self.is_lost else ""


def test_a_sweep_does_not_wait_for_an_engine_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_engine", lambda *args: LostEngine())
    path = tmp_path / "s.toml"
    path.write_text(TINY + "[axes]\nseed = [0, 1, 2]\n")
    result = run_sweep(load_sweep(path), tmp_path / "out")
    assert (result.problem, result.finished, result.failed) == ("the scheduler is gone", 1, {})


def test_starting_again_skips_what_finished_and_resumes_what_did_not(
    tmp_path: Path, engine: InlineEngine
) -> None:
    sweep, out = sweep_of(tmp_path, "task.alpha = [0.1]", "seeds = 3"), tmp_path / "out"
    engine.stop_after = 1
    first = run_sweep(sweep, out)
    done, begun, waiting = first.members
    states = [first.outcomes[member.name].state for member in first.members]
    assert states == ["finished", "interrupted", "interrupted"]
    stop = StopSignal()
    train(
        begun.recipe,
        out=begun.folder,
        stop=stop,
        on_progress=lambda p: setattr(stop, "received", 2 if p.step >= 3 else None),
    )
    assert run_info(begun.folder).state == "interrupted"
    written = (done.folder / "summary.json").stat().st_mtime_ns
    engine.ran, engine.stop_after = [], 10**6
    assert run_sweep(sweep, out).finished == 3
    assert sorted(engine.ran) == [begun.name, waiting.name]
    assert (done.folder / "summary.json").stat().st_mtime_ns == written
    assert list((begun.folder / "checkpoints").iterdir())
    # From its folder it is read again, and has nothing to do.
    engine.ran = []
    assert run_sweep(load_sweep(out), out).finished == 3
    assert not engine.ran


def test_a_failing_member_is_reported_and_stops_no_other(
    tmp_path: Path, engine: InlineEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = "training.stage1.lr = [1.0, 2.0, 1e9]\ntraining.epsilon = [0.1, 0.1, 0.0]"
    text = f'kind = "list"\n{TINY}\n[axes]\n{axes}\n'
    out = tmp_path / "out"
    out.mkdir()
    file = write(tmp_path, text)
    blocked = plan(load_sweep(file), out)[0]
    (out / "sweep.json").write_text(json.dumps(sweep_to_dict(load_sweep(file))))
    blocked.folder.write_text("a file where a folder should be")
    assert main(["sweep", str(file), "--out", str(out)]) == 1
    output = capsys.readouterr()
    assert f"mechcausal: {blocked.name}: " in output.err
    assert "1 of 3 finished, 2 failed" in output.out
    table = pd.read_csv(out / "results.csv")
    assert table["state"].tolist() == ["failed", "finished", "failed"]
    assert "File exists" in table["error"][0]
    assert "the loss became inf at step 0" in table["error"][2]
    blocked.folder.unlink()
    assert main(["sweep", str(out)]) == 1
    assert "2 of 3 finished, 1 failed" in capsys.readouterr().out
    # The page of the sweep shows its pictures and names who failed.
    assert main(["report", str(out)]) == 0
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert (
        page.count('<figure class="card"><img alt=') == len(list((out / "figures").iterdir())) > 0
    )
    assert "the loss became inf at step 0" in page
    (out / "results.csv").write_bytes(b"no table")
    assert main(["report", str(out)]) == 0
    assert "the sweep has no pictures: " in (out / "comparison.html").read_text(encoding="utf-8")


def test_the_folder_of_another_sweep_is_refused(tmp_path: Path, finished: SweepResult) -> None:
    head = 'kind = "list"\nseeds = 2'
    with pytest.raises(SweepError, match=r"another sweep \(axes differ\)"):
        run_sweep(sweep_of(tmp_path, "task.alpha = [0.2]", head), finished.folder)
    axes = "task.alpha = [0.1, 1]\ntraining.beta0 = [0.5, 1.0]"
    picture = '[[pictures]]\nfigure="loss/eval"\nx="task.alpha"'
    run_sweep(sweep_of(tmp_path, f"{axes}\n{picture}", head), finished.folder)
    assert (finished.folder / "figures" / "loss-eval_alpha.png").is_file()
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").touch()
    with pytest.raises(SweepError, match="holds no sweep"):
        run_sweep(sweep_of(tmp_path, "task.alpha = [0.1]"), full)
    with pytest.raises(SweepError, match="not a sweep folder"):
        load_sweep(full)


def test_members_that_were_sent_back_are_as_if_written_here(
    tmp_path: Path, engine: InlineEngine, finished: SweepResult
) -> None:
    axes = "task.alpha = [0.1]\ntraining.beta0 = [0.5]"
    sent = run_sweep(
        sweep_of(tmp_path, axes, "seeds = 2"),
        tmp_path / "sent",
        engine="dask",
        address="tcp://nowhere",
        collect=True,
    )
    assert sent.finished == 2
    for here, back in zip(finished.members, sent.members, strict=False):
        for name in ("metrics.jsonl", "model/model.safetensors", "matrices.safetensors"):
            assert (here.folder / name).read_bytes() == (back.folder / name).read_bytes()


def test_archives_hold_regular_files_below_their_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, copy, bad = tmp_path / "run", tmp_path / "copy", tmp_path / "bad"
    (run / "model").mkdir(parents=True)
    (run / "model" / "a").write_text("1")
    (run / "link").symlink_to("/etc/passwd")
    copy.mkdir()
    (copy / "model").symlink_to(tmp_path)  # replaced, not followed
    unpack(pack(run), copy)
    assert sorted(p.relative_to(copy).as_posix() for p in copy.rglob("*")) == ["model", "model/a"]
    assert not (tmp_path / "a").exists()
    link, folder = tarfile.TarInfo("inside"), tarfile.TarInfo("folder")
    link.type, link.linkname, folder.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.DIRTYPE
    for entry in (tarfile.TarInfo("../out"), link, folder):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            archive.addfile(tarfile.TarInfo("good"))
            archive.addfile(entry)
        with pytest.raises(RunFolderError, match="not unpacked"):
            unpack(buffer.getvalue(), bad)
    monkeypatch.setattr("mechcausal.sweeps.archive.MAX_BYTES", 0)
    with pytest.raises(RunFolderError, match="not unpacked: more than 0 bytes"):
        unpack(pack(run), bad)
    with pytest.raises(RunFolderError, match="cannot be read"):
        unpack(b"no archive", bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "run"]


def schema() -> object:
    """W&B's own, from its package sweeps, which `make` installs without what its code needs."""
    try:
        files = metadata.files("sweeps") or []
    except metadata.PackageNotFoundError:
        pytest.skip("W&B's package sweeps is not installed")
    (file,) = (path for path in files if path.name == "schema.json")
    return json.loads(Path(str(file.locate())).read_text())


WANDB = {
    "grid": "task.alpha = [0.00001, 1.0]\nprobing.enabled = [true, false]",
    "random": "task.alpha = {low = 1e-5, high = 1.0, log = true}\ntask.vocab_size={low=2, high=4}",
    "bayes": "task.alpha = {low = 0.1, high = 1.0}\ntraining.stage1.optimizer = ['sgd', 'adam']",
}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that `mechcausal train` would train."""
    recipes: list[Recipe] = []

    def interrupted(recipe: Recipe, **options: Any) -> None:
        recipes.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("mechcausal.training.run.train", interrupted)
    return recipes


def test_wandbs_agents_draw_no_page(tmp_path: Path, trained: list[Recipe]) -> None:
    sweep = load_sweep(write(tmp_path, 'recipe = "manual"\nseeds = 2'))
    command = wandb_config(sweep, "manual")["command"]
    assert main([*command[2:-1], "--seed=1"]) == 130
    assert trained == [plan(sweep, tmp_path)[1].recipe]


@pytest.mark.parametrize("method", WANDB)
def test_wandbs_own_form_is_valid_and_its_agents_call_train(
    method: str, tmp_path: Path, trained: list[Recipe]
) -> None:
    axes = WANDB[method]
    head = "seeds = 2\n" + ("" if method == "grid" else 'kind = "random"\nsamples = 5\n')
    search = f'[search]\nmethod = "{method}"\n'
    file = write(tmp_path, f"{head}{TINY}\n[axes]\n{axes}\n{search}")
    config_file = tmp_path / "wandb.yaml"
    assert main(["sweep", str(file), "--as-wandb", str(config_file)]) == 0
    config = yaml.safe_load(config_file.read_text())
    assert config["method"] == method
    assert not list(jsonschema.Draft7Validator(schema()).iter_errors(config))
    # What an agent makes of it is a command that parses, to the member's recipe.
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = load_sweep(file)
    member = plan(sweep, tmp_path)[-1]
    values = {path: {"value": value} for path, value in member.point.items()}
    flags = create_sweep_command_args({"args": values})["args"]
    words = [w for c in config["command"] for w in (flags if c == "${args}" else [c])]
    assert words[:3] == ["${env}", "mechcausal", "train"]
    assert main(words[2:]) == 130
    assert trained == [member.recipe]


def test_what_wandb_has_no_form_for_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for axes, head in (
        ("graph.parents = [[-1, 0, 0]]", ""),
        ("task.alpha = [1, 2]", 'kind = "list"'),
        ("task.vocab_size = {low = 2, high = 100, log = true}", 'kind = "random"\nsamples = 2'),
    ):
        file = write(tmp_path, f"{head}\n{TINY}\n[axes]\n{axes}\n")
        assert "W&B" in refused(capsys, "sweep", file, "--as-wandb", tmp_path / "w.yaml")
        assert not (tmp_path / "w.yaml").exists()


@pytest.mark.parametrize("name", sorted(packaged_sweeps()))
def test_sweeps_that_come_along_can_be_planned(name: str, tmp_path: Path) -> None:
    members = plan(load_sweep(name), tmp_path)
    assert len(members) == len({member.folder for member in members}) == size(load_sweep(name))


def test_a_power_law_is_found_within_its_error() -> None:
    x = np.geomspace(10, 200, 12)
    noise = np.random.default_rng(0).normal(0, 0.1, len(x))
    k, error, _ = power_law(x, 3 / x * np.exp(noise))
    assert abs(k + 1) < 4 * error
    assert error < 0.1

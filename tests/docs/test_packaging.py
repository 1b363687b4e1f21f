"""What a user installs: the wheel, what it depends on, and a run from an unrelated folder."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = ("mechcausal", "probes")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command to its end and return what it printed; a failure shows all of it."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def source(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the record of a run in it."""
    source = tmp_path_factory.mktemp("source") / "mechcausal"
    for name in (*PACKAGES, "tests"):
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repository / name, source / name, ignore=left_out)
    for path in (*repository.iterdir(), *repository.glob("runs/**/*.toml")):
        if path.is_file() and len(path.relative_to(repository).parts) < 4:
            target = source / path.relative_to(repository)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    record = source / "runs" / "markov_chain" / "20260101-000000"
    record.mkdir(parents=True)
    for name in ["recipe.toml", "metrics.jsonl"]:
        (record / name).touch()
    return source


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist built from the copy, and the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel(built: tuple[Path, Path]) -> Path:
    return built[1]


def test_wheel_holds_the_packages_and_nothing_else_at_the_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {Path(name).parts[0] for name in names} == {*PACKAGES, "mechcausal-0.1.0.dist-info"}
    for package in PACKAGES:
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert "mechcausal/cli/main.py" in names
    assert "mechcausal-0.1.0.dist-info/licenses/LICENSE" in names


def test_wheel_holds_the_recipes_of_the_checkout_and_no_records(
    wheel: Path, repository: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {
            name.removeprefix("mechcausal/_recipes/"): archive.read(name)
            for name in archive.namelist()
            if name.startswith("mechcausal/_recipes/")
        }
    runs = repository / "runs"
    recipes = [*runs.glob("*.toml"), *runs.glob("sweeps/*.toml")]
    tracked = {path.relative_to(runs).as_posix(): path.read_bytes() for path in recipes}
    assert {"markov_chain.toml", "sweeps/recovery.toml"} <= set(tracked)
    assert shipped == tracked


def test_wheel_declares_the_command_and_the_dependencies(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read("mechcausal-0.1.0.dist-info/entry_points.txt").decode()
        header = Parser().parsestr(archive.read("mechcausal-0.1.0.dist-info/METADATA").decode())
    assert entry_points.split() == [
        "[console_scripts]",
        "mechcausal",
        "=",
        "mechcausal.cli.main:main",
    ]
    assert header["Requires-Python"] == ">=3.11"
    runtime = [line for line in header.get_all("Requires-Dist", []) if "extra ==" not in line]
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert {Requirement(line) for line in runtime} == {
        Requirement(line) for line in project["dependencies"]
    }


def test_sdist_holds_every_module_and_no_records(
    built: tuple[Path, Path], repository: Path
) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(built[1]) as archive:
        shipped = set(archive.namelist())
    for package in PACKAGES:
        modules = (repository / package).rglob("*.py")
        assert {path.relative_to(repository).as_posix() for path in modules} <= names & shipped
    assert not [name for name in names if name.startswith("runs/markov_chain/")]


def test_every_import_is_declared(repository: Path) -> None:
    """An import that only some dependency of a dependency brings breaks when that one drops it."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["cluster"]]
    declared = {Requirement(line).name.replace("-", "_") for line in lines}
    # Optional extras, each imported only where it is asked for.
    assert {Requirement(line).name for line in extras["discovery"]} == {"causal-learn"}
    assert {Requirement(line).name for line in extras["lightning"]} == {"lightning"}
    assert {Requirement(line).name for line in extras["circuitsvis"]} == {"circuitsvis"}
    assert "pyyaml" in declared
    # Modules that are not called like their packages.
    declared |= {"causallearn", "circuitsvis", "lightning", "yaml"}
    undeclared = {
        f"{path.relative_to(repository)}: {module}"
        for package in PACKAGES
        for path in (repository / package).rglob("*.py")
        for module in imported_modules(path)
        if module not in {*declared, *PACKAGES, *sys.stdlib_module_names}
    }
    assert not undeclared


def imported_modules(path: Path) -> set[str]:
    """The top-level names of the modules that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_constraints_pin_every_dependency_exactly(repository: Path) -> None:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [line for line in pins.values() if not re.fullmatch(r"[0-9][0-9a-z.]*", line)]
    assert pins["torch"] == "2.13.0"
    pinned = {canonicalize_name(name) for name in pins}
    # Which of these torch needs differs by platform, and it pins them itself.
    of_torch = re.compile(r"nvidia-|cuda-|triton")
    assert not [name for name in pinned if of_torch.match(name)]

    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    required = transitive([Requirement(line) for line in direct])
    assert not {name for name in required - pinned if not of_torch.match(name)}


def transitive(requirements: list[Requirement]) -> set[str]:
    """The names of these requirements and of all that they need in turn, as installed here."""
    names: set[str] = set()
    pending = [(requirement, "") for requirement in requirements]
    seen: set[tuple[str, str]] = set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        names.add(name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                needed = metadata.requires(name) or []
                pending += [(Requirement(line), wanted) for line in needed]
    return names


@pytest.mark.slow
def test_installed_wheel_trains_a_recipe_from_an_unrelated_folder(
    wheel: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    # Lends the dependencies without a download. A .pth file adds the folder alone, not what the
    # .pth files in it name, so an editable install of the checkout stays out of sight.
    folders = [path for path in sys.path if Path(path).name == "site-packages"]
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(folders))
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    origin = run(
        python, "-c", "import mechcausal; print(mechcausal.__file__)", cwd=elsewhere, env=env
    )
    assert Path(origin.strip()).is_relative_to(site_packages)

    command = environment / "bin" / "mechcausal"
    assert "train" in run(command, "--help", cwd=elsewhere, env=env)
    out = tmp_path / "out"
    steps = ("--training.stage1.steps", "2", "--training.stage2.steps", "2")
    draws = ("--evaluation.theory-priors", "10", "--evaluation.bayes-draws", "2")
    run(
        *(
            command,
            "train",
            "markov_chain",
            *steps,
            *draws,
            "--wandb-mode",
            "offline",
            "--out",
            out,
        ),
        cwd=elsewhere,
        env=env,
    )
    assert list(out.rglob("summary.json"))
    assert not list(elsewhere.iterdir())

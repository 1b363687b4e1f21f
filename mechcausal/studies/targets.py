"""Load a model to probe: from a run, a saved HookedTransformer, or a Hugging Face model.

Only safetensors are read, nothing is unpickled, and a Hugging Face model's own code is never run.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from mechcausal.models import CONFIG_FILE
from mechcausal.models.adapter import FORMAT, ModelFileError, load_with_extra, read_config
from mechcausal.models.loading import kind_of
from mechcausal.records.run_folder import MODEL_FOLDER, RECIPE_FILE
from mechcausal.studies.hub import (
    MAIN,
    HubError,
    HubRevision,
    InterruptedDownloadError,
    describe,
    describe_cached,
    fetch,
    read_hub_config,
)
from mechcausal.studies.hugging_face import (
    TOKENIZER_FILES,
    TargetError,
    load_bridge,
    read_model_config,
)
from mechcausal.studies.weights import weight_digests
from mechcausal.support.messages import first_line
from mechcausal.training.checkpoints import checkpoint_folders
from probes import ProbeError
from probes.heads.stimuli import Bos
from probes.reading.passes import attends_ahead

__all__ = ["Target", "TargetError", "load_folder", "load_revision", "load_target", "running"]


@contextmanager
def running(name: str) -> Iterator[None]:
    """Turn errors from running a model in the block into a one-line TargetError.

    A model that loads may still not run: its parts may not fit together, or memory runs out.

    Args:
        name: name of the target.

    Raises:
        TargetError: the model cannot be run.
        ProbeError: raised by a probe, passed on unchanged.
    """
    try:
        yield
    except ProbeError:
        raise
    except (IndexError, MemoryError, RuntimeError) as error:
        raise TargetError(f"{name}: cannot be run: {first_line(error)}") from None


@dataclass(frozen=True)
class Target:
    """A model to probe.

    Attributes:
        name: name from the command line, with the step of a checkpoint.
        model: a HookedTransformer or TransformerBridge.
        bos: token that starts its sequences; None for none, "auto" for the tokenizer's choice.
        folder: the run folder, if the model comes from a run.
        predicts_every_token: whether it predicts the next token at every position. False for models
            that predict only at the query, and for models that attend to later tokens.
        origin: of a revision of a Hub model: `revision`, `commit` and `weights_sha256`.
    """

    name: str
    model: nn.Module
    bos: Bos
    folder: Path | None = None
    predicts_every_token: bool = True
    origin: Mapping[str, str] = field(default_factory=dict)


def load_target(
    target: str, *, step: int | None = None, revision: str | None = None, device: str = "cpu"
) -> Target:
    """Load a model.

    Args:
        target: a run folder; a folder that `save_model` wrote; a folder with a Hugging Face model
            in safetensors; or the name of a model on the Hugging Face Hub.
        step: step of a checkpoint in a run folder; the final weights when absent.
        revision: branch, tag or commit of a model on the Hub; `main` when absent.
        device: device for the model.

    Raises:
        TargetError: it does not exist, cannot be read or cannot be fetched.
    """
    path = Path(target)
    try:
        if path.is_file():
            raise TargetError(f"{target}: a file; give the folder of a model or a run")
        is_run = (path / RECIPE_FILE).is_file()
    except OSError as error:  # e.g. the name is too long, or a folder may not be entered
        raise TargetError(f"{target}: {error.strerror or error}") from None
    if not path.exists() and (target.count("/") > 1 or target.startswith((".", "/", "~"))):
        raise TargetError(f"{target}: no such folder")
    if step is not None and not is_run:
        raise TargetError(f"{target}: --step goes with a run folder, and this is not one")
    if revision is not None and path.exists():
        raise TargetError(f"{target}: --revision goes with a model on the Hub, this is a folder")
    try:
        if is_run:
            folder = _weights_folder(path, step)
            name = target if step is None else f"{target}, step {step}"
            return _load_saved(folder, name, device, run=path)
    except ModelFileError as error:
        raise TargetError(str(error)) from None
    if path.is_dir():
        return load_folder(path, name=target, device=device)
    if revision is not None:
        wanted = _described(target, revision)
        name = f"{target}, revision {revision}"
        return load_revision(wanted, fetch(wanted), name=name, device=device)
    if _is_saved(read_hub_config(target)):  # transformers would not know what to do with it
        wanted = _described(target, MAIN)
        return load_revision(wanted, fetch(wanted), name=target, device=device)
    return _from_hugging_face(target, target, device, has_tokenizer=True)


def _described(repo: str, revision: str) -> HubRevision:
    """A revision as the Hub describes it, or the cache if the Hub is not reached.

    Raises:
        HubError: there is no such revision.
    """
    try:
        return describe(repo, revision)
    except InterruptedDownloadError as error:
        try:
            return describe_cached(repo, revision)
        except HubError:
            raise error from None


def load_folder(folder: Path, *, name: str, device: str = "cpu") -> Target:
    """Load a folder that `save_model` wrote, or one with a Hugging Face model in safetensors.

    Raises:
        TargetError: it holds no model, or one that cannot be read.
    """
    try:
        return _from_folder(folder, name, device)
    except ModelFileError as error:
        raise TargetError(str(error)) from None


def load_revision(
    revision: HubRevision,
    folder: Path,
    *,
    name: str,
    device: str = "cpu",
    weights_sha256: str | None = None,
) -> Target:
    """Load a revision of a Hub model from the folder that `fetch` filled.

    Args:
        revision: the revision.
        folder: its files.
        name: name of the target.
        device: device for the model.
        weights_sha256: see `WeightDigests.sha256`; computed when absent.

    Raises:
        TargetError: it holds no model, or one that cannot be read.
    """
    try:
        weights_sha256 = weights_sha256 or weight_digests(folder).sha256
        if _is_saved(read_config(folder / CONFIG_FILE)):
            # The files of a cache are links out of the folder, which a saved model may not have.
            with tempfile.TemporaryDirectory() as copy:
                for file in (CONFIG_FILE, *revision.weights):
                    shutil.copyfile(folder / file, Path(copy) / file)
                target = load_folder(Path(copy), name=name, device=device)
        else:
            target = load_folder(folder, name=name, device=device)
    except ModelFileError as error:
        raise TargetError(str(error)) from None
    except OSError as error:
        raise HubError(f"{name}: not read: {error.strerror or error}") from None
    origin = {
        "revision": revision.name,
        "commit": revision.commit,
        "weights_sha256": weights_sha256,
    }
    return replace(target, origin=origin)


def _is_saved(config: object) -> bool:
    """Whether a config was written by `save_model`."""
    return isinstance(config, dict) and config.get("format") == FORMAT


def _weights_folder(run: Path, step: int | None) -> Path:
    """The folder of a run's final weights, or of a checkpoint's weights.

    Raises:
        TargetError: it does not exist.
    """
    if step is None:
        if not (run / MODEL_FOLDER).is_dir():
            raise TargetError(f"{run}: no final weights ({MODEL_FOLDER}/): the run did not end")
        return run / MODEL_FOLDER
    folders = checkpoint_folders(run)
    if step not in folders:
        available = ", ".join(map(str, folders)) or "none"
        raise TargetError(f"{run}: no checkpoint at step {step}; there are: {available}")
    return folders[step]


def _load_saved(folder: Path, name: str, device: str, *, run: Path | None = None) -> Target:
    model, extra = load_with_extra(folder, device=device)
    bos = extra.get("bos")
    kind = kind_of(extra)
    if kind is not None:
        kind.from_saved(folder, model, extra)  # checks the wiring
    # Models of a causal graph predict only at the last position, also those of the user's own.
    is_of_graph = "bos" not in extra and extra.get("kind") not in (None, "own")
    with running(name):
        is_language_model = not is_of_graph and not attends_ahead(model)
    return Target(name, model, bos if isinstance(bos, int) else None, run, is_language_model)


def _from_folder(path: Path, name: str, device: str) -> Target:
    config_path = path / CONFIG_FILE
    if not config_path.exists():
        raise TargetError(f"{path}: no {CONFIG_FILE} or {RECIPE_FILE} in it: no model")
    config = read_config(config_path)
    if _is_saved(config):
        return _load_saved(path, name, device)
    read_model_config(path)
    has_tokenizer = any((path / file).is_file() for file in TOKENIZER_FILES)
    return _from_hugging_face(str(path), name, device, has_tokenizer=has_tokenizer)


def _from_hugging_face(source: str, name: str, device: str, *, has_tokenizer: bool) -> Target:
    model = load_bridge(source, device=device, has_tokenizer=has_tokenizer)
    with running(name):
        predicts_every_token = not attends_ahead(model)
    bos: Bos = "auto" if has_tokenizer else None
    return Target(name, model, bos, predicts_every_token=predicts_every_token)

"""Models on the Hugging Face Hub: their revisions, and files that are what the Hub declares.

Only configuration, tokenizer and safetensors are fetched. Every file is compared with the checksum
that the Hub declares for it, before anything reads it.
"""

import errno
import hashlib
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechcausal.models import CONFIG_FILE, WEIGHTS_FILE
from mechcausal.models.adapter import ModelFileError, read_config
from mechcausal.studies.hugging_face import PICKLES, TargetError
from mechcausal.support.messages import excerpt, first_line

MAIN = "main"
_TEXTS = ("*.json", "*.txt", "*.model")  # configuration and tokenizer
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_CHUNK = 2**20


class HubError(TargetError):
    """The Hub does not give what was asked for; the message is one line that names it."""


class InterruptedDownloadError(HubError):
    """A download broke off; the same call, made again, continues with the files that it lacks."""


class WrongChecksumError(HubError):
    """A fetched file is not the one that the Hub declares; it has been deleted."""


@dataclass(frozen=True)
class HubFile:
    """A file of a revision.

    Attributes:
        name: its path in the repository.
        size: bytes.
        sha256: the SHA-256 that the Hub declares for a large file; None for a small one.
        blob: git's object id, the SHA-1 of a small file with git's header.
    """

    name: str
    size: int
    sha256: str | None
    blob: str | None

    @property
    def digest(self) -> str:
        """The checksum that the Hub declares, "" if it declares none."""
        return self.sha256 or self.blob or ""


@dataclass(frozen=True)
class HubRevision:
    """A revision of a model on the Hub.

    Attributes:
        repo: the model's name, such as "EleutherAI/pythia-70m".
        name: branch, tag or commit.
        commit: the commit that it stands for.
        files: what `fetch` downloads: configuration, tokenizer and safetensors.
        pickles: names of weights that are pickles, which are never fetched.
    """

    repo: str
    name: str
    commit: str
    files: tuple[HubFile, ...]
    pickles: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of `files`."""
        return sum(file.size for file in self.files)

    @property
    def weights(self) -> Mapping[str, str]:
        """The declared checksum of every file of weights, by its name."""
        return {f.name: f.digest for f in self.files if f.name.endswith(".safetensors")}

    @property
    def problem(self) -> str:
        """Why the revision cannot be read; empty if it can."""
        if self.weights:
            return ""
        if self.pickles:
            return f"holds no safetensors: {excerpt(self.pickles[0])} is a pickle, never opened"
        return "holds no weights"


@contextmanager
def asking(subject: str, *, action: str = "download") -> Iterator[None]:
    """Talk to the Hub: it prints nothing, and its errors become one line.

    Args:
        subject: the model, with its revision if there is one; the message begins with it.
        action: what breaks off if the connection does.

    Raises:
        HubError: the block raised an exception.
    """
    from huggingface_hub import errors
    from huggingface_hub import utils as hub_utils

    utils: Any = hub_utils  # exports more than it declares
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    shows_progress = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except HubError:
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"{subject}: gated: accept its terms on the Hub and log in (hf auth login)"
        ) from None
    except errors.RepositoryNotFoundError:
        problem = "no such model on the Hub, or a private one"
        if action == "upload":
            problem = "the Hub does not let you write there"
        raise HubError(f"{subject}: {problem} (hf auth login)") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{subject}: no such revision on the Hub") from None
    except errors.HFValidationError as error:
        raise HubError(
            f"{subject}: not a model's name: {excerpt(first_line(error), 120)}"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            problem = "denies access" if action == "download" else "does not let you write there"
            raise HubError(f"{subject}: the Hub {problem} ({status}): hf auth login") from None
        raise HubError(f"{subject}: the Hub answers {status}: {excerpt(_reason(error))}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise InterruptedDownloadError(
            f"{subject}: the Hub is not reached: {_cause(error)}"
        ) from None
    except Exception as error:  # the HTTP client may raise anything: give the user one line
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise HubError(f"{subject}: no space left on the disk") from None
        if code is not None and not isinstance(error, ConnectionError):
            raise HubError(f"{subject}: {excerpt(error, 160)}") from None
        raise InterruptedDownloadError(
            f"{subject}: the {action} broke off: {_cause(error)}"
        ) from None
    finally:
        logger.setLevel(level)
        if shows_progress:
            utils.enable_progress_bars()


def _cause(error: BaseException) -> str:
    """The first line of an error and its type: the HTTP client's messages may be empty."""
    return excerpt(f"{type(error).__name__}: {first_line(error)}", 120)


def _reason(error: Any) -> str:
    return error.server_message or first_line(error)


def list_revisions(repo: str) -> dict[str, str]:
    """The commit of every branch and tag of a model, by name.

    Raises:
        HubError: there is no such model, or the Hub does not answer.
    """
    from huggingface_hub import HfApi

    with asking(repo):
        refs = HfApi().list_repo_refs(repo)
    # A branch hides a tag of the same name, as it does for git and for the Hub.
    return {ref.name: ref.target_commit for ref in (*refs.tags, *refs.branches)}


def describe(repo: str, revision: str = MAIN) -> HubRevision:
    """The commit and the files of a revision, with the checksums that the Hub declares.

    Raises:
        HubError: there is no such model or revision, or the Hub does not answer.
    """
    from huggingface_hub import HfApi

    with asking(f"{repo}@{revision}"):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = [
        HubFile(
            name=sibling.rfilename,
            size=sibling.size or 0,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
            blob=sibling.blob_id,
        )
        for sibling in info.siblings or ()
        if "/" not in sibling.rfilename
    ]
    return _chosen_files(repo, revision, info.sha or "", files)


def _chosen_files(repo: str, revision: str, commit: str, listed: Sequence[HubFile]) -> HubRevision:
    """Of all files of a revision, those that are fetched."""
    files = {file.name: file for file in listed}
    shards = sorted(filter(_SHARD.fullmatch, files))
    weights = [WEIGHTS_FILE] if WEIGHTS_FILE in files else shards
    texts = sorted(name for name in files if any(Path(name).match(text) for text in _TEXTS))
    pickles = sorted(name for name in files if any(Path(name).match(glob) for glob in PICKLES))
    return HubRevision(
        repo=repo,
        name=revision,
        commit=commit,
        files=tuple(files[name] for name in (*texts, *weights)),
        pickles=tuple(pickles),
    )


def read_hub_config(repo: str) -> Any:
    """The config.json of a model's main revision, which is then in the Hugging Face cache.

    Returns:
        The file's content; None if there is none, or it cannot be fetched or read.
    """
    from huggingface_hub import hf_hub_download

    try:
        with asking(repo):
            path = hf_hub_download(repo, CONFIG_FILE)
        return read_config(Path(path))
    except (HubError, ModelFileError):
        return None


def describe_cached(repo: str, revision: str = MAIN) -> HubRevision:
    """A revision as the Hugging Face cache has it, without the Hub and so without its checksums.

    Raises:
        HubError: the cache has no such revision.
    """
    from huggingface_hub import snapshot_download

    with asking(f"{repo}@{revision}"):
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return _chosen_files(
        repo,
        revision,
        folder.name,
        [HubFile(name, size, None, None) for name, size in files.items()],
    )


def is_cached(revision: HubRevision) -> bool:
    """Whether the Hugging Face cache holds every file of a revision."""
    from huggingface_hub import try_to_load_from_cache

    return all(
        isinstance(try_to_load_from_cache(revision.repo, file.name, revision=revision.commit), str)
        for file in revision.files
    )


def fetch(revision: HubRevision, cache: Path | None = None) -> Path:
    """Download a revision's files, one after the other, and compare each with its checksum.

    Files that are there are not downloaded again. A connection that drops is taken up again by the
    client a few times.

    Args:
        revision: its `files` are fetched.
        cache: folder of a cache; None for that of Hugging Face.

    Returns:
        The folder that holds them, links into the cache.

    Raises:
        WrongChecksumError: a file is not the one that the Hub declares.
        HubError: the Hub does not answer, or the disk is full.
    """
    from huggingface_hub import hf_hub_download

    subject = f"{revision.repo}@{revision.name}"
    if revision.problem:
        raise HubError(f"{subject}: {revision.problem}")
    if CONFIG_FILE not in {file.name for file in revision.files}:
        raise HubError(f"{subject}: holds no {CONFIG_FILE}")
    folder = Path()
    for file in revision.files:
        # Asked for by its name, the commit of a branch is kept in the cache, to be there offline.
        named = revision.name if cache is None and file.name == CONFIG_FILE else revision.commit
        with asking(subject):
            path = Path(hf_hub_download(revision.repo, file.name, revision=named, cache_dir=cache))
            digest = _digest(path, file)
        if path.parent.name != revision.commit:
            raise HubError(f"{subject}: has changed while it was fetched; try again")
        if file.digest and digest != file.digest:
            for copy in {path.resolve(), path}:
                with suppress(OSError):
                    copy.unlink()
            kind = "SHA-256" if file.sha256 else "git id"
            raise WrongChecksumError(
                f"{subject}: {excerpt(file.name)}: its {kind} is {digest[:12]}…, the Hub declares "
                f"{file.digest[:12]}…: damaged on its way, or not what it claims to be; deleted"
            )
        folder = path.parent
    return folder


def _digest(path: Path, file: HubFile) -> str:
    """The checksum of a file on the disk, of the kind that the Hub declares for it."""
    size = path.stat().st_size
    # git's object id is no defence against forgery, but it is all the Hub declares of a small file.
    hashed = hashlib.sha256() if file.sha256 else git_object(size)
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest()


def git_object(size: int) -> Any:
    """The hash of git's object id of a file with so many bytes, to be updated with its content.

    Example:
        >>> hashed = git_object(5)
        >>> hashed.update(b"hello")
        >>> hashed.hexdigest()[:8]
        'b6fc4c62'
    """
    return hashlib.sha1(b"blob %d\0" % size)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    folder = folder.resolve()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free

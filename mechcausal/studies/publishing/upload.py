"""Upload a run to the Hugging Face Hub; what is there already is not sent again."""

from collections.abc import Callable
from typing import Any

from mechcausal.records.run_folder import RECIPE_FILE
from mechcausal.studies.hub import MAIN, HubError, asking, git_object
from mechcausal.studies.publishing.publication import Publication, PublishedRevision


def publish(
    publication: Publication,
    *,
    private: bool = False,
    on_progress: Callable[[int, PublishedRevision], None] = lambda done, revision: None,
) -> dict[str, str]:
    """Create the model if it does not exist, and upload its revisions, `main` last.

    An upload that was interrupted goes on when it is called again: the client does not send a file
    that a branch holds already.

    Args:
        publication: the run.
        private: create the model as a private one.
        on_progress: called before every revision with the number of those done.

    Returns:
        The commit of every branch.

    Raises:
        HubError: nobody is logged in, the name belongs to another model, or the Hub fails.
        TargetError: a checkpoint is damaged or gone.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    repo = publication.repo
    if get_token() is None:
        raise HubError(f"{repo}: nobody is logged in: hf auth login, or set HF_TOKEN")
    api = HfApi()
    with asking(repo, action="upload"):
        _check_free(api, publication, private=private)
        api.create_repo(repo, private=private, exist_ok=True)
    commits = {}
    for done, revision in enumerate(publication.revisions):
        on_progress(done, revision)
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in publication.files(revision).items()
        ]
        with asking(f"{repo}@{revision.branch}", action="upload"):
            if revision.branch != MAIN:
                api.create_branch(repo, branch=revision.branch, exist_ok=True)
            commit = api.create_commit(
                repo,
                operations,
                commit_message=f"Weights at step {revision.step}",
                revision=revision.branch,
            )
        commits[revision.branch] = commit.oid
    return commits


def _check_free(api: Any, publication: Publication, *, private: bool) -> None:
    """Refuse a model that exists and is not this run.

    Raises:
        HubError: it holds other weights, or is public though a private one is wanted.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repo = publication.repo
    try:
        info = api.model_info(repo, files_metadata=True)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return
    if private and not info.private:
        raise HubError(f"{repo}: exists and is public; --private is for a new model")
    recipe = publication.recipe_toml.encode()
    ours = git_object(len(recipe))
    ours.update(recipe)
    files = {sibling.rfilename: sibling.blob_id for sibling in info.siblings or ()}
    has_weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in files)
    if has_weights and files.get(RECIPE_FILE) != ours.hexdigest():
        raise HubError(f"{repo}: holds another model already; choose another name")

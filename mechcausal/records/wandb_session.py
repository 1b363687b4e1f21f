"""W&B's session of this process, which runs of others may share: nothing here acts on theirs.

W&B has one session a process: settings, a login, a service, and the runs that are open. A second
`wandb.init` returns the run that was opened last, and `wandb.teardown` ends them all.
"""

import os
import queue
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mechcausal.records.wandb_fragments import fragments

if TYPE_CHECKING:
    from wandb import Settings
    from wandb.sdk.wandb_run import Run

# Held while a run is opened and while the service is ended: a run in between is on no list yet.
_lock = threading.RLock()
_open_runs: list[tuple[int, "Run"]] = []
"""Ours, with the process that opened them: W&B's own list is kept free of them."""


def settings() -> "Settings | None":
    """W&B's settings as its next run will have them; None where nobody has left any.

    Nothing is started and nothing is changed. W&B, slow to import, is then not imported.
    """
    home, config = Path("~").expanduser(), os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    file = Path(config).expanduser() / "settings"
    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    workspace = (Path(name) / "settings" for name in ("wandb", ".wandb"))
    places = (file, netrc, home / "_netrc", *workspace)
    if "wandb" not in sys.modules and not any(place.is_file() for place in places):
        return None
    import wandb
    from wandb.sdk import wandb_setup

    session = wandb_setup._singleton  # `singleton()` would make one
    if session is not None and session._pid == os.getpid() and session.settings_if_loaded:
        return session.settings_if_loaded
    found = wandb.Settings(silent=True)  # names no file that it reads
    found.settings_system = str(file)
    found.update_from_system_settings()
    found.update_from_env_vars(dict(os.environ))
    return found


def has_key(settings: "Settings | None") -> bool:
    """Whether W&B has a key for its server: in the environment, of a login, or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if settings is None:
        return False
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    host = settings.base_url
    try:
        return bool(
            settings.api_key
            or settings.identity_token_file
            or wbauth.session_credentials(host=host)
            or wbauth.read_netrc_auth(host=host)
        )
    except AuthenticationError:  # a key of the wrong form: W&B says so when the run starts
        return True


def open_run(*, patience: int, **options: Any) -> "Run":
    """`wandb.init` for a run that others in this process do not see.

    Args:
        patience: seconds for W&B to tidy up after an attempt that failed.
        **options: of `wandb.init`, with `dir` and `id`.

    Raises:
        Exception: whatever W&B raises; its session and the folder are then without the run.
    """
    import wandb
    from wandb.sdk import wandb_setup

    with _lock:
        _leave_service_of_others()
        folder, run_id = Path(options["dir"]), options["id"]
        before = fragments(folder, run_id)
        try:
            session = wandb_setup.singleton()
            # Read before the environment changes: W&B warns the user of a change that comes after.
            _ = session.settings
            # Its reports of its own errors keep a process without network from ending.
            with environment("WANDB_ERROR_REPORTING", "false", override=False):
                run = wandb.init(**options)
        except Exception as error:
            begun = set(fragments(folder, run_id)) - set(before)
            if not _others_are_open():
                _end_session(patience)
            elif begun:
                _close_unopened(run_id, error, patience)
            for leftover in begun:  # without a row
                shutil.rmtree(leftover, ignore_errors=True)
            raise
        with suppress(AttributeError):
            session.remove_active_run(run)  # else the user's next `wandb.init` returns it
        _open_runs.append((os.getpid(), run))
        return run


def finish_run(run: "Run", exit_code: int, *, seconds: int) -> None:
    """`run.finish` that is given up after some seconds.

    W&B's limits do not hold of the upload of an artifact: where the network has gone in the midst
    of one, it is tried again for twenty minutes. Only the end of its service stops that.

    Raises:
        TimeoutError: it took longer.
        Exception: whatever W&B raises.
    """
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def finish() -> None:
        try:
            run.finish(exit_code=exit_code)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=finish, daemon=True).start()
    try:
        error = ended.get(timeout=seconds)
    except queue.Empty:
        with _lock:
            if not _others_are_open(run):
                _kill(_services())
        raise TimeoutError(f"not finished after {seconds} s") from None
    if error is not None:
        raise error
    with _lock:
        _forget(run)


def abandon_run(run: "Run", *, patience: int) -> None:
    """Let go of a run that failed, and of W&B's service, which may have died, if nobody needs it.

    Else W&B stumbles over it when Python exits.

    Args:
        run: of `open_run`.
        patience: seconds after which the service is killed.
    """
    with _lock:
        _forget(run)
        if not _others_are_open():
            _end_session(patience)


def _close_unopened(run_id: str, error: Exception, patience: int) -> None:
    """Free the id of a run that could not be opened: else the next attempt finds it in use."""
    from wandb.sdk import wandb_setup
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

    if isinstance(error, ServerResponseError):  # somebody else's run has that id
        return
    with suppress(Exception):
        service = wandb_setup.singleton().assert_service()
        _, interface = service.inform_attach(run_id)
        # The service serves nobody while it waits for a run that was not told to end.
        interface.deliver_exit(1).wait_or(timeout=patience)
        service.inform_finish(run_id)


def _others_are_open(run: "Run | None" = None) -> bool:
    """Whether any run but this one is open: of ours, or of the user."""
    from wandb.sdk import wandb_setup

    session = wandb_setup._singleton
    if session is not None and session._pid == os.getpid() and session.most_recent_active_run:
        return True
    return any(other is not run for pid, other in _open_runs if pid == os.getpid())


def _forget(run: "Run") -> None:
    _open_runs[:] = [(pid, other) for pid, other in _open_runs if other is not run]


def _end_session(patience: int) -> None:
    """End W&B's service; what the user has set up or logged in to stays."""
    import wandb
    from wandb.sdk import wandb_setup

    session = wandb_setup._singleton
    if session is None or session._pid != os.getpid():
        return
    kept = session.settings_if_loaded
    timer = threading.Timer(patience, _kill, [_services()])
    timer.daemon = True
    timer.start()
    try:
        # W&B would exit with the code of a service that was killed.
        with suppress(Exception, SystemExit):
            wandb.teardown(exit_code=1)
    finally:
        timer.cancel()
    with suppress(Exception):
        wandb_setup._setup(settings=kept, start_service=False)


def _services() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                found.append(child)
    return found


def _kill(services: list[psutil.Process]) -> None:
    for service in services:
        with suppress(psutil.Error):
            service.kill()


@contextmanager
def environment(name: str, value: str, *, override: bool = True) -> Iterator[None]:
    """A variable of the environment within the block.

    Args:
        name: of the variable.
        value: within the block.
        override: False leaves a value that it has already.
    """
    before = os.environ.get(name)
    if override or before is None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _leave_service_of_others() -> None:
    """Have a service of our own in a process that inherited its parent's.

    That one may have ended, and it would take our run for one in use after we were killed.
    """
    _, owner, *_ = [*os.environ.get("WANDB_SERVICE", "").split("-"), ""]
    if owner and owner != str(os.getpid()):
        del os.environ["WANDB_SERVICE"]

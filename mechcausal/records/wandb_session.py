"""Open and close W&B runs without touching W&B runs that the user has open in this process.

W&B has one session per process: settings, login, service, and the open runs. A second `wandb.init`
returns the run opened last, and `wandb.teardown` ends all of them.
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

# A run that is just being opened is in no list yet: do not end the service meanwhile.
_lock = threading.RLock()
_open_runs: list[tuple[int, "Run"]] = []
"""Our open runs with the pid that opened them; they are removed from W&B's own list."""


def settings() -> "Settings | None":
    """The settings of W&B's next run; None if no settings file exists and W&B is not imported.

    Starts and changes nothing. Without a settings file W&B, slow to import, is not imported.
    """
    home, config = Path("~").expanduser(), os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    system_file = Path(config).expanduser() / "settings"
    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    workspace = (Path(name) / "settings" for name in ("wandb", ".wandb"))
    files = (system_file, netrc, home / "_netrc", *workspace)
    if "wandb" not in sys.modules and not any(file.is_file() for file in files):
        return None
    import wandb
    from wandb.sdk import wandb_setup

    session = wandb_setup._singleton  # `singleton()` would create a session
    if session is not None and session._pid == os.getpid() and session.settings_if_loaded:
        return session.settings_if_loaded
    loaded = wandb.Settings(silent=True)  # do not print the names of the files read
    loaded.settings_system = str(system_file)
    loaded.update_from_system_settings()
    loaded.update_from_env_vars(dict(os.environ))
    return loaded


def has_key(settings: "Settings | None") -> bool:
    """Whether W&B has a key for its server: from the environment, a login, or netrc."""
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
    except AuthenticationError:  # malformed key: W&B reports it when the run starts
        return True


def open_run(*, patience: int, **options: Any) -> "Run":
    """`wandb.init` for a run that other W&B users in this process do not see.

    Args:
        patience: seconds that W&B gets to clean up after a failed attempt.
        **options: arguments of `wandb.init`, including `dir` and `id`.

    Raises:
        Exception: whatever W&B raises; nothing of the run is left in its session or the folder.
    """
    import wandb
    from wandb.sdk import wandb_setup

    with _lock:
        _leave_service_of_others()
        folder, run_id = Path(options["dir"]), options["id"]
        old_fragments = fragments(folder, run_id)
        try:
            session = wandb_setup.singleton()
            # Load the settings first: W&B warns if the environment changes before it has.
            _ = session.settings
            # Without a network, W&B's error reporting would keep the process from exiting.
            with environment("WANDB_ERROR_REPORTING", "false", override=False):
                run = wandb.init(**options)
        except Exception as error:
            new_fragments = set(fragments(folder, run_id)) - set(old_fragments)
            if not _others_are_open():
                _end_session(patience)
            elif new_fragments:
                _close_unopened(run_id, error, patience)
            for fragment in new_fragments:  # they hold no rows
                shutil.rmtree(fragment, ignore_errors=True)
            raise
        with suppress(AttributeError):
            session.remove_active_run(run)  # else the user's next `wandb.init` would return it
        _open_runs.append((os.getpid(), run))
        return run


def finish_run(run: "Run", exit_code: int, *, seconds: int) -> None:
    """`run.finish` with a time limit.

    W&B's own limits do not cover artifact uploads: if the network fails during one, W&B retries for
    twenty minutes, unless its service is killed.

    Raises:
        TimeoutError: the limit was exceeded.
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
    """Drop a failed run; also end W&B's service if no other run is open.

    A dead service would make W&B fail when Python exits.

    Args:
        run: a run from `open_run`.
        patience: seconds after which the service is killed.
    """
    with _lock:
        _forget(run)
        if not _others_are_open():
            _end_session(patience)


def _close_unopened(run_id: str, error: Exception, patience: int) -> None:
    """Release the id of a run that failed to open, so that the next attempt can use it."""
    from wandb.sdk import wandb_setup
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

    if isinstance(error, ServerResponseError):  # another user's run has that id
        return
    with suppress(Exception):
        service = wandb_setup.singleton().assert_service()
        _, interface = service.inform_attach(run_id)
        # The service blocks until it is told that the run ends.
        interface.deliver_exit(1).wait_or(timeout=patience)
        service.inform_finish(run_id)


def _others_are_open(run: "Run | None" = None) -> bool:
    """Whether any other run is open in this process, ours or the user's."""
    from wandb.sdk import wandb_setup

    session = wandb_setup._singleton
    if session is not None and session._pid == os.getpid() and session.most_recent_active_run:
        return True
    return any(other is not run for pid, other in _open_runs if pid == os.getpid())


def _forget(run: "Run") -> None:
    _open_runs[:] = [(pid, other) for pid, other in _open_runs if other is not run]


def _end_session(patience: int) -> None:
    """End W&B's service but keep the user's settings and login."""
    import wandb
    from wandb.sdk import wandb_setup

    session = wandb_setup._singleton
    if session is None or session._pid != os.getpid():
        return
    user_settings = session.settings_if_loaded
    timer = threading.Timer(patience, _kill, [_services()])
    timer.daemon = True
    timer.start()
    try:
        # W&B exits the process with the service's code if the service was killed.
        with suppress(Exception, SystemExit):
            wandb.teardown(exit_code=1)
    finally:
        timer.cancel()
    with suppress(Exception):
        wandb_setup._setup(settings=user_settings, start_service=False)


def _services() -> list[psutil.Process]:
    services = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                services.append(child)
    return services


def _kill(services: list[psutil.Process]) -> None:
    for service in services:
        with suppress(psutil.Error):
            service.kill()


@contextmanager
def environment(name: str, value: str, *, override: bool = True) -> Iterator[None]:
    """Set an environment variable within the block.

    Args:
        name: name of the variable.
        value: its value within the block.
        override: False keeps an existing value.
    """
    old_value = os.environ.get(name)
    if override or old_value is None:
        os.environ[name] = value
    try:
        yield
    finally:
        if old_value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = old_value


def _leave_service_of_others() -> None:
    """Do not use a W&B service inherited from the parent process; W&B then starts its own.

    The parent's service may have ended. It would also keep our run id in use after we are killed.
    """
    _, owner, *_ = [*os.environ.get("WANDB_SERVICE", "").split("-"), ""]
    if owner and owner != str(os.getpid()):
        del os.environ["WANDB_SERVICE"]

"""A W&B server on this machine, for the real client to talk to, that fails when it is told to."""

import contextlib
import gzip
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.wandb_protocol import Received, ReceivedRun


class WandbServer:
    """The server: a context manager, listening on 127.0.0.1 while entered.

    Attributes:
        received: everything that arrived.
    """

    def __init__(self) -> None:
        """Nothing received; not listening yet."""
        self.received = Received()
        self._http: _Http | None = None
        self._port = 0
        self._status: int | None = None
        self._hanging = False
        self.takes_files = True
        self._wake = threading.Event()
        self._rows_left: int | None = None
        self._failure: Callable[[], None] = self.stop

    def __enter__(self) -> "WandbServer":
        """Start listening."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop listening and let go of every connection."""
        self.stop()

    @property
    def url(self) -> str:
        """For WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def run(self, run_id: str) -> ReceivedRun:
        """A run that has to have arrived.

        Raises:
            KeyError: it has not.
        """
        return self.received.runs[run_id]

    # --- How it behaves ---

    def start(self) -> None:
        """Listen and answer, at the same address as before."""
        self.stop()
        self.answer()
        self._http = _Http(("127.0.0.1", self._port), self)
        self._port = self._http.server_address[1]
        self.received.url = self.url
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections and cut the open ones; `start` comes back."""
        http, self._http = self._http, None
        self._wake.set()
        if http is not None:
            http.shutdown()
            http.server_close()
            http.cut()

    def answer(self) -> None:
        """Answer again, after `hang` or `reject`."""
        self._status, self._hanging, self._rows_left = None, False, None
        self.takes_files = True
        self._wake.set()

    def hang(self) -> None:
        """Accept every request from now on and answer none, until `answer`, `reject` or `stop`."""
        if not self._hanging:
            self._wake = threading.Event()
            self._hanging = True

    def reject(self, status: int = 500) -> None:
        """Answer every request from now on with an HTTP error."""
        self._status, self._hanging = status, False
        self._wake.set()

    def refuse_uploads(self) -> None:
        """Take everything but files, which are to be tried again, until `answer`."""
        self.takes_files = False

    def fail(self, after: int, how: Callable[[], None] | None = None) -> None:
        """Fail once so many further history rows have arrived.

        Args:
            after: rows that are still taken; the request that completes them already fails.
            how: a method such as `server.hang`; `server.stop` by default.
        """
        self._failure = how or self.stop
        self._rows_left = after

    def stream(self, run_id: str, content: dict[str, Any]) -> bool:
        """Take one message of a run's stream; False: it is the one to fail at."""
        rows = self.received.stream(run_id, content)
        with self.received.lock:
            if self._rows_left is None:
                return True
            self._rows_left -= rows
            if self._rows_left > 0:
                return True
            self._rows_left = None
        self._failure()
        return False

    @property
    def failing(self) -> int | None:
        """Status to fail with; waits while the server hangs."""
        if self._hanging:
            self._wake.wait()
            return 503
        return self._status


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], owner: WandbServer) -> None:
        self.owner = owner
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away, or is cut off, is no error here."""

    def cut(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        owner = self.server.owner
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status = owner.failing
        path = urlsplit(self.path).path
        if status is not None:
            self._reply(status, {"error": "refused"})
        elif path == "/graphql":
            request = json.loads(body)
            match = re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])
            name = request.get("operationName") or (match[1] if match else "")
            self._reply(200, owner.received.answer(name, request.get("variables") or {}))
        elif path.endswith("/file_stream"):
            if owner.stream(unquote(path.split("/")[-2]), json.loads(body)):
                self._reply(200, {"exitcode": None, "limits": {}})
            else:
                self._reply(owner.failing or 500, {"error": "refused"})
        elif path.startswith("/upload/") and not owner.takes_files:
            self._reply(503, {"error": "try again"})
        elif path.startswith("/upload/"):
            owner.received.store(path.removeprefix("/upload/"), body)
            self._reply(200, {}, digest=hashlib.md5(body).digest())
        else:
            self._reply(404, {"error": path})

    def _reply(self, status: int, content: Any, digest: bytes | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if digest is not None:
            self.send_header("ETag", f'"{digest.hex()}"')
        self.end_headers()
        self.wfile.write(data)

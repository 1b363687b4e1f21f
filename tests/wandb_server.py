"""A W&B server on this machine: enough of its protocol for the real client, and ways to fail.

The client sends GraphQL for runs, files and artifacts, a stream of numbered lines per run
(`file_stream`), and the bytes of files to addresses that GraphQL answers gave it. What arrives is
kept, for tests to look at. Only what wandb 0.31 asks is answered; any other operation gets a
GraphQL error and is listed in `unknown`.
"""

import base64
import gzip
import hashlib
import json
import re
import socket
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

ENTITY = "tester"
HISTORY = "wandb-history.jsonl"
SUMMARY = "wandb-summary.json"


@dataclass
class ReceivedArtifact:
    """One version of an artifact.

    Attributes:
        name: its collection's name.
        type: the artifact's type.
        run: id of the run that logged it.
        aliases: such as `latest`.
        digest: the client's digest of the manifest.
        files: bytes by path within the artifact.
        committed: the client said that everything is uploaded.
    """

    id: str
    name: str
    type: str
    run: str
    aliases: list[str]
    digest: str
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


@dataclass
class ReceivedRun:
    """One run as the server has it.

    Attributes:
        id: the run's id.
        config: values by key.
        tags: the run's tags.
        lines: the streams' lines by file, then by line number; a line sent twice counts once.
        files: bytes by name.
        artifacts: in order of creation.
        exit_code: what finish reported, None while the run is open.
    """

    id: str
    project: str
    config: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: list[ReceivedArtifact] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows in the order of their line numbers."""
        lines = self.lines.get(HISTORY, {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    @property
    def steps(self) -> list[int]:
        """`_step` of every row."""
        return [row["_step"] for row in self.history]

    @property
    def summary(self) -> dict[str, Any]:
        """The latest summary."""
        lines = self.lines.get(SUMMARY, {})
        content: dict[str, Any] = json.loads(lines[max(lines)]) if lines else {}
        return content


class WandbServer:
    """The server: a context manager, listening on 127.0.0.1 while entered.

    Attributes:
        runs: what arrived, by run id.
        operations: GraphQL operations in order of arrival.
        unknown: operations that the server does not know.
    """

    def __init__(self) -> None:
        """Nothing received; not listening yet."""
        self.runs: dict[str, ReceivedRun] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        self._http: _Http | None = None
        self._port = 0
        self._status: int | None = None
        self._hanging = False
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
        return self.runs[run_id]

    # --- How it behaves ---

    def start(self) -> None:
        """Listen and answer, at the same address as before."""
        self.stop()
        self.answer()
        self._http = _Http(("127.0.0.1", self._port), self)
        self._port = self._http.server_address[1]
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
        self._wake.set()

    def hang(self) -> None:
        """Accept every request from now on and answer none, until `answer`, `reject` or `stop`."""
        self._wake = threading.Event()
        self._hanging = True

    def reject(self, status: int = 500) -> None:
        """Answer every request from now on with an HTTP error."""
        self._status, self._hanging = status, False
        self._wake.set()

    def fail(self, after: int, how: Callable[[], None] | None = None) -> None:
        """Fail once so many further history rows have arrived.

        Args:
            after: rows that are still taken; the request that completes them is not answered.
            how: a method such as `server.hang`; `server.stop` by default.
        """
        self._failure = how or self.stop
        self._rows_left = after

    # --- What it answers ---

    def graphql(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        """The answer to one GraphQL request."""
        with self.lock:
            self.operations.append(operation)
            method = getattr(self, f"_on_{operation}", None)
            if method is None:
                self.unknown.append(operation)
                return {"data": None, "errors": [{"message": f"unknown operation {operation}"}]}
            return {"data": method(values)}

    def stream(self, run_id: str, content: dict[str, Any]) -> bool:
        """Take one message of a run's stream; False: it was the one to fail at."""
        with self.lock:
            run = self.runs[run_id]
            rows = 0
            for name, chunk in (content.get("files") or {}).items():
                lines = run.lines.setdefault(name, {})
                for number, line in enumerate(chunk["content"], start=chunk["offset"]):
                    rows += name == HISTORY and number not in lines
                    lines[number] = line
            if content.get("complete"):
                run.exit_code = content.get("exitcode")
            if self._rows_left is not None:
                self._rows_left -= rows
                if self._rows_left <= 0:
                    self._rows_left = None
                    self._failure()
                    return False
        return True

    def store(self, path: str, content: bytes) -> None:
        """Take a file's bytes; the path is one that `_upload` gave out."""
        kind, owner, name = (unquote(part) for part in path.split("/"))
        with self.lock:
            if kind == "run":
                self.runs[owner].files[name] = content
            elif name:
                self._artifact(owner).files[name] = content

    @property
    def failing(self) -> int | None:
        """Status to fail with; waits while the server hangs."""
        if self._hanging:
            self._wake.wait()
            return 503
        return self._status

    def _upload(self, kind: str, owner: str, name: str) -> str:
        return f"{self.url}/upload/" + "/".join(quote(p, safe="") for p in (kind, owner, name))

    def _artifact(self, artifact_id: str) -> ReceivedArtifact:
        artifacts = (a for run in self.runs.values() for a in run.artifacts)
        return next(a for a in artifacts if a.id == artifact_id)

    def _on_ServerFeaturesQuery(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_Viewer(self, values: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
        return {"viewer": viewer | {"teams": {"edges": []}}}

    def _on_RunResumeStatus(self, values: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "1", "name": values["project"], "entity": {"id": "1", "name": ENTITY}}
        run = self.runs.get(values["name"])
        if run is None:
            return {"model": project | {"bucket": None}}
        history = run.lines.get(HISTORY, {})
        events = run.lines.get("wandb-events.jsonl", {})
        bucket = {
            "id": run.id,
            "name": run.id,
            "displayName": run.id,
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": len(run.lines.get("output.log", {})),
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "historyTail": json.dumps([history[max(history)]] if history else []),
            "eventsTail": json.dumps([events[max(events)]] if events else []),
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "tags": run.tags,
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": project | {"bucket": bucket}}

    def _on_UpsertBucket(self, values: dict[str, Any]) -> dict[str, Any]:
        name = values.get("name") or values["id"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, ReceivedRun(name, values.get("project") or ""))
        if values.get("config"):
            entries = json.loads(values["config"])
            run.config = {key: entry["value"] for key, entry in entries.items() if key != "_wandb"}
        if values.get("tags"):
            run.tags = list(values["tags"])
        project = {"id": "1", "name": run.project, "entity": {"id": "1", "name": ENTITY}}
        bucket = {
            "id": run.id,
            "name": run.id,
            "displayName": values.get("displayName") or run.id,
            "description": None,
            "config": values.get("config") or "{}",
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run.lines.get(HISTORY, {})),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_CreateRunFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": self._upload("run", values["run"], name)}
            for name in values["files"]
        ]
        return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": files}}

    def _on_MarkRunFilesUploaded(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def _on_ArtifactType(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _on_XXHashDigestsEnabled(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _on_FetchArtifactDigestAlgorithm(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _on_CreateArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        request = values["input"]
        run = self.runs[request["runName"]]
        aliases = [entry["alias"] for entry in request.get("aliases") or []]
        name, digest = request["artifactCollectionName"], request["digest"]
        same = [a for a in run.artifacts if (a.name, a.digest) == (name, digest)]
        if same:
            artifact = same[0]
            artifact.aliases += [alias for alias in aliases if alias not in artifact.aliases]
        else:
            artifact = ReceivedArtifact(
                id=base64.b64encode(uuid.uuid4().bytes).decode(),
                name=name,
                type=request["artifactTypeName"],
                run=run.id,
                aliases=aliases,
                digest=digest,
            )
            run.artifacts.append(artifact)
        # As on the real server, an alias belongs to one version at a time.
        for other in run.artifacts:
            if other is not artifact and other.name == name:
                other.aliases = [alias for alias in other.aliases if alias not in aliases]
        state = "COMMITTED" if artifact.committed else "PENDING"
        answer = {"id": artifact.id, "state": state, "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": answer}}

    def _on_CreateArtifactManifest(self, values: dict[str, Any]) -> dict[str, Any]:
        manifest: dict[str, Any] = {"id": values["artifactID"]}
        file = {"id": "1"}
        if values["includeUpload"]:
            url = self._upload("artifact", values["artifactID"], "")
            file |= {"uploadUrl": url, "uploadHeaders": []}  # type: ignore[dict-item]
        return {"createArtifactManifest": {"artifactManifest": manifest | {"file": file}}}

    def _on_UpdateArtifactManifest(self, values: dict[str, Any]) -> dict[str, Any]:
        url = self._upload("artifact", values["artifactManifestID"], "")
        file = {"id": "1", "uploadUrl": url, "uploadHeaders": []}
        manifest = {"id": values["artifactManifestID"], "file": file}
        return {"updateArtifactManifest": {"artifactManifest": manifest}}

    def _on_CreateArtifactFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {
                "node": {
                    "storagePath": spec["name"],
                    "uploadUrl": self._upload("artifact", spec["artifactID"], spec["name"]),
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": spec["artifactID"]},
                }
            }
            for spec in values["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(values["artifactID"])
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}


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
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        owner = self.server.owner
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status = owner.failing
        if status is not None:
            self._reply(status, {"error": "refused"})
            return
        path = urlsplit(self.path).path
        if path == "/graphql":
            request = json.loads(body)
            match = re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])
            name = request.get("operationName") or (match[1] if match else "")
            self._reply(200, owner.graphql(name, request.get("variables") or {}))
        elif path.endswith("/file_stream"):
            if owner.stream(unquote(path.split("/")[-2]), json.loads(body)):
                self._reply(200, {"exitcode": None, "limits": {}})
        elif path.startswith("/upload/"):
            owner.store(path.removeprefix("/upload/"), body)
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

"""What a W&B server answers and keeps: runs, their streams of lines, their files, their artifacts.

The client sends GraphQL for runs, files and artifacts, a stream of numbered lines per run
(`file_stream`), and the bytes of files to addresses that GraphQL answers gave it. Only what
wandb 0.31 asks is answered; any other operation gets a GraphQL error and is listed in `unknown`.
"""

import base64
import json
import re
import threading
import uuid
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

ENTITY = "tester"
HISTORY = "wandb-history.jsonl"
SUMMARY = "wandb-summary.json"
_WORD = r"(?<=[a-z])(?=[A-Z])"


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


class Received:
    """Everything that arrived.

    Attributes:
        runs: by id.
        operations: GraphQL operations in order of arrival.
        unknown: operations that have no answer here.
        url: address that files are sent to, set by the server.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.runs: dict[str, ReceivedRun] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.url = ""
        self.lock = threading.RLock()

    def answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        """The answer to one GraphQL request."""
        with self.lock:
            self.operations.append(operation)
            method = getattr(self, "_on_" + re.sub(_WORD, "_", operation).lower(), None)
            if method is None:
                self.unknown.append(operation)
                return {"data": None, "errors": [{"message": f"unknown operation {operation}"}]}
            return {"data": method(values)}

    def stream(self, run_id: str, content: dict[str, Any]) -> int:
        """Take one message of a run's stream; the number of history rows that are new."""
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
        return rows

    def store(self, path: str, content: bytes) -> None:
        """Take a file's bytes; the path is one that `_upload` gave out."""
        kind, owner, name = (unquote(part) for part in path.split("/"))
        with self.lock:
            if kind == "run":
                self.runs[owner].files[name] = content
            elif name:
                self._artifact(owner).files[name] = content

    def _upload(self, kind: str, owner: str, name: str) -> str:
        return f"{self.url}/upload/" + "/".join(quote(p, safe="") for p in (kind, owner, name))

    def _artifact(self, artifact_id: str) -> ReceivedArtifact:
        artifacts = (a for run in self.runs.values() for a in run.artifacts)
        return next(a for a in artifacts if a.id == artifact_id)

    def _on_server_features_query(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_viewer(self, values: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
        return {"viewer": viewer | {"teams": {"edges": []}}}

    def _on_run_resume_status(self, values: dict[str, Any]) -> dict[str, Any]:
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

    def _on_upsert_bucket(self, values: dict[str, Any]) -> dict[str, Any]:
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

    def _on_create_run_files(self, values: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": self._upload("run", values["run"], name)}
            for name in values["files"]
        ]
        return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": files}}

    def _on_artifact_type(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _on_create_artifact(self, values: dict[str, Any]) -> dict[str, Any]:
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

    def _on_create_artifact_manifest(self, values: dict[str, Any]) -> dict[str, Any]:
        file: dict[str, Any] = {"id": "1"}
        if values["includeUpload"]:
            url = self._upload("artifact", values["artifactID"], "")
            file |= {"uploadUrl": url, "uploadHeaders": []}
        manifest = {"id": values["artifactID"], "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _on_create_artifact_files(self, values: dict[str, Any]) -> dict[str, Any]:
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

    def _on_commit_artifact(self, values: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(values["artifactID"])
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

"""A Hugging Face Hub on this machine, for the real client to talk to; it fails when told to.

It speaks the part of the Hub's protocol that reading and publishing models needs: refs, revisions
with the checksums of their files, downloads with ranges, and commits with their uploads.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_a_test"
Files: TypeAlias = dict[str, bytes]


class HubRepo:
    """A repository: branches of commits of files.

    Attributes:
        commits: the files of every commit.
        branches: the commit of every branch.
        tags: the commit of every tag.
        private: whether it was created as a private one.
        refusal: HTTP status and error code of every answer; None for none.
        lies: by commit and name, the content that is sent instead of the declared one.
    """

    def __init__(self, *, private: bool = False) -> None:
        """A repository as the Hub creates it, with a first commit."""
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.private = private
        self.refusal: tuple[int, str] | None = None
        self.lies: dict[tuple[str, str], bytes] = {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, files: Mapping[str, bytes]) -> str:
        """Add files to a branch, which may be a new one."""
        parent = self.branches.get(branch, "")
        content = self.commits.get(parent, {}) | dict(files)
        identity = json.dumps([branch, parent, {n: _sha256(c) for n, c in content.items()}])
        commit = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[commit] = content
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit."""
        names = {**self.tags, **self.branches}
        return revision if revision in self.commits else names.get(revision)


class HubServer:
    """The server: a context manager, listening on 127.0.0.1 while entered.

    Attributes:
        repos: the repositories, by name.
        blobs: uploaded large files, by SHA-256.
        requests: method and path of every request, in order.
        drops: how many downloads of large files break off after a third of their bytes.
        keeps_dropping: every download breaks off without sending anything.
    """

    def __init__(self) -> None:
        """Empty; not listening yet."""
        self.repos: dict[str, HubRepo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.drops = 0
        self.keeps_dropping = False
        self._http: ThreadingHTTPServer | None = None

    def __enter__(self) -> "HubServer":
        """Start listening."""
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop listening."""
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        assert self._http is not None
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def add(self, repo: str, revisions: Mapping[str, Path | Mapping[str, bytes]]) -> HubRepo:
        """Add a repository with a branch for every folder or set of files."""
        added = self.repos[repo] = HubRepo()
        for branch, source in revisions.items():
            added.commit(branch, _read(source) if isinstance(source, Path) else source)
        return added

    def downloads(self, name: str = "model.safetensors") -> list[str]:
        """The commits whose file of this name was asked for, in order."""
        found = (
            re.fullmatch(rf"/.+/resolve/(\w+)/{re.escape(name)}", path)
            for method, path in self.requests
            if method == "GET"
        )
        return [match[1] for match in found if match]


@contextmanager
def client_of(server: HubServer, cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """Let huggingface_hub in this process talk to a server.

    What a process of its own reads from HF_ENDPOINT and its kin when it imports the client.
    """
    from huggingface_hub import constants

    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        # Large files go by the LFS protocol, whose server is simple.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield monkeypatch


def environment_of(server: HubServer, home: Path) -> dict[str, str]:
    """What a process needs in its environment to talk to a server."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
    }


def _read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".png"))


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                handle(self, *map(unquote, match.groups()))
                return
        self._error(404, "EntryNotFound")

    # --- Reading ---

    def _repo(self, name: str) -> HubRepo | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._error(401, "RepoNotFound")
            return None
        if repo.refusal is not None:
            self._error(*repo.refusal)
            return None
        return repo

    def _commit(self, name: str, revision: str) -> tuple[HubRepo, str] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound")
            return None
        return repo, commit

    def _info(self, name: str, revision: str = "main") -> None:
        if found := self._commit(name, revision):
            repo, commit = found
            siblings = []
            for path, content in repo.commits[commit].items():
                sibling: dict[str, Any] = {"rfilename": path, "size": len(content)}
                sibling["blobId"] = _git_id(content)
                if _is_large(path):
                    size = len(content)
                    sibling["lfs"] = {"sha256": _sha256(content), "size": size, "pointerSize": 134}
                siblings.append(sibling)
            self._json({"id": name, "sha": commit, "siblings": siblings, "private": repo.private})

    def _refs(self, name: str) -> None:
        if repo := self._repo(name):
            self._json(
                {
                    kind: [
                        {"name": branch, "ref": f"refs/{git}/{branch}", "targetCommit": commit}
                        for branch, commit in named.items()
                    ]
                    for kind, git, named in (
                        ("branches", "heads", repo.branches),
                        ("tags", "tags", repo.tags),
                    )
                }
                | {"converts": []}
            )

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._commit(name, revision)
        if not found:
            return
        repo, commit = found
        if path not in repo.commits[commit]:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        declared = repo.commits[commit][path]
        content = repo.lies.get((commit, path), declared)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if _is_large(path):
            headers["X-Linked-Etag"] = f'"{_sha256(declared)}"'
            headers["X-Linked-Size"] = str(len(declared))
        headers["ETag"] = f'"{_sha256(declared) if _is_large(path) else _git_id(declared)}"'
        status, size = 200, len(content)
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            status, content = 206, content[start:]
        if self.command == "GET" and _is_large(path) and self._is_dropped():
            sent = b"" if self.hub.keeps_dropping else content[: len(content) // 3]
            self._send(status, content, headers, sent=sent)
            self.close_connection = True
            return
        self._send(status, content, headers)

    def _is_dropped(self) -> bool:
        if self.hub.keeps_dropping:
            return True
        self.hub.drops -= 1
        return self.hub.drops >= 0

    # --- Publishing ---

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "")
            return False
        return True

    def _create(self) -> None:
        if not self._may_write():
            return
        wanted = json.loads(self._body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repos:
            answer = {"error": "You already created this model repo"}
            self._json(answer | {"url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repos[name] = HubRepo(private=wanted.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _branch(self, name: str, branch: str) -> None:
        if not self._may_write() or not (repo := self._repo(name)):
            return
        if branch in repo.branches:
            self._json({"error": "Reference already exists"}, 409)
            return
        start = repo.resolve(json.loads(self._body or b"{}").get("startingPoint", "main"))
        if start is None:
            self._error(404, "RevisionNotFound")
            return
        repo.branches[branch] = start
        self._json({})

    def _validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, name: str, revision: str) -> None:
        found = self._commit(name, revision) if self._may_write() else None
        if not found:
            return
        repo, commit = found
        files = []
        for file in json.loads(self._body)["files"]:
            path = file["path"]
            current = repo.commits[commit].get(path)
            answer = {"path": path, "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if _is_large(path) else "regular"
            if current is not None:
                answer["oid"] = _sha256(current) if _is_large(path) else _git_id(current)
            files.append(answer)
        self._json({"files": files})

    def _batch(self, name: str) -> None:
        if not self._may_write() or not self._repo(name):
            return
        objects = []
        for wanted in json.loads(self._body)["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        if _sha256(self._body) != oid:
            self._error(400, "")
            return
        self.hub.blobs[oid] = self._body
        self._json({})

    def _write(self, name: str, revision: str) -> None:
        repo = self._repo(name) if self._may_write() else None
        if repo is None:
            return
        files: Files = {}
        for line in self._body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    self._error(400, "")
                    return
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = repo.commit(revision, files)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "success": True})

    # --- Answers ---

    def _json(self, content: Any, status: int = 200) -> None:
        headers = {"Content-Type": "application/json"}
        self._send(status, json.dumps(content).encode(), headers)

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, **(headers or {})})

    def _send(
        self,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        *,
        sent: bytes | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if sent is None else sent)


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, Any]] = [
    (rf"/api/models/{_NAME}", _Handler._info),
    (rf"/api/models/{_NAME}/revision/([^/]+)", _Handler._info),
    (rf"/api/models/{_NAME}/refs", _Handler._refs),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler._file),
    (r"/api/repos/create", _Handler._create),
    (r"/api/validate-yaml", _Handler._validate),
    (rf"/api/models/{_NAME}/branch/([^/]+)", _Handler._branch),
    (rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler._preupload),
    (rf"/api/models/{_NAME}/commit/([^/]+)", _Handler._write),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"/lfs/(\w+)", _Handler._store),
]

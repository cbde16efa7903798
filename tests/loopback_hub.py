"""A Hub on this machine's loopback: the part of the Hub's HTTP interface that pushing and pulling model repositories uses.

Real `huggingface_hub` code talks to it; nothing is replaced on the client's side but the endpoint. Repositories live in
memory, every commit is kept. Faults are asked for by name (`hub.faults`), and every request is on record (`hub.requests`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"  # the only token that may write, and read private repositories


@dataclass
class Repository:
    """One model repository: commits (path -> content), and the branches that point at them."""

    name: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        sha = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.branches[branch] = files, message, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


class LoopbackHub:
    """A running Hub; `url` is its endpoint.

    Attributes:
        repositories: by name.
        requests: `"METHOD path"` of every request, in order.
        sent: bytes sent of each file, by its name.
        when_sent: called with the name of each file that has been sent.
        unreachable: names of files at which the connection is closed.
        faults: what goes wrong: `"commit"` answers 503 so many times, `"flip"` sends so many files with one byte changed.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.unreachable: set[str] = set()
        self.when_sent: Callable[[str], None] = lambda path: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, files: dict[str, bytes]) -> Repository:
        """Put files into a repository, as one commit on top of what its main branch held."""
        repository = self.repositories.setdefault(name, Repository(name))
        before = repository.files() if repository.branches else {}
        repository.commit("main", {**before, **files})
        return repository

    def take_fault(self, name: str) -> bool:
        taken = self.faults[name] > 0
        self.faults[name] -= taken
        return taken


class _Refusal(Exception):
    """An answer that is an error: status, the Hub's code for it, and a message."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self) -> None:
        parts = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {parts.path}")
        body = self._body()
        try:
            for pattern, method, answer in self._routes:
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in method.split():
                    answer(self, *(unquote(group) for group in match.groups()), body=body, query=parse_qs(parts.query))
                    return
            raise _Refusal(404, "EntryNotFound", f"no such address: {self.command} {parts.path}")
        except _Refusal as refusal:
            status, code, message = refusal.args
            self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    do_GET = do_HEAD = do_POST = do_PUT = _route

    def _token(self, *, write: bool) -> str | None:
        """The token, which must be the right one, if any; a wrong one is 401."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN) or (write and token is None):
            raise _Refusal(401, "", "Invalid username or password.")
        return token

    def _repository(self, name: str, *, write: bool) -> Repository:
        """A missing or hidden repository is 404, or 401 to nobody."""
        token, repository = self._token(write=write), self.hub.repositories.get(name)
        if repository is None or (repository.private and token is None):
            raise _Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit_of(self, name: str, revision: str, *, write: bool = False) -> tuple[Repository, str]:
        """The repository, and the commit that a branch or a commit's own name stands for."""
        repository = self._repository(name, write=write)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, sha

    def _create(self, body: bytes, query: Any) -> None:
        self._token(write=True)
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        repository = self.hub.repositories[name] = Repository(name, private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _yaml(self, body: bytes, query: Any) -> None:
        text = json.loads(body)["content"]
        front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
        errors = [] if isinstance(front, dict) else [{"message": "no metadata"}]
        base = (front or {}).get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            errors.append({"message": '"base_model" must be a repository'})
        self._answer(200 if not errors else 400, {"errors": errors, "warnings": []})

    def _info(self, name: str, revision: str = "main", *, body: bytes, query: Any) -> None:
        repository, sha = self._commit_of(name, revision)
        siblings: list[dict[str, Any]] = []
        for path, data in repository.commits[sha].items():
            lfs = {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}} if _is_large(path) else {}
            siblings.append({"rfilename": path, "size": len(data), "blobId": _oid(data), **lfs})
        self._answer(200, {"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def _branch(self, name: str, branch: str, *, body: bytes, query: Any) -> None:
        repository = self._repository(name, write=True)
        if branch in repository.branches:
            raise _Refusal(409, "", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._answer(200, {})

    def _preupload(self, name: str, revision: str, *, body: bytes, query: Any) -> None:
        self._commit_of(name, revision, write=True)
        paths = [one["path"] for one in json.loads(body)["files"]]
        modes = {path: "lfs" if _is_large(path) else "regular" for path in paths}
        self._answer(200, {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]})

    def _batch(self, name: str, *, body: bytes, query: Any) -> None:
        self._repository(name, write=True)
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.hub.objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}
        self._answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _put_object(self, oid: str, *, body: bytes, query: Any) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, "", "the checksum does not match")
        self.hub.objects[oid] = body
        self._answer(200)

    def _commit(self, name: str, revision: str, *, body: bytes, query: Any) -> None:
        repository, head = self._commit_of(name, revision, write=True)
        if self.hub.take_fault("commit"):
            raise _Refusal(503, "", "try again")
        files, message = dict(repository.commits[head]), ""
        for line in body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise _Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refusal(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
        opened = {}
        if "create_pr" in query:
            repository.pull_requests += 1
            revision = f"refs/pr/{repository.pull_requests}"
            opened = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{repository.pull_requests}"}
        sha = repository.commit(revision, files, message)
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", **opened})

    def _resolve(self, name: str, revision: str, path: str, *, body: bytes, query: Any) -> None:
        if path in self.hub.unreachable:
            self.close_connection = True
            self.connection.close()
            return
        repository, sha = self._commit_of(name, revision)
        data = repository.commits[sha].get(path)
        if data is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{_oid(data)}"',
            "X-Repo-Commit": sha,
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest() if path.endswith(".safetensors") else _oid(data)}"',
        }
        if self.command == "HEAD":
            self._answer(200, data, headers)
            return
        status = 200
        if path.endswith(".safetensors"):
            if self.hub.take_fault("flip"):
                middle = len(data) // 2
                data = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last, size = int(asked[1]), int(asked[2] or len(data) - 1), len(data)
                status, data = 206, data[first : last + 1]
                headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{size}"
        self.hub.sent[path] += len(data)
        self._answer(status, data, headers)
        self.hub.when_sent(path)

    _repo = r"([^/]+/[^/]+)"
    _routes = (
        (r"/api/repos/create", "POST", _create),
        (r"/api/validate-yaml", "POST", _yaml),
        (rf"/api/models/{_repo}", "GET", _info),
        (rf"/api/models/{_repo}/revision/(.+)", "GET", _info),
        (rf"/api/models/{_repo}/branch/(.+)", "POST", _branch),
        (rf"/api/models/{_repo}/preupload/(.+)", "POST", _preupload),
        (rf"/api/models/{_repo}/commit/(.+)", "POST", _commit),
        (rf"/{_repo}\.git/info/lfs/objects/batch", "POST", _batch),
        (r"/lfs/([0-9a-f]+)", "PUT", _put_object),
        (rf"/{_repo}/resolve/([^/]+)/(.+)", "GET HEAD", _resolve),
    )


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".gz"))


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

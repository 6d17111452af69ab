"""A stand-in of the hub's HTTP API on this machine: model information, tree and files, with the faults of real ones.

Weights are LFS files: their SHA-256 is the ETag, and `resolve` redirects to a storage host that knows Range (the same
server under its other name).
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

MAIN = "a" * 40
BLOCK = 2**14


@dataclass
class Repository:
    """`files` of every commit by name; `refs`: branch or tag -> commit."""

    files: dict[str, dict[str, bytes]]
    refs: dict[str, str] = field(default_factory=lambda: {"main": MAIN})
    token: str | None = None  # without it the repository is gated


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Faults:
    """`cuts`: by file name, after how many bytes each of its next transfers ends; `sizes`: what the list says of a
    file; `damage`: files sent with other bytes; `statuses`: by path, an answer without content; `delay`: seconds
    before each block of a file; `hide_sizes`: the list has none; `no_tree`: there is no list of the tree;
    `ignore_range`: files are sent whole."""

    cuts: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    damage: set[str] = field(default_factory=set)
    statuses: dict[str, int] = field(default_factory=dict)
    delay: float = 0.0
    hide_sizes: bool = False
    no_tree: bool = False
    ignore_range: bool = False


class Hub:
    """The repositories by ID, what goes wrong, and every request so far."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults = Faults()
        self.calls: list[Call] = []
        self.address = ""
        self.storage = ""

    def add(self, repo: str, files: dict[str, bytes], token: str | None = None) -> Repository:
        self.repositories[repo] = Repository({MAIN: files}, token=token)
        return self.repositories[repo]

    def downloads(self, name: str) -> list[Call]:
        """The transfers of a file, by their start."""
        return [call for call in self.calls if call.method == "GET" and call.path.endswith(f"/{name}")]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    hub.storage = hub.address.replace("127.0.0.1", "localhost")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf"))


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            call = Call(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
            hub.calls.append(call)
            if path in hub.faults.statuses:
                return self._send(hub.faults.statuses[path])
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self._with_repository("/".join(parts[2:4]), lambda one: self._describe(one, parts[2:]))
            if parts[:1] == ["storage"]:
                return self._send_file("/".join(parts[1:3]), parts[3], parts[4])
            if parts[2:3] == ["resolve"]:
                return self._with_repository("/".join(parts[:2]), lambda one: self._resolve(one, parts))
            return self._send(404)

        def _with_repository(self, repo: str, answer: Callable[[Repository], None]) -> None:
            repository = hub.repositories.get(repo)
            if repository is None:
                return self._send(401 if self.headers.get("Authorization") is None else 404, error="RepoNotFound")
            if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
                return self._send(403, error="GatedRepo")
            return answer(repository)

        def _describe(self, repository: Repository, parts: list[str]) -> None:
            revision = "/".join(parts[3:]) or "main"
            commit = repository.refs.get(revision, revision)
            if commit not in repository.files:
                return self._send(404, error="RevisionNotFound")
            entries = [_entry(hub, name, content) for name, content in repository.files[commit].items()]
            if parts[2:3] == ["tree"] and hub.faults.no_tree:
                return self._send(404)
            if parts[2:3] == ["tree"]:
                return self._send_json([_tree_entry(hub, *item) for item in repository.files[commit].items()])
            return self._send_json({"id": "/".join(parts[:2]), "sha": commit, "siblings": entries})

        def _resolve(self, repository: Repository, parts: list[str]) -> None:
            repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            commit = repository.refs.get(revision, revision)
            if commit not in repository.files:
                return self._send(404, error="RevisionNotFound")
            content = repository.files[commit].get(name)
            if content is None:
                return self._send(404, error="EntryNotFound", headers={"X-Repo-Commit": commit})
            if not is_lfs(name):
                return self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag(content)}"'})
            headers = {
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "Location": f"{hub.storage}/storage/{repo}/{commit}/{name}",
            }
            return self._send(302, headers=headers)

        def _send_file(self, repo: str, commit: str, name: str) -> None:
            content = hub.repositories[repo].files[commit][name]
            if name in hub.faults.damage:
                content = bytes(byte ^ 1 for byte in content)
            given_range = None if hub.faults.ignore_range else self.headers.get("Range")
            start = int(given_range.removeprefix("bytes=").split("-")[0]) if given_range else 0
            self.send_response(206 if given_range else 200)
            if given_range:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            cuts = hub.faults.cuts.get(name, [])
            end = start + cuts.pop(0) if cuts else len(content)
            try:
                for at in range(start, min(end, len(content)), BLOCK):
                    time.sleep(hub.faults.delay)
                    self.wfile.write(content[at : min(at + BLOCK, end)])
                    self.wfile.flush()
            except OSError:  # the client was killed
                pass
            if end < len(content):
                self.close_connection = True

        def _send(
            self, status: int, content: bytes = b"", headers: dict[str, str] | None = None, error: str | None = None
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if error is not None:
                self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _send_json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler


def _entry(hub: Hub, name: str, content: bytes) -> dict[str, Any]:
    """A file in the model's information."""
    size = hub.faults.sizes.get(name, len(content))
    entry: dict[str, Any] = {"rfilename": name}
    if not hub.faults.hide_sizes:
        entry |= {"size": size, "blobId": etag(content)}
        if is_lfs(name):
            entry["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
    return entry


def _tree_entry(hub: Hub, name: str, content: bytes) -> dict[str, Any]:
    size = hub.faults.sizes.get(name, len(content))
    entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": etag(content)}
    if is_lfs(name):
        entry["lfs"] = {"size": size, "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
    return entry

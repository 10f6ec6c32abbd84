"""A small server that speaks as much of the Hugging Face hub's protocol as `snapshot_download` needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ERRORS = {
    "unknown": (404, {"X-Error-Code": "RepoNotFound"}),
    "private": (401, {"X-Error-Code": "RepoNotFound"}),
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "bad-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "down": (500, {}),
}


@dataclass
class Repository:
    """One model repository: revision name to folder. The first revision is `main`'s."""

    revisions: dict[str, Path]
    error: str | None = None  # a key of ERRORS: what the hub says instead of listing the repository
    cut: dict[str, int] = field(default_factory=dict)  # file to the bytes it gives before the hub fails, for good

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit stands for."""
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def folder(self, commit: str) -> Path:
        return next(f for name, f in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Hub:
    """A running hub: add to `repositories`, read `requests`."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path
    tokens: set[str | None] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)  # files whose cut has been given once

    @property
    def files(self) -> set[str]:
        """Names of the files that were asked for."""
        found = (re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.*)", path) for _, path in self.requests)
        return {match[1] for match in found if match}


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        hub.tokens.add(self.headers.get("Authorization"))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?/?", path):
            self._api(hub, match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(hub, match[1], match[2], match[3])
        else:
            self._send(404, b"{}")

    def _api(self, hub: Hub, name: str, what: str | None, revision: str) -> None:
        repository = hub.repositories.get(name, Repository({}, error="unknown"))
        if repository.error is not None:
            code, headers = ERRORS[repository.error]
            return self._send(code, b"{}", headers)
        commit = repository.commit(revision)
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        folder = repository.folder(commit)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if what == "tree":
            listing: object = [
                {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": _oid(p)}
                for p in files
            ]
        else:
            siblings = [{"rfilename": str(p.relative_to(folder))} for p in files]
            listing = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
        return self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _file(self, hub: Hub, name: str, revision: str, file: str) -> None:
        repository = hub.repositories[name]
        commit = repository.commit(revision)
        assert commit is not None
        path = repository.folder(commit) / file
        if file in hub.failing:
            return self._send(500, b"broken")
        data = path.read_bytes()
        begin, code = 0, 200
        headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            begin, code = int(match[1]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and file in repository.cut:
            hub.failing.add(file)
            return self._send(code, data[begin:], headers, only=repository.cut[file])
        return self._send(code, data[begin:], headers)

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None, only: int | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if only is not None:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:only])


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()

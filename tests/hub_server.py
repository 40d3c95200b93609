"""A server on loopback that speaks as much of the hub's protocol as huggingface-hub asks for when it fetches a model.

    GET  /api/models/ID/revision/REV          which commit a branch or tag is
    GET  /api/models/ID/tree/COMMIT           its files, sizes and hashes
    HEAD /ID/resolve/COMMIT/FILE              one file's hash and size
    GET  /ID/resolve/COMMIT/FILE              its bytes, from where a Range header says

As on the hub, what a repository holds may be listed by anybody, and what a gated one holds is refused file by file.
"""
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
from typing import Any

LARGE = (".safetensors", ".bin", ".model")


@dataclass
class Repository:
    """What the server holds, and how it misbehaves.

    Attributes:
        id: of the one repository. files: name -> bytes, of every commit. commits: branch or tag -> commit.
        token: that files are given for; None gives them to anybody. denied: of a user who asked for access in vain.
        breaks: file -> bytes after which the connection ends, once. fails: files answered with status 503.
        spoiled: files that arrive with one byte changed, once.
        asked: (method, file, first byte) of every request for a file.
    """

    id: str
    files: dict[str, bytes]
    commits: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    token: str | None = None
    denied: str | None = None
    breaks: dict[str, int] = field(default_factory=dict)
    fails: set[str] = field(default_factory=set)
    spoiled: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    endpoint: str = ""

    def digest(self, name: str) -> str:
        """As the hub names content: SHA-256 of a large file, git's SHA-1 of a small one."""
        content = self.files[name]
        if name.endswith(LARGE):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def listing(self) -> list[dict[str, Any]]:
        """The tree, as the hub's API has it."""
        entries = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": self.digest(name)[:40]}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": self.digest(name), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def gets(self, name: str) -> list[int]:
        """First bytes of all requests for a file's content."""
        return [first for method, asked, first in self.asked if method == "GET" and asked == name]


class _Handler(BaseHTTPRequestHandler):
    repository: Repository

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        repository, path = self.repository, self.path.partition("?")[0]
        if not (path.startswith(f"/api/models/{repository.id}/") or path.startswith(f"/{repository.id}/")):
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if (found := re.fullmatch(r"/api/models/.+/(revision|tree)/(\w+)", path)) is not None:
            kind, revision = found.groups()
            commit = repository.commits.get(revision, revision if revision in repository.commits.values() else None)
            if commit is None:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            described = {"id": repository.id, "sha": commit, "siblings": [{"rfilename": name} for name in repository.files]}
            return self.give(json.dumps(described if kind == "revision" else repository.listing()).encode(), {})
        found = re.fullmatch(r"/.+/resolve/(\w+)/(.+)", path)
        if found is None or found[2] not in repository.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.file(found[2], found[1])

    def file(self, name: str, commit: str) -> None:
        repository, token = self.repository, self.headers.get("Authorization", "").removeprefix("Bearer ")
        start = int((re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["", "0"])[1])
        repository.asked.append((self.command, name, start))
        if repository.token is not None and token != repository.token:
            if token and token == repository.denied:
                return self.refuse(403, "GatedRepo", f"Access to model {repository.id} is restricted")
            if token:
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            return self.refuse(401, "GatedRepo", f"Access to model {repository.id} is restricted")
        if self.command == "GET" and name in repository.fails:
            return self.refuse(503, "", "Service Unavailable")
        content = repository.files[name]
        if self.command == "GET" and name in repository.spoiled:
            repository.spoiled.discard(name)
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"ETag": f'"{repository.digest(name)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        ends = repository.breaks.pop(name, None) if self.command == "GET" else None
        return self.give(content[start:], headers, 206 if start else 200, ends)

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.give(json.dumps({"error": message}).encode(), headers, status)

    def give(self, content: bytes, headers: dict[str, str], status: int = 200, ends: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content if ends is None else content[:ends])
        if ends is not None:
            self.close_connection = True


@contextmanager
def serving(repository: Repository) -> Iterator[Repository]:
    """Serve a repository on a free port of loopback; its `endpoint` is what HF_ENDPOINT would be."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"repository": repository}))
    repository.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield repository
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files, as a repository holds them."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}

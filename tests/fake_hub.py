"""A model hub on this machine: as much of the real one's interface as downloads use."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves `files` of `repository`. `large` files carry a SHA-256, others git's SHA-1.

    `break_after` breaks the first so many transfers of a path after that many bytes; `served`
    replaces a file's content without changing what is announced; `status` answers every request
    with an error.
    """

    repository: str = "Qwen/Tiny"
    files: dict[str, bytes] = field(default_factory=dict)
    large: tuple[str, ...] = (".safetensors", ".bin", ".gguf")
    break_after: dict[str, list[int]] = field(default_factory=dict)
    served: dict[str, bytes] = field(default_factory=dict)
    ignores_ranges: bool = False
    status: tuple[int, str] | None = None
    redirect_to: str | None = None
    answer: bytes | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)
    endpoint: str = ""

    def is_large(self, path: str) -> bool:
        return path.endswith(self.large)

    def checksum(self, path: str) -> str:
        content = self.files[path]
        if self.is_large(path):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def siblings(self) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = []
        for path, content in self.files.items():
            entry: dict[str, object] = {"rfilename": path, "size": len(content)}
            entry["blobId"] = hashlib.sha1(path.encode()).hexdigest()
            if self.is_large(path):
                entry["lfs"] = {
                    "sha256": self.checksum(path),
                    "size": len(content),
                    "pointerSize": 130,
                }
            else:
                entry["blobId"] = self.checksum(path)
            entries.append(entry)
        return entries

    def tree(self) -> list[dict[str, object]]:
        """The listing in the form that huggingface_hub's own downloader asks for."""
        return [
            {
                "type": "file",
                "path": entry["rfilename"],
                "size": entry["size"],
                "oid": entry["blobId"],
                **(
                    {"lfs": {**lfs, "oid": lfs["sha256"]}}
                    if isinstance(lfs := entry.get("lfs"), dict)
                    else {}
                ),
            }
            for entry in self.siblings()
        ]

    def ranges(self, path: str) -> list[str]:
        """The Range header of each request for a file, in order; "" where it had none."""
        return [header for asked, header in self.requests if asked.endswith(f"/{path}")]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((path, self.headers.get("Range", "")))
        if self.hub.status is not None:
            code, kind = self.hub.status
            self._send(code, b"{}", {"X-Error-Code": kind})
        elif self.hub.redirect_to is not None:
            self._send(302, b"", {"Location": self.hub.redirect_to})
        elif path.startswith(f"/api/models/{self.hub.repository}/tree/"):
            self._send(200, json.dumps(self.hub.tree()).encode())
        elif path.startswith(f"/api/models/{self.hub.repository}"):
            listing = {
                "id": self.hub.repository,
                "sha": COMMIT,
                "siblings": self.hub.siblings(),
            }
            self._send(200, self.hub.answer or json.dumps(listing).encode())
        elif path.startswith(prefix := f"/{self.hub.repository}/resolve/{COMMIT}/"):
            self._file(path.removeprefix(prefix), body=body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _file(self, path: str, *, body: bool) -> None:
        if path not in self.hub.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = self.hub.served.get(path, self.hub.files[path])
        start, code = 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not self.hub.ignores_ranges:
            start, code = int(asked[1]), 206
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{self.hub.checksum(path)}"',
            "X-Linked-Size": str(len(content)),
        }
        if code == 206:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(code, content[start:], headers, body=body, cut=self._cut(path, body=body))

    def _cut(self, path: str, *, body: bool) -> int | None:
        cuts = self.hub.break_after.get(path)
        return cuts.pop(0) if cuts and body else None

    def _send(
        self,
        code: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        *,
        body: bool = True,
        cut: int | None = None,
    ) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving_with(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer with `handler` on a free port of this machine; what is given is the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Run the hub; `hub.endpoint` is its address."""
    with serving_with(type("Handler", (_Handler,), {"hub": hub})) as hub.endpoint:
        yield hub

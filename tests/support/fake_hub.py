"""A Hugging Face hub of local folders, served over HTTP to the real client libraries.

with served({"datasets/nyu-mll/glue": folder, "some/model": folder}) as address: ...
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def served(repositories: Mapping[str, Path]) -> Iterator[str]:
    """Serve folders as repositories; gives the address for ``HF_ENDPOINT``."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer(body=True, asked=asked)

        def answer(self, body: bool, asked: bytes = b"") -> None:
            path = unquote(self.path.partition("?")[0]).strip("/")
            api = path.startswith("api/")
            path = re.sub("^(api/)(models/)?", "", path)
            name = next((name for name in repositories if path == name or path.startswith(f"{name}/")), None)
            if name is None:
                self.send({"error": "Repository not found"}, 404, body, {"X-Error-Code": "RepoNotFound"})
                return
            rest = path[len(name) :].strip("/").split("/")
            files = describe(repositories[name])
            if not api and rest[0] == "resolve":
                self.file(repositories[name] / "/".join(rest[2:]), body)
            elif rest[0] == "tree":
                found = listed(files, "/".join(rest[2:]), "recursive=true" in self.path.lower())
                if found:
                    self.send(found, 200, body)
                else:
                    self.send({"error": "Entry not found"}, 404, body, {"X-Error-Code": "EntryNotFound"})
            elif rest[0] == "paths-info":
                wanted = set(json.loads(asked)["paths"]) if asked.startswith(b"{") else set(form(asked))
                self.send([f for f in files if f["path"] in wanted], 200, body)
            else:
                about = {"id": name.removeprefix("datasets/"), "sha": COMMIT, "private": False, "gated": False}
                about |= {"disabled": False, "tags": [], "downloads": 0, "likes": 0, "lastModified": None}
                self.send({**about, "siblings": [{"rfilename": f["path"]} for f in files]}, 200, body)

        def file(self, path: Path, body: bool) -> None:
            if not path.is_file():
                self.send({"error": "Entry not found"}, 404, body, {"X-Error-Code": "EntryNotFound"})
                return
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.send_response(200)
            for key, value in {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def send(self, value: Any, status: int, body: bool, headers: Mapping[str, str] | None = None) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            for key, text in {"Content-Type": "application/json", "X-Repo-Commit": COMMIT, **(headers or {})}.items():
                self.send_header(key, text)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def describe(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    oids = [hashlib.sha1(path.read_bytes()).hexdigest() for path in paths]
    return [
        {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": oid}
        for path, oid in zip(paths, oids, strict=True)
    ]


def listed(files: list[dict[str, Any]], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What is in a folder: files, and the folders beside them."""
    start = f"{folder}/" if folder else ""
    inside = [f for f in files if f["path"].startswith(start)]
    own = [f for f in inside if recursive or "/" not in f["path"][len(start) :]]
    names = dict.fromkeys(f["path"][len(start) :].partition("/")[0] for f in inside if f not in own)
    return own + [{"type": "directory", "path": start + name, "oid": COMMIT, "size": 0} for name in names]


def form(content: bytes) -> list[str]:
    return [unquote(part.partition("=")[2]) for part in content.decode().split("&") if part.startswith("paths")]

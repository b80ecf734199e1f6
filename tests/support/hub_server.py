"""A stand-in for the Hub's HTTP interface, as far as an upload goes: what arrives is kept. Weights and arrays go by LFS."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Repositories by name, with their files; objects of LFS by their SHA-256."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.files, self.private = token, dict[str, dict[str, bytes]](), dict[str, bool]()
        self.objects = dict[str, bytes]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            self.server.private.setdefault(name, asked.get("visibility") == "private")
            status = 409 if name in self.server.files else 200
            self.server.files.setdefault(name, {})
            self._answer(status, {"url": f"{self.server.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            self._answer(200, {"files": [_mode(one["path"]) for one in wanted]})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self._answer(200, {"objects": [self._action(**one) for one in json.loads(body)["objects"]]})
        elif self.path.endswith("/commit/main"):
            self._commit(self.path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        else:
            self._answer(404, {"error": f"nothing at {self.path}"})

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("/revision")[0].partition("?")[0]
        private = self.server.private.get(name, False)
        self._answer(200, {"id": name, "sha": "0" * 40, "siblings": [], "private": private, "tags": []})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rpartition("/")[2]
        if digest == hashlib.sha256(content).hexdigest():
            self.server.objects[digest] = content
        self._answer(200 if digest in self.server.objects else 400, {})

    def _action(self, oid: str, size: int) -> dict[str, Any]:
        return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{self.server.url}/objects/{oid}"}}}

    def _commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                self.server.files[name][line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
        commit = {"commitOid": "1" * 40, "commitUrl": f"{self.server.url}/{name}/commit/{'1' * 40}"}
        self._answer(200, {"success": True, "pullRequestUrl": None, **commit})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def _mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith((".safetensors", ".npz")) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}


@contextlib.contextmanager
def hub_server(token: str) -> Iterator[Hub]:
    """A Hub that knows one token."""
    hub = Hub(token)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()

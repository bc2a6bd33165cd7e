"""A stand-in for the hub: the part of its HTTP interface that huggingface_hub uses to create a repository, to upload in
one commit (weights through LFS), to list and to download. It keeps everything in memory, on a port of this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_a_token_of_the_stand_in"
LFS = (".safetensors",)
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(
        default_factory=list
    )  # (sha, files), the last one is main

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1] if self.commits else ("0" * 40, {})
        return next((c for c in self.commits if c[0] == revision), None)

    def commit(self, files: dict[str, bytes]) -> str:
        before = self.commits[-1][1] if self.commits else {}
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, {**before, **files}))
        return sha


@dataclass
class Answer:
    status: int = 200
    json: Any = None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class FakeHub:
    """repositories, blobs: what was uploaded. requests: (method, path) of every request, in order."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = self.storage = ""  # huggingface_hub follows redirects to the same host by itself

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repositories[repo].commits[-1][1]

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> Answer:
        self.requests.append((method, path))
        if token not in (None, TOKEN):
            return Answer(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        for route, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and route == method:
                parts = {k: unquote(v) for k, v in found.groupdict().items()}
                if "repo" in parts and (refusal := self._refusal(parts["repo"], token, method)):
                    return refusal
                return handle(self, body, token, **parts)
        return Answer(404)

    def _refusal(self, name: str, token: str | None, method: str) -> Answer | None:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token is None):
            return Answer(404 if token else 401, headers={"X-Error-Code": "RepoNotFound"})
        return Answer(403) if method == "POST" and token is None else None

    def create(self, body: bytes, token: str | None) -> Answer:
        if token is None:
            return Answer(401)
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if name in self.repositories:
            return Answer(409, {"url": f"{self.url}/{name}"})
        self.repositories[name] = Repository(
            private=wanted.get("visibility") == "private" or wanted.get("private", False)
        )
        return Answer(200, {"url": f"{self.url}/{name}", "name": name})

    def validate(self, body: bytes, token: str | None) -> Answer:
        text = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            stated = yaml.safe_load(found[1]) if found else {}
        except yaml.YAMLError as e:
            return Answer(400, {"errors": [{"message": str(e)}], "warnings": []})
        return Answer(
            200, {"errors": [] if isinstance(stated, dict) else [{"message": "no mapping"}], "warnings": []}
        )

    def preupload(self, body: bytes, token: str | None, repo: str, revision: str) -> Answer:
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        return Answer(200, {"files": files})

    def batch(self, body: bytes, token: str | None, repo: str) -> Answer:
        objects = [
            {
                **o,
                "actions": {
                    "upload": {"href": f"{self.storage}/lfs/{o['oid']}"},
                    "verify": {"href": f"{self.url}/verify"},
                },
            }
            for o in json.loads(body)["objects"]
        ]
        return Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, token: str | None, oid: str) -> Answer:
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        return Answer()

    def verify(self, body: bytes, token: str | None) -> Answer:
        wanted = json.loads(body)
        return Answer(200 if len(self.blobs[wanted["oid"]]) == wanted["size"] else 400, {})

    def commit(self, body: bytes, token: str | None, repo: str, revision: str) -> Answer:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        sha = self.repositories[repo].commit(files)
        return Answer(
            200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"}
        )

    def info(self, body: bytes, token: str | None, repo: str, revision: str = "main") -> Answer:
        found = self.repositories[repo].find(revision)
        if found is None:
            return Answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        card = re.match(r"---\n(.*?)\n---\n", found[1].get("README.md", b"").decode(), re.DOTALL)
        data = {
            "id": repo,
            "modelId": repo,
            "sha": found[0],
            "private": self.repositories[repo].private,
            "tags": [],
        }
        return Answer(200, data | ({"cardData": yaml.safe_load(card[1])} if card else {}))

    def tree(self, body: bytes, token: str | None, repo: str, revision: str) -> Answer:
        found = self.repositories[repo].find(revision)
        assert found is not None
        return Answer(200, [self._entry(path, content) for path, content in found[1].items()])

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(LFS):
            entry["lfs"] = {
                "oid": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 130,
            }
        return entry

    def resolve(self, body: bytes, token: str | None, repo: str, revision: str, path: str) -> Answer:
        found = self.repositories[repo].find(revision)
        if found is None or path not in found[1]:
            return Answer(404, headers={"X-Error-Code": "EntryNotFound" if found else "RevisionNotFound"})
        content, headers = found[1][path], {"X-Repo-Commit": found[0]}
        if not path.endswith(LFS):
            return Answer(200, body=content, headers={**headers, "ETag": f'"{git_hash(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        self.blobs[oid] = content
        linked = {
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.storage}/lfs/{oid}",
        }
        return Answer(302, headers=headers | linked)

    def blob(self, body: bytes, token: str | None, oid: str) -> Answer:
        return Answer(200, body=self.blobs[oid], headers={"ETag": f'"{oid}"'})


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", "/api/repos/create", FakeHub.create),
    ("POST", "/api/validate-yaml", FakeHub.validate),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", FakeHub.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", FakeHub.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", FakeHub.put),
    ("POST", "/verify", FakeHub.verify),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", FakeHub.commit),
    ("GET", rf"/api/models/{REPO}", FakeHub.info),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", FakeHub.info),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", FakeHub.tree),
    *((m, rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", FakeHub.resolve) for m in ("GET", "HEAD")),
    *((m, r"/lfs/(?P<oid>\w+)", FakeHub.blob) for m in ("GET", "HEAD")),
]


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """huggingface_hub of this process uses the stand-in, and an empty cache; nobody is logged in."""
    from huggingface_hub import constants, hf_api

    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = read_chunks(self.rfile)
            said = self.headers.get("Authorization")
            token = said.removeprefix("Bearer ") if said else None
            found = hub.answer(self.command, urlsplit(self.path).path, token, body)
            content = found.body if found.json is None else json.dumps(found.json).encode()
            self.send_response(found.status)
            for name, value in {"Content-Length": str(len(content)), **found.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.storage = hub.url.replace("127.0.0.1", "localhost")
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # weights go through LFS
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no_token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # made at import, used by peft
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def read_chunks(file: Any) -> bytes:
    parts = []
    while size := int(file.readline(), 16):
        parts.append(file.read(size))
        file.readline()
    file.readline()
    return b"".join(parts)

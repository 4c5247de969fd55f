"""A loopback server for the part of the Hub's HTTP API that uploads and downloads use."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs

import pytest

from helpers.forked import orthogonalize

COMMIT = "0" * 40
CHUNKS_TOKEN = "token-of-the-chunked-storage"


@dataclass
class Repository:
    """A repository whose only revision is `commit`, also called main."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = COMMIT


@dataclass
class HubState:
    token: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: list[tuple[str, int, int]] = field(default_factory=list)  # of files: name, first byte, number of bytes
    before_file: Callable[[str, int], int | None] = lambda _name, _first: None
    """Called before each piece of a file is sent; says after how many bytes to cut the connection, if it should be."""
    cuts: list[str] = field(default_factory=list)  # a request that begins like the first is cut off, once
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)  # status and message by beginning of request
    branches: list[str] = field(default_factory=list)
    settings: list[dict] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    xorbs: dict[str, bytes] = field(default_factory=dict)  # chunks that the client of the chunked storage sent, by hash
    shards: list[bytes] = field(default_factory=list)  # and what it said of files and their chunks


def etag(path: str, content: bytes) -> str:
    """The Hub's name for a file's content: its git hash, or its SHA-256 where git holds only a pointer."""
    if path.endswith(".safetensors") or len(content) > 10 * 2**20:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entries(files: dict[str, bytes], wanted: list[str] | None, below: str) -> list[dict]:
    """The Hub's entries for files and folders: those `wanted`, or all directly `below` a folder."""
    folders = {str(parent) for file in files for parent in PurePosixPath(file).parents} - {"."}
    known = [
        {"type": "file", "path": file, "size": len(content), "oid": etag(file, content)}
        for file, content in files.items()
    ] + [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)]
    if wanted is not None:
        return [entry for entry in known if entry["path"] in wanted]
    return [entry for entry in known if str(PurePosixPath(entry["path"]).parent) == (below or ".")]


def handler_for(state: HubState) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                data = b""
                while size := int(self.rfile.readline().strip(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def reply(self, value, status: int = 200, code: str = "RepoNotFound") -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            if status >= 400:
                self.send_header("X-Error-Message", value["error"])
                if status == 404:
                    self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def handle_any(self) -> None:
            path = self.path.split("?")[0]
            state.requests.append(f"{self.command} {path}")
            data = self.body()
            if state.cuts and f"{self.command} {path}".startswith(state.cuts[0]):
                state.cuts.pop(0)
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            for begin, (status, said) in state.refusals.items():
                if f"{self.command} {path}".startswith(begin):
                    return self.reply({"error": said}, status, code="")
            if self.command != "GET":
                state.bodies.append(data)
            if path.startswith("/blob/"):
                state.blobs[path.removeprefix("/blob/")] = data
                return self.reply({})
            if path.startswith("/cas/"):
                return self.chunked_storage(path.removeprefix("/cas"), data)
            if self.headers.get("Authorization") != f"Bearer {state.token}":
                return self.reply({"error": "Invalid credentials"}, 401)
            return self.route(path, data)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

        def chunked_storage(self, path: str, data: bytes) -> None:
            """The storage that the client `hf_xet` talks to with a token of its own; nothing is known to it before."""
            if self.headers.get("Authorization") != f"Bearer {CHUNKS_TOKEN}":
                return self.reply({"error": "Invalid credentials"}, 401)
            if path.startswith("/v1/xorbs/"):
                state.xorbs[path.rpartition("/")[2]] = data
                return self.reply({"was_inserted": True})
            if path in ("/v1/shards", "/shards"):
                state.shards.append(data)
                return self.reply({"result": 1})
            if path == "/v1/telemetry":
                return self.reply({})
            return self.reply({"error": "not found"}, 404, code="")

        def route(self, path: str, data: bytes) -> None:
            if path.startswith(("/datasets/", "/api/datasets/")):
                return self.dataset(path, data)
            if path == "/api/repos/create":
                wanted = json.loads(data)
                name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                if name in state.repositories:
                    return self.reply({"error": "exists", "url": self.url(name)}, 409)
                private = wanted.get("private") or wanted.get("visibility") == "private"
                state.repositories[name] = Repository(bool(private))
                return self.reply({"url": self.url(name), "name": name, "id": name})
            if path == "/api/whoami-v2":
                return self.reply({"type": "user", "name": "me", "auth": {}})
            if path == "/api/validate-yaml":
                return self.reply({"errors": [], "warnings": []})
            found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/.*)?", path)
            large = re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path)
            if large:
                return self.reply({"transfer": "basic", "objects": self.large_files(json.loads(data))})
            resolved = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path)
            if resolved:
                repository = state.repositories[resolved[1]]
                if resolved[2] not in ("main", repository.commit):
                    return self.reply({"error": "Revision not found"}, 404, code="RevisionNotFound")
                if resolved[3] in repository.files:
                    return self.send_file(resolved[3], repository.files[resolved[3]], repository.commit)
            if not found or found[1] not in state.repositories:
                return self.reply({"error": "Repository not found"}, 404)
            return self.repository(found[1], found[2] or "", data)

        def dataset(self, path: str, data: bytes) -> None:
            """Answer a request about a dataset: its files, entries for some of them, and their content."""
            asked = re.fullmatch(r"/api/datasets/([\w.-]+/[\w.-]+)(?:/(\w[\w-]*)/[\w.-]+)?(?:/(.*))?", path)
            content = re.fullmatch(r"/datasets/([\w.-]+/[\w.-]+)/resolve/[\w.-]+/(.+)", path)
            name = (asked or content or [None, None])[1]
            if name not in state.datasets:
                return self.reply({"error": "Repository not found"}, 404)
            files = state.datasets[name]
            if content:
                if content[2] not in files:
                    return self.reply({"error": "Entry not found"}, 404, code="EntryNotFound")
                return self.send_file(content[2], files[content[2]])
            if asked[2] in ("tree", "paths-info"):
                wanted = parse_qs(data.decode()).get("paths", []) if asked[2] == "paths-info" else None
                return self.reply(entries(files, wanted, asked[3] or ""))
            siblings = [{"rfilename": file} for file in files]
            return self.reply({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

        def send_file(self, path: str, content: bytes, commit: str = COMMIT) -> None:
            tag, first = etag(path, content), 0
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if part:
                first = int(part[1])
                content = content[first : int(part[2]) + 1]
            self.send_response(206 if part else 200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                most = state.before_file(path, first)
                content = content[:most]
                self.wfile.write(content)
                state.sent.append((path, first, len(content)))
                if most is not None:
                    self.close_connection = True

        def repository(self, name: str, action: str, data: bytes) -> None:
            repository = state.repositories[name]
            if action.startswith("/preupload/"):
                wanted = json.loads(data)["files"]
                return self.reply({"files": [self.upload_mode(f) for f in wanted]})
            if action.startswith("/commit/"):
                for line in data.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        repository.files[entry["value"]["path"]] = content
                    if entry["key"] == "deletedFile":
                        del repository.files[entry["value"]["path"]]
                    if entry["key"] == "lfsFile":
                        oid = entry["value"]["oid"]
                        repository.files[entry["value"]["path"]] = state.blobs.get(oid, oid.encode())
                oid = hashlib.sha1(data).hexdigest()
                opened = {"pullRequestUrl": f"{self.url(name)}/discussions/1"} if "create_pr=1" in self.path else {}
                done = {"success": True, "commitOid": oid, "commitUrl": f"{self.url(name)}/commit/{oid}"}
                return self.reply(done | opened)
            if action.startswith("/tree/"):
                return self.reply([
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in repository.files.items()
                ])  # fmt: skip
            if action.startswith("/xet-write-token/"):
                return self.reply({"casUrl": f"{self.server_url()}/cas", "accessToken": CHUNKS_TOKEN, "exp": 2**40})
            if action.startswith("/branch/"):
                state.branches.append(action.removeprefix("/branch/"))
                return self.reply({})
            if action == "/settings":
                wanted = json.loads(data)
                state.settings.append(wanted)
                if "private" in wanted or "visibility" in wanted:
                    repository.private = wanted.get("private") or wanted.get("visibility") == "private"
                return self.reply({})
            return self.reply({"id": name, "modelId": name, "private": repository.private, "sha": repository.commit,
                               "siblings": [self.sibling(*f) for f in repository.files.items()]})  # fmt: skip

        def sibling(self, path: str, content: bytes) -> dict:
            """A file of a repository as the Hub lists it; files that git does not hold have their SHA-256."""
            name = etag(path, content)
            large = {"lfs": {"sha256": name, "size": len(content), "pointerSize": 134}} if len(name) == 64 else {}
            return {"rfilename": path, "size": len(content), "blobId": "0" * 40, **large}

        def upload_mode(self, file: dict) -> dict:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

        def large_files(self, wanted: dict) -> list[dict]:
            return [
                {"oid": o["oid"], "size": o["size"], "authenticated": True,
                 **({} if o["oid"] in state.blobs else
                    {"actions": {"upload": {"href": f"{self.server_url()}/blob/{o['oid']}", "header": {}}}})}
                for o in wanted["objects"]
            ]  # fmt: skip

        def server_url(self) -> str:
            return f"http://127.0.0.1:{self.server.server_address[1]}"

        def url(self, name: str) -> str:
            return f"{self.server_url()}/{name}"

    return Handler


class Hub:
    """The server, as a context manager."""

    def __init__(self, token: str) -> None:
        self.state = HubState(token)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(self.state))
        self.server.handle_error = lambda *_: None  # clients hang up once they have read enough
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def command(
    hub: Hub, *words: str | Path, token: str | None, home: Path, xet: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run an orthogonalize command against the server, in a process of its own (see `environment_of`)."""
    return orthogonalize([str(word) for word in words], environment_of(hub, token, home, xet))


def python(hub: Hub, *words: str | Path, token: str | None, home: Path) -> subprocess.CompletedProcess[str]:
    """Run Python against the server in a process of its own (see `environment_of`)."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True, text=True, env=environment_of(hub, token, home), timeout=120, check=False,
    )  # fmt: skip


def environment_of(hub: Hub, token: str | None, home: Path, xet: bool = False) -> dict[str, str]:
    """What a process finds the server by: huggingface_hub reads its endpoint on import.

    With `xet`, large files go to the chunked storage, else to LFS.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "0" if xet else "1", "HF_HOME": str(home)}
    return environment | ({"HF_TOKEN": token} if token else {})


def use_hub(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, in this process, talk to the server and keep its cache in the folder `cache`."""
    from huggingface_hub import constants

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", hub.state.token)

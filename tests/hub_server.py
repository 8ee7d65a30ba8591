"""A Hub on this machine: the part of its HTTP API that pushing and loading a model uses, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "testtoken" * 4
USER = "me"
Fault = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Repository:
    private: bool | None = None
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


@dataclass
class Hub:
    """`repositories` by id, every request as `METHOD path`, and `faults`: (pattern of the request, times left, what
    to do instead of answering)."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)
    faults: list[list] = field(default_factory=list)

    def fail(self, pattern: str, fault: Fault, times: int = 1) -> None:
        self.faults.append([pattern, times, fault])

    def fault_for(self, request: str) -> Fault | None:
        for entry in self.faults:
            if entry[1] and re.search(entry[0], request):
                entry[1] -= 1
                return entry[2]
        return None

    def files(self, repo_id: str, branch: str) -> dict[str, bytes]:
        return self.repositories[repo_id].branches[branch]


def answers(status: int) -> Fault:
    return lambda handler: handler.send(status, {"error": f"injected {status}"})  # type: ignore[attr-defined]


def cuts_the_connection(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.close()


def never_answers(handler: BaseHTTPRequestHandler) -> None:
    handler.server.released.wait(30)  # type: ignore[attr-defined]
    handler.close_connection = True


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    server.released = threading.Event()  # type: ignore[attr-defined]
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.released.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._read_chunks()
        self.hub.requests.append(f"{self.command} {path}")
        fault = self.hub.fault_for(f"{self.command} {path}")
        if fault is not None:
            return fault(self)
        for pattern, method, act in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command == method:
                if "lfs-store" not in path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.send(401, {"error": "Invalid credentials"})
                return act(self, body, **match.groupdict())
        return self.send(404, {"error": f"no {self.command} {path} here"})

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def whoami(self, body: bytes) -> None:
        self.send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        if repo_id in self.hub.repositories:
            return self.send(409, {"error": "exists", "url": f"{self.hub.url}/{repo_id}"})
        if not repo_id.startswith(f"{USER}/"):
            return self.send(403, {"error": f"You don't have the rights to create a model under {repo_id}"})
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repositories[repo_id] = Repository(private=private)
        return self.send(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def auth_check(self, body: bytes, repo: str) -> None:
        if repo not in self.hub.repositories:
            return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return self.send(200 if repo.startswith(f"{USER}/") else 403, {})

    def branch(self, body: bytes, repo: str, rev: str) -> None:
        branches = self.hub.repositories[repo].branches
        if rev in branches:
            return self.send(409, {"error": "branch exists"})
        branches[rev] = dict(branches["main"])
        return self.send(200, {})

    def info(self, body: bytes, repo: str, rev: str = "main") -> None:
        if repo not in self.hub.repositories or rev not in self.hub.repositories[repo].branches:
            return self.send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.files(repo, rev)
        about = {"id": repo, "modelId": repo, "sha": "a" * 40, "private": self.hub.repositories[repo].private}
        return self.send(200, about | {"siblings": [{"rfilename": name} for name in files], "tags": []})

    def tree(self, body: bytes, repo: str, rev: str, folder: str = "") -> None:
        files = self.hub.files(repo, rev)
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        self.send(200, entries)

    def validate(self, body: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, rev: str) -> None:
        files = [
            {"path": f["path"], "shouldIgnore": False, "oid": None,
             "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
            for f in json.loads(body)["files"]
        ]  # fmt: skip
        self.send(200, {"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs-store/{entry['oid']}"}}}
            objects.append(entry | ({} if entry["oid"] in self.hub.lfs else upload))
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.send(400, {"error": "the content is not what was announced"})
        self.hub.lfs[oid] = body
        return self.send(200, {})

    def commit(self, body: bytes, repo: str, rev: str) -> None:
        files = dict(self.hub.files(repo, rev))
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        self.hub.repositories[repo].branches[rev] = files
        self.send(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40})

    def resolve(self, body: bytes, repo: str, rev: str, name: str) -> None:
        branches = self.hub.repositories[repo].branches
        if rev == "a" * 40:  # every branch has one commit here; the newest that has the file
            rev = next((branch for branch in reversed(branches) if name in branches[branch]), "main")
        data = branches.get(rev, {}).get(name)
        if data is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "a" * 40}
        return self.send(200, data, headers | {"Content-Type": "application/octet-stream"})

    REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
    ROUTES = [
        (r"/api/whoami-v2", "GET", whoami),
        (r"/api/repos/create", "POST", create),
        (r"/api/validate-yaml", "POST", validate),
        (rf"/api/models/{REPO}/auth-check/write", "GET", auth_check),
        (rf"/api/models/{REPO}/branch/(?P<rev>[\w.-]+)", "POST", branch),
        (rf"/api/models/{REPO}/preupload/(?P<rev>[\w.-]+)", "POST", preupload),
        (rf"/api/models/{REPO}/commit/(?P<rev>[\w.-]+)", "POST", commit),
        (rf"/api/models/{REPO}/tree/(?P<rev>[\w.-]+)(?P<folder>/.*)?", "GET", tree),
        (rf"/api/models/{REPO}/revision/(?P<rev>[\w.-]+)", "GET", info),
        (rf"/api/models/{REPO}", "GET", info),
        (rf"/{REPO}\.git/info/lfs/objects/batch", "POST", lfs_batch),
        (r"/lfs-store/(?P<oid>\w+)", "PUT", lfs_put),
        (rf"/{REPO}/resolve/(?P<rev>[\w.-]+)/(?P<name>.+)", "GET", resolve),
        (rf"/{REPO}/resolve/(?P<rev>[\w.-]+)/(?P<name>.+)", "HEAD", resolve),
    ]

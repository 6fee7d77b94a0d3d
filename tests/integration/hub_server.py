"""A small model Hub on loopback that answers what huggingface_hub asks when transformers pushes and pulls.

    with HubServer(tokens={"hf_secret": "me"}) as hub:
        env = {**os.environ, **hub.environment(cache_folder, token="hf_secret")}

A commit is a whole tree of files. `requests` lists all requests, `unknown` those that have no answer here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

DATASET = r"[\w.-]+(/[\w.-]+)?"


@dataclass
class Repo:
    """Commits by id, each a whole tree of files, and the branches that point to them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        content = [f"{name}:{hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items())]
        sha = hashlib.sha1("\n".join([*content, revision, str(len(self.commits))]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[revision] = sha
        return sha


class HubServer:
    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create_repo(self, name: str, files: dict[str, bytes]) -> None:
        """Create a public repository with one commit."""
        self.repos[name] = Repo()
        self.repos[name].commit({".gitattributes": b"", **files})

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the variables for a process that uses this server as the Hub, with caches of its own in `home`."""
        env = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**env, "HF_TOKEN": token} if token else env


class RefusedError(Exception):
    """Raised for a request that is answered with an error: its HTTP status and huggingface_hub's name for it."""

    def __init__(self, status: int, code: str):
        self.status, self.code = status, code


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Print nothing."""

        def answer(self, code: int, body: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def user(self) -> str | None:
            return hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

        def found(self, name: str, revision: str = "main") -> tuple[Repo, str]:
            """Return the repository and the commit."""
            repo = hub.repos.get(name)
            if repo is None or (repo.private and self.user() is None):
                raise RefusedError(401 if self.user() is None else 404, "RepoNotFound")
            sha = repo.branches.get(revision, revision)
            if sha not in repo.commits:
                raise RefusedError(404, "RevisionNotFound")
            return repo, sha

        def serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                self.dispatch(path)
            except RefusedError as refused:
                self.answer(refused.status, X_Error_Code=refused.code)

        do_GET = do_HEAD = do_POST = serve  # noqa: N815

        def dispatch(self, path: str) -> None:
            if self.headers.get("Authorization") and self.user() is None:
                self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
                return
            for method, pattern, function in ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    if self.command == "POST" and "validate-yaml" not in path and self.user() is None:
                        self.answer(401, {"error": "a token is needed to write"})
                        return
                    with hub.lock:
                        function(self, **match.groupdict())
                    return
            hub.unknown.append(f"{self.command} {path}")
            raise RefusedError(404, "EntryNotFound")

        def create(self) -> None:
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or self.user()}/{asked['name']}"
            if name in hub.repos:
                self.answer(409, {"error": "it exists", "url": f"{hub.url}/{name}"})
                return
            hub.create_repo(name, {})
            hub.repos[name].private = asked.get("visibility") == "private"
            self.answer(200, {"url": f"{hub.url}/{name}", "name": name})

        def whoami(self) -> None:
            self.answer(200, {"type": "user", "name": self.user()})

        def resolve(self, name: str, revision: str, file: str) -> None:
            repo, sha = self.found(name, revision)
            data = repo.commits[sha].get(file)
            if data is None:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            else:
                self.answer(200, data, X_Repo_Commit=sha, ETag=f'"{_sha(data)}"')

        def validate_yaml(self) -> None:
            """Make the checks of the real Hub that matter to a card: the types of the fields that it reads."""
            front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
            data = yaml.safe_load(front.group(1)) if front else {}
            fields = dict.fromkeys(("tags", "datasets", "metrics"), list) | {"library_name": str, "pipeline_tag": str}
            wrong = [key for key, kind in fields.items() if not isinstance(data.get(key, kind()), kind)]
            entries = [str(e) for key in ("tags", "metrics") for e in data.get(key, []) if not isinstance(e, str)]
            ids = [str(entry) for entry in data.get("datasets", []) if not re.fullmatch(DATASET, str(entry))]
            for model in data.get("model-index", []):
                results = [(r["task"]["type"], r["dataset"]["type"], r["dataset"]["name"]) for r in model["results"]]
                wrong += ["model-index"] * (not model.get("name") or not all(map(all, results)))
            errors = [{"message": f"{value!r} is not valid"} for value in wrong + entries + ids]
            self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

        def preupload(self, name: str, revision: str) -> None:
            self.found(name, revision)
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer(200, {"files": files})

        def commit(self, name: str, revision: str) -> None:
            repo, sha = self.found(name, revision)
            files = dict(repo.commits[sha])
            for line in map(json.loads, self.body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
            sha = repo.commit(files, revision)
            self.answer(200, {"commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"})

        def branch(self, name: str, branch: str) -> None:
            repo, sha = self.found(name)
            self.answer(409 if branch in repo.branches else 200, {})
            repo.branches.setdefault(branch, sha)

        def info(self, name: str, revision: str = "main") -> None:
            repo, sha = self.found(name, revision)
            siblings = [{"rfilename": file} for file in repo.commits[sha]]
            body = {"id": name, "sha": sha, "siblings": siblings, "private": repo.private, "tags": []}
            self.answer(200, {**body, "pipeline_tag": "text-classification", "library_name": "transformers"})

        def tree(self, name: str, revision: str, folder: str | None = None) -> None:
            repo, sha = self.found(name, revision)
            files = {file: data for file, data in repo.commits[sha].items() if file.startswith(folder or "")}
            if folder and not files:
                raise RefusedError(404, "EntryNotFound")
            self.answer(200, [{"type": "file", "path": f, "size": len(d), "oid": _sha(d)} for f, d in files.items()])

    repo, rev = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
    ROUTES = [
        ("POST", "/api/repos/create", Handler.create),
        ("GET", "/api/whoami-v2", Handler.whoami),
        ("POST", "/api/validate-yaml", Handler.validate_yaml),
        ("HEAD GET", f"/{repo}/resolve/{rev}/(?P<file>.+)", Handler.resolve),
        ("POST", f"/api/models/{repo}/preupload/{rev}", Handler.preupload),
        ("POST", f"/api/models/{repo}/commit/{rev}", Handler.commit),
        ("POST", f"/api/models/{repo}/branch/(?P<branch>[^/]+)", Handler.branch),
        ("GET", f"/api/models/{repo}/tree/{rev}(?:/(?P<folder>.+))?", Handler.tree),
        ("GET", f"/api/models/{repo}/revision/{rev}", Handler.info),
        ("GET", f"/api/models/{repo}", Handler.info),
    ]
    return Handler


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

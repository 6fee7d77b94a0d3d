"""A small model Hub on loopback: what huggingface_hub asks when transformers pushes and pulls.

    with HubServer(tokens={"hf_secret": "me"}) as hub:
        env = {**os.environ, **hub.environment(cache_folder, token="hf_secret")}

Repositories are commits of whole file trees, so a commit is there entirely or not at all; files whose name ends in
`.safetensors` go through the LFS protocol. `requests` lists what was asked, `unknown` what had no answer here, and
`break_uploads = True` cuts the connection in the middle of every LFS upload.
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
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.break_uploads = False
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}/_lfs"  # on another host

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create_repo(self, name: str, files: dict[str, bytes]) -> None:
        """A public repository with one commit."""
        self.repos[name] = Repo()
        self.repos[name].commit({".gitattributes": b"", **files})

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a fresh process: this server as the Hub, and caches of its own in `home`."""
        env = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        env["HF_HUB_OFFLINE"] = "0"  # whatever the tests run under, this server is there
        return {**env, "HF_TOKEN": token} if token else env


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Nothing on stderr."""

        def answer(self, code: int, body: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            for name, value in {"Content-Length": str(len(data)), **names}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def user(self) -> str | None:
            return hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

        def repo(self, name: str, revision: str = "main") -> tuple[Repo, str] | None:
            """The repository and the commit, or None after an error was answered."""
            repo = hub.repos.get(name)
            if repo is None or (repo.private and self.user() is None):
                self.answer(401 if self.user() is None else 404, X_Error_Code="RepoNotFound")
                return None
            sha = repo.branches.get(revision, revision)
            if sha not in repo.commits and repo.commits:
                self.answer(404, X_Error_Code="RevisionNotFound")
                return None
            return repo, sha

        def serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            length = int(self.headers.get("Content-Length") or 0)
            if self.command == "PUT" and hub.break_uploads:
                self.rfile.read(length // 2)
                self.close_connection = True
                self.connection.close()
                return
            self.body = self.rfile.read(length)
            if self.headers.get("Authorization") and self.user() is None:
                self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
                return
            for method, pattern, function in ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    open_to_all = "validate-yaml" in path or "_lfs" in path
                    if self.command in ("POST", "PUT") and not open_to_all and self.user() is None:
                        self.answer(401, {"error": "a token is needed to write"})
                        return
                    with hub.lock:
                        function(self, **match.groupdict())
                    return
            hub.unknown.append(f"{self.command} {path}")
            self.answer(404, X_Error_Code="EntryNotFound")

        do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815

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
            if (found := self.repo(name, revision)) is None:
                return
            files, sha = found[0].commits[found[1]], found[1]
            if file not in files:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            elif file.endswith(".safetensors"):
                oid = hashlib.sha256(files[file]).hexdigest()
                linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(files[file]))}
                self.answer(302, X_Repo_Commit=sha, Location=f"{hub.storage}/{oid}", **linked)
            else:
                self.answer(200, files[file], X_Repo_Commit=sha, ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"')

        def lfs_get(self, oid: str) -> None:
            data = next(
                d for r in hub.repos.values() for t in r.commits.values() for d in t.values() if _sha(d) == oid
            )
            self.answer(200, data, ETag=f'"{oid}"')

        def lfs_put(self, oid: str) -> None:
            hub.lfs[oid] = self.body
            self.answer(200 if _sha(self.body) == oid else 400)

        def lfs_batch(self, name: str) -> None:
            objects = [
                {**entry, "actions": {"upload": {"href": f"{hub.storage}/{entry['oid']}"}}}
                for entry in json.loads(self.body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

        def validate_yaml(self) -> None:
            """The checks of the real thing that matter to a card: known types of the fields that the Hub reads."""
            import yaml

            front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
            data = yaml.safe_load(front.group(1)) if front else {}
            lists = [key for key in ("tags", "datasets", "metrics") if not _strings(data.get(key, []))]
            wrong = lists + [key for key in ("library_name", "pipeline_tag") if not isinstance(data.get(key, ""), str)]
            errors = [{"message": f"{key!r} has a wrong type"} for key in wrong]
            ids = data.get("datasets") or []
            wrong = [str(entry) for entry in ids if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(entry))]
            errors += [{"message": f"dataset {entry!r} is not the id of a dataset"} for entry in wrong]
            for model in data.get("model-index") or []:
                results = model.get("results") or []
                complete = [r for r in results if r["task"]["type"] and r["dataset"]["type"] and r["dataset"]["name"]]
                if not model.get("name") or len(complete) < len(results):
                    errors.append(
                        {"message": "model-index: a name, and results with a task and a dataset, are needed"}
                    )
            self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

        def preupload(self, name: str, revision: str) -> None:
            if self.repo(name, revision) is not None:
                files = [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(self.body)["files"]
                ]
                self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})

        def commit(self, name: str, revision: str) -> None:
            if (found := self.repo(name, revision)) is None:
                return
            files = dict(found[0].commits[found[1]])
            for line in map(json.loads, self.body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.lfs[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
            sha = found[0].commit(files, revision)
            self.answer(200, {"commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"})

        def branch(self, name: str, branch: str) -> None:
            if (found := self.repo(name)) is not None:
                created = branch not in found[0].branches
                found[0].branches.setdefault(branch, found[1])
                self.answer(200 if created else 409, {})

        def info(self, name: str, revision: str = "main") -> None:
            if (found := self.repo(name, revision)) is not None:
                siblings = [{"rfilename": file} for file in found[0].commits[found[1]]]
                tag = "text-classification"
                body = {"id": name, "sha": found[1], "siblings": siblings, "private": found[0].private, "tags": []}
                self.answer(200, {**body, "pipeline_tag": tag, "library_name": "transformers"})

        def tree(self, name: str, revision: str, folder: str | None = None) -> None:
            if (found := self.repo(name, revision)) is None:
                return
            files = {f: d for f, d in found[0].commits[found[1]].items() if f.startswith(f"{folder or ''}")}
            if folder and not files:
                self.answer(404, X_Error_Code="EntryNotFound")
                return
            entries = [{"type": "file", "path": f, "size": len(d), "oid": _sha(d)} for f, d in files.items()]
            self.answer(200, entries)

    repo, rev = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
    ROUTES = [
        ("POST", "/api/repos/create", Handler.create),
        ("GET", "/api/whoami-v2", Handler.whoami),
        ("POST", "/api/validate-yaml", Handler.validate_yaml),
        ("HEAD GET", f"/{repo}/resolve/{rev}/(?P<file>.+)", Handler.resolve),
        ("HEAD GET", r"/_lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_get),
        ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
        ("POST", rf"/{repo}\.git/info/lfs/objects/batch", Handler.lfs_batch),
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


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

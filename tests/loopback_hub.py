"""A stand-in for the Hugging Face Hub on this machine, for tests: repositories in memory, spoken to over HTTP.

It covers what huggingface_hub, transformers and datasets ask for when they create, upload, tag, list and download
model, dataset and Space repositories. Refusals carry the Hub's status and X-Error-Code, so that clients raise their own
errors.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Self
from urllib.parse import unquote, urlsplit

import yaml

DATASET_ID = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)
LARGE = (".safetensors", ".parquet", ".png", ".onnx")  # what goes by the LFS protocol, as .gitattributes says there
Files = dict[str, bytes]


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, code: str | None = None, commit: str | None = None, **content: object
    ):
        super().__init__(message)
        self.status, self.content = status, {"error": message} | content
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in headers.items() if value}


@dataclass
class Repo:
    """One repository: what each commit holds, and what branches and tags point to."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files, message: str) -> str:
        names = [f"{path}:{hashlib.sha1(content).hexdigest()}" for path, content in sorted(files.items())]
        sha = hashlib.sha1("\n".join([str(len(self.commits)), message, *names]).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class LoopbackHub:
    """Use it in a `with`; client processes get `environment`.

    Attributes:
        repos: {(type, "user/name"): Repo}; types are model, dataset and space.
        fault: (method, path) -> a status to answer with, "truncate" for half of a body, or None; a test sets it.
        requests: "METHOD path status" of everything that was asked for.
    """

    token, user = "hf_loopback", "your-name"

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.fault: Callable[[str, str], int | str | None] = lambda method, path: None
        self.requests: list[str] = []

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """For a client: this Hub instead of huggingface.co, and a cache folder of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add_repo(self, kind: str, repo_id: str, files: Files) -> str:
        """A repository with one commit, whose sha is returned."""
        repo = self.repos[kind, repo_id] = Repo()
        return repo.commit("main", files, "initial commit")

    def repo(self, kind: str, repo_id: str, authorized: bool) -> Repo:
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not authorized):
            raise Refusal(404 if authorized else 401, "Repository not found", "RepoNotFound")
        return repo


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, path: str) -> Callable:
    """A handler's method for a path in which {kind}, {id}, … stand for parts."""
    parts = {"kind": "models|datasets|spaces", "prefix": "datasets/|spaces/|", "id": r"[\w.-]+/[\w.-]+", "path": ".+"}
    pattern = re.sub(r"\{(\w+)\}", lambda found: f"(?P<{found[1]}>{parts.get(found[1], '[^/]+')})", path)
    return lambda function: ROUTES.append((method, re.compile(f"^{pattern}$"), function)) or function


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body waits 40 ms for the acknowledgement of its headers
    hub: LoopbackHub

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.authorized, self.body, self.fault = token == self.hub.token, body, self.hub.fault(self.command, path)
        try:
            if isinstance(self.fault, int):
                raise Refusal(self.fault, "Internal Server Error")
            writes = self.command in ("POST", "PUT") and "/paths-info/" not in path and "validate-yaml" not in path
            if (token or writes) and not self.authorized and not path.startswith("/lfs/"):
                raise Refusal(401, "Invalid username or password.")
            for method, pattern, function in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (found := pattern.match(path)):
                    parts = {name: unquote(value) for name, value in found.groupdict().items()}
                    self.answer(200, *function(self, **parts))
                    return
            raise Refusal(404, f"no such page: {path}", "EntryNotFound")
        except Refusal as refusal:
            self.answer(refusal.status, refusal.content, refusal.headers)
        except (KeyError, ValueError, IndexError, yaml.YAMLError) as error:  # what was sent is not what is sent here
            self.answer(400, {"error": f"{type(error).__name__}: {error}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body, headers = content if isinstance(content, bytes) else json.dumps(content).encode(), headers or {}
        if status == 200 and self.headers.get("Range") and "ETag" in headers:  # a download goes on where it broke off
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            whole, first = len(body), int(first)
            body, status = body[first : int(last) + 1 if last else None], 206
            headers |= {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{whole}"}
        self.hub.requests.append(f"{self.command} {urlsplit(self.path).path} {status}")
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "truncate":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass

    def repo(self, kind: str, repo_id: str) -> Repo:
        return self.hub.repo(kind.removesuffix("/").removesuffix("s") or "model", repo_id, self.authorized)

    # Each returns (content, headers): bytes, or what becomes JSON.

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if not self.authorized:
            raise Refusal(401, "Invalid username or password.")
        access = {"displayName": "loopback", "role": "write"}
        return {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": access}}, None

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        card = json.loads(self.body)["content"].replace("\r\n", "\n")
        front = re.match(r"---\n(.*?)\n---(\n|$)", card, re.DOTALL)
        error = None
        try:
            data = (yaml.safe_load(front[1]) if front else None) or {}
            if not isinstance(data, dict) or not isinstance(data.get("license", ""), str):
                error = '"license" must be a string'
            else:
                results = [result for model in data.get("model-index") or [] for result in model["results"]]
                if wrong := [name for r in results if not DATASET_ID.fullmatch(name := r["dataset"]["type"])]:
                    error = f'dataset.type with value "{wrong[0]}" fails to match {DATASET_ID.pattern}'
        except yaml.YAMLError as found:
            error = f"not YAML: {found}".splitlines()[0]
        if error:  # clients look at the status alone
            raise Refusal(400, error, errors=[{"message": error}], warnings=[])
        return {"errors": [], "warnings": []}, None

    @route("POST", "/api/repos/create")
    def create_repo(self):
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        kind = wanted.get("type") or "model"
        url = f"{self.hub.url}/{repo_id if kind == 'model' else f'{kind}s/{repo_id}'}"
        if (kind, repo_id) in self.hub.repos:
            raise Refusal(409, "You already created this repo", url=url)
        self.hub.add_repo(kind, repo_id, {})
        self.hub.repos[kind, repo_id].private = wanted.get("visibility") == "private" or wanted.get("private") is True
        return {"url": url}, None

    @route("POST", "/api/{kind}/{id}/branch/{branch}")
    def create_branch(self, kind: str, id: str, branch: str):
        repo = self.repo(kind, id)
        if branch in repo.refs:
            raise Refusal(409, "Reference already exists")
        repo.refs[branch] = repo.sha((json.loads(self.body or b"{}")).get("startingPoint") or "main")
        return {}, None

    @route("POST", "/api/{kind}/{id}/tag/{revision}")
    def create_tag(self, kind: str, id: str, revision: str):
        repo = self.repo(kind, id)
        repo.refs[json.loads(self.body)["tag"]] = repo.sha(revision)
        return {}, None

    @route("GET", "/api/spaces/{id}/runtime")
    def runtime(self, id: str):
        self.repo("space", id)
        return {"stage": "RUNNING", "hardware": {"current": "cpu-basic", "requested": "cpu-basic"}}, None

    @route("POST", "/api/{kind}/{id}/preupload/{revision}")
    def preupload(self, kind: str, id: str, revision: str):
        self.repo(kind, id).sha(revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        return {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}, None

    @route("POST", "/{prefix}{id}.git/info/lfs/objects/batch")
    def lfs_batch(self, prefix: str, id: str):
        self.repo(prefix, id)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}, None

    @route("PUT", "/lfs/{sha256}")
    def lfs_upload(self, sha256: str):
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, "the content is not that of this sha256")
        self.hub.objects[sha256] = self.body
        return b"", None

    @route("POST", "/api/{kind}/{id}/commit/{branch}")
    def commit(self, kind: str, id: str, branch: str):
        repo = self.repo(kind, id)
        files, message = dict(repo.commits[repo.sha(branch)]), ""
        for line in self.body.splitlines():
            key, value = (found := json.loads(line))["key"], found["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"{key} is not known here")
        sha = repo.commit(branch, files, message)
        prefix = "" if kind == "models" else f"{kind}/"
        return {"commitUrl": f"{self.hub.url}/{prefix}{id}/commit/{sha}", "commitOid": sha}, None

    @route("GET", "/api/{kind}/{id}")
    def info(self, kind: str, id: str, revision: str = "main"):
        repo = self.repo(kind, id)
        sha = repo.sha(revision)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        return {
            "id": id,
            "sha": sha,
            "private": repo.private,
            "gated": repo.gated and "auto",
            "tags": [],
            "siblings": siblings,
        }, None

    @route("GET", "/api/{kind}/{id}/revision/{revision}")
    def info_at(self, kind: str, id: str, revision: str):
        return self.info(kind, id, revision)

    @route("GET", "/api/{kind}/{id}/tree/{revision}")
    def tree(self, kind: str, id: str, revision: str, folder: str = ""):
        repo = self.repo(kind, id)
        files, start = repo.commits[repo.sha(revision)], f"{folder}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(start)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        if "recursive=true" in self.path.lower():
            return [describe(path, content) for path, content in inside.items()], None
        names = {start + path.removeprefix(start).split("/")[0] for path in inside}
        return [describe(path, files.get(path)) for path in sorted(names)], None

    @route("GET", "/api/{kind}/{id}/tree/{revision}/{path}")
    def tree_of_folder(self, kind: str, id: str, revision: str, path: str):
        return self.tree(kind, id, revision, path)

    @route("POST", "/api/{kind}/{id}/paths-info/{revision}")
    def paths_info(self, kind: str, id: str, revision: str):
        repo = self.repo(kind, id)
        files, wanted = repo.commits[repo.sha(revision)], json.loads(self.body)["paths"]
        folders = {str(parent) for path in files for parent in Path(path).parents}
        return [describe(path, files.get(path)) for path in wanted if path in files or path in folders], None

    @route("GET", "/{prefix}{id}/resolve/{revision}/{path}")
    def resolve(self, prefix: str, id: str, revision: str, path: str):
        repo = self.repo(prefix, id)
        sha = repo.sha(revision)
        if path not in repo.commits[sha]:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound", commit=sha)  # clients remember it by commit
        content = repo.commits[sha][path]
        return content, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}


def describe(path: str, content: bytes | None) -> dict:
    """A file as the Hub lists it; a folder has no content."""
    if content is None:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry

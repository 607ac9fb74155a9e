"""The stand-in for the Hub, as Hugging Face's own client and plain HTTP see it."""

import hashlib
import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import run
from loopback_hub import LoopbackHub

REPO_ID = "your-name/example"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


def client(hub: LoopbackHub, folder: Path, script: str, **environment: str) -> list[str]:
    """The lines that a script with `api` printed, in a process with an empty cache, run in `folder`."""
    script = f"from huggingface_hub import *\napi, repo_id = HfApi(), {REPO_ID!r}\n{script}"
    command = [sys.executable, "-I", "-c", script]
    finished = run(*command, cwd=folder, **hub.environment(folder / "cache") | environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None, **headers: str):
    """(status, body)"""
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def connect(hub: LoopbackHub) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=30)


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_create_upload_branch_and_download(hub, tmp_path, kind):
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Example\n")
    (folder / "data" / "train.parquet").write_bytes(bytes(range(256)) * 1000)
    script = f"""
kind = {{"repo_type": {kind!r}}}
for _ in range(2):
    api.create_repo(repo_id, exist_ok=True, private=True, space_sdk="gradio" if {kind!r} == "space" else None, **kind)
first = api.upload_folder(repo_id=repo_id, folder_path="folder", commit_message="all", **kind)
for _ in range(2):
    api.create_branch(repo_id, branch="trial", exist_ok=True, **kind)
api.upload_file(repo_id=repo_id, path_or_fileobj=b"new", path_in_repo="new.txt", revision="trial", **kind)
api.delete_file("README.md", repo_id, **kind)
print(snapshot_download(repo_id, revision=first.oid, **kind))
print(*api.list_repo_files(repo_id, **kind), *api.list_repo_files(repo_id, revision="trial", **kind))
"""
    snapshot, names = client(hub, tmp_path, script)
    files = {path: (folder / path).read_bytes() for path in ("README.md", "data/train.parquet")}
    assert {path: Path(snapshot, path).read_bytes() for path in files} == files
    assert names.split() == ["data/train.parquet", "README.md", "data/train.parquet", "new.txt"]
    repo = hub.repos[kind, REPO_ID]
    assert repo.private and repo.messages[:2] == ["initial commit", "all"] and len(repo.commits) == 4
    uploads = [line for line in hub.requests if line.startswith("PUT")]
    parquet = hashlib.sha256(files["data/train.parquet"]).hexdigest()
    assert uploads == [f"PUT /lfs/{parquet} 200"]  # by the LFS protocol, and once


def test_refusals_are_the_clients_own_errors(hub, tmp_path):
    sha = hub.add_repo("model", REPO_ID, {"README.md": b"before"})
    hub.add_repo("model", "your-name/private", {"README.md": b"secret"})
    hub.repos["model", "your-name/private"].private = True
    attempt = """
def attempt(function, *arguments, **keywords):
    try:
        print("no error:", function(*arguments, **keywords))
    except Exception as error:
        print(type(error).__name__, error.response.status_code)
"""
    script = f"""{attempt}
attempt(api.model_info, "your-name/nothing")
attempt(api.model_info, repo_id, revision="nothing")
attempt(hf_hub_download, repo_id, "nothing.txt")
attempt(api.create_repo, repo_id)
"""
    errors = ["RepositoryNotFoundError 404", "RevisionNotFoundError 404", "RemoteEntryNotFoundError 404"]
    assert client(hub, tmp_path, script) == [*errors, "HfHubHTTPError 409"]
    script = f"""{attempt}
attempt(api.create_repo, "your-name/other")
attempt(api.upload_file, repo_id=repo_id, path_or_fileobj=b"after", path_in_repo="README.md")
"""
    assert client(hub, tmp_path, script, HF_TOKEN="hf_wrong") == ["HfHubHTTPError 401"] * 2
    script = f"{attempt}\nattempt(api.model_info, 'your-name/private', token=False)"
    assert client(hub, tmp_path, script) == ["RepositoryNotFoundError 401"]
    assert len(hub.repos) == 2 and hub.repos["model", REPO_ID].commits == {sha: {"README.md": b"before"}}


@pytest.mark.parametrize("where", ["PUT /lfs/", "POST /api/models/your-name/example/commit/"])
def test_a_fault_while_uploading_leaves_the_earlier_commit(hub, tmp_path, where):
    sha = hub.add_repo("model", REPO_ID, {"README.md": b"before"})
    # 507 rather than 500: the client asks once, not six times over 23 seconds
    hub.fault = lambda method, path: 507 if f"{method} {path}".startswith(where) else None
    script = """
operations = [CommitOperationAdd("README.md", b"after"), CommitOperationAdd("model.safetensors", b"weights")]
try:
    api.create_commit(repo_id, operations, commit_message="both")
except Exception as error:
    print(error.response.status_code if hasattr(error, "response") else error.__cause__.response.status_code)
"""
    assert client(hub, tmp_path, script) == ["507"]
    assert hub.repos["model", REPO_ID].refs == {"main": sha}
    assert hub.repos["model", REPO_ID].commits == {sha: {"README.md": b"before"}}


def test_a_commit_is_whole_or_not_at_all(hub):
    """The second file's content never came."""
    sha = hub.add_repo("model", REPO_ID, {"README.md": b"before"})
    lines = [
        {"key": "header", "value": {"summary": "both", "description": ""}},
        {"key": "file", "value": {"path": "README.md", "content": "YWZ0ZXI=", "encoding": "base64"}},
        {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 7}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    path, connection, token = f"/api/models/{REPO_ID}/commit/main", connect(hub), f"Bearer {hub.token}"
    assert ask(connection, "PUT", f"/lfs/{'0' * 64}", b"not of this sha256")[0] == 400
    assert ask(connection, "POST", path, body)[0] == 401
    assert ask(connection, "POST", path, body, Authorization=token)[0] == 400
    assert hub.repos["model", REPO_ID].refs == {"main": sha}
    assert hub.repos["model", REPO_ID].commits == {sha: {"README.md": b"before"}}
    assert [line.split()[2] for line in hub.requests] == ["400", "401", "400"]  # all by one connection


def test_a_truncated_body_says_its_whole_length(hub):
    hub.add_repo("model", REPO_ID, {"model.safetensors": bytes(1000)})
    hub.fault = lambda method, path: "truncate" if path.endswith(".safetensors") else None
    with pytest.raises(http.client.IncompleteRead) as error:
        ask(connect(hub), "GET", f"/{REPO_ID}/resolve/main/model.safetensors")
    assert len(error.value.partial) == 500 and error.value.expected == 500  # what came, what is still to come

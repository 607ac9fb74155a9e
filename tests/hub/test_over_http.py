"""From a folder to the Hub and back, over HTTP, by a stand-in for the Hub on this machine."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import loopback_hub
import pytest
import torch
from helpers import ROOT, copy_to_change, new_environment, open_when_served, run
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file

from vit_cifar.evaluation.records import read_record, weights_sha256
from vit_cifar.hub import stranger
from vit_cifar.hub.publish import PublishError
from vit_cifar.hub.publish import publish as publish_folder
from vit_cifar.hub.stranger import answer
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL, load_model
from vit_cifar.training.data import SAMPLE_FOLDER

pytestmark = pytest.mark.slow
NANO = BUNDLED_MODELS / DEFAULT_MODEL
MODEL_ID, SPACE_ID = "your-name/vit-cifar10-nano", "your-name/where-nano-looks"
SHIP = ROOT / "vit_cifar" / "demo" / "assets" / "examples" / "ship.png"


def vit_cifar(hub: LoopbackHub, cache: Path, *words: object, **environment: str):
    """A command in a process of its own, with an empty cache if `cache` is one."""
    return run(sys.executable, "-m", "vit_cifar", *words, **hub.environment(cache) | environment)


def publish(hub: LoopbackHub, cache: Path, *words: object, model_dir: Path = NANO, **environment: str):
    return vit_cifar(hub, cache, "publish", model_dir, "--repo-id", MODEL_ID, "--push", *words, **environment)


def nano_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in NANO.iterdir() if path.is_file()}


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[LoopbackHub]:
    """With nano and a dataset, for tests that only read."""
    with LoopbackHub() as hub:
        hub.add_repo("model", MODEL_ID, nano_files())
        hub.add_repo(
            "dataset",
            "your-name/sample",
            {
                f"data/{split}-00000-of-00001.parquet": (SAMPLE_FOLDER / f"{split}.parquet").read_bytes()
                for split in ("train", "test")
            },
        )
        yield hub


def one_line(finished, code: int = 2) -> str:
    """What a failed command said."""
    assert finished.returncode == code, finished.stdout + finished.stderr
    assert finished.stderr.count("\n") == 1, finished.stderr
    return finished.stderr


def test_push_and_load_in_another_process_with_an_empty_cache(hub, tmp_path):
    """The whole way: one commit with weights as safetensors alone and the remote code; its answers are the folder's."""
    pushed = publish(hub, tmp_path / "ours")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stderr == ""
    repo = hub.repos["model", MODEL_ID]
    sha = repo.refs["main"]
    assert f"load it with revision='{sha}'" in pushed.stdout and repo.messages == [
        "initial commit",
        f"vit-cifar10-nano, {read_record(NANO)['test_accuracy']:.2%} test accuracy",
    ]
    files = repo.commits[sha]
    assert {"README.md", "model.safetensors", "modeling_vit_cifar.py", "training_record.json"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]

    script = """
import sys
sys.modules["vit_cifar"] = None
import torch
from huggingface_hub import snapshot_download
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
repo_id, sha, image, output = sys.argv[1:]
trust = {"revision": sha, "trust_remote_code": True}
model = AutoModelForImageClassification.from_pretrained(repo_id, **trust)
processor = AutoImageProcessor.from_pretrained(repo_id, revision=sha)
pixels = torch.arange(3 * 32 * 32, dtype=torch.uint8).view(3, 32, 32)
with torch.inference_mode():
    outputs = model(**processor([pixels], return_tensors="pt"), output_attentions=True)
torch.save({"logits": outputs.logits, "attentions": torch.stack(outputs.attentions, dim=1)}, output)
print(pipeline("image-classification", model=repo_id, **trust)(image, top_k=1)[0]["label"])
print(snapshot_download(repo_id, revision=sha))
"""
    command = [sys.executable, "-I", "-c", script, MODEL_ID, sha, SHIP, tmp_path / "answer.pt"]
    finished = run(*command, cwd=tmp_path, **hub.environment(tmp_path / "theirs"))
    assert finished.returncode == 0, finished.stderr
    label, snapshot = finished.stdout.splitlines()
    assert label == "ship"
    assert {path.name: path.read_bytes() for path in Path(snapshot).iterdir()} == files
    pixels = torch.arange(3 * 32 * 32, dtype=torch.uint8).view(1, 3, 32, 32)
    ours, theirs = answer(*load_model(str(NANO)), pixels), torch.load(tmp_path / "answer.pt")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-5)


def test_push_to_a_branch_and_private(hub, tmp_path):
    assert publish(hub, tmp_path, "--private", "--revision", "trial").returncode == 0
    repo = hub.repos["model", MODEL_ID]
    assert repo.private and "README.md" in repo.commits[repo.refs["trial"]]
    assert repo.commits[repo.refs["main"]] == {}
    for name, ends in ((f"{MODEL_ID}@trial", 0), (MODEL_ID, 2)):
        assert vit_cifar(hub, tmp_path / "other", "predict", SHIP, "--model", name).returncode == ends
    stranger = vit_cifar(hub, tmp_path / "stranger", "predict", SHIP, "--model", f"{MODEL_ID}@trial", HF_TOKEN="")
    assert "expected a model folder or a Hub id" in one_line(stranger)


@pytest.mark.parametrize("how", ["NaN", "another accuracy", "another answer"])
def test_nothing_is_uploaded_of_what_is_refused(hub, tmp_path, how, smoke_folder, monkeypatch):
    folder = copy_to_change(smoke_folder, tmp_path / "run")
    weights, record = load_file(folder / "model.safetensors"), read_record(folder)
    if how == "NaN":
        weights["classifier.bias"].fill_(float("nan"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        record["weights_sha256"] = weights_sha256(folder)
    elif how == "another accuracy":
        record["test_accuracy"] += 0.05
    else:
        monkeypatch.setattr(stranger, "answer", lambda *_: {"logits": torch.ones(4, 10), "attentions": torch.ones(1)})
    (folder / "training_record.json").write_text(json.dumps(record))
    if how == "another answer":
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setattr("vit_cifar.hub.publish.upload", pytest.fail)  # it would not ask the loopback hub
        with pytest.raises(PublishError, match="remote code: expected the answers"):
            publish_folder(folder, MODEL_ID, push=True)
    else:
        finished = publish(hub, tmp_path / "cache", model_dir=folder)  # decoding has a progress bar
        assert finished.returncode == 2 and "expected" in finished.stderr.splitlines()[-1]
    assert hub.repos == {} and not [line for line in hub.requests if line.startswith(("POST", "PUT"))]


def test_a_commit_that_is_refused_is_not_tried_in_parts(hub, tmp_path, monkeypatch):
    """With Xet, as users have it: a Space would lose its files with the first part."""
    monkeypatch.setattr(loopback_hub, "LARGE", ())
    hub.add_repo("model", MODEL_ID, nano_files())
    before = hub.add_repo("space", SPACE_ID, {"app.py": b"as before"})
    refusals = [413] * 5
    hub.fault = lambda method, path: refusals.pop() if refusals and "/commit/" in path else None
    words = ["publish-space", "--repo-id", SPACE_ID, "--model-id", MODEL_ID, "--push"]
    assert "413" in one_line(vit_cifar(hub, tmp_path, *words, HF_HUB_DISABLE_XET="0"))
    assert hub.repos["space", SPACE_ID].commits == {before: {"app.py": b"as before"}}


def test_what_an_earlier_version_left_is_not_taken_for_this_ones(hub, tmp_path, smoke_folder):
    """An examined model with pickled weights beside it, then one that was not examined; the owner's files stay."""
    others = {"notes.txt": b"mine", "openvino/openvino_model.bin": b"no pickle"}
    hub.add_repo("model", MODEL_ID, nano_files() | others | {"pytorch_model.bin": b"pickled"})
    pushed = publish(hub, tmp_path, model_dir=smoke_folder)
    assert pushed.returncode == 0
    repo = hub.repos["model", MODEL_ID]
    names = set(repo.commits[repo.refs["main"]])
    gone = {"pytorch_model.bin", "examination.json", "mistakes.parquet", "overlays.png"}
    assert not names & gone
    said = {line.split()[1].rstrip(",") for line in pushed.stdout.splitlines() if line.startswith("deleted ")}
    assert said == gone
    assert set(others) <= names and len(repo.messages) == 2


def test_private_is_not_ignored_for_a_public_repository(hub, tmp_path):
    hub.add_repo("model", MODEL_ID, {})
    assert "private: expected a new or a private repository" in one_line(publish(hub, tmp_path, "--private"))
    assert hub.repos["model", MODEL_ID].messages == ["initial commit"]


@pytest.mark.parametrize("how", ["missing", "private", "gated", "not ours"])
def test_a_space_that_could_not_start_is_refused(hub, tmp_path, how):
    if how != "missing":
        hub.add_repo("model", MODEL_ID, {"config.json": b'{"model_type": "bert"}'})
        hub.repos["model", MODEL_ID].private = how == "private"
        hub.repos["model", MODEL_ID].gated = how == "gated"
    words = ["publish-space", "--repo-id", SPACE_ID, "--model-id", MODEL_ID, "--push"]
    said = one_line(vit_cifar(hub, tmp_path, *words))
    assert "model" in said and (how not in ("private", "gated") or f"which is {how}" in said)
    assert ("space", SPACE_ID) not in hub.repos


def test_a_wrong_token_is_one_line(hub, tmp_path):
    said = one_line(publish(hub, tmp_path, HF_TOKEN="hf_wrong"))
    assert "push to your-name/vit-cifar10-nano: 401 Unauthorized, Invalid username or password." in said
    assert hub.repos == {}


@pytest.mark.parametrize("where", ["POST /api/models/your-name/vit-cifar10-nano/commit/main", "PUT /lfs/"])
def test_an_upload_that_breaks_leaves_the_earlier_revision(hub, tmp_path, where):
    """At the commit, and before it, at the weights."""
    before = hub.add_repo("model", MODEL_ID, {"README.md": b"as before"})
    hub.fault = lambda method, path: 500 if f"{method} {path}".startswith(where) else None
    assert "push to your-name/vit-cifar10-nano: 500 Internal Server Error" in one_line(publish(hub, tmp_path))
    repo = hub.repos["model", MODEL_ID]
    assert repo.refs == {"main": before} and repo.commits == {before: {"README.md": b"as before"}}
    hub.fault = lambda method, path: None
    assert publish(hub, tmp_path).returncode == 0  # again, as the note says
    assert repo.commits[repo.refs["main"]]["README.md"].startswith(b"---\n")


@pytest.mark.parametrize("name", ["your-name/nothing", f"{MODEL_ID}@no-such-branch"])
def test_a_repo_or_revision_that_is_not_there_is_one_line(shared_hub, tmp_path, name):
    finished = vit_cifar(shared_hub, tmp_path, "predict", SHIP, "--model", name)
    assert "vit-cifar: model: expected a model folder or a Hub id, got" in one_line(finished)
    assert finished.stdout == ""


def test_a_download_that_breaks_off_is_one_line_and_leaves_nothing_half(hub, tmp_path):
    hub.add_repo("model", MODEL_ID, nano_files())
    hub.fault = lambda method, path: "truncate" if path.endswith("model.safetensors") and method == "GET" else None
    words = ["predict", SHIP, "--model", MODEL_ID]
    assert "vit-cifar: model: expected a model folder or a Hub id, got" in one_line(vit_cifar(hub, tmp_path, *words))
    hub.fault = lambda method, path: None
    again = vit_cifar(hub, tmp_path, *words)  # with the same cache
    assert again.returncode == 0 and "ship" in again.stdout


def test_train_on_a_dataset_and_from_a_model_of_the_hub(shared_hub, tmp_path):
    words = [
        "train.py",
        "--model_name_or_path",
        MODEL_ID,
        "--dataset_name",
        "your-name/sample",
        "--num_train_epochs",
        1,
    ]
    words += ["--validation_size", 100, "--output_dir", tmp_path / "run"]
    finished = run(sys.executable, *words, **shared_hub.environment(tmp_path / "cache"))
    assert finished.returncode == 0, finished.stderr
    record = json.loads((tmp_path / "run" / "training_record.json").read_text())
    assert record["dataset"]["name"] == "your-name/sample"
    assert record["arguments"]["model_name_or_path"] == MODEL_ID
    assert record["arguments"]["model_revision"] == shared_hub.repos["model", MODEL_ID].refs["main"]
    assert any("/datasets/your-name/sample/resolve/" in line for line in shared_hub.requests)


def test_the_page_shows_a_model_from_the_hub(shared_hub, tmp_path):
    environment = shared_hub.environment(tmp_path / "cache") | {"MODEL_ID": MODEL_ID}
    with open_when_served(tmp_path, sys.executable, ROOT / "app.py", **environment) as page:
        assert page.title() == f"Where {MODEL_ID} looks"
        assert "score" in page.content()  # its examination came along


@pytest.mark.timeout(2400)  # torch is downloaded anew
def test_a_space_in_an_environment_of_its_own(hub, tmp_path):
    """Built in an empty folder, its requirements installed, its app.py started: the page of the pinned model."""
    sha = hub.add_repo("model", MODEL_ID, nano_files())
    words = ["publish-space", "--repo-id", SPACE_ID, "--model-id", f"{MODEL_ID}@main", "--push"]
    pushed = vit_cifar(hub, tmp_path / "cache", *words, "--output", tmp_path / "space")
    assert pushed.returncode == 0 and pushed.stderr == "", pushed.stderr
    space = hub.repos["space", SPACE_ID]
    files = space.commits[space.refs["main"]]
    built = {str(path.relative_to(tmp_path / "space")): path.read_bytes() for path in (tmp_path / "space").rglob("*.*")}
    assert files["model_id.txt"].decode() == f"{MODEL_ID}@{sha}\n" and built.items() <= files.items()
    assert not [name for name in files if "__pycache__" in name or name.startswith("hub_card")]
    assert not [
        name
        for name, content in files.items()
        if name.endswith(".py") and b"trust_remote_code=True" in content and "hub/" not in name
    ]
    hub.repos["model", MODEL_ID].commit("main", {}, "the model moves on, the pin does not")

    commands = new_environment(tmp_path / "environment", "-r", tmp_path / "space" / "requirements.txt")
    python = commands / "python"
    environment = hub.environment(tmp_path / "cache of the Space")
    with open_when_served(tmp_path / "space", python, "app.py", **environment) as page:
        assert page.title() == f"Where {MODEL_ID} looks"
        assert page.locator("#answer h2").inner_text() == "dog"


def test_every_step_of_the_checklist_works(hub, tmp_path):
    """docs/publishing.md from top to bottom, as a person would, but for the login's prompt."""
    page = (ROOT / "docs" / "publishing.md").read_text()
    steps = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    assert len(steps) == 9
    checkout = shutil.copytree(
        ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "*.egg-info")
    )
    environment = hub.environment(tmp_path / "home") | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for step in steps:
        if "hf auth login" in step:
            step = f"hf auth login --token {hub.token}"
        finished = run("bash", "-ec", step, cwd=checkout, **environment | {"HF_TOKEN": "", "PYTHONPATH": str(checkout)})
        assert finished.returncode == 0, step + finished.stdout + finished.stderr
    model, space = hub.repos["model", MODEL_ID], hub.repos["space", SPACE_ID]
    assert model.refs["v1"] == model.refs["main"]
    assert f"{MODEL_ID}@{model.refs['v1']}\n".encode() == space.commits[space.refs["main"]]["model_id.txt"]
    assert (checkout / "runs" / "to-publish" / "README.md").is_file()

"""What may be published, and that what is published is what a stranger gets. Over HTTP: test_over_http.py."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, copy_to_change, run
from safetensors.torch import load_file, save_file

from vit_cifar.errors import UserError
from vit_cifar.evaluation.records import RECORD_NAME, read_record, weights_sha256
from vit_cifar.hub.publish import PublishError, build_model_repo, check_accuracy, check_as_stranger, check_card, publish
from vit_cifar.hub.space import build_space_repo, publish_space
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL

NANO = BUNDLED_MODELS / DEFAULT_MODEL
REPO_ID = "user/name"
ACCURACY = read_record(NANO)["test_accuracy"]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return copy_to_change(NANO, tmp_path / "nano")


@pytest.fixture
def built(tmp_path: Path) -> Path:
    folder = tmp_path / "built"
    folder.mkdir()
    build_model_repo(NANO, REPO_ID, folder)
    return folder


def change_weights(folder: Path, change) -> None:
    """Other weights, and a record that belongs to them."""
    path, record = folder / "model.safetensors", read_record(folder)
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    record["weights_sha256"] = weights_sha256(folder)
    (folder / RECORD_NAME).write_text(json.dumps(record))
    for name in ("examination.json", "mistakes.parquet"):
        (folder / name).unlink()


def test_what_is_built_is_checked_and_kept(tmp_path, capsys):
    assert publish(NANO, REPO_ID, output=tmp_path / "built") is None
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(",")[0] for line in said[:2]] == ["card", "loaded without this package"]
    assert "differ by at most" in said[1]
    assert said[2].startswith("not evaluated again") and "nothing was uploaded" in said[-1]
    assert said[-2] == "mistakes.parquet and overlays.png hold test images, which all who see the repository get"
    names = {path.name for path in (tmp_path / "built").iterdir()}
    assert names == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training_record.json"),
        *("configuration_vit_cifar.py", "modeling_vit_cifar.py", "SHA256SUMS", "LICENSE"),
        *("examination.json", "mistakes.parquet", "overlays.png"),
    }
    for name in ("model.safetensors", "training_record.json"):
        assert (tmp_path / "built" / name).read_bytes() == (NANO / name).read_bytes()


def spoil(folder: Path, how: str) -> None:
    if how == "pickle":
        torch.save({}, folder / "pytorch_model.bin")
    elif how == "no record":
        (folder / RECORD_NAME).unlink()
    elif how == "other weights":
        weights = load_file(folder / "model.safetensors")
        weights["classifier.bias"] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif how == "NaN":
        change_weights(folder, lambda weights: weights["classifier.bias"].fill_(float("nan")))
    elif how == "missing weight":
        change_weights(folder, lambda weights: weights.pop("classifier.bias"))
    elif how == "no processor":
        (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pickle", "expected weights as safetensors alone, got pytorch_model.bin"),
        ("no record", "expected a training_record.json, got none"),
        ("other weights", "expected the record of these weights"),
        ("NaN", "expected finite weights, got NaN or infinity in classifier.bias"),
        ("missing weight", "got missing keys: ['classifier.bias']"),
        ("no processor", "got no preprocessor_config.json"),
    ],
)
def test_what_is_refused(model_dir, tmp_path, how, message):
    spoil(model_dir, how)
    before = {path: path.read_bytes() for path in model_dir.iterdir()}
    with pytest.raises(UserError) as error:
        publish(model_dir, REPO_ID, output=tmp_path / "built")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "built").exists()
    assert {path: path.read_bytes() for path in model_dir.iterdir()} == before


@pytest.mark.parametrize("repo_id", ["name", "user/", "a/b/c", "user/na me", ""])
def test_a_repo_id_without_user_or_name_is_refused(repo_id):
    with pytest.raises(PublishError, match="repo-id: expected user/name, got"):
        publish(NANO, repo_id)
    with pytest.raises(PublishError, match="model-id: expected user/name, got"):
        publish_space("user/name", repo_id)


def test_a_folder_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="output: expected a new or an empty folder"):
        publish(NANO, REPO_ID, output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_remote_code_that_answers_otherwise_is_refused(built):
    (built / "SHA256SUMS").unlink()
    path = built / "modeling_vit_cifar.py"
    code = path.read_text()
    path.write_text(code.replace("self.scaling = self.head_dim**-0.5", "self.scaling = 1.0"))
    with pytest.raises(PublishError, match="remote code: expected the answers of this package to 0.0001, got logits"):
        check_as_stranger(built)
    path.write_text(code.replace("from .configuration_vit_cifar", "from vit_cifar.configuration_vit_cifar"))
    with pytest.raises(PublishError, match="remote code: expected a model that loads without this package, got "):
        check_as_stranger(built)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: apache-2.0\n", "", "got no license"),
        (f"value: {ACCURACY}", "value: 0.95", rf"expected the record's accuracy {ACCURACY}, got \[0.95\]"),
        (f"{ACCURACY:.2%}", "95.00%", f"expected the record's accuracy, {ACCURACY:.2%}, in its text, got none"),
        ("(overlays.png)", "(elsewhere.png)", "got elsewhere.png"),
        ("## Citation", "[More Information Needed]", "every section to be filled"),
    ],
)
def test_a_card_that_is_not_the_records_is_refused(built, old, new, message):
    check_card(built)
    card = (built / "README.md").read_text()
    assert old in card
    (built / "README.md").write_text(card.replace(old, new))
    with pytest.raises(PublishError, match=message):
        check_card(built)


def test_a_record_that_the_dataset_contradicts_is_refused(smoke_folder, tmp_path):
    folder = copy_to_change(smoke_folder, tmp_path / "run")
    assert "as the record says" in check_accuracy(folder, None)  # `sample` travels with the package
    record = read_record(folder)
    per_class = record["test_accuracy_per_class"]
    for name, other in (
        ("test_accuracy", {"test_accuracy": record["test_accuracy"] + 0.05}),
        ("test_loss", {"test_loss": record["test_loss"] + 0.01}),
        ("cat", {"test_accuracy_per_class": per_class | {"cat": per_class["cat"] + 0.3}}),
        ("test", {"dataset": record["dataset"] | {"images": record["dataset"]["images"] | {"test": 201}}}),
    ):
        (folder / RECORD_NAME).write_text(json.dumps(record | other))
        with pytest.raises(PublishError, match=f"record: expected its {name} "):
            check_accuracy(folder, "sample")
    with pytest.raises(UserError, match="dataset_name: expected a dataset"):
        check_accuracy(folder, "no/such-dataset")


@pytest.mark.parametrize(
    ("name", "value"),
    [("parameters", 7), ("test_accuracy", 100 * ACCURACY), ("test_accuracy", None), ("test_loss", "low")],
)
def test_a_record_that_cannot_be_is_refused(model_dir, tmp_path, name, value):
    (model_dir / RECORD_NAME).write_text(json.dumps(read_record(model_dir) | {name: value}))
    with pytest.raises(UserError) as error:
        publish(model_dir, REPO_ID, output=tmp_path / "built")
    assert "record" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_record_is_one_line(model_dir, content):
    (model_dir / RECORD_NAME).write_text(content)
    with pytest.raises(UserError, match="expected a record with weights_sha256, got"):
        publish(model_dir, REPO_ID)


def test_the_command_without_a_token_says_how_to_log_in(tmp_path):
    words = ["publish", NANO, "--repo-id", REPO_ID, "--push"]
    finished = run(sys.executable, "-m", "vit_cifar", *words, HF_HOME=str(tmp_path), HF_TOKEN="")
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr == ("vit-cifar: push: expected a token of the Hub, got none: `hf auth login` stores one\n")


def test_a_space_holds_the_package_without_what_an_editor_left(tmp_path, monkeypatch):
    checkout, built = tmp_path / "checkout", tmp_path / "built"
    built.mkdir()
    shutil.copytree(ROOT / "vit_cifar", checkout / "vit_cifar")
    for name in ("app.py", "LICENSE"):
        shutil.copyfile(ROOT / name, checkout / name)
    for name in (".ipynb_checkpoints/cli.py", "demo/._page.py"):
        (checkout / "vit_cifar" / name).parent.mkdir(exist_ok=True)
        (checkout / "vit_cifar" / name).write_text("secret")
    monkeypatch.setattr("vit_cifar.hub.space.__file__", str(checkout / "vit_cifar" / "hub" / "space.py"))
    build_space_repo("user/page", REPO_ID, "a" * 40, built)
    names = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert {"app.py", "LICENSE", "model_id.txt", "vit_cifar/cli.py", "vit_cifar/demo/page.py"} <= names
    assert not [name for name in names if any(part.startswith(".") for part in name.split("/"))]


@pytest.mark.slow
def test_an_installation_without_checkout_says_so(tmp_path):
    package = Path(sys.modules["vit_cifar"].__file__).parent
    shutil.copytree(package, tmp_path / "vit_cifar", ignore=shutil.ignore_patterns("__pycache__"))
    for words in (["publish", NANO], ["publish-space", "--model-id", REPO_ID, "--model-revision", "a" * 40]):
        words = ["-m", "vit_cifar", *words, "--repo-id", REPO_ID]
        finished = run(sys.executable, *words, PYTHONPATH=f"{tmp_path}{os.pathsep}", cwd=tmp_path)
        assert finished.returncode == 2
        assert finished.stderr.count("\n") == 1 and "expected a checkout of the project" in finished.stderr

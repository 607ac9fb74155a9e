import json
import shutil
import subprocess

import pytest

from vit_cifar.evaluation.records import (
    RECORD_NAME,
    accuracy_tolerance,
    epoch_log,
    epochs_trained,
    fill_tables,
    git_commit,
    public_command,
    public_name,
    read_record,
    write_json,
)


def test_the_epochs_of_a_record_are_those_that_were_trained():
    rows = [{"epoch": 1}, {"epoch": 1.5}]  # ended by max_steps
    assert epochs_trained({"epoch_selected_on": "validation", "epochs": rows, "kept_epoch": 1}) == 1.5
    assert epochs_trained({"epoch_selected_on": None, "epochs": rows, "kept_epoch": 1.5}) == 1.5


@pytest.mark.parametrize(("images", "tolerated"), [(10_000, 10), (1_000, 2), (100, 2)])
def test_two_images_on_the_border_or_a_thousandth_are_the_same_accuracy(images, tolerated):
    assert tolerated / images <= accuracy_tolerance(images) < (tolerated + 1) / images


def test_a_record_belongs_to_its_weights(smoke_folder, tmp_path):
    folder = shutil.copytree(smoke_folder, tmp_path / "model")
    record = read_record(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match="expected the record of these weights"):
        read_record(folder)
    (folder / "training_record.json").unlink()
    with pytest.raises(ValueError, match="expected a training_record.json, got none"):
        read_record(folder)
    write_json(folder / RECORD_NAME, record)
    assert json.loads((folder / "training_record.json").read_text()) == record


def test_epoch_log_joins_what_trainer_logs_apart():
    history = [
        {"epoch": 0.1, "loss": 5.0, "learning_rate": 0.1, "step": 1},  # --logging_first_step
        {"epoch": 1.0, "loss": 2.0, "learning_rate": 0.1, "step": 10},
        {"epoch": 1.0, "eval_loss": 1.5, "eval_accuracy": 0.5, "eval_runtime": 1.0},
        {"epoch": 2.0, "loss": 1.0, "step": 20},
        {"epoch": 2.0, "eval_loss": 1.2, "eval_accuracy": 0.6},
        {"epoch": 2.0, "train_runtime": 9.0, "train_loss": 1.5},
    ]
    assert epoch_log(history) == [
        {"epoch": 1, "training_loss": 2.3, "validation_loss": 1.5, "validation_accuracy": 0.5},
        {"epoch": 2, "training_loss": 1.0, "validation_loss": 1.2, "validation_accuracy": 0.6},
    ]


def test_epoch_log_averages_what_is_logged_within_an_epoch():
    logged = ((0.5, 4.0), (1.0, 2.0), (1.5, 1.0), (2.0000001, 0.5))
    history = [{"epoch": epoch, "loss": loss, "step": 10 * round(2 * epoch)} for epoch, loss in logged]
    assert epoch_log(history) == [{"epoch": 1, "training_loss": 3.0}, {"epoch": 2, "training_loss": 0.75}]


def test_a_training_that_ends_within_an_epoch_has_its_last_row_there():
    history = [
        {"epoch": 1.0, "loss": 2.0, "step": 10},
        {"epoch": 1.1005, "loss": 1.0, "step": 11},
        {"epoch": 1.1005, "train_runtime": 9.0},
    ]
    assert epoch_log(history) == [{"epoch": 1, "training_loss": 2.0}, {"epoch": 1.1, "training_loss": 1.0}]


@pytest.mark.parametrize("form", [["--dataset_name", "/a/folder"], ["--dataset-name=/a/folder"]])
def test_a_public_command_names_no_folder_of_a_machine(form):
    command = public_command(["train.py", "--recipe", "nano", *form], {"dataset_name": "cifar10-jpeg-q75"})
    assert "/a/folder" not in command
    assert command.startswith("train.py --recipe nano --dataset_name") and command.endswith("cifar10-jpeg-q75")


def test_a_folder_of_a_machine_is_called_by_its_last_part(tmp_path, monkeypatch):
    (folder := tmp_path / "my_images").mkdir()
    monkeypatch.chdir(folder)
    assert {public_name(name) for name in (".", "../my_images", str(folder))} == {"my_images"}
    assert public_name("user/name") == "user/name" and public_name("runs/nano") == "runs/nano"


def test_a_table_without_its_place_in_the_page_is_an_error():
    page = "<!-- a: made by x.py -->\nold\n<!-- end of a -->"
    assert fill_tables(page, "x.py", {"a": "new"}) == page.replace("old", "new")
    with pytest.raises(ValueError, match="expected <!-- b: made by x.py --> and <!-- end of b --> once"):
        fill_tables(page, "x.py", {"b": "new"})
    with pytest.raises(ValueError, match="got them 2 times"):
        fill_tables(f"{page}\nwhat lies between stays\n{page}", "x.py", {"a": "new"})


def test_no_commit_outside_a_checkout(tmp_path):
    (tmp_path / "train.py").touch()
    assert git_commit(tmp_path / "train.py") is None
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert git_commit(tmp_path / "train.py") is None
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "other.py").touch()
    subprocess.run(["git", "-C", tmp_path, "add", "other.py"], check=True)
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-qm", "another project"], check=True)
    assert git_commit(tmp_path / "train.py") is None  # it lies in another project's checkout
    assert len(git_commit(tmp_path / "other.py")) == 40

"""train.py as its users run it. What is killed, and `smoke_folder`, is a process of its own."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import run, run_elsewhere, run_here, start
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.v2.functional import to_pil_image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vit_cifar.evaluation.metrics import evaluate
from vit_cifar.evaluation.records import read_record, weights_sha256
from vit_cifar.hub.card import model_card
from vit_cifar.training.data import load_split, split_off_validation


def train(*arguments):
    return run_here("train.py", *arguments)


def refusal(*arguments) -> str:
    """The last line of a training that is refused before it starts."""
    refused = train(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    return refused.stderr.splitlines()[-1]


def test_the_folder_loads_and_scores_what_its_record_says(smoke_folder):
    model = AutoModelForImageClassification.from_pretrained(smoke_folder)
    processor = AutoImageProcessor.from_pretrained(smoke_folder)
    record = read_record(smoke_folder)
    _, validation = split_off_validation(load_split("sample", "train"), 50, seed=0)
    for name, dataset in (("test", load_split("sample", "test")), ("validation", validation)):
        result = evaluate(model, processor, dataset)
        assert result.accuracy == record[f"{name}_accuracy"]
        assert result.loss == pytest.approx(record[f"{name}_loss"], abs=1e-5)
    assert record["test_accuracy"] > 0.15  # ten classes: it has learned something


def test_the_record_is_whole(smoke_folder):
    record = read_record(smoke_folder)
    assert record["command"].startswith("python train.py --recipe smoke --output_dir ")
    assert str(smoke_folder.parent) not in json.dumps(record)  # whose machine it was is nobody's business
    assert record["arguments"]["output_dir"] == smoke_folder.name
    assert record["arguments"]["optimizer"] == "muon"
    assert record["dataset"]["hub_id"] is None  # the images in the package
    assert record["arguments"]["per_device_train_batch_size"] == 25
    assert record["dataset"]["images"] == {"train": 250, "validation": 50, "test": 200}
    assert [row["epoch"] for row in record["epochs"]] == list(range(1, 11))
    for row in record["epochs"]:
        assert set(row) == {"epoch", "training_loss", "validation_loss", "validation_accuracy"}
    assert record["epochs"][-1]["training_loss"] < record["epochs"][0]["training_loss"]
    assert record["kept_epoch"] == 10
    assert record["epoch_selected_on"] is None
    assert record["epochs"][-1]["validation_loss"] == pytest.approx(record["validation_loss"], abs=0.01)
    assert record["wall_time_seconds"] > 0 and record["images_per_second"] > 0
    assert record["weights_sha256"] == weights_sha256(smoke_folder)
    assert {"torch", "transformers", "python"} <= set(record["versions"])
    assert record["hardware"]["cores"] == (psutil.cpu_count(logical=False) or os.cpu_count())
    assert len(record["git_commit"].removesuffix("+changes")) == 40


def test_the_folder_holds_no_pickle_and_a_picture(smoke_folder):
    names = {path.name for path in smoke_folder.iterdir() if path.is_file()}
    assert names == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "training_record.json", "loss_curve.png"),
        *("configuration_vit_cifar.py", "modeling_vit_cifar.py", "SHA256SUMS"),
    }
    assert (smoke_folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_works_by_remote_code_alone(smoke_folder, tmp_path):
    """In a process that cannot import the package."""
    script = """
import sys
sys.modules["vit_cifar"] = None  # any import of it fails
import torch
from transformers import AutoImageProcessor, pipeline, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
attentions = model(torch.zeros(1, 3, 32, 32), output_attentions=True).attentions
print(len(attentions), tuple(attentions[0].shape), model.config.id2label[3])
"""
    finished = run_elsewhere(script, tmp_path, smoke_folder)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "2 (1, 2, 65, 65) cat"


def test_killed_in_the_middle_of_an_epoch_and_resumed_ends_with_the_same_weights(smoke_folder, tmp_path):
    folder = tmp_path / "run"
    process = start(sys.executable, "train.py", "--recipe", "smoke", "--output_dir", folder)
    deadline = time.monotonic() + 300
    # An epoch has 10 steps and a checkpoint is written every 5: 15 lies in the middle of the second one.
    while (
        not (folder / "checkpoint-15" / "SHA256SUMS").exists()
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not ended by itself
    assert not (folder / "model.safetensors").exists()

    resumed = train("--recipe", "smoke", "--output_dir", folder, "--resume_from_checkpoint")
    assert resumed.returncode == 0, resumed.stderr
    unbroken = load_file(smoke_folder / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, unbroken[name]), name
    first, second = read_record(smoke_folder), read_record(folder)
    for name in ("validation_loss", "validation_accuracy"):
        assert [row[name] for row in first["epochs"]] == [row[name] for row in second["epochs"]]
    assert first["resumed_from_step"] is None
    assert second["resumed_from_step"] >= 15


def test_resume_from_the_middle_of_an_epoch_by_name(smoke_folder, tmp_path):
    folder = tmp_path / "run"
    first = train("--recipe", "smoke", "--output_dir", folder, "--save_total_limit", "100")
    assert first.returncode == 0, first.stderr
    checkpoint = f"{folder}/checkpoint-45/"  # as a shell completes it
    (tmp_path / "again" / "checkpoint-50").mkdir(parents=True)  # it was killed inside its first save before
    again = train("--recipe", "smoke", "--output_dir", tmp_path / "again", "--resume_from_checkpoint", checkpoint)
    assert again.returncode == 0, again.stderr
    assert weights_sha256(tmp_path / "again") == weights_sha256(folder) == weights_sha256(smoke_folder)
    # Another training's folder would lose its checkpoints, and one of them might be taken for the best of this one.
    other = smoke_folder / "checkpoint-95"
    message = refusal("--recipe", "smoke", "--output_dir", folder, "--resume_from_checkpoint", other)
    assert "output_dir: expected a folder that holds no other training" in message


def test_a_damaged_newest_checkpoint_is_passed_over_and_refused_by_name(smoke_folder, tmp_path):
    folder = shutil.copytree(smoke_folder, tmp_path / "run")
    (folder / "model.safetensors").unlink()
    (folder / "checkpoint-100" / "trainer_state.json").write_text('{"epoch": 10.0, "glo')
    command = ["--recipe", "smoke", "--output_dir", folder, "--resume_from_checkpoint"]
    assert "checkpoint-95 is whole" in refusal(*command, folder / "checkpoint-100")
    resumed = train(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "passed over" in resumed.stdout and "checkpoint-100" in resumed.stdout
    assert weights_sha256(folder) == weights_sha256(smoke_folder)


def test_a_stop_between_the_last_step_and_the_record_costs_nothing(smoke_folder, tmp_path):
    folder = shutil.copytree(smoke_folder, tmp_path / "run")
    for name in ("model.safetensors", "training_record.json", "SHA256SUMS"):
        (folder / name).unlink()
    resumed = train("--recipe", "smoke", "--output_dir", folder, "--resume_from_checkpoint")
    assert resumed.returncode == 0, resumed.stderr
    assert weights_sha256(folder) == weights_sha256(smoke_folder)
    first, second = read_record(smoke_folder), read_record(folder)
    assert second["epochs"] == first["epochs"] and second["test_accuracy"] == first["test_accuracy"]
    assert second["images_per_second"] is None
    assert "images a second" not in str(model_card(folder, "user/name"))


def test_a_finished_training_is_not_overwritten(smoke_folder):
    before = {path: path.stat().st_mtime_ns for path in smoke_folder.rglob("*")}
    message = refusal("--recipe", "smoke", "--output_dir", smoke_folder)
    assert "output_dir: expected a folder that holds no other training" in message
    assert before == {path: path.stat().st_mtime_ns for path in smoke_folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "no/such/folder"], "dataset_name: expected a dataset on the Hub or a folder"),
        (["--image_column", "picture"], "image_column: expected a column of split 'train'"),
        (["--validation_size", "5000"], "validation_size: expected 10 (one image a class) to 299, got 5000"),
        (["--config_overrides", "hidden_size=33"], "num_attention_heads: expected a divisor of hidden_size 33, got 2"),
        (["--config_overrides", "hiden_size=33"], "hiden_size: expected a field of ViTCifarConfig"),
        (["--config_overrides", "hidden_size=wide"], "Field 'hidden_size' expected int, got str"),
        (["--config_overrides", "num_channels=1"], "num_channels: expected 3, as images are decoded to RGB, got 1"),
        (
            ["--config_overrides", "num_labels=5"],
            "config fields: expected none of the classes, which are the dataset's, got num_labels",
        ),
        (["--max_shift", "32"], "max_shift: expected less than the images' 32 pixels, got 32"),
        (["--optim", "adafactor"], "optim: expected --optimizer trainer with it, got muon"),
        (["--attn_implementation", "magic"], "magic"),
        (["--attn_implementation", "flash_attention_2"], "FlashAttention2"),
        (["--report_to", "tensorbord"], "tensorbord"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint: nowhere: expected a SHA256SUMS"),
        (["--resume_from_checkpoint"], "resume_from_checkpoint: expected a whole checkpoint"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_write_nothing(tmp_path, arguments, message):
    assert message in refusal("--recipe", "smoke", "--output_dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_class_of_the_test_split_alone_is_refused(tmp_path):
    for row, place in enumerate(("train/cat", "train/dog", "test/cat", "test/Dog")):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (32, 32), (40 * row, 0, 0)).save(tmp_path / place / "1.png")
    arguments = ["--recipe", "smoke", "--output_dir", tmp_path / "run", "--dataset_name", tmp_path]
    assert "got none of Dog" in refusal(*arguments, "--validation_size", "0")


def test_a_file_in_the_place_of_the_folder_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = refusal("--recipe", "smoke", "--output_dir", tmp_path / "file")
    assert "output_dir: expected a folder that can be written" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_stopped_by_the_user_it_says_how_to_go_on(tmp_path):
    with (tmp_path / "errors").open("w") as errors:
        command = ["env", "--default-signal=INT", sys.executable, "train.py", "--recipe", "smoke"]
        process = start(*command, "--output_dir", tmp_path / "run", errors=errors)
    deadline = time.monotonic() + 300
    saved = tmp_path / "run" / "checkpoint-5" / "SHA256SUMS"  # while libraries are imported, an interrupt may be lost
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    said = (tmp_path / "errors").read_text()
    assert "train.py: stopped; --resume_from_checkpoint goes on" in said and "Traceback" not in said


def test_early_stopping_best_model_and_tensorboard(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "logs"))
    finished = train(
        *("--recipe", "smoke", "--output_dir", folder, "--save_strategy", "epoch", "--load_best_model_at_end"),
        *("--metric_for_best_model", "accuracy", "--early_stopping_patience", "1", "--learning_rate", "0"),
        *("--muon_learning_rate", "0", "--report_to", "tensorboard"),
    )
    assert finished.returncode == 0, finished.stderr
    record = read_record(folder)
    # Nothing is learned but the running mean and variance of the stem's norms: soon an epoch brings nothing better.
    assert len(record["epochs"]) < 10
    accuracies = [row["validation_accuracy"] for row in record["epochs"]]
    assert accuracies[round(record["kept_epoch"]) - 1] == max(accuracies)
    assert list(Path(folder).rglob("events.out.tfevents*"))


def test_the_tutorials_training_in_small(tmp_path):
    """Adam, all training images, and the epoch of the lowest loss on the test split from an epoch on."""
    finished = train(
        *("--recipe", "smoke", "--output_dir", tmp_path / "run", "--optimizer", "adam", "--validation_size", "0"),
        *("--save_strategy", "epoch", "--load_best_model_at_end", "--metric_for_best_model", "loss"),
        # Nothing is learned, so no epoch is better than another: without the rule, the first would be kept.
        *("--first_eligible_epoch", "4", "--num_train_epochs", "6", "--learning_rate", "0"),
        *("--config_overrides", "patch_embedding=conv"),
    )
    assert finished.returncode == 0, finished.stderr
    record = read_record(tmp_path / "run")
    assert len({row["validation_loss"] for row in record["epochs"]}) == 1
    assert record["kept_epoch"] == 4
    assert record["epoch_selected_on"] == "test"
    assert record["dataset"]["images"]["train"] == 300
    assert "not decayed: 0 in 0 tensors\n" in finished.stdout


def test_adamw_and_no_augmentation_are_one_argument_away(tmp_path):
    finished = train(
        *("--recipe", "smoke", "--output_dir", tmp_path / "run", "--optimizer", "trainer", "--num_train_epochs", "1"),
        *("--flip", "none", "--max_shift", "0", "--cutout_size", "0"),
    )
    assert finished.returncode == 0, finished.stderr
    arguments = json.loads((tmp_path / "run" / "training_record.json").read_text())["arguments"]
    assert (arguments["optimizer"], arguments["optim"]) == ("trainer", "adamw_torch_fused")


@pytest.mark.slow
def test_nano_starts_on_the_real_dataset_and_the_second_start_decodes_nothing(cifar10, tmp_path):
    cache = {"HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "train.py", "--recipe", "nano", "--dataset_name", cifar10, "--max_steps", "20"]
    command += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--output_dir"]
    first = run(*command, tmp_path / "first", **cache)
    assert first.returncode == 0, first.stderr
    assert "decoding train" in first.stderr and "decoding test" in first.stderr
    second = run(*command, tmp_path / "second", **cache)
    assert second.returncode == 0, second.stderr
    assert "decoding" not in second.stderr
    assert weights_sha256(tmp_path / "first") == weights_sha256(tmp_path / "second")
    record = read_record(tmp_path / "first")
    assert record["dataset"]["images"] == {"train": 45_000, "validation": 5_000, "test": 10_000}
    assert str(cifar10) not in (tmp_path / "first" / "training_record.json").read_text()


def test_the_kept_epoch_is_that_of_the_weights_also_when_not_each_evaluated_step_was_saved(tmp_path):
    finished = train(
        *("--recipe", "smoke", "--output_dir", tmp_path / "run", "--max_steps", "30", "--eval_strategy", "steps"),
        *("--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "5", "--metric_for_best_model", "accuracy"),
        *("--load_best_model_at_end", "true"),
    )
    assert finished.returncode == 0, finished.stderr
    record = read_record(tmp_path / "run")
    step = round(record["kept_epoch"] * 10)  # of 250 images in batches of 25
    assert record["weights_sha256"] == weights_sha256(tmp_path / "run" / f"checkpoint-{step}")


@pytest.fixture
def two_classes(tmp_path) -> Path:
    """An image folder of animals and vehicles made from the sample, 40 px wide and high."""
    animals = ("bird", "cat", "deer", "dog", "frog", "horse")
    for split in ("train", "test"):
        dataset = load_split("sample", split)
        for row, (image, label) in enumerate(zip(dataset.images, dataset.labels, strict=True)):
            name = "animal" if dataset.classes[label] in animals else "vehicle"
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).resize((40, 40)).save(folder / f"{row}.png")
    for row, path in enumerate(sorted(tmp_path.glob("data/train/animal/*.png"))[:3]):
        shutil.copy(path, tmp_path / "data" / "test" / "animal" / f"twice_{row}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("frozen", [False, True])
def test_a_trained_model_learns_other_classes_at_another_size(smoke_folder, two_classes, tmp_path, frozen):
    finished = train(
        *("--model_name_or_path", smoke_folder, "--dataset_name", two_classes, "--output_dir", tmp_path / "mine"),
        *("--config_overrides", "image_size=48", "--validation_size", "20", "--num_train_epochs", "2"),
        *["--freeze_body"] * frozen,
    )
    assert finished.returncode == 0, finished.stderr
    assert "new head: 2 classes (animal, vehicle) in place of 10, positions interpolated" in finished.stdout
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "mine")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "mine")
    assert (model.config.image_size, dict(processor.size)["height"]) == (48, 48)
    record = read_record(tmp_path / "mine")
    twice = record["dataset"]["test_images_in_train"]
    assert 1 <= twice <= 3  # of the three, some may be held out for validation
    assert f"{twice} of 203 test images are training images too" in finished.stdout
    assert evaluate(model, processor, load_split(str(two_classes), "test", 48)).accuracy == record["test_accuracy"]
    assert record["arguments"]["model_name_or_path"] == smoke_folder.name
    assert record["arguments"]["model_revision"] == weights_sha256(smoke_folder)
    assert str(tmp_path) not in json.dumps(record) and str(smoke_folder) not in json.dumps(record)
    before, after = load_file(smoke_folder / "model.safetensors"), load_file(tmp_path / "mine" / "model.safetensors")
    names = [name for name in before if not name.startswith("classifier") and "position" not in name]
    assert all(torch.equal(before[name], after[name]) for name in names) == frozen
    predicted = run_here("vit_cifar", "predict", next(two_classes.rglob("*.png")), "--model", tmp_path / "mine")
    assert "animal" in predicted.stdout and "vehicle" in predicted.stdout

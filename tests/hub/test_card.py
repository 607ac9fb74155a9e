"""The card says what the records say, and its code runs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, copy_to_change

from vit_cifar.evaluation.examination import EXAMINATION_NAME, MISTAKES_NAME
from vit_cifar.evaluation.records import RECORD_NAME, RecordError, read_record
from vit_cifar.hub.card import model_card
from vit_cifar.hub.publish import LINK
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL

FOLDERS = sorted(BUNDLED_MODELS.iterdir())
NANO = BUNDLED_MODELS / DEFAULT_MODEL


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return shutil.copytree(NANO, tmp_path / "nano")


def change_record(folder: Path, **changes: object) -> None:
    path = folder / RECORD_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_committed_card_is_the_records(folder):
    assert (folder / "README.md").read_text() == str(model_card(folder, f"your-name/{folder.name}")), (
        "python docs/results.py fills it"
    )


def test_metadata_is_what_the_hub_reads():
    record, card = read_record(NANO), model_card(NANO, "user/name")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification" and data["datasets"] == ["uoft-cs/cifar10"]
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"name": "cifar10-jpeg-q75", "type": "uoft-cs/cifar10", "split": "test"}
    assert result["metrics"][0]["value"] == record["test_accuracy"]
    examination = json.loads((NANO / EXAMINATION_NAME).read_text())
    assert result["metrics"][1]["value"] == examination["calibration"]["as trained"]["calibration_error"]


def test_a_gpu_is_named_once_beside_the_processor(nano):
    hardware = read_record(nano)["hardware"]
    change_record(nano, wall_time_seconds=300, hardware=hardware | {"gpu": "NVIDIA H200"})
    (line,) = re.findall(r"\*\*Hardware and time.*", model_card(nano, "user/name").content)
    assert f"5.0 min on NVIDIA H200, bf16 autocast ({hardware['cpu']})" in line


def test_every_number_follows_the_record(nano):
    """Other numbers in the records, the same numbers in the card; those of before are gone."""
    before = read_record(nano)
    per_class = {name: 0.5 + index / 100 for index, name in enumerate(before["test_accuracy_per_class"])}
    change_record(nano, test_accuracy=0.7654, test_accuracy_per_class=per_class, wall_time_seconds=600 * 60, seed=7)
    text = model_card(nano, "user/name").content
    assert "76.54%" in text and f"{before['test_accuracy']:.2%}" not in text
    assert "50.00%" in text and "59.00%" in text and "seed 7" in text and "600 min on 2 CPU cores" in text


def test_classes_that_are_known_alike_have_no_worst_and_best(nano):
    per_class = read_record(nano)["test_accuracy_per_class"]
    assert "knows worst and best" in model_card(nano, "user/name").content
    change_record(nano, test_accuracy_per_class=dict.fromkeys(per_class, 0.9))
    assert "knows worst and best" not in model_card(nano, "user/name").content


def test_a_model_that_was_not_examined_has_no_such_sections(nano):
    for name in (EXAMINATION_NAME, MISTAKES_NAME):
        (nano / name).unlink()
    text = model_card(nano, "user/name").content
    assert "xamination" not in text and "Calibration" not in text and "overlays.png" not in text
    assert "Evaluation" in text and f"{read_record(nano)['test_accuracy']:.2%}" in text


def test_own_classes_have_the_dataset_of_their_own(smoke_folder, tmp_path):
    folder = shutil.copytree(smoke_folder, tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(index): f"kind {index}" for index in range(10)}
    config["label2id"] = {f"kind {index}": index for index in range(10)}
    (folder / "config.json").write_text(json.dumps(config))
    record = read_record(folder)
    record["dataset"] |= {"name": "user/kinds", "hub_id": "user/kinds"}
    record["arguments"] |= {"model_name_or_path": "user/base@v1", "model_revision": "a" * 40}
    change_record(folder, **record)
    card = model_card(folder, "user/mine")
    assert card.data.datasets == ["user/kinds"] and card.data.base_model == "user/base"
    assert "fine-tuned from user/base@v1 on user/kinds" in " ".join(card.text.split())
    assert "cifar10" not in card.content.lower() and "Krizhevsky" not in card.text


def test_another_dataset_with_its_class_names_is_not_cifar10(smoke_folder):
    card = model_card(smoke_folder, "user/name")
    assert card.data.datasets is None and card.data.eval_results[0].dataset_type == "sample"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("./my_images", "my_images"), ("my photos", "my-photos"), ("data/Vögel", "V-gel"), ("犬", "own-images")],
)
def test_a_dataset_of_ones_own_has_a_name_that_the_hub_takes(smoke_folder, tmp_path, name, kind):
    """The Hub refuses a card otherwise."""
    folder = copy_to_change(smoke_folder, tmp_path / "mine")
    change_record(folder, dataset=read_record(folder)["dataset"] | {"name": name})
    result = model_card(folder, "user/name").data.eval_results[0]
    assert (result.dataset_type, result.dataset_name) == (kind, name)


def test_class_names_are_shown_as_they_are(smoke_folder, tmp_path):
    folder = copy_to_change(smoke_folder, tmp_path / "mine")
    per_class = read_record(folder)["test_accuracy_per_class"]
    odd = ["a|b", "<unk>", "box](x)", "two\nlines", *list(per_class)[4:]]
    change_record(folder, test_accuracy_per_class=dict(zip(odd, per_class.values(), strict=True)))
    card = model_card(folder, "user/name")
    assert not LINK.search(card.text[card.text.index("box") :][:10])
    for name in (r"a\|b", r"\<unk\>", r"box\](x)", "two lines"):
        assert f"\n| {name} | " in card.text


def test_a_start_from_a_folder_of_this_machine_is_no_base_model(nano):
    arguments = read_record(nano)["arguments"] | {"model_name_or_path": "runs/nano", "model_revision": "b" * 64}
    change_record(nano, arguments=arguments)
    assert model_card(nano, "user/name").data.base_model is None


def test_a_record_that_lacks_what_the_card_says_is_an_error(nano):
    record = json.loads((nano / RECORD_NAME).read_text())
    del record["validation_accuracy"]
    (nano / RECORD_NAME).write_text(json.dumps(record))
    with pytest.raises(RecordError, match="expected a record with all that a card says"):
        model_card(nano, "user/name")
    (nano / RECORD_NAME).unlink()
    with pytest.raises(RecordError, match="expected a training_record.json, got none"):
        model_card(nano, "user/name")


def test_its_code_runs_as_a_stranger_would(tmp_path):
    """In another folder, with the model under its name there, in a process that cannot import the package."""
    shutil.copytree(NANO, tmp_path / "your-name" / NANO.name)
    shutil.copyfile(ROOT / "vit_cifar" / "demo" / "assets" / "examples" / "ship.png", tmp_path / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (NANO / "README.md").read_text(), flags=re.DOTALL)
    code = f"import sys\nsys.modules['vit_cifar'] = None\n{code}\nprint(where_it_looks.shape)"
    finished = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    answer, shape = finished.stdout.splitlines()
    assert answer.startswith("ship ") and shape == "torch.Size([8, 8])"

"""The model folders in hub_card/models/ are what they say."""

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run

import vit_cifar
from vit_cifar.evaluation.metrics import evaluate
from vit_cifar.evaluation.records import read_record, time_and_machine
from vit_cifar.models import BUNDLED_MODELS, load_model
from vit_cifar.training.arguments import RECIPES
from vit_cifar.training.data import load_split

FOLDERS = sorted(BUNDLED_MODELS.iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_remote_code_is_the_packages(folder):
    for name in ("configuration_vit_cifar.py", "modeling_vit_cifar.py"):
        assert (folder / name).read_bytes() == (Path(vit_cifar.__file__).parent / name).read_bytes(), name
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_record_belongs_to_the_weights_and_the_model_loads(folder):
    record = read_record(folder)
    model, _ = load_model(str(folder))
    assert model.num_parameters() == record["parameters"]
    assert list(model.config.id2label.values()) == list(vit_cifar.CIFAR10_CLASSES)
    kept = record["epochs"][round(record["kept_epoch"]) - 1]
    assert kept["validation_accuracy"] == max(row["validation_accuracy"] for row in record["epochs"])


def test_nano_classifies_the_sample(tmp_path):
    """Without the dataset at hand: a lower bound on 200 test images, far above what a broken model reaches."""
    result = evaluate(*load_model(), load_split("sample", "test"))
    assert result.accuracy > 0.8


def test_a_recipes_header_has_the_records_numbers():
    for folder in FOLDERS:
        record = read_record(folder)
        recipe = (RECIPES / f"{record['recipe']}.yaml").read_text()
        line = f"{record['test_accuracy']:.2%} on {record['dataset']['name']}, {time_and_machine(record)}"
        assert line in recipe, f"the header of recipe {record['recipe']} is not that of the record: {line}"


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_accuracy_on_the_test_set_equals_the_record(folder, cifar10):
    record = read_record(folder)
    answer = run(sys.executable, "-m", "vit_cifar", "evaluate", folder, "--dataset_name", cifar10, "--json")
    assert answer.returncode == 0, answer.stderr
    numbers = json.loads(answer.stdout)
    assert numbers["images"] == 10_000
    # Processors round differently: an image or two on the border may fall to the other side.
    assert numbers["accuracy"] == pytest.approx(record["test_accuracy"], abs=3e-4)
    assert numbers["accuracy"] >= 0.9
    assert numbers["per_class"] == pytest.approx(record["test_accuracy_per_class"], abs=3e-3)

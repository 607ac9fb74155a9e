import json
import os
import shutil
import sys

import pytest
from helpers import copy_to_change, run, run_here
from PIL import Image
from transformers import pipeline

from vit_cifar import cli
from vit_cifar.evaluation.examination import read_examination
from vit_cifar.evaluation.metrics import evaluate
from vit_cifar.evaluation.records import RECORD_NAME, read_record, write_json
from vit_cifar.images import MAX_DECODED_PIXELS
from vit_cifar.models import load_model
from vit_cifar.training.data import load_split


def vit_cifar(*arguments):
    return run_here("vit_cifar", *arguments)


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / name for name in ("red.png", "large.jpg")]
    Image.new("RGB", (32, 32), "red").save(paths[0])
    Image.radial_gradient("L").resize((300, 200)).save(paths[1])
    return paths


def test_predict_prints_what_the_pipeline_says(images, tiny_model_folder):
    model, processor = load_model(str(tiny_model_folder))
    classify = pipeline("image-classification", model=model, image_processor=processor)
    expected = [classify(Image.open(path).convert("RGB"), top_k=10) for path in images]

    words = ("predict", *images, "--model", tiny_model_folder, "--json", "--top", "20")
    answer = run(sys.executable, "-m", "vit_cifar", *words)
    assert answer.returncode == 0, answer.stderr
    rows = json.loads(answer.stdout)  # nothing else is on stdout
    for row, path, classes in zip(rows, images, expected, strict=True):
        assert row["image"] == str(path)
        assert [item["label"] for item in row["predictions"]] == [item["label"] for item in classes]
        for item, other in zip(row["predictions"], classes, strict=True):
            assert item["score"] == pytest.approx(other["score"], abs=1e-5)

    lines = vit_cifar("predict", *images, "--model", tiny_model_folder).stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in images]
    assert lines[0].count("%") == 3


def test_evaluate_prints_accuracy_and_each_class(smoke_folder):
    result = evaluate(*load_model(str(smoke_folder)), load_split("sample", "test"))
    answer = vit_cifar("evaluate", smoke_folder, "--dataset_name", "sample", "--json")
    assert answer.returncode == 0, answer.stderr
    numbers = json.loads(answer.stdout)
    assert numbers["accuracy"] == result.accuracy
    assert numbers["per_class"] == pytest.approx(result.per_class)
    text = vit_cifar("evaluate", smoke_folder, "--dataset-name", "sample").stdout
    assert f"accuracy {result.accuracy:.2%} on 200 images" in text
    assert all(name in text for name in result.per_class)


def test_explain_draws_one_image_or_a_folder_of_them(images, tiny_model_folder, tmp_path):
    one = vit_cifar("explain", images[0], "-o", tmp_path / "one.png", "--model", tiny_model_folder, "--layer", "1")
    assert one.returncode == 0, one.stderr
    with Image.open(tmp_path / "one.png") as picture:
        assert (picture.text["model"], picture.text["layer"]) == (tiny_model_folder.name, "1")
        assert picture.text["entropy"] in one.stdout
    (tmp_path / "one.png").unlink()
    words = ("-o", tmp_path / "maps", "--model", tiny_model_folder, "--method", "occlusion", "--class", "cat")
    several = vit_cifar("explain", images[0].parent, *words)
    assert several.returncode == 0, several.stderr
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["large.png", "red.png"]
    for path in (tmp_path / "maps").iterdir():
        with Image.open(path) as picture:
            assert picture.text["class"] == "cat"
    before = {path: path.read_bytes() for path in (tmp_path / "maps").iterdir()}
    refused = vit_cifar("explain", *images, *words)
    assert refused.returncode == 2 and "output: expected a new or an empty folder" in refused.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in (tmp_path / "maps").iterdir()} == before


def test_examine_leaves_its_record_beside_the_weights(smoke_folder, tmp_path):
    folder = shutil.copytree(smoke_folder, tmp_path / "model")
    answer = vit_cifar("examine", folder, "--dataset_name", "sample", "--images", "4")
    assert answer.returncode == 0, answer.stderr
    found, trained = read_examination(folder), read_record(folder)
    assert found.record["test_accuracy"] == pytest.approx(trained["test_accuracy"])
    assert found.record["dataset"] == trained["dataset"]["name"]
    assert found.record["images"] == {"validation": trained["dataset"]["images"]["validation"], "test": 200}
    assert f"test accuracy {trained['test_accuracy']:.2%}" in answer.stdout
    assert len(found.record["maps"]["methods"]["rollout"]["deletion"]) == 17
    load_model(str(folder))  # its checksums are those of the new files


@pytest.mark.parametrize("why", ["validation", "test", "none held out"])
def test_examine_refuses_what_it_cannot_tell_of(smoke_folder, why, tmp_path):
    """On another dataset than the record's, or one in another order, or without held-out images, no image is known to
    be new to the model."""
    folder = copy_to_change(smoke_folder, tmp_path / "model")
    record = read_record(folder)
    if why != "none held out":
        record[f"{why}_accuracy"] += 0.1
        message = f"dataset_name: expected the dataset of the record's {why} accuracy"
    else:
        record["arguments"]["validation_size"] = 0
        message = "record: expected a training that held images out of train, got validation_size 0"
    write_json(folder / RECORD_NAME, record)
    answer = vit_cifar("examine", folder, "--images", "2")  # on the record's own dataset
    assert answer.returncode == 2 and message in answer.stderr
    assert read_examination(folder) is None


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def write():
        raise PermissionError(13, "Permission denied", "model/examination.json")

    monkeypatch.setattr(cli, "app", write)  # root may write everywhere
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "vit-cifar: [Errno 13] Permission denied: 'model/examination.json'\n"


def test_users_errors_are_one_line_and_exit_code_2(images, tiny_model_folder, tmp_path, recwarn):
    text = tmp_path / "text.png"
    text.write_text("no image")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    own_classes = copy_to_change(tiny_model_folder, tmp_path / "own")
    model, _ = load_model(str(tiny_model_folder))
    model.config.id2label = dict(enumerate("abcdefghij"))
    model.config.save_pretrained(own_classes)
    for arguments, message in (
        (["predict", text, "--model", tiny_model_folder], "expected an image"),
        (
            ["predict", tmp_path / "huge.png", "--model", tiny_model_folder],
            f"expected at most {MAX_DECODED_PIXELS:,} pixels",
        ),
        (["predict", images[0], tmp_path / "nothing.png", "--model", tiny_model_folder], "no such file"),
        (["predict", images[0], "--model", tmp_path / "nowhere"], "no such folder"),
        (["evaluate", tiny_model_folder, "--dataset_name", tmp_path / "nowhere"], "dataset_name: expected"),
        (["explain", images[0], "-o", tmp_path / "x.png", "--method", "lime"], "method: expected one of attention, "),
        (["explain", text, "-o", tmp_path / "x.png", "--model", tiny_model_folder], "expected an image"),
        (
            ["explain", images[0], "-o", tmp_path / "new" / "x.png"],
            "output: expected a new file in a folder that exists",
        ),
        (["explain", *images, "-o", tmp_path], "output: expected a new or an empty folder"),
        (["explain", *images, text, "-o", tmp_path / "maps", "--model", tiny_model_folder], "expected an image"),
        (["examine", tiny_model_folder, "--dataset_name", "sample"], "expected a training_record.json, got none"),
        (["examine", tmp_path / "nowhere"], "model: expected a model folder"),
        (
            ["evaluate", tiny_model_folder, "--dataset_name", "sample", "--split", "dev"],
            "sample: expected a split named dev",
        ),
        (
            ["evaluate", own_classes],
            "dataset_name: expected a dataset of the model's classes, which are not CIFAR-10's",
        ),
        (["predict", tmp_path, "--model", tiny_model_folder], "expected an image file, got a folder"),
        (["explain", images[0], "-o", tmp_path / "x.jpg"], "output: expected a name that ends in .png"),
    ):
        refused = vit_cifar(*arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        (line,) = refused.stderr.strip().splitlines()
        assert line.startswith("vit-cifar: ") and message in line
    assert not recwarn.list and not (tmp_path / "maps").exists()


def test_explain_checks_what_is_asked_for_before_it_reads_the_pictures(images, tiny_model_folder, tmp_path):
    images[0].write_text("no image")
    for words, message in ((["-o", tmp_path], "output: expected"), (["-o", tmp_path / "x", "--layer", "9"], "layer: ")):
        refused = vit_cifar("explain", *images, "--model", tiny_model_folder, *words)
        assert refused.returncode == 2 and message in refused.stderr


def test_a_file_name_need_not_be_text(images, tiny_model_folder, tmp_path):
    odd = images[0].rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    answer = vit_cifar("predict", odd, "--model", tiny_model_folder)
    assert answer.returncode == 0, answer.stderr
    assert "caf\\udce9.png: " in answer.stdout

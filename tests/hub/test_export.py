"""What is exported equals the model, in the hands of those who have none of this package's code."""

import hashlib
import importlib.metadata
import itertools
import json
import sys

import datasets
import onnx
import onnxruntime
import pytest
import torch
from helpers import ROOT, run, run_elsewhere, run_here
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification
from vit_cifar.evaluation.metrics import evaluate
from vit_cifar.evaluation.records import read_record, weights_sha256
from vit_cifar.hub import export
from vit_cifar.hub.export import ExportError, export_model
from vit_cifar.hub.folder import FolderError
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL, load_model
from vit_cifar.training.data import DataError, image_processor, load_rows, load_split

NANO = BUNDLED_MODELS / DEFAULT_MODEL
TUTORIAL_PE = {"patch_embedding": "linear", "position_embedding": "sinusoidal", "attention_output_projection": False}
VARIANTS = [
    dict(zip(("patch_embedding", "position_embedding", "attention_output_projection", "qkv_bias"), values, strict=True))
    for values in itertools.product(("linear", "conv"), ("learned", "sinusoidal"), (True, False), (True, False))
]


def model_in(folder, dtype=torch.float32, **fields):
    """A small model with weights far from their start, so that every tensor leaves its mark on logits and maps."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTCifarConfig(**{**sizes, "image_size": 16} | fields)
    torch.manual_seed(0)
    model = ViTCifarForImageClassification(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.3)
    model.to(dtype).save_pretrained(folder)
    image_processor(config.image_size).save_pretrained(folder)
    return model.eval().float()


def images_for(config, batch=3):
    size = (batch, config.num_channels, config.image_size, config.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(7))


def assert_same(model, images, logits, attentions):
    """attentions: (B, L, A, N, N)"""
    with torch.no_grad():
        expected = model(images, output_attentions=True)
    maps = torch.stack(expected.attentions, dim=1)
    assert expected.logits.std() > 0.5 and maps.amax() > 3 / maps.shape[-1]  # no agreement of zeros or uniform maps
    torch.testing.assert_close(logits, expected.logits, atol=5e-5, rtol=0)
    torch.testing.assert_close(attentions, maps, atol=5e-5, rtol=0)


# --format vit


def load_stock(folder):
    model, info = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def assert_stock_equals(model, folder):
    stock, images = load_stock(folder), images_for(model.config)
    with torch.no_grad():
        outputs = stock(images, output_attentions=True)
    assert_same(model, images, outputs.logits, torch.stack(outputs.attentions, dim=1))
    return stock


def test_a_full_disk_is_one_line(tmp_path):
    model_in(tmp_path / "model", patch_embedding="linear")
    export = [sys.executable, "-m", "vit_cifar", "export", "model", "--format", "vit", "--output", "exported"]
    finished = run("sh", "-c", 'ulimit -f 64; exec "$@"', "sh", *export, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert finished.returncode == 2 and finished.stderr.splitlines()[-1].startswith("vit-cifar: ")
    assert "File too large" in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr and not (tmp_path / "exported").exists()


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_vit_of_every_variant_without_a_stem(fields, tmp_path):
    model = model_in(tmp_path / "model", **fields)
    record = export_model(str(tmp_path / "model"), "vit", tmp_path / "vit")
    assert_stock_equals(model, tmp_path / "vit")
    assert max(record["largest_difference"].values()) <= 1e-4
    assert json.loads((tmp_path / "vit" / "export_record.json").read_text()) == record


@pytest.mark.parametrize(
    "fields",
    [
        {"id2label": {0: "a", 1: "b", 2: "c"}, "problem_type": "multi_label_classification"},
        {"num_labels": 0},  # no head: logits are the class token
        {"image_size": 48, "patch_size": 8, "num_channels": 1},
        {"dtype": torch.bfloat16},
        {"initializer_range": 1, "layer_norm_eps": 0, "hidden_act": "relu"},  # whole numbers, which stock ViT refuses
    ],
    ids=["classes", "no-head", "sizes", "bf16", "numbers"],
)
def test_vit_keeps_what_the_config_says(fields, tmp_path):
    model = model_in(tmp_path / "model", **TUTORIAL_PE, **fields)
    export_model(str(tmp_path / "model"), "vit", tmp_path / "vit")
    config = assert_stock_equals(model, tmp_path / "vit").config
    for name in ("id2label", "label2id", "num_labels", "problem_type", "hidden_act", "layer_norm_eps", "image_size"):
        assert getattr(config, name) == getattr(model.config, name), name


def test_vit_loads_where_this_package_cannot_be_imported(tmp_path):
    model = model_in(tmp_path / "model", **TUTORIAL_PE)
    export_model(str(tmp_path / "model"), "vit", tmp_path / "vit")
    names = {"config.json", "export_record.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in (tmp_path / "vit").iterdir()} == names
    torch.save(images_for(model.config), tmp_path / "images.pt")
    script = """
import sys, torch
sys.modules["vit_cifar"] = None  # importing it is an error from here on
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
outputs = model(torch.load("images.pt"), output_attentions=True)
torch.save((type(model).__module__, outputs.logits.detach(), torch.stack(outputs.attentions, 1).detach()), "found.pt")
"""
    finished = run_elsewhere(script, tmp_path, tmp_path / "vit")
    assert finished.returncode == 0, finished.stderr
    module, logits, attentions = torch.load(tmp_path / "found.pt")
    assert module == "transformers.models.vit.modeling_vit"
    assert_same(model, images_for(model.config), logits, attentions)
    image = torch.randint(0, 256, (3, 40, 20), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    ours, theirs = (AutoImageProcessor.from_pretrained(tmp_path / name)(image) for name in ("model", "vit"))
    torch.testing.assert_close(theirs["pixel_values"][0], ours["pixel_values"][0])


def test_vit_under_a_fused_implementation_gives_the_same_logits(tmp_path):
    model = model_in(tmp_path / "model", **TUTORIAL_PE)
    export_model(str(tmp_path / "model"), "vit", tmp_path / "vit")
    fused = AutoModelForImageClassification.from_pretrained(tmp_path / "vit", attn_implementation="sdpa")
    images = images_for(model.config)
    torch.testing.assert_close(fused(images).logits, model(images).logits, atol=5e-5, rtol=0)


# --format onnx


@pytest.fixture(scope="module", params=["nano", "tutorial_pe"])
def exported(request, tmp_path_factory):
    """(model, its folder, the folder of its export, the record that export_model returned)"""
    scratch = tmp_path_factory.mktemp(request.param)
    if request.param == "nano":  # a convolutional stem
        folder, model = NANO, load_model(str(NANO))[0]
    else:
        folder, model = scratch / "model", model_in(scratch / "model", **TUTORIAL_PE, num_labels=3)
    return model, folder, scratch / "onnx", export_model(str(folder), "onnx", scratch / "onnx")


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnx_at_any_batch(exported, batch):
    model, _, folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images = images_for(model.config, batch)
    logits, attentions = session.run(["logits", "attentions"], {"pixel_values": images.numpy()})
    assert_same(model, images, torch.tensor(logits), torch.tensor(attentions))


def test_onnx_is_one_valid_file_that_says_nothing_of_this_machine(exported):
    _, _, folder, _ = exported
    names = {"config.json", "export_record.json", "model.onnx", "preprocessor_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    program = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(program, full_check=True)
    assert [(opset.domain, opset.version) for opset in program.opset_import] == [("", export.OPSET)]
    for path in folder.iterdir():
        for words in (str(ROOT), "site-packages", ".py", str(folder.parent)):
            assert words.encode() not in path.read_bytes(), path.name


def test_onnx_record_and_config(exported):
    model, source, folder, record = exported
    assert json.loads((folder / "export_record.json").read_text()) == record
    assert record["source_weights_sha256"] == weights_sha256(source)
    assert record["sha256"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert record["versions"]["onnxruntime"] == onnxruntime.__version__
    assert record["test_accuracy"] is record["images"] is record["dataset"] is None
    assert 0 < record["largest_difference"]["logits"] <= 1e-4
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config
    assert list(config["id2label"].values()) == list(model.config.id2label.values())


# The command


def command(*words):
    return run_here("vit_cifar", "export", *words)


@pytest.mark.slow
def test_the_command_measures_in_onnxruntime(tmp_path):
    expected = evaluate(*load_model(str(NANO)), load_split("sample", "test")).accuracy
    answer = command(NANO, "--format", "onnx", "--output", tmp_path / "new", "--dataset_name", "sample")
    assert (answer.returncode, answer.stderr) == (0, "")
    record = json.loads((tmp_path / "new" / "export_record.json").read_text())
    assert (record["test_accuracy"], record["images"], record["dataset"]) == (expected, 200, "sample")
    first, second = answer.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'new'}: largest difference from PyTorch: logits ")
    assert second == f"test accuracy {expected:.2%} on 200 images of sample"


@pytest.mark.slow
def test_the_command_takes_the_columns_that_evaluate_takes(tmp_path):
    rows = load_rows("sample")["test"].select(range(0, 200, 20))
    rows = rows.add_column("small", [None] * 10, feature=datasets.Image())
    (tmp_path / "rows").mkdir()
    rows.to_parquet(tmp_path / "rows" / "test.parquet")
    model_in(tmp_path / "model", **TUTORIAL_PE)
    words = (tmp_path / "model", "--format", "vit", "-o", tmp_path / "new", "--dataset_name", tmp_path / "rows")
    refused = command(*words)
    assert refused.returncode == 2 and "name it with --image_column" in refused.stderr
    assert not (tmp_path / "new").exists()
    answer = command(*words, "--image_column", "img", "--label_column", "label")
    assert answer.returncode == 0 and "on 10 images of rows" in answer.stdout


def test_the_command_says_that_nothing_was_measured_and_refuses_a_folder_that_holds_something(tmp_path):
    model_in(tmp_path / "model")
    (tmp_path / "new").mkdir()  # an empty one may be there
    answer = command(tmp_path / "model", "--format", "vit", "-o", tmp_path / "new")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.splitlines()[1] == "test accuracy not measured: name a dataset with --dataset_name"
    again = command(tmp_path / "model", "--format", "vit", "-o", tmp_path / "new")
    assert (again.returncode, again.stdout) == (2, "")
    (line,) = again.stderr.splitlines()
    assert line.startswith("vit-cifar: output: expected a new or an empty folder")


def test_it_is_the_export_that_is_measured(tmp_path, monkeypatch):
    """A stand-in for it that always says bird is right on the birds."""
    model_in(tmp_path / "model", image_size=32)
    right = export._export_vit

    def always_bird(model, folder):
        stock = right(model, folder)
        nn.init.zeros_(stock.classifier.weight)
        stock.classifier.bias.data = torch.eye(10)[2]
        return stock

    monkeypatch.setattr(export, "_export_vit", always_bird)
    monkeypatch.setattr(export, "_compare", lambda model, exported: {})
    record = export_model(str(tmp_path / "model"), "vit", tmp_path / "new", "sample")
    birds = (load_split("sample", "test").labels == 2).float().mean().item()
    assert record["test_accuracy"] == pytest.approx(birds)


@pytest.mark.slow
def test_nanos_onnx_scores_on_the_test_set_what_its_record_says(cifar10, tmp_path):
    answer = command(NANO, "--format", "onnx", "--output", tmp_path / "new", "--dataset-name", cifar10)
    assert answer.returncode == 0, answer.stderr
    record = json.loads((tmp_path / "new" / "export_record.json").read_text())
    assert record["images"] == 10_000
    assert record["test_accuracy"] == pytest.approx(read_record(NANO)["test_accuracy"], abs=5e-4)


# What goes wrong is said in one line, and nothing is written.


def refused(tmp_path, *arguments, error=ExportError, **keywords):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        export_model(*arguments, **keywords)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_convolutional_stem_has_no_place_in_stock_vit(tmp_path):
    message = refused(tmp_path, str(NANO), "vit", tmp_path / "new")
    assert message.startswith("format: expected onnx for this model, got vit: ") and "conv_stem" in message


def test_an_unknown_format(tmp_path):
    assert refused(tmp_path, str(NANO), "tflite", tmp_path / "new") == "format: expected onnx or vit, got 'tflite'"


def test_a_place_that_is_taken(tmp_path):
    model_in(tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "model", tmp_path / "file", tmp_path / "file" / "below"):
        message = refused(tmp_path, str(tmp_path / "model"), "vit", taken, error=FolderError)
        assert message.startswith("output: expected a")
    assert (tmp_path / "file").read_text() == "mine"


def test_classes_of_another_dataset(tmp_path):
    model_in(tmp_path / "model", num_labels=3)
    message = refused(tmp_path, str(tmp_path / "model"), "vit", tmp_path / "new", "sample", error=DataError)
    assert message.startswith("classes: expected those of the model")


def test_onnx_without_the_extra(tmp_path, monkeypatch):
    installed = importlib.metadata.version

    def version(name):
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    message = refused(tmp_path, str(NANO), "onnx", tmp_path / "new")
    assert "onnxruntime" in message and message.endswith('pip install "vit-cifar[export]"')
    model_in(tmp_path / "model")
    export_model(str(tmp_path / "model"), "vit", tmp_path / "new")  # needs none of it


@pytest.mark.parametrize("shift", [2e-4, float("nan")])
@pytest.mark.parametrize("name", ["logits", "attentions"])
def test_an_export_that_differs_is_not_kept(name, shift, tmp_path, monkeypatch):
    model_in(tmp_path / "model")
    right = export._export_vit

    def wrong(model, folder):
        def shifted(*args, **kwargs):
            outputs = stock(*args, **kwargs)
            if name == "logits":
                outputs.logits = outputs.logits + shift
            else:
                *others, last = outputs.attentions
                outputs.attentions = (*others, last + shift)
            return outputs

        stock = right(model, folder)
        return shifted

    monkeypatch.setattr(export, "_export_vit", wrong)
    message = refused(tmp_path, str(tmp_path / "model"), "vit", tmp_path / "new")
    assert message.startswith(f"{name}: expected those of the model to 0.0001, got ")

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from vit_cifar import models
from vit_cifar.models import ModelError, load_model


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def test_weights_and_processor_are_those_of_the_folder(folder):
    model, processor = load_model(str(folder))
    assert not model.training
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert list(processor.image_mean) == json.loads((folder / "preprocessor_config.json").read_text())["image_mean"]


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("classifier.bias"), "missing keys: .*classifier.bias"),
        (lambda weights: weights.update(extra=torch.ones(1)), "unexpected keys: .*extra"),
        (lambda weights: weights.update({"classifier.bias": torch.ones(3)}), "classifier.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_named(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(ModelError, match=message) as refused:
        load_model(str(folder))
    assert len(str(refused.value).splitlines()) == 1


def test_damaged_or_missing_files_give_one_line(folder):
    for name, content in (
        ("model.safetensors", b"\x00" * 50),
        ("config.json", b"{"),
        ("preprocessor_config.json", b"{"),
        ("model.safetensors", None),
        ("config.json", None),
    ):
        original = (folder / name).read_bytes()
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(ModelError) as refused:
            load_model(str(folder))
        assert len(str(refused.value).splitlines()) == 1
        (folder / name).write_bytes(original)
    load_model(str(folder))


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        load_model(str(folder))


def test_another_type_of_model_is_refused(tmp_path):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected type vit_cifar, got vit"):
        load_model(str(tmp_path))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_model(str(tmp_path / "nowhere"))


def test_without_a_bundled_model_one_must_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "BUNDLED_MODELS", tmp_path)
    with pytest.raises(ModelError, match="this installation carries no model"):
        load_model()

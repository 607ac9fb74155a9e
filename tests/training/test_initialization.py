import shutil
from dataclasses import replace

import pytest
import torch

from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification
from vit_cifar.configuration_vit_cifar import CIFAR10_CLASSES
from vit_cifar.training.arguments import parse_arguments
from vit_cifar.training.data import CIFAR10_MEAN, CIFAR10_STD, image_processor, load_split, normalize
from vit_cifar.training.initialization import adapt, initial_model, load_start, whiten

IMAGES = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def build(**fields) -> ViTCifarForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTCifarConfig(**sizes, embedding_initializer_range=0.5, **fields)
    return ViTCifarForImageClassification(config).eval()


def test_the_same_classes_keep_the_head():
    pretrained = build(patch_embedding="conv_stem")
    model, said = adapt(pretrained, list(CIFAR10_CLASSES), "eager")
    assert said == "head kept: 10 classes"
    torch.testing.assert_close(model.eval()(IMAGES).logits, pretrained(IMAGES).logits)


def test_weights_saved_in_bf16_are_trained_in_float32(tmp_path):
    build().to(torch.bfloat16).save_pretrained(tmp_path)
    pretrained = ViTCifarForImageClassification.from_pretrained(tmp_path)
    model, _ = adapt(pretrained, ["animal", "vehicle"], "eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.vit.embeddings.cls_token, pretrained.vit.embeddings.cls_token.float())


def test_other_classes_get_a_new_head_on_the_same_body():
    pretrained = build()
    model, said = adapt(pretrained, ["animal", "vehicle"], "eager")
    assert said == "new head: 2 classes (animal, vehicle) in place of 10"
    assert model.config.id2label == {0: "animal", 1: "vehicle"}
    assert model.config.label2id == {"animal": 0, "vehicle": 1}
    assert model(IMAGES).logits.shape == (3, 2)
    torch.testing.assert_close(model.eval().vit(IMAGES).pooler_output, pretrained.vit(IMAGES).pooler_output)
    assert pretrained.config.num_labels == 10


def test_a_trained_models_pixels_are_normalized_as_it_learned_them(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "start")
    image_processor(32, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]).save_pretrained(folder)
    recipe, _, _ = parse_arguments(["--model_name_or_path", str(folder), "--output_dir", str(tmp_path)])
    _, processor = load_start(recipe, folder)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and list(processor.image_std) == [0.4, 0.5, 0.6]


def test_a_single_class_is_refused():
    recipe, _, _ = parse_arguments(["--recipe", "smoke", "--output_dir", "x"])
    one_class = replace(load_split("sample", "train"), classes=["cat"])
    with pytest.raises(ValueError, match="label_column: expected two classes or more, got cat alone"):
        initial_model(recipe, *load_start(recipe, None), one_class, "eager")


@pytest.mark.parametrize("position_embedding", ["learned", "sinusoidal"])
def test_another_image_size_starts_from_interpolated_positions(position_embedding):
    pretrained = build(position_embedding=position_embedding)
    model, said = adapt(pretrained, list(CIFAR10_CLASSES), "eager", image_size=48)
    assert said == "head kept: 10 classes, positions interpolated from 32 to 48 px"
    assert model.config.image_size == 48
    assert model.vit.embeddings.position_embeddings.shape == (1, 1 + 12 * 12, 32)
    # The old model interpolates at every call.
    torch.testing.assert_close(model.eval()(IMAGES).logits, pretrained(IMAGES).logits)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("hidden_size=64", "config_overrides: expected image_size, .* with --model_name_or_path, got hidden_size"),
        ("drop_path=0.1", "config_overrides: expected .*, got drop_path"),
        ("image_size=47", "patch_size: expected a divisor of image_size 47, got 4"),
    ],
)
def test_fields_that_a_trained_model_cannot_change_are_refused_before_any_image_is_read(
    tiny_model_folder, tmp_path, overrides, message
):
    words = ["--model_name_or_path", str(tiny_model_folder), "--output_dir", str(tmp_path)]
    recipe, _, _ = parse_arguments([*words, "--config_overrides", overrides])
    with pytest.raises(ValueError, match=message):
        load_start(recipe, tiny_model_folder)


def test_whitened_filters_give_outputs_that_do_not_correlate():
    torch.manual_seed(0)
    train_set = load_split("sample", "train")
    convolution = torch.nn.Conv2d(3, 60, 3, bias=False)
    random = convolution.weight.detach().clone()
    whiten(convolution, train_set, CIFAR10_MEAN, CIFAR10_STD)
    assert torch.equal(convolution.weight[54:], random[54:])
    images = normalize(train_set.images, CIFAR10_MEAN, CIFAR10_STD).double()
    outputs = convolution.double()(images).detach().transpose(0, 1).flatten(1)
    powers = outputs @ outputs.T / outputs.shape[1]
    assert powers[0, 0] == powers.diagonal().max() > 10 * powers[26, 26]  # the largest first
    first = powers[:27, :27]
    scale = first.diagonal().sqrt()
    torch.testing.assert_close(first / scale[:, None] / scale, torch.eye(27).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(outputs[27:54], -outputs[:27])

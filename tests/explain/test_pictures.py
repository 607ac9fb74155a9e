import copy
import re

import matplotlib
import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from vit_cifar.explain.overlay import figure_with_colourbar
from vit_cifar.explain.perturbation import METHODS
from vit_cifar.explain.pictures import UNITS, draw_overlays, explain_image, files_in, map_options
from vit_cifar.images import open_image
from vit_cifar.models import load_model

EXAMPLE = ROOT / "vit_cifar/demo/assets/examples/ship.png"


@pytest.fixture(scope="module")
def model_and_processor():
    return load_model()


def test_every_method_has_a_unit():
    assert set(UNITS) == set(METHODS)


def test_the_cards_picture_of_a_bf16_model_whose_classes_are_no_formulas(model_and_processor, tmp_path):
    model, processor = model_and_processor
    half = copy.deepcopy(model).bfloat16()
    half.config.id2label = {index: "$" * (index + 1) for index in range(10)}
    half.config.id2label[8] = "$$"  # matplotlib takes this for a formula that it cannot read
    expected, found = (draw_overlays(m, processor, [open_image(EXAMPLE)], ["label: $$"]) for m in (model, half))
    found.savefig(tmp_path / "picture.png")
    words = [figure.axes[0].get_ylabel() for figure in (expected, found)]
    assert re.fullmatch(r"ship \d+%\nlabel: \$\$", words[0]) and re.fullmatch(r"\$\$ \d+%\nlabel: \$\$", words[1])
    for title, one, other in zip(("seen", "map", "classic", "colour"), expected.axes, found.axes, strict=True):
        drawn, of_half = (np.asarray(axis.images[0].get_array()) for axis in (one, other))
        assert drawn.std() > 0 and np.abs(of_half - drawn).max() < 0.1 * drawn.max(), title


@pytest.mark.parametrize("method", METHODS)
def test_the_file_says_what_it_shows(model_and_processor, method, tmp_path):
    model, processor = model_and_processor
    of_a_class = method in ("gradient rollout", "occlusion")
    options = map_options(model.config, method, class_name="cat" if of_a_class else None)
    explanation = explain_image(model, processor, open_image(EXAMPLE), "a-model", **options)
    explanation.save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        said = picture.text
    assert said["model"] == "a-model" and said["method"] == method
    assert said["answer"].startswith("ship ")
    assert said["minimum"] == f"{explanation.map.values.min().item():.4g}"
    assert said["entropy"].endswith(f" of {np.log2(explanation.map.values.numel()):g} bits")
    assert ("layer" in said) == ("head" in said) == (method == "attention")
    assert said.get("class") == ("cat" if of_a_class else None)
    assert ("class token to itself" in said) == (method in ("attention", "rollout"))


def test_a_class_is_found_by_the_name_that_it_is_shown_by(model_and_processor, monkeypatch):
    """`from_pretrained(folder, id2label=...)` leaves the old label2id as it was."""
    model, processor = model_and_processor
    monkeypatch.setattr(model.config, "id2label", {index: f"kind {index}" for index in range(10)})
    options = map_options(model.config, "occlusion", class_name="kind 3")
    explanation = explain_image(model, processor, open_image(EXAMPLE), "a-model", **options)
    assert explanation.metadata()["class"] == "kind 3"


def test_layer_and_head_count_from_one(tiny_model_folder):
    model, processor = load_model(str(tiny_model_folder))
    image = open_image(EXAMPLE)
    pixel_values = processor(image, return_tensors="pt").pixel_values
    attentions = model(pixel_values, output_attentions=True).attentions
    options = map_options(model.config, layer=1, head="3")
    found = explain_image(model, processor, image, "", **options).map
    torch.testing.assert_close(found.values.flatten(), attentions[0][0, 2, 0, 1:])
    last = explain_image(model, processor, image, "", **map_options(model.config)).map
    torch.testing.assert_close(last.values.flatten(), attentions[-1][0, :, 0, 1:].mean(0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "grad-cam"}, "method: expected one of attention, rollout, .* got 'grad-cam'"),
        ({"layer": 0}, "layer: expected 1 to 2, got 0"),
        ({"layer": 3}, "layer: expected 1 to 2, got 3"),
        ({"head": "5"}, "head: expected 1 to 4, mean or max, got '5'"),
        ({"method": "occlusion", "class_name": "cow"}, "class: expected one of airplane, .*, got 'cow'"),
        ({"class_name": "cat"}, "class: expected it for gradient rollout or occlusion, got it for attention"),
        ({"method": "rollout", "layer": 1}, "layer and head: expected them for the method attention alone"),
    ],
)
def test_wrong_words_are_named(tiny_model_folder, words, message):
    with pytest.raises(ValueError, match=message):
        map_options(load_model(str(tiny_model_folder))[0].config, **words)


def test_the_colourbar_has_the_maps_own_numbers():
    values = torch.tensor([[0.02, 0.3], [0.1, 0.2]])
    picture, bar = figure_with_colourbar(values, torch.zeros(3, 32, 32), "title", "unit").axes
    assert bar.get_ylim() == pytest.approx((0.02, 0.3)) and bar.get_ylabel() == "unit"
    drawn = picture.images[0].get_array()
    for corner, value in (((0, 0), 0.02), ((0, -1), 0.3)):
        expected = 0.6 * np.array(matplotlib.colormaps["viridis"]((value - 0.02) / 0.28)[:3])
        assert np.asarray(drawn)[corner] == pytest.approx(expected, abs=1e-6)


def test_folders_give_their_images_by_name(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "paper.pdf", "._a.JPG"):  # the last is what a Mac leaves on other disks
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in files_in([tmp_path])] == ["a.JPG", "b.png"]
    with pytest.raises(ValueError, match="expected a different name for each, got 'b' 2 times"):
        files_in([tmp_path, tmp_path / "b.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected image files in the folder, got none"):
        files_in([tmp_path / "empty"])

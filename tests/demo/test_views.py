import copy
import re
import shutil
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import ROOT, copy_to_change
from markdown_it import MarkdownIt
from PIL import Image

from vit_cifar import cli
from vit_cifar.demo import views
from vit_cifar.demo.views import Subject, load_subjects
from vit_cifar.explain.attention import cls_map
from vit_cifar.explain.overlay import colour_overlay
from vit_cifar.explain.perturbation import METHODS
from vit_cifar.explain.pictures import OF_A_CLASS, UNITS, explain_image, map_options
from vit_cifar.images import open_image
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL, ModelError

EXAMPLE = ROOT / "vit_cifar/demo/assets/examples/ship.png"


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The shipped model and its examination."""
    return load_subjects(None)[0]


@pytest.fixture(scope="module")
def pixel_values(subject) -> torch.Tensor:
    return subject.pixels(open_image(EXAMPLE))


def as_pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


def test_a_model_saved_in_bf16_is_explained_in_float32(subject, tmp_path, capsys):
    """Otherwise most of an occlusion map would be rounding."""
    copy.deepcopy(subject.model).bfloat16().save_pretrained(tmp_path)
    subject.processor.save_pretrained(tmp_path)
    (rounded,) = load_subjects(str(tmp_path))
    assert rounded.model.dtype == torch.float32
    cli.explain([EXAMPLE], tmp_path / "map.png", model=str(tmp_path), method="occlusion")
    options = map_options(rounded.model.config, "occlusion")
    expected = explain_image(rounded.model, rounded.processor, open_image(EXAMPLE), tmp_path.name, **options)
    assert capsys.readouterr().out == f"{EXAMPLE}: {expected}\n"


def test_every_head_of_every_layer_has_its_place_in_the_strip(subject, pixel_values):
    seen = subject.look(pixel_values)
    sheet = as_pixels(views.strip(subject, seen))
    layers, heads = subject.model.config.num_hidden_layers, subject.model.config.num_attention_heads
    for layer in range(layers):
        for column, head in enumerate(["mean", *range(heads)]):
            expected = colour_overlay(cls_map(seen.attentions, layer, head).values, subject.denormalize(pixel_values))[
                0
            ]
            top, left = 24 + layer * 100, 24 + column * 100
            assert (sheet[:, top : top + 96 : 3, left : left + 96 : 3] - expected).abs().max() < 1 / 250


def test_hidden_patches_are_painted_over_before_the_model_sees_them(subject, pixel_values):
    size, (rows, columns) = subject.model.config.patch_size, subject.grid
    chances, picture, said = views.hidden(subject, pixel_values, [0, columns + 1, rows * columns - 1])
    painted = pixel_values.clone()
    for row, column in ((0, 0), (1, 1), (rows - 1, columns - 1)):
        painted[:, :, size * row : size * (row + 1), size * column : size * (column + 1)] = 0
    before, after = (subject.model(pixels).logits[0].softmax(-1) for pixels in (pixel_values, painted))
    assert list(chances.values()) == pytest.approx(after.tolist(), abs=1e-5)
    index = before.argmax().item()
    change = f"**{subject.classes[index]}** {before[index]:.0%} → {after[index]:.0%}"
    assert said == f"3 of {rows * columns} patches hidden: {change}"
    assert (as_pixels(picture)[:, ::8, ::8] - subject.denormalize(painted)[0]).abs().max() < 1 / 250


def test_a_sentence_shows_a_class_name_as_it_is_and_counts_a_patch_once(subject, pixel_values):
    names = ["<unknown>", "a*b*c", "snake_case_", "[x](y)", "`code`", "1 \\ 2", "&amp;", "cat", "dog", "ship"]
    model = copy.deepcopy(subject.model)
    for answer in range(len(names)):
        model.config.id2label = dict(enumerate(names[-answer:] + names[:-answer]))
        renamed = replace(subject, model=model)
        _, _, said = views.hidden(renamed, pixel_values, [3, 3])
        shown = unescape(re.sub("<.*?>", "", MarkdownIt().render(said)))
        chances = views.probabilities(renamed, subject.model(pixel_values).logits[0])
        assert shown.startswith(f"1 of 64 patches hidden: {max(chances, key=chances.get)} ")


def test_mistakes_show_class_names_as_they_are(subject):
    examination = subject.examination
    names = [f"*{name}* <b>_x_" for name in examination.record["classes"]]
    renamed = replace(examination, record=examination.record | {"classes": names})
    label, answer = views.commonest_mistake(renamed)
    _, said = views.mistakes(replace(subject, examination=renamed), label, answer)
    shown = unescape(re.sub("</?(p|strong|em)>", "", MarkdownIt().render(said)))
    assert f"of class {label} answered {answer}" in shown


def test_the_next_patch_is_the_largest_of_those_still_shown(subject, pixel_values):
    values = METHODS["gradient rollout"](subject.look(pixel_values)).values.flatten()
    order = values.argsort(descending=True).tolist()
    counts = (0, 1, len(order) - 1)
    assert [views.most_important(subject, pixel_values, order[:n]) for n in counts] == [order[n] for n in counts]


def test_pictures_say_what_they_show(subject, pixel_values, tmp_path):
    seen = subject.look(pixel_values, "cat")
    for method in METHODS:
        explanation = subject.explain(seen, method, layer=1, head="3")
        for kind in ("classic", "colour"):
            said = views.overlay(explanation, kind).info
            assert said["model"] == DEFAULT_MODEL and said["method"] == method and said["overlay"] == kind
            assert said["answer"].startswith("ship ")
            assert (said.get("layer"), said.get("head")) == (("1", "3") if method == "attention" else (None, None))
            assert said.get("class") == ("cat" if method in ("gradient rollout", "occlusion") else None)
        caption = views.caption(subject, explanation)
        assert f"{UNITS[method]}: minimum {explanation.map.minimum.item():.4g}, maximum" in caption
        assert ("score" in caption) == (method in ("rollout", "random"))  # the others' settings were not examined


@pytest.mark.parametrize(("difference", "sure"), [(0.1, True), (0.0, True), (-0.01, False), (-0.2, False)])
@pytest.mark.parametrize("examined", [True, False])
def test_the_word_is_stronger_when_the_answer_is_weak(subject, difference, sure, examined):
    bound = subject.examination.record["doubtful_below"] if examined else 0.55  # halfway from 1 / 10 to 1
    subject = subject if examined else replace(subject, examination=None)
    highest = bound + difference
    chances = {"cat": highest} | {str(n): (1 - highest) / 9 for n in range(9)}
    said = views.caution(subject, chances)
    assert "forced into one of its 10 classes" in said
    assert ("not sure" in said) == (not sure) and (f"{highest:.0%}" in said) == (not sure)


def test_an_unsure_answer_of_two_classes_is_called_so(subject):
    subject = replace(subject, examination=None)
    assert "not sure" in views.caution(subject, {"animal": 0.51, "vehicle": 0.49})
    assert "not sure" not in views.caution(subject, {"animal": 0.9, "vehicle": 0.1})


class Cells(HTMLParser):
    def __init__(self, table: str):
        super().__init__()
        self.buttons, self.words = [], []
        self.feed(table)

    def handle_starttag(self, tag, attributes):
        if tag == "button":
            self.buttons.append(dict(attributes))

    def handle_data(self, data):
        self.words.append(data)


def test_the_confusion_table_holds_the_records_numbers(subject):
    record = subject.examination.record
    cells = Cells(views.confusion_table(subject.examination))
    found = {(button["data-label"], button["data-answer"]): button["aria-label"] for button in cells.buttons}
    for label, counts in zip(record["classes"], record["confusion"], strict=True):
        for answer, count in zip(record["classes"], counts, strict=True):
            assert re.fullmatch(rf"{label} (answered|taken for) {answer}: {count} of 1000", found[label, answer])
        assert f"{record['test_accuracy_per_class'][label]:.1%}" in cells.words
    odd = record | {"classes": ["<b>" + name for name in record["classes"]]}
    odd["test_accuracy_per_class"] = dict.fromkeys(odd["classes"], 0.5)
    table = views.confusion_table(replace(subject.examination, record=odd))
    assert table.count('title="&lt;b&gt;airplane"') == 2  # of its row and its column, which may be too narrow for it
    assert "<b>" not in table and Cells(table).buttons[0]["data-label"] == "<b>airplane"


def test_a_class_without_test_images_has_no_accuracy(subject):
    record = subject.examination.record
    confusion = [[0] * 10, *record["confusion"][1:]]
    accuracies = {name: value for name, value in record["test_accuracy_per_class"].items() if name != "airplane"}
    changed = record | {"confusion": confusion, "test_accuracy_per_class": accuracies}
    words = Cells(views.confusion_table(replace(subject.examination, record=changed))).words
    assert words[words.index("airplane", 1) + 11] == "–"


def test_mistakes_are_the_rows_of_that_pair_the_surest_first(subject):
    rows, names = subject.examination.answers, subject.classes
    for label, answer, surest_first in (("dog", "cat", True), ("frog", "frog", False)):
        pair = (names.index(label), names.index(answer))
        kept = [row for row in rows if (row["label"], row["prediction"]) == pair]
        kept.sort(key=lambda row: row["confidence"], reverse=surest_first)
        pictures, said = views.mistakes(subject, label, answer)
        assert len(pictures) == min(len(kept), views.SHOWN_MISTAKES)
        assert said.startswith(f"{subject.examination.record['confusion'][pair[0]][pair[1]]} test images of class")
        for row, (picture, caption) in zip(kept, pictures, strict=False):
            assert caption == f"{answer} {row['confidence']:.0%}, #{row['index']}"
            said = picture.info
            assert (said["model"], said["method"], said["class"]) == (DEFAULT_MODEL, "gradient rollout", answer)
            assert (said["label"], said["test image"]) == (label, str(row["index"]))
            assert np.array_equal(np.asarray(picture)[::4, :128:4], np.asarray(row["image"]))
            seen = subject.look(subject.pixels(row["image"]), answer)
            assert seen.logits.argmax().item() == pair[1]
            drawn = colour_overlay(METHODS["gradient rollout"](seen).values, subject.denormalize(seen.pixel_values))[0]
            assert (as_pixels(picture)[:, ::4, 128::4] - drawn).abs().max() < 1 / 100


def test_mistakes_of_a_model_whose_classes_were_renamed_since(subject):
    model = copy.deepcopy(subject.model)
    model.config.id2label = {index: name.upper() for index, name in enumerate(subject.classes)}
    pictures, _ = views.mistakes(replace(subject, model=model), "dog", "cat")
    assert pictures
    for (picture, _), (expected, _) in zip(pictures, views.mistakes(subject, "dog", "cat")[0], strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_a_pair_without_mistakes(subject):
    confusion = torch.tensor(subject.examination.record["confusion"])
    label, answer = (subject.classes[i] for i in (confusion == 0).nonzero()[0].tolist())
    assert views.mistakes(subject, label, answer) == ([], f"No test image of class **{label}** answered **{answer}**.")


def test_the_commonest_mistake(subject):
    label, answer = views.commonest_mistake(subject.examination)
    confusion = np.array(subject.examination.record["confusion"])
    np.fill_diagonal(confusion, 0)
    assert label != answer
    assert confusion[subject.classes.index(label), subject.classes.index(answer)] == confusion.max()


def test_scores_are_the_examinations(subject, pixel_values):
    methods = subject.examination.record["maps"]["methods"]
    seen, last = subject.look(pixel_values), subject.model.config.num_hidden_layers
    rollout = subject.explain(seen, "rollout")
    assert subject.score(rollout) == f"score {methods['rollout']['score']:.2f}"
    assert subject.score(subject.explain(seen, "attention", last)) == f"score {methods['attention']['score']:.2f}"
    for layer, head in ((1, "mean"), (last, "max"), (last, "1")):  # which were not examined
        assert subject.score(subject.explain(seen, "attention", layer, head)) == ""
    of_another_class = subject.look(pixel_values, "truck")
    assert rollout.answer == "ship"
    for method in OF_A_CLASS:
        assert subject.score(subject.explain(seen, method)) == f"score {methods[method]['score']:.2f}"
        assert subject.score(subject.explain(of_another_class, method)) == ""
    changed = {"score": -0.001, "passes_random_weights": False}
    record = subject.examination.record | {"maps": {"images": 5, "methods": {"rollout": changed}}}
    failing = replace(subject, examination=replace(subject.examination, record=record))
    assert failing.score(rollout) == "score 0.00, but alike on random weights"
    assert "5 test images" in views.score_words(failing)
    assert replace(subject, examination=None).score(rollout) == ""


def test_an_examination_of_other_weights_is_left_out_and_named(tmp_path, capsys, tiny_model_folder):
    folder = copy_to_change(BUNDLED_MODELS / DEFAULT_MODEL, tmp_path / "mixed")
    shutil.copy(tiny_model_folder / "model.safetensors", folder)
    shutil.copy(tiny_model_folder / "config.json", folder)
    (mixed,) = load_subjects(str(folder))
    assert mixed.name == "mixed" and mixed.examination is None
    assert "expected the examination of these weights" in capsys.readouterr().err


def test_all_models_of_the_checkout_the_default_first(tmp_path, monkeypatch, tiny_model_folder):
    for name in ("a-model", DEFAULT_MODEL):
        shutil.copytree(tiny_model_folder, tmp_path / name)
    monkeypatch.setattr(views, "BUNDLED_MODELS", tmp_path)
    assert [subject.name for subject in load_subjects(None)] == [DEFAULT_MODEL, "a-model"]
    with pytest.raises(ModelError, match="expected a model folder or a Hub id, got 'no such/folder/here'"):
        load_subjects("no such/folder/here")


def test_the_reliability_diagram_has_words_and_metadata(subject):
    assert views.reliability_picture(subject).text["model"] == DEFAULT_MODEL
    last = subject.examination.record["calibration"]["as trained"]["reliability"][-1]
    alt = views.reliability_alt(subject.examination)
    assert alt.endswith(f"{last['accuracy']:.0%} of {last['images']:,} at {last['confidence']:.0%}")


@pytest.mark.parametrize(("size", "shown"), [(32, 256), (48, 240), (300, 300)])
def test_every_pixel_is_a_square_of_one_size(size, shown):
    image = torch.rand(3, size, size)
    picture = views.to_picture(image)
    assert picture.size == (shown, shown)
    times = shown // size
    assert (as_pixels(picture) - image.repeat_interleave(times, 1).repeat_interleave(times, 2)).abs().max() < 1 / 250

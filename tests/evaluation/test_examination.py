import json
import shutil

import pytest
import torch

from vit_cifar.evaluation import records
from vit_cifar.evaluation.examination import (
    EXAMINATION_NAME,
    MISTAKES_NAME,
    RIGHT_PER_CLASS,
    Examination,
    answers,
    examine,
    read_examination,
    write_examination,
)
from vit_cifar.evaluation.metrics import calibration_error, doubtful_below, evaluate, fit_temperature, reliability
from vit_cifar.explain.perturbation import (
    METHODS,
    bootstrap_interval,
    deletion_insertion,
    look,
    randomized,
    rank_correlation,
)
from vit_cifar.integrity import check_checksums
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL, load_model
from vit_cifar.training.data import load_split, normalize


@pytest.fixture(scope="module")
def found() -> Examination:
    """Of the shipped model, on the images in the package."""
    validation, test = load_split("sample", "train"), load_split("sample", "test")
    return examine(*load_model(), validation, test, images=8)


def test_numbers_are_those_of_the_model(found):
    model, processor = load_model()
    held_out, test = load_split("sample", "train"), load_split("sample", "test")
    result, before = evaluate(model, processor, test), evaluate(model, processor, held_out)
    record = found.record
    assert record["temperature"] == pytest.approx(fit_temperature(before.logits, held_out.labels))
    assert record["doubtful_below"] == pytest.approx(doubtful_below(before.logits.softmax(-1), held_out.labels))
    assert record["test_accuracy"] == result.accuracy and record["test_accuracy_per_class"] == result.per_class
    assert torch.equal(torch.tensor(record["confusion"]), result.confusion)
    calibrations = record["calibration"]
    for name, temperature in (("as trained", 1.0), ("with temperature", record["temperature"])):
        loss = torch.nn.functional.cross_entropy(result.logits / temperature, test.labels).item()
        assert calibrations[name]["loss"] == pytest.approx(loss)
        probabilities = (result.logits / temperature).softmax(-1)
        error = calibration_error(probabilities, test.labels)
        assert calibrations[name]["calibration_error"] == pytest.approx(error)
        points = reliability(probabilities, test.labels)
        assert len(calibrations[name]["reliability"]) == len(points) > 1
        for kept, point in zip(calibrations[name]["reliability"], points, strict=True):
            assert kept == pytest.approx(point)


def test_a_methods_score_is_the_mean_over_the_drawn_images(found):
    model, processor = load_model()
    test = load_split("sample", "test")
    drawn = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:8]
    pixel_values = normalize(test.images[drawn], processor.image_mean, processor.image_std)
    classes = model(pixel_values).logits.argmax(-1)
    methods = found.record["maps"]["methods"]
    assert list(methods) == list(METHODS)
    for name, numbers in methods.items():
        curves = [  # image by image
            deletion_insertion(model, image, label, METHODS[name](look(model, image, label)).values)
            for image, label in zip(pixel_values.split(1), classes.split(1), strict=True)
            if name != "random"  # which depends on the place in the batch
        ]
        if curves:
            assert numbers["score"] == pytest.approx(sum(curve.score.item() for curve in curves) / 8, abs=1e-3)
            for kind in ("deletion", "insertion"):
                expected = torch.cat([getattr(curve, kind) for curve in curves]).mean(dim=0)
                assert numbers[kind] == pytest.approx(expected.tolist(), abs=1e-3)
            passes = abs(numbers["correlation_with_random_weights"]) < 0.5
            assert numbers["passes_random_weights"] == passes
            difference = numbers["score"] - methods["random"]["score"]
            assert numbers["above_random"] == pytest.approx(difference, abs=1e-5)
            low, high = numbers["above_random_interval"]
            assert low < numbers["above_random"] < high
        low, high = numbers["score_interval"]
        assert low < numbers["score"] < high


def test_maps_are_compared_with_those_of_random_weights_for_the_same_class(found):
    """And with random order image by image: the interval is that of the differences."""
    model, processor = load_model()
    test = load_split("sample", "test")
    drawn = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:8]
    pixel_values = normalize(test.images[drawn], processor.image_mean, processor.image_std)
    learned = look(model, pixel_values)
    unlearned = look(randomized(model), pixel_values, learned.classes)
    assert not torch.equal(unlearned.logits.argmax(-1), learned.classes)
    methods = found.record["maps"]["methods"]
    by_chance = deletion_insertion(model, pixel_values, learned.classes, METHODS["random"](learned).values).score
    for name in methods.keys() - {"random"}:
        values, others = (METHODS[name](seen).values for seen in (learned, unlearned))
        expected = rank_correlation(values, others).mean().item()
        assert methods[name]["correlation_with_random_weights"] == pytest.approx(expected, abs=1e-3)
        score = deletion_insertion(model, pixel_values, learned.classes, values).score
        assert methods[name]["above_random_interval"] == pytest.approx(bootstrap_interval(score - by_chance), abs=2e-3)


def test_every_mistake_is_kept_and_the_least_sure_right_answers(found):
    test = load_split("sample", "test")
    probabilities = evaluate(*load_model(), test).logits.softmax(-1)
    confusion = torch.tensor(found.record["confusion"])
    rows = list(found.answers)
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    assert len(wrong) == confusion.sum() - confusion.trace()
    right = [row for row in rows if row["label"] == row["prediction"]]
    assert len(right) == confusion.diagonal().clamp(max=RIGHT_PER_CLASS).sum()
    for row in rows:
        assert row["label"] == test.labels[row["index"]]
        assert row["confidence"] == pytest.approx(probabilities[row["index"], row["prediction"]].item())
        assert row["confidence"] == pytest.approx(probabilities[row["index"]].max().item())
        assert row["image"].tobytes() == test.images[row["index"]].permute(1, 2, 0).numpy().tobytes()


def test_the_right_answers_that_are_kept_are_the_least_sure():
    test = load_split("sample", "test")
    confidence = torch.linspace(0.3, 0.9, len(test))[:, None]
    probabilities = torch.nn.functional.one_hot(test.labels, 10) * confidence + (1 - confidence) / 20
    kept = answers(probabilities, test)["index"]
    for label in range(10):
        own = (test.labels == label).nonzero().flatten().tolist()
        assert [index for index in kept if test.labels[index] == label] == own[:RIGHT_PER_CLASS]


def test_it_lies_beside_the_weights_and_is_refused_beside_others(found, tmp_path):
    shutil.copytree(BUNDLED_MODELS / DEFAULT_MODEL, folder := tmp_path / "model")
    for name in (EXAMINATION_NAME, MISTAKES_NAME):
        (folder / name).unlink(missing_ok=True)
    assert read_examination(folder) is None
    write_examination(folder, found)
    again = read_examination(folder)
    assert again.record.pop("weights_sha256")
    assert again.record == json.loads(json.dumps(found.record))
    assert list(again.answers["index"]) == list(found.answers["index"])

    shutil.move(folder / MISTAKES_NAME, tmp_path / "other")
    with pytest.raises(ValueError, match=f"expected {EXAMINATION_NAME} and {MISTAKES_NAME}, got no {MISTAKES_NAME}"):
        read_examination(folder)
    (folder / MISTAKES_NAME).write_bytes((tmp_path / "other").read_bytes()[:500])
    with pytest.raises(ValueError, match="expected an examination, got files that cannot be read"):
        read_examination(folder)
    shutil.move(tmp_path / "other", folder / MISTAKES_NAME)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="expected the examination of these weights"):
        read_examination(folder)
    shutil.copyfile(folder / MISTAKES_NAME, tmp_path / "of the weights before")
    write_examination(folder, found)
    assert read_examination(folder) is not None
    shutil.move(tmp_path / "of the weights before", folder / MISTAKES_NAME)
    with pytest.raises(ValueError, match="expected the examination of these weights"):
        read_examination(folder)


def test_an_examination_that_is_cut_off_leaves_a_folder_that_loads(found, tmp_path, monkeypatch):
    shutil.copytree(BUNDLED_MODELS / DEFAULT_MODEL, folder := tmp_path / "model")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(records, "write_json", full)
        write_examination(folder, found)
    load_model(str(folder))
    write_examination(folder, found)  # again, as the command would
    assert read_examination(folder) is not None
    check_checksums(folder)

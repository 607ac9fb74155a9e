import pytest
import torch
from PIL import Image

from vit_cifar.evaluation.metrics import calibration_error, doubtful_below, evaluate, fit_temperature, reliability
from vit_cifar.models import load_model
from vit_cifar.training.data import load_split


def test_a_dataset_with_other_classes_is_refused(tiny_model_folder):
    model, processor = load_model(str(tiny_model_folder))
    sample = load_split("sample", "test")
    sample.classes = ["x"] * 10
    with pytest.raises(ValueError, match="classes: expected those of the model"):
        evaluate(model, processor, sample)


def test_metrics_equal_counting_one_by_one(smoke_folder):
    model, processor = load_model(str(smoke_folder))
    sample = load_split("sample", "test")
    result = evaluate(model, processor, sample, batch_size=7)
    right = {name: [0, 0] for name in sample.classes}
    confusion = torch.zeros(10, 10, dtype=torch.long)
    for image, label in zip(sample.images, sample.labels, strict=True):
        inputs = processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")
        with torch.inference_mode():
            prediction = model(**inputs).logits.argmax().item()
        count = right[sample.classes[label]]
        count[0] += prediction == label.item()
        count[1] += 1
        confusion[label, prediction] += 1
    assert result.per_class == pytest.approx({name: hits / images for name, (hits, images) in right.items()})
    assert result.accuracy == pytest.approx(sum(hits for hits, _ in right.values()) / 200)
    assert torch.equal(result.confusion, confusion)


def test_the_temperature_is_the_best_of_many_and_undoes_a_known_one():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 10, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]  # drawn as the logits say
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.05)
    assert fit_temperature(logits * 3, labels) == pytest.approx(3, abs=0.15)
    found = fit_temperature(logits * 3, labels)
    losses = {t: torch.nn.functional.cross_entropy(logits * 3 / t, labels) for t in (found * 0.98, found, found * 1.02)}
    assert min(losses, key=losses.get) == found


def test_calibration_error_and_reliability_equal_sorting_into_bins_by_hand():
    generator = torch.Generator().manual_seed(1)
    probabilities = (torch.randn(300, 4, generator=generator) * 2).softmax(-1)
    labels = torch.randint(4, (300,), generator=generator)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        bins.setdefault(int(max(row) * 15), []).append((max(row), row.index(max(row)) == label))
    means = {number: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for number, rows in bins.items()}
    expected = sum(len(bins[n]) / 300 * abs(confidence - right) for n, (confidence, right) in means.items())
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-5)
    points = reliability(probabilities, labels)
    assert [point["images"] for point in points] == [len(bins[number]) for number in sorted(bins)]
    for point, number in zip(points, sorted(bins), strict=True):
        assert [point["confidence"], point["accuracy"]] == pytest.approx(means[number], abs=1e-5)


def test_the_temperature_is_1_where_no_answer_is_wrong():
    labels = torch.arange(10).repeat(10)
    logits = 6 * torch.nn.functional.one_hot(labels, 10).float()
    assert fit_temperature(logits, labels) == 1
    assert fit_temperature(logits, (labels + 1) % logits.shape[1]) == 20  # every answer wrong: as large as it gets


def test_full_confidence_has_no_bin_of_its_own():
    probabilities = torch.tensor([[1.0, 0.0], [0.95, 0.05]])
    labels = torch.tensor([1, 0])
    (point,) = reliability(probabilities, labels)
    assert point == pytest.approx({"confidence": 0.975, "accuracy": 0.5, "images": 2})
    assert calibration_error(probabilities, labels) == pytest.approx(0.475, abs=1e-5)


def test_below_the_doubtful_confidence_at_most_half_are_right():
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(500, 10, generator=generator)).softmax(-1)
    confidence, prediction = probabilities.max(dim=1)
    right = torch.rand(500, generator=generator) < confidence**2
    labels = torch.where(right, prediction, (prediction + 1) % 10)
    bound = doubtful_below(probabilities, labels)
    assert 0.5 < bound < confidence.max()
    assert right[confidence <= bound].float().mean() <= 0.5
    for larger in confidence[confidence > bound]:
        assert right[confidence <= larger].float().mean() > 0.5
    assert doubtful_below(probabilities, prediction) == 0  # nothing wrong, nothing doubtful
    assert doubtful_below(probabilities, prediction + 1) == 1  # nothing right: no confidence is enough

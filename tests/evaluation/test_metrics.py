import pytest
import torch
from PIL import Image

from vit_cifar.evaluation.metrics import evaluate
from vit_cifar.models import load_model
from vit_cifar.training.data import load_split


def test_a_dataset_with_other_classes_is_refused(tiny_model_folder, tmp_path):
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
    for image, label in zip(sample.images, sample.labels, strict=True):
        inputs = processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")
        with torch.inference_mode():
            prediction = model(**inputs).logits.argmax().item()
        count = right[sample.classes[label]]
        count[0] += prediction == label.item()
        count[1] += 1
    assert result.per_class == pytest.approx({name: hits / images for name, (hits, images) in right.items()})
    assert result.accuracy == pytest.approx(sum(hits for hits, _ in right.values()) / 200)
    assert result.confusion.sum() == 200

"""`vit-cifar examine`: mistakes, calibration and how far each map can be trusted, kept beside the weights."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.parquet
import torch
from datasets.table import InMemoryTable
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm
from transformers import ViTImageProcessor

from ..explain.perturbation import (
    METHODS,
    bootstrap_interval,
    deletion_insertion,
    feature_ablation,
    look,
    randomized,
    rank_correlation,
)
from ..integrity import MISTAKES_NAME, SUMS_NAME, write_checksums
from ..modeling_vit_cifar import ViTCifarForImageClassification
from ..models import default_device, load_model
from ..training.data import (
    DataError,
    ImageDataset,
    load_recorded_split,
    normalize,
    recorded_dataset,
    split_off_validation,
)
from . import records
from .metrics import BINS, calibration_error, doubtful_below, evaluate, fit_temperature, reliability

EXAMINATION_NAME = "examination.json"
RIGHT_PER_CLASS = 20  # rightly classified images that are kept of each class, those the model was least sure of
HIGHEST_CORRELATION = 0.5  # of a method's maps with those of random weights; above it, it shows little that was learned


@dataclass(frozen=True, eq=False)
class Examination:
    """What `examine` found.

    Attributes:
        record: examination.json; see `examine`.
        answers: columns image, label, prediction, confidence (0..1), index (in the test split): every image that was
            classified wrongly, and RIGHT_PER_CLASS of each class that were not.
    """

    record: dict
    answers: datasets.Dataset


def examine(
    model: ViTCifarForImageClassification,
    processor: ViTImageProcessor,
    validation_set: ImageDataset,
    test_set: ImageDataset,
    images: int = 500,
    stated: tuple[float, float] | None = None,
) -> Examination:
    """Numbers of a trained model beyond its accuracy.

    Args:
        validation_set: held out of training; the temperature is fitted on it.
        images: how many of the test split the maps are tried on, drawn with seed 0.
        stated: the validation and the test accuracy of the model's record, if there is one.

    Raises:
        RecordError: the accuracies are not the stated ones, so that it is another dataset or order of its images.
        DataError: a dataset's classes are not those of the model.
    """
    validation, test = (evaluate(model, processor, dataset) for dataset in (validation_set, test_set))
    # The second is the same whatever the order of the images; the first is not, as other ones are held out then.
    for split, found, expected in zip(("validation", "test"), (validation, test), stated or (), strict=False):
        if abs(expected - found.accuracy) > records.accuracy_tolerance(len(found.logits)):
            raise records.RecordError(
                f"dataset_name: expected the dataset of the record's {split} accuracy, {expected:.2%}, got one with "
                f"{found.accuracy:.2%}: what was held out of training cannot be told there"
            )
    temperature = fit_temperature(validation.logits, validation_set.labels)
    calibration = {}
    for name, logits in (("as trained", test.logits), ("with temperature", test.logits / temperature)):
        probabilities = logits.softmax(-1)
        calibration[name] = {
            "calibration_error": calibration_error(probabilities, test_set.labels),
            "loss": torch.nn.functional.cross_entropy(logits, test_set.labels).item(),
            "reliability": reliability(probabilities, test_set.labels),
        }
    some = torch.randperm(len(test_set), generator=torch.Generator().manual_seed(0))[:images]
    record = {
        "classes": test_set.classes,
        "images": {"validation": len(validation_set), "test": len(test_set)},
        "test_accuracy": test.accuracy,
        "test_accuracy_per_class": test.per_class,
        "confusion": test.confusion.tolist(),  # row: label, column: prediction
        "temperature": temperature,
        "doubtful_below": doubtful_below(validation.logits.softmax(-1), validation_set.labels),
        "calibration": calibration,
        "maps": examine_maps(model, processor, test_set.subset(some)),
    }
    return Examination(record, answers(test.logits.softmax(-1), test_set))


def examine_folder(folder: Path, dataset_name: str | None, images: int) -> Examination:
    """`examine`, with the split that the folder's training held out, and how the numbers came about.

    Args:
        dataset_name: a Hub id or a local folder; None for what the record names.

    Raises:
        RecordError: the folder has no training record, or one of other weights or of a training that held no images
            out; or the accuracies are not the record's, so that it is another dataset or order of its images.
        ModelError, DataError: the model or the dataset cannot be used.
    """
    feature_ablation()  # minutes before it is needed
    record = records.read_record(folder)
    arguments = record["arguments"]
    if not arguments["validation_size"]:
        raise records.RecordError("record: expected a training that held images out of train, got validation_size 0")
    model, processor = load_model(str(folder))
    try:
        dataset_name = dataset_name or recorded_dataset(record)
        train_set, test_set = (
            load_recorded_split(record, split, dataset_name, model.config.image_size) for split in ("train", "test")
        )
    except DataError as error:
        raise DataError(f"{error} (--dataset_name names the dataset that the model was trained on)") from error
    _, validation_set = split_off_validation(train_set, arguments["validation_size"], arguments["validation_seed"])
    stated = (record["validation_accuracy"], record["test_accuracy"])
    examination = examine(model.to(default_device()), processor, validation_set, test_set, images, stated)
    same = test_set.fingerprint == record["dataset"]["fingerprints"]["test"]  # a local folder has no name of its own
    name = record["dataset"]["name"] if same else records.public_name(dataset_name)
    command = [
        "vit-cifar",
        "examine",
        records.public_name(str(folder)),
        "--dataset_name",
        name,
        "--images",
        str(images),
    ]
    source = {
        "command": shlex.join(command),
        "git_commit": records.git_commit(__file__),
        "versions": records.versions(),
        "hardware": records.hardware(model.device),
        "dataset": name,
    }
    return Examination(source | examination.record, examination.answers)


def examine_maps(model: ViTCifarForImageClassification, processor: ViTImageProcessor, dataset: ImageDataset) -> dict:
    """How faithful each method's maps are, for the class that the model answers: {method: its numbers}."""
    curves, correlations = ({name: [] for name in METHODS} for _ in range(2))
    fresh = randomized(model)
    for images in tqdm(dataset.images.split(100), desc="maps", unit=" × 100 images"):
        pixel_values = normalize(images, processor.image_mean, processor.image_std).to(model.device, model.dtype)
        seen = look(model, pixel_values)
        unlearned = look(fresh, pixel_values, seen.classes)
        for name, make in METHODS.items():
            values = make(seen).values
            curves[name].append(deletion_insertion(model, pixel_values, seen.classes, values))
            correlations[name].append(rank_correlation(values, make(unlearned).values))
    scores = {name: torch.cat([part.score for part in parts]).cpu() for name, parts in curves.items()}
    result = {}
    for name, score in scores.items():
        result[name] = {"score": score.mean().item(), "score_interval": bootstrap_interval(score)}
        for kind in ("deletion", "insertion"):
            result[name][kind] = torch.cat([getattr(part, kind) for part in curves[name]]).mean(dim=0).tolist()
        if name == "random":
            continue
        correlation = torch.cat(correlations[name]).mean().item()
        result[name] |= {
            "above_random": (score - scores["random"]).mean().item(),
            "above_random_interval": bootstrap_interval(score - scores["random"]),
            "correlation_with_random_weights": correlation,
            "passes_random_weights": abs(correlation) < HIGHEST_CORRELATION,
        }
    return {"images": len(dataset), "interval": "95%, bootstrap", "methods": result}


def answers(probabilities: torch.Tensor, test_set: ImageDataset) -> datasets.Dataset:
    """The rows that a page shows for each pair of label and answer; see `Examination`."""
    confidence, prediction = probabilities.max(dim=1)
    wrong = prediction != test_set.labels
    kept = [wrong.nonzero().flatten()]
    for label in range(len(test_set.classes)):
        right = ((test_set.labels == label) & ~wrong).nonzero().flatten()
        kept.append(right[confidence[right].argsort()[:RIGHT_PER_CLASS]])
    index = torch.cat(kept)
    columns = {
        "image": [F.to_pil_image(image) for image in test_set.images[index]],
        "label": test_set.labels[index].tolist(),
        "prediction": prediction[index].tolist(),
        "confidence": confidence[index].tolist(),
        "index": index.tolist(),
    }
    names = datasets.ClassLabel(names=test_set.classes)
    features = {"image": datasets.Image(), "label": names, "prediction": names}
    features |= {"confidence": datasets.Value("float32"), "index": datasets.Value("int64")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def calibration_errors(record: dict) -> tuple[float, float]:
    """(As trained, with temperature)."""
    before, after = (record["calibration"][name]["calibration_error"] for name in ("as trained", "with temperature"))
    return before, after


def calibration_words(record: dict) -> str:
    """For README and the model's card."""
    before, after = calibration_errors(record)
    return (
        f"Confidence and accuracy are {100 * before:.1f} percentage points apart on average (expected calibration "
        f"error, {BINS} bins), and {100 * after:.1f} with the logits divided by {record['temperature']:.3f}, which was "
        f"fitted on the {record['images']['validation']:,} images held out of training."
    )


def trust_table(record: dict) -> str:
    """How far each kind of map can be trusted, as Markdown: for README and the model's card."""
    rows = [
        "| map | insertion minus deletion, area | above random order | rank correlation with random weights |",
        "|---|---|---|---|",
    ]
    for name, found in record["maps"]["methods"].items():
        low, high = found["score_interval"]
        cells = [name, f"{found['score']:.3f} ({low:.3f} to {high:.3f})", "", ""]
        if name != "random":
            low, high = found["above_random_interval"]
            cells[2] = f"{found['above_random']:+.3f} ({low:+.3f} to {high:+.3f})"
            verdict = "" if found["passes_random_weights"] else " **fails**"
            cells[3] = f"{found['correlation_with_random_weights']:.2f}{verdict}"
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", f"Means over {record['maps']['images']:,} test images, 95% bootstrap intervals."])


def report(record: dict) -> str:
    """The record for the terminal."""
    before, after = calibration_errors(record)
    lines = [
        f"test accuracy {record['test_accuracy']:.2%}",
        f"calibration error {before:.2%}, with temperature {record['temperature']:.3f} {after:.2%}",
        f"area between insertion and deletion, {record['maps']['images']} images, 95% interval:",
    ]
    for name, found in record["maps"]["methods"].items():
        low, high = found["score_interval"]
        line = f"  {name:<17} {found['score']:6.3f} ({low:.3f} to {high:.3f})"
        if "correlation_with_random_weights" in found:
            line += f", rank correlation with random weights {found['correlation_with_random_weights']:.2f}"
            line += "" if found["passes_random_weights"] else ": fails"
        lines.append(line)
    return "\n".join(lines)


def write_examination(folder: str | Path, examination: Examination) -> None:
    """Both files, with the weights' checksum in both; each whole or not at all."""
    folder, sha256 = Path(folder), records.weights_sha256(folder)
    part = folder / f".{MISTAKES_NAME}.part"
    examination.answers.add_column("weights_sha256", [sha256] * len(examination.answers)).to_parquet(part)
    (folder / SUMS_NAME).unlink(missing_ok=True)  # cut off from here on, an old list would refuse the whole folder
    os.replace(part, folder / MISTAKES_NAME)
    records.write_json(folder / EXAMINATION_NAME, {"weights_sha256": sha256} | examination.record)
    write_checksums(folder)


def read_examination(folder: str | Path) -> Examination | None:
    """What lies beside the weights; None if nothing does.

    Raises:
        records.RecordError: it belongs to other weights, or one of the two files is missing or damaged.
    """
    folder = Path(folder)
    paths = [folder / EXAMINATION_NAME, folder / MISTAKES_NAME]
    if not any(path.is_file() for path in paths):
        return None
    for path in paths:
        if not path.is_file():
            raise records.RecordError(f"{folder}: expected {EXAMINATION_NAME} and {MISTAKES_NAME}, got no {path.name}")
    try:
        record = json.loads(paths[0].read_text(encoding="utf-8"))
        # Not Dataset.from_parquet, which would write a copy into the cache folder.
        rows = datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(paths[1])))
        found = {record["weights_sha256"], *rows.unique("weights_sha256")}
    except Exception as error:  # a damaged parquet file can be of any type in the libraries below
        raise records.RecordError(f"{folder}: expected an examination, got files that cannot be read") from error
    expected = records.weights_sha256(folder)
    if found != {expected}:
        raise records.RecordError(
            f"{folder}: expected the examination of these weights (sha256 {expected[:12]}…), got that of others: "
            "`vit-cifar examine` makes it anew"
        )
    return Examination(record, rows.remove_columns("weights_sha256"))

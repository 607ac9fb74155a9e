"""`datasets` rows, decoded once into a uint8 tensor that is cached on disk; seeded splits; access by batch."""

import atexit
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import torch
from datasets.utils.stratify import stratified_shuffle_split_generate_indices
from huggingface_hub.errors import HTTPError  # its HTTP library's base error, which is no OSError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm
from transformers import ViTImageProcessor

from ..errors import UserError, first_line
from ..images import UNREADABLE, to_rgb

if TYPE_CHECKING:
    from .arguments import RecipeArguments  # which imports this module

CIFAR10_NAME = "uoft-cs/cifar10"
CIFAR10_MEAN = [0.4914, 0.4822, 0.4465]  # per channel, of pixels scaled to 0..1: the tutorial's numbers
CIFAR10_STD = [0.2023, 0.1994, 0.2010]
SAMPLE_NAME = "sample"
SAMPLE_FOLDER = Path(__file__).parents[1] / "demo" / "assets" / "sample"
CACHE_FORMAT = "3"  # part of the cache's key: raise it when what is stored changes
MAX_CLASSES = 100_000  # ImageNet-21k has 21,841


class DataError(UserError):
    """A dataset that cannot be used; the message is one line that names split, row and column."""


@dataclass
class ImageDataset(torch.utils.data.Dataset):
    """Images of one split in memory, handed out by whole batches (`__getitems__`, which DataLoader prefers).

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,), int64, 0 <= label < len(classes).
        classes: the class names.
        fingerprint: what `datasets` calls the state of the split that the images come from.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        indices = torch.as_tensor(indices)
        images = self.images.index_select(0, indices)  # copies whole images, where [indices] takes pixel by pixel
        return {"pixel_values": images, "labels": self.labels[indices], "sample_index": indices}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def digest(self) -> str:
        """Of images, labels and class names; `fingerprint` changes with the files' dates too."""
        parts = (self.images.numpy(), self.labels.numpy(), json.dumps(self.classes).encode())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def subset(self, indices: torch.Tensor) -> "ImageDataset":
        return ImageDataset(self.images[indices], self.labels[indices], self.classes, self.fingerprint)


def keep_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collate function for ImageDataset, whose batches are whole already."""
    return batch


def normalize(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """uint8 (B, C, H, W) to float32, scaled to 0..1, minus mean, divided by std: what the image processor does."""
    return F.normalize(F.to_dtype(images, torch.float32, scale=True), mean=mean, std=std, inplace=True)


def image_processor(
    image_size: int = 32, mean: list[float] = CIFAR10_MEAN, std: list[float] = CIFAR10_STD
) -> ViTImageProcessor:
    """What a model folder carries to do to any image what training did to its own."""
    size = {"height": image_size, "width": image_size}
    return ViTImageProcessor(size=size, image_mean=mean, image_std=std, resample=3, do_convert_rgb=True)


def is_local(dataset_name: str) -> bool:
    """Whether it is found on this machine: the package's sample, a file or a folder."""
    return dataset_name == SAMPLE_NAME or Path(dataset_name).exists()


def recorded_dataset(record: dict) -> str:
    """The name that `load_rows` finds a training record's dataset by.

    Raises:
        DataError: it was a local folder, of which the record knows the title alone.
    """
    dataset = record["dataset"]
    if name := dataset.get("hub_id"):
        return name
    if not is_local(dataset["name"]):
        raise DataError(
            f"dataset_name: expected the folder that {dataset['name']!r} stands for in the record, got none"
        )
    return dataset["name"]


def load_recorded_split(record: dict, split: str, dataset_name: str, image_size: int) -> ImageDataset:
    """`load_split`, of the columns that a training record names."""
    arguments = record["arguments"]
    return load_split(dataset_name, split, image_size, arguments.get("image_column"), arguments.get("label_column"))


def load_rows(dataset_name: str) -> datasets.DatasetDict:
    """The rows of every split, nothing decoded yet.

    Raises:
        DataError: no such dataset, or an empty split.
    """
    source = str(SAMPLE_FOLDER) if dataset_name == SAMPLE_NAME else dataset_name
    if not is_local(source) and "/" not in source:  # `datasets` would take any cached folder of that last name
        raise DataError(
            f"dataset_name: expected a folder or a Hub id with its user, as in ylecun/mnist, got {source!r}"
        )
    try:
        return _load_dataset(source)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, HTTPError) as error:
        reason = first_line(_cause(error))
        if "corresponds to no data" in reason:  # what `datasets` says of a split without rows
            raise DataError(f"{dataset_name}: expected rows in every split, got an empty split: {reason}") from error
        raise DataError(f"dataset_name: expected a dataset on the Hub or a folder, got {source!r}: {reason}") from error


def _load_dataset(source: str) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(source)
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        if getattr(_cause(error), "errno", None) not in (errno.EROFS, errno.EACCES):
            raise
        print(
            f"the cache cannot be written ({_cause(error)}): {_stand_in()} takes its place until this process ends",
            file=sys.stderr,
        )
        return datasets.load_dataset(source, cache_dir=_stand_in())


def _cause(error: Exception) -> BaseException:
    """What went wrong while `datasets` wrote its cache, of which its own error says nothing."""
    wraps = isinstance(error, datasets.exceptions.DatasetGenerationError)
    return error.__cause__ if wraps and error.__cause__ else error


@cache
def _stand_in() -> str:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def load_split(
    dataset_name: str,
    split: str,
    image_size: int = 32,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageDataset:
    """One split of a dataset as tensors; decoded with a progress bar the first time, read from the cache afterwards.

    Args:
        dataset_name: a Hub id, a local folder, or "sample" for the images that the package carries.
        split: "train", "test", or whatever else the dataset has.
        image_size: height and width in pixels; images of another size are resized (bicubic, antialiased).
        image_column, label_column: names; if omitted, the only Image and the only ClassLabel column are taken. Whole
            numbers without names are labels too, from 0 to the largest one of any split.

    Raises:
        DataError: no such dataset, split or column, an empty split, a row whose image cannot be decoded or whose
            label is missing or not one of the classes.
    """
    splits = load_rows(dataset_name)
    if split not in splits:
        raise DataError(f"{dataset_name}: expected a split named {split}, got {', '.join(splits)}")
    rows = splits[split]
    image_column = _find_column(rows, image_column, datasets.Image, "image_column", split)
    label_column = _find_column(rows, label_column, datasets.ClassLabel, "label_column", split)
    classes = _classes(splits, label_column)

    key = json.dumps([CACHE_FORMAT, rows._fingerprint, image_column, label_column, classes, image_size])
    path = (
        Path(datasets.config.HF_CACHE_HOME)
        / "vit_cifar"
        / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    )
    cached = _read_cache(path, classes, rows._fingerprint)
    if cached is None:
        labels = _labels(rows, label_column, split, classes)
        images = _images(rows, image_column, split, image_size)
        cached = ImageDataset(images, labels, classes, rows._fingerprint)
        _write_cache(path, cached)
    return cached


def duplicates(dataset: ImageDataset, of: ImageDataset) -> list[int]:
    """Rows of `dataset` whose image, as decoded, is one of `of` too, byte for byte."""
    known = {hashlib.sha256(image).digest() for image in of.images.numpy()}
    return [row for row, image in enumerate(dataset.images.numpy()) if hashlib.sha256(image).digest() in known]


def missing_classes(dataset: ImageDataset, of: ImageDataset) -> list[str]:
    """Classes that `of` has images of and `dataset` has none of."""
    missing = set(of.labels.tolist()) - set(dataset.labels.tolist())
    return [of.classes[label] for label in sorted(missing)]


def split_off_validation(dataset: ImageDataset, size: int, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """(rest, validation): `size` images drawn so that every class keeps its share; the same for the same seed.

    Raises:
        DataError: size leaves no training image of a class, or is smaller than the number of classes; a class has one
            image only.
    """
    if not len(dataset.classes) <= size < len(dataset):
        raise DataError(
            f"validation_size: expected {len(dataset.classes)} (one image a class) to {len(dataset) - 1}, got {size}"
        )
    if 1 in (counts := dataset.labels.bincount().tolist()):
        name = dataset.classes[counts.index(1)]
        raise DataError(
            f"validation_size: expected at least two images of each class to draw from, got one of {name!r}"
        )
    # What train_test_split(stratify_by_column=...) draws; that one reads the labels row by row, for seconds.
    draws = stratified_shuffle_split_generate_indices(
        dataset.labels.numpy(), len(dataset) - size, size, rng=np.random.default_rng(seed)
    )
    rest, validation = (dataset.subset(torch.from_numpy(rows).sort().values) for rows in next(draws))
    if lost := ", ".join(missing_classes(rest, dataset)):
        raise DataError(
            f"validation_size: expected images of each class left to train with, got {size}: none of {lost}"
        )
    return rest, validation


def load_data(recipe: "RecipeArguments", image_size: int) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """(training, validation, test): all of it before training, which a broken row must not cost.

    Raises:
        DataError: see `load_split` and `split_off_validation`; or the test split has a class that training lacks.
    """
    train_set, test_set = (
        load_split(recipe.dataset_name, split, image_size, recipe.image_column, recipe.label_column)
        for split in ("train", "test")
    )
    if lost := ", ".join(missing_classes(train_set, test_set)):
        raise DataError(f"dataset_name: expected training images of each class of the test split, got none of {lost}")
    if recipe.validation_size == 0:  # the tutorial's way: the test split decides which epoch is kept
        return train_set, test_set, test_set
    return *split_off_validation(train_set, recipe.validation_size, recipe.validation_seed), test_set


def _find_column(rows: datasets.Dataset, name: str | None, kind: type, argument: str, split: str) -> str:
    if name is not None:
        if name not in rows.features:
            raise DataError(
                f"{argument}: expected a column of split {split!r} ({', '.join(rows.features)}), got {name!r}"
            )
        return name
    found = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        advice = ""
        if len(rows.features) > 1:
            advice = f": name it with --{argument}"
        elif kind is datasets.ClassLabel:
            advice = ": in a folder, two subfolders or more of each split are its labels"
        raise DataError(
            f"{argument}: expected one column of type {kind.__name__} in split {split!r} ({', '.join(rows.features)}), "
            f"got {', '.join(found) or 'none'}{advice}"
        )
    return found[0]


def _classes(splits: datasets.DatasetDict, column: str) -> list[str]:
    """The class names, the same for every split."""
    feature = next(rows.features[column] for rows in splits.values() if column in rows.features)
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    if not isinstance(feature, datasets.Value) or "int" not in feature.dtype:
        raise DataError(
            f"label_column: expected class labels or whole numbers in {column!r}, got {feature} (of names, `datasets` "
            f"makes class labels with class_encode_column({column!r}))"
        )
    labels = [label for rows in splits.values() if column in rows.features for label in rows.unique(column)]
    labels = [label for label in labels if label is not None]
    if not labels:
        raise DataError(f"label_column: expected class labels or whole numbers in {column!r}, got none")
    if (last := max(labels)) >= MAX_CLASSES:  # times or hashes, of which a list would fill the memory
        raise DataError(f"label_column: expected class numbers below {MAX_CLASSES:,} in {column!r}, got {last}")
    return [str(index) for index in range(last + 1)]


def _labels(rows: datasets.Dataset, column: str, split: str, classes: list[str]) -> torch.Tensor:
    labels, last = rows.with_format(None)[column][:], len(classes) - 1
    for row, label in enumerate(labels):
        if label is None or not 0 <= label <= last:
            got = "none" if label is None else label
            raise DataError(
                f"split {split!r}, row {row}, column {column!r}: expected a label from 0 to {last}, got {got}"
            )
    return torch.tensor(labels)


def _images(rows: datasets.Dataset, column: str, split: str, image_size: int) -> torch.Tensor:
    if not isinstance(rows.features[column], datasets.Image):
        raise DataError(
            f"image_column: expected a column of type Image, got {column!r} of type {rows.features[column]}"
        )
    decoder = datasets.Image()
    images = torch.empty(len(rows), 3, image_size, image_size, dtype=torch.uint8)
    encoded = rows.cast_column(column, datasets.Image(decode=False))[column]
    for row, value in enumerate(tqdm(encoded, desc=f"decoding {split}", unit=" images")):
        where = f"split {split!r}, row {row}, column {column!r}"
        if value is None:
            raise DataError(f"{where}: expected an image, got none")
        try:
            image = F.pil_to_tensor(to_rgb(decoder.decode_example(value)))
        except UNREADABLE as error:
            raise DataError(f"{where}: expected an image, got {_describe(value)}") from error
        if image.shape[-2:] != images.shape[-2:]:
            image = F.resize(image, [image_size, image_size], InterpolationMode.BICUBIC, antialias=True)
        images[row] = image
    return images


def _describe(value: dict) -> str:
    if value.get("bytes") is None:
        return f"file {value.get('path')!r} that cannot be decoded"
    return f"{len(value['bytes'])} bytes that cannot be decoded"


def _read_cache(path: Path, classes: list[str], fingerprint: str) -> ImageDataset | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return ImageDataset(file.get_tensor("images"), file.get_tensor("labels"), classes, fingerprint)
    except (SafetensorError, OSError) as error:
        print(f"cache {path} cannot be read and is made again: {error}", file=sys.stderr)
        return None


def _write_cache(path: Path, dataset: ImageDataset) -> None:
    """Whole or not at all: written beside its place, then renamed, so that no reader ever sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            tensors = {"images": dataset.images, "labels": dataset.labels}
            save_file(tensors, part)
            os.replace(part, path)
    except (OSError, SafetensorError) as error:  # the second is how safetensors says "disk full"
        print(f"the decoded images are not cached, the next start decodes again: {error}", file=sys.stderr)

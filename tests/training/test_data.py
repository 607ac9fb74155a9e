import errno
import io
import sys
from dataclasses import replace

import datasets
import pytest
import torch
from helpers import run
from PIL import Image
from safetensors import SafetensorError
from torchvision.transforms.v2 import functional as F
from transformers import ViTImageProcessor

from vit_cifar.images import open_image
from vit_cifar.training import data
from vit_cifar.training.data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    DataError,
    ImageDataset,
    duplicates,
    load_split,
    recorded_dataset,
    split_off_validation,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path / "cache" / "vit_cifar"


def test_a_dataset_of_other_labels_classes_or_pixels_has_another_digest():
    found = load_split("sample", "train")
    others = [
        {"labels": found.labels.flip(0)},
        {"classes": found.classes[::-1]},
        {"images": torch.cat([found.images[:-1], 255 - found.images[-1:]])},
    ]
    assert load_split("sample", "train").digest() == found.digest()
    assert len({replace(found, **other).digest() for other in [{}, *others]}) == 4


def picture(seed: int, size=(32, 32), mode="RGB") -> bytes:
    pixels = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    buffer = io.BytesIO()
    F.to_pil_image(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(tmp_path, images, labels, label_feature=None, split="train", **columns) -> str:
    label_feature = label_feature or datasets.ClassLabel(names=["cat", "dog"])
    features = {"img": datasets.Image(), "label": label_feature}
    features |= {name: datasets.Image() for name in columns}
    table = {"img": [{"bytes": image, "path": None} for image in images], "label": labels}
    table |= {name: [{"bytes": image, "path": None} for image in images] for name in columns}
    (tmp_path / "rows").mkdir(exist_ok=True)
    rows = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    rows.to_parquet(tmp_path / "rows" / f"{split}.parquet")
    return str(tmp_path / "rows")


def test_tensors_equal_decoding_each_image(tmp_path):
    images = [picture(seed) for seed in range(6)]
    dataset = load_split(folder_of(tmp_path, images, [0, 1, 0, 1, 1, 0]), "train")
    for row, image in enumerate(images):
        assert torch.equal(dataset.images[row], F.pil_to_tensor(Image.open(io.BytesIO(image))))
    assert dataset.labels.tolist() == [0, 1, 0, 1, 1, 0]
    assert dataset.classes == ["cat", "dog"]


@pytest.mark.parametrize("mode", ["I;16", "L", "LA", "P", "RGBA"])
def test_training_sees_what_predict_and_the_page_see(tmp_path, mode):
    pixels = torch.randint(0, 256, (32, 32, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype("uint16") * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **({"transparency": 0} if mode == "P" else {}))
    dataset = load_split(folder_of(tmp_path, [buffer.getvalue()], [0]), "train")
    assert torch.equal(dataset.images[0], F.pil_to_tensor(open_image(buffer.getvalue())))


def test_second_load_reads_the_cache_and_decodes_nothing(tmp_path, monkeypatch, own_cache):
    folder = folder_of(tmp_path, [picture(seed) for seed in range(4)], [0, 1, 0, 1])
    first = load_split(folder, "train")
    monkeypatch.setattr(data, "_images", lambda *_: pytest.fail("decoded again"))
    second = load_split(folder, "train")
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert (first.classes, first.fingerprint) == (second.classes, second.fingerprint)
    assert len(list(own_cache.iterdir())) == 1  # nothing half written is left


def test_other_rows_have_another_cache(tmp_path):
    first = load_split(folder_of(tmp_path, [picture(1), picture(2)], [0, 1]), "train")
    (tmp_path / "second").mkdir()
    second = load_split(folder_of(tmp_path / "second", [picture(3), picture(4)], [0, 1]), "train")
    assert not torch.equal(first.images, second.images)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_cache_is_made_again(tmp_path, own_cache, damage):
    folder = folder_of(tmp_path, [picture(1), picture(2)], [0, 1])
    first = load_split(folder, "train")
    (path,) = own_cache.iterdir()
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-100], "empty": b"", "text": b"no tensors"}[damage])
    assert torch.equal(load_split(folder, "train").images, first.images)
    assert path.read_bytes() == content


def test_unwritable_cache_is_said_and_does_not_stop(tmp_path, own_cache, capsys):
    own_cache.parent.write_text("a file where the folder should be")
    dataset = load_split(folder_of(tmp_path, [picture(1), picture(2)], [0, 1]), "train")
    assert len(dataset) == 2
    assert "not cached" in capsys.readouterr().err


def test_a_disk_that_is_full_while_caching_is_said_and_does_not_stop(tmp_path, own_cache, capsys, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(data, "save_file", full)
    assert len(load_split(folder_of(tmp_path, [picture(1), picture(2)], [0, 1]), "train")) == 2
    assert "not cached" in capsys.readouterr().err and not list(own_cache.parent.rglob("*.safetensors"))


def test_normalize_equals_the_image_processor():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    processor = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=CIFAR10_MEAN, image_std=CIFAR10_STD, resample=3
    )
    pixels = processor([F.to_pil_image(image) for image in images], return_tensors="pt").pixel_values
    torch.testing.assert_close(data.normalize(images, CIFAR10_MEAN, CIFAR10_STD), pixels, atol=1e-6, rtol=0)


def test_grey_images_become_rgb_and_other_sizes_are_resized(tmp_path):
    dataset = load_split(folder_of(tmp_path, [picture(1, mode="L"), picture(2, size=(48, 64))], [0, 1]), "train")
    assert dataset.images.shape == (2, 3, 32, 32)
    assert torch.equal(dataset.images[0, 0], dataset.images[0, 2])


def test_batches_are_indexing():
    dataset = ImageDataset(torch.arange(5 * 3 * 4).view(5, 3, 2, 2).byte(), torch.arange(5), list("abcde"), "x")
    batch = dataset.__getitems__([3, 0, 3])
    assert torch.equal(batch["pixel_values"], dataset.images[[3, 0, 3]])
    assert batch["labels"].tolist() == batch["sample_index"].tolist() == [3, 0, 3]
    assert torch.equal(dataset[4]["pixel_values"], dataset.images[4])


def labelled(labels: torch.Tensor) -> ImageDataset:
    images = torch.arange(len(labels), dtype=torch.int32).view(torch.uint8).view(-1, 1, 2, 2)
    return ImageDataset(images, labels, [str(i) for i in range(int(labels.max()) + 1)], "x")


def test_validation_is_stratified_seeded_and_disjoint():
    dataset = labelled(torch.arange(10).repeat(100))
    rest, validation = split_off_validation(dataset, 100, seed=0)
    assert validation.labels.bincount().tolist() == [10] * 10
    assert rest.labels.bincount().tolist() == [90] * 10
    both = torch.cat([rest.images, validation.images]).flatten(1).unique(dim=0)
    assert len(both) == 1000  # every image is in one of the two
    assert torch.equal(split_off_validation(dataset, 100, seed=0)[1].images, validation.images)
    assert not torch.equal(split_off_validation(dataset, 100, seed=1)[1].images, validation.images)


def test_validation_is_what_datasets_draws():
    labels = torch.randint(3, (300,), generator=torch.Generator().manual_seed(0))
    features = datasets.Features({"row": datasets.Value("int64"), "label": datasets.ClassLabel(num_classes=3)})
    table = datasets.Dataset.from_dict({"row": range(300), "label": labels.tolist()}, features=features)
    parts = table.train_test_split(test_size=40, stratify_by_column="label", seed=5)
    for found, expected in zip(split_off_validation(labelled(labels), 40, seed=5), parts.values(), strict=True):
        rows = found.images.flatten(1).contiguous().view(torch.int32).flatten().tolist()
        assert rows == sorted(expected["row"])


def test_a_class_of_one_image_cannot_be_split():
    with pytest.raises(DataError, match="expected at least two images of each class to draw from, got one of '2'"):
        split_off_validation(labelled(torch.tensor([0, 0, 1, 1, 2, 0, 1])), 3, seed=0)


@pytest.mark.parametrize("size", [0, 9, 1000, 2000])
def test_impossible_validation_sizes_are_refused(size):
    with pytest.raises(DataError, match=f"validation_size: expected 10 .* to 999, got {size}"):
        split_off_validation(labelled(torch.arange(10).repeat(100)), size, seed=0)


def test_the_dataset_of_a_record_is_found_by_its_hub_id_or_where_it_is(tmp_path, monkeypatch):
    def found(name, **more):
        return recorded_dataset({"dataset": {"name": name, **more}})

    assert found("CIFAR-10", hub_id="uoft-cs/cifar10") == "uoft-cs/cifar10"
    assert found("sample", hub_id=None) == "sample"
    monkeypatch.chdir(tmp_path)
    for record in ({"hub_id": None}, {}):  # the second: an older record
        with pytest.raises(DataError, match="expected the folder that 'cifar10' stands for in the record, got none"):
            found("cifar10", **record)  # a stranger's on the Hub may be called so
    (tmp_path / "cifar10").mkdir()
    assert found("cifar10", hub_id=None) == "cifar10"


def test_undecodable_row_is_named(tmp_path):
    folder = folder_of(tmp_path, [picture(1), b"not an image", picture(2)], [0, 1, 0])
    with pytest.raises(DataError, match="split 'train', row 1, column 'img': expected an image, got 12 bytes"):
        load_split(folder, "train")


def test_row_without_image_is_named(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    (tmp_path / "rows").mkdir()
    table = {"img": [{"bytes": picture(1), "path": None}, None], "label": [0, 0]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "rows" / "train.parquet")
    with pytest.raises(DataError, match="split 'train', row 1, column 'img': expected an image, got none"):
        load_split(str(tmp_path / "rows"), "train")


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, None, 1], None, "row 1, column 'label': expected a label from 0 to 1, got none"),
        ([0, 1, -1], None, "row 2, column 'label': expected a label from 0 to 1, got -1"),
        ([0, -1, 1], datasets.Value("int64"), "row 1, column 'label': expected a label from 0 to 1, got -1"),
    ],
)
def test_wrong_labels_are_named(tmp_path, labels, feature, message):
    folder = folder_of(tmp_path, [picture(seed) for seed in range(3)], labels, feature)
    with pytest.raises(DataError, match=message):
        load_split(folder, "train", label_column="label")


def test_label_outside_the_classes_is_named(tmp_path):
    folder = folder_of(tmp_path, [picture(1), picture(2)], [0, 7], datasets.Value("int64"))
    rows = datasets.load_dataset(folder)["train"]
    with pytest.raises(DataError, match="row 1, column 'label': expected a label from 0 to 1, got 7"):
        data._labels(rows, "label", "train", ["a", "b"])  # a file that disagrees with its own schema


def test_whole_numbers_are_labels_up_to_the_largest_of_any_split(tmp_path):
    folder_of(tmp_path, [picture(1), picture(2)], [0, 3], datasets.Value("int64"))
    folder = folder_of(tmp_path, [picture(3)], [1], datasets.Value("int64"), split="test")
    for split in ("train", "test"):
        assert load_split(folder, split, label_column="label").classes == ["0", "1", "2", "3"]


def test_images_that_two_splits_have_in_common(tmp_path):
    folder_of(tmp_path, [picture(seed) for seed in range(4)], [0, 1, 0, 1])
    folder = folder_of(tmp_path, [picture(9), picture(2), picture(8), picture(2)], [0, 1, 0, 1], split="test")
    train_set, test_set = (load_split(folder, split) for split in ("train", "test"))
    assert duplicates(test_set, train_set) == [1, 3]


def test_columns_splits_and_datasets_that_are_not_there(tmp_path):
    folder = folder_of(tmp_path, [picture(1)], [0], other=None)
    with pytest.raises(DataError, match="expected a split named test, got train"):
        load_split(folder, "test")
    with pytest.raises(DataError, match=r"image_column: expected a column of split 'train' \(.*img.*\), got 'picture'"):
        load_split(folder, "train", image_column="picture")
    with pytest.raises(DataError, match="image_column: expected one column of type Image .* got img, other"):
        load_split(folder, "train")
    with pytest.raises(DataError, match="image_column: expected a column of type Image, got 'label'"):
        load_split(folder, "train", image_column="label")
    with pytest.raises(DataError, match="dataset_name: expected a dataset on the Hub or a folder"):
        load_split(str(tmp_path / "nowhere"), "train")
    assert len(load_split(folder, "train", image_column="other")) == 1


def test_a_folder_that_is_not_there_is_no_earlier_one_of_its_name(tmp_path, monkeypatch):
    """`datasets` would take that one from its cache."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    folder_of(tmp_path / "one", [picture(1)], [0])
    monkeypatch.chdir(tmp_path / "one")
    assert len(load_split("rows", "train")) == 1
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(
        DataError, match="dataset_name: expected a folder or a Hub id with its user, as in ylecun/mnist, got 'rows'"
    ):
        load_split("rows", "train")


def test_a_folder_of_one_class_has_no_labels(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(picture(1))
    with pytest.raises(
        DataError, match="label_column: .* got none: in a folder, two subfolders or more of each split are its labels"
    ):
        load_split(str(tmp_path), "train")


def test_a_full_disk_is_named_and_a_read_only_cache_has_a_stand_in(tmp_path, monkeypatch):
    """`datasets` says only that an error occurred while generating the dataset."""
    folder, load = folder_of(tmp_path, [picture(1)], [0]), datasets.load_dataset

    def fail(error):
        def load_dataset(source, cache_dir=None):
            if cache_dir is not None:
                return load(source, cache_dir=cache_dir)
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DataError, match="No space left on device"):
        load_split(folder, "train")
    fail(OSError(errno.EROFS, "Read-only file system"))
    assert len(load_split(folder, "train")) == 1


def test_validation_leaves_images_of_each_class_to_train_with():
    labels = torch.tensor([0] * 60 + [1] * 60 + [2] * 2)
    dataset = ImageDataset(torch.zeros(122, 3, 4, 4, dtype=torch.uint8), labels, ["a", "b", "c"], "")
    with pytest.raises(DataError, match="validation_size: expected images of each class left .*, got 100: none of c"):
        split_off_validation(dataset, 100, seed=0)


def test_whole_numbers_that_count_no_classes_are_refused(tmp_path):
    folder = folder_of(tmp_path, [picture(1), picture(2)], [0, 1_700_000_000], datasets.Value("int64"))
    with pytest.raises(DataError, match="label_column: expected class numbers below 100,000 in 'label', got 17"):
        load_split(folder, "train", label_column="label")


@pytest.mark.parametrize(("feature", "labels"), [(datasets.Value("bool"), [True, False]), (datasets.Image(), None)])
def test_labels_that_are_no_numbers_are_named(tmp_path, feature, labels):
    images = [picture(1), picture(2)]
    folder = folder_of(tmp_path, images, labels or [{"bytes": image, "path": None} for image in images], feature)
    with pytest.raises(DataError, match="label_column: expected class labels or whole numbers in 'label', got"):
        load_split(folder, "train", image_column="img", label_column="label")


def test_empty_split_is_named(tmp_path):
    folder = folder_of(tmp_path, [], [])
    with pytest.raises(DataError, match="expected rows in every split, got an empty split: .*train"):
        load_split(folder, "train")


def test_the_sample_in_the_package_needs_no_network():
    script = """
import sys
sys.addaudithook(lambda event, args: sys.exit(f"{event} {args}") if event.startswith("socket.") else None)
from vit_cifar.training.data import load_split
print(load_split("sample", "test").labels.bincount().tolist())
"""
    finished = run(sys.executable, "-c", script, HF_HUB_OFFLINE="0")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == str([20] * 10)

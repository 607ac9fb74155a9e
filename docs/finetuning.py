"""Fine-tuning beside training from scratch: animals against vehicles at 48 px, 900 images; makes finetuning.json.

The two classes only coarsen those that the model was trained on, but none of the images was among its own.

python docs/finetuning.py DATASET OUTPUT_FOLDER
"""

import subprocess
import sys
from pathlib import Path

import datasets
from PIL import Image

from vit_cifar.evaluation.records import epochs_trained, read_record, write_json

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "finetuning.json"
MODEL = "hub_card/models/vit-cifar10-nano"
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
AT_48_PX = ["--config_overrides", "image_size=48", "--seed", "0"]
SCRATCH = ["--recipe", "nano", *AT_48_PX, "--validation_size", "100", "--per_device_train_batch_size", "32"]
TRAININGS = {
    "fine-tuned": ["--model_name_or_path", MODEL, *AT_48_PX],
    "fine-tuned, frozen body": ["--model_name_or_path", MODEL, *AT_48_PX, "--freeze_body"],
    "from scratch": [*SCRATCH, "--num_train_epochs", "10"],
    "from scratch, as many epochs as nano": SCRATCH,
}


def make_dataset(dataset_name: str, folder: Path) -> None:
    """1,000 images to train with (100 of them choose the epoch) and 2,000 to test with, all from CIFAR-10's test split:
    the model saw none of them."""
    rows = datasets.load_dataset(dataset_name, split="test").shuffle(seed=0)
    names = rows.features["label"].names
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["animal", "vehicle"])})
    folder.mkdir(parents=True)  # an error if it is there: nothing is overwritten
    for split, first, last in (("train", 0, 1000), ("test", 1000, 3000)):
        part = rows.select(range(first, last))
        images = [image.convert("RGB").resize((48, 48), Image.Resampling.BICUBIC) for image in part["img"]]
        labels = [int(names[label] not in ANIMALS) for label in part["label"]]
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(f"{folder}/{split}-00000-of-00001.parquet")


def table(records: dict[str, dict]) -> str:
    """README's table as Markdown."""
    rows = ["| | epochs | test accuracy | seconds |", "|---|---|---|---|"]
    for name, record in records.items():
        seconds = record["wall_time_seconds"]
        rows.append(f"| {name} | {epochs_trained(record):g} | {record['test_accuracy']:.2%} | {seconds:.0f} |")
    return "\n".join(rows)


def main(dataset_name: str, output_folder: str) -> None:
    folder = Path(output_folder).resolve()
    make_dataset(dataset_name, folder / "animals-vehicles-48px")
    records = {}
    for name, words in TRAININGS.items():
        output = ["--output_dir", str(folder / name.replace(" ", "_").replace(",", ""))]
        data = ["--dataset_name", str(folder / "animals-vehicles-48px")]
        subprocess.run([sys.executable, "train.py", *words, *data, *output], cwd=ROOT, check=True)
        records[name] = read_record(output[1])
    write_json(RECORDS, records)
    print(table(records))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A model folder's records -> its model card. Not a number comes from anywhere else."""

import re
import tomllib
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, UndefinedError
from matplotlib.figure import Figure

from ..configuration_vit_cifar import CIFAR10_CLASSES, ViTCifarConfig
from ..errors import UserError
from ..evaluation.examination import Examination, calibration_errors, calibration_words, read_examination, trust_table
from ..evaluation.metrics import BINS
from ..evaluation.records import RecordError, epochs_trained, read_record, time_and_machine
from ..explain.pictures import draw_overlays
from ..models import HUB_CARD, class_names, load_model, split_revision
from ..training.data import CIFAR10_NAME

CIFAR10_COPIES = ("cifar10-jpeg-q75",)  # what records call copies of it
COMMIT_LENGTH = 40
NO_HUB_ID = re.compile(r"[^A-Za-z0-9_.-]+")  # what the Hub refuses in the id of a dataset
MARKUP = re.compile(r"([\\|<>\[\]*_`])")
PICTURE_NAME = "overlays.png"
# What of the recorded arguments a reader of the card wants to know; `command` and the record have the rest.
SETTINGS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "optimizer", "muon_learning_rate", "optim"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "label_smoothing_factor"),
    *("flip", "max_shift", "shift_fill", "cutout_size", "cutmix_probability", "trivial_augment_probability", "seed"),
)
ONLY_WITH = {"muon_learning_rate": "muon", "optim": "trainer"}  # settings that another optimizer does not read


def model_card(folder: str | Path, repo_id: str) -> ModelCard:
    """The card of a model folder, filled from its records by `hub_card/model_card.md`.

    Args:
        folder: with config.json, model.safetensors, training_record.json and, if it was examined, examination.json.
        repo_id: what the card's code calls the model, as in "user/name".

    Raises:
        RecordError: a record is missing, damaged or of other weights, or lacks something that the card says.
    """
    try:
        return ModelCard(_fill(Path(folder), repo_id))
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, UndefinedError) as error:
        raise RecordError(
            f"{folder}: expected a record with all that a card says, got one that lacks or garbles it: {error}"
        ) from error


def _fill(folder: Path, repo_id: str) -> str:
    record, config, examined = read_record(folder), ViTCifarConfig.from_pretrained(folder), read_examination(folder)
    arguments, classes = record["arguments"], class_names(config)
    examination = examined.record if examined else None
    per_class = record["test_accuracy_per_class"]
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["plain"] = _plain
    metadata = _metadata(record, classes, repo_id, examination)
    template = environment.from_string((HUB_CARD / "model_card.md").read_text(encoding="utf-8"))
    return template.render(
        card_data=metadata.to_yaml(),
        license=metadata.license,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        record={"git_commit": None, **record},
        config=config,
        classes=classes,
        grid=config.image_size // config.patch_size,
        base_model=arguments.get("model_name_or_path"),
        per_class=per_class,
        worst=min(per_class, key=per_class.get),
        best=max(per_class, key=per_class.get),
        epochs=epochs_trained(record),
        transformers=next(word for word in project()["dependencies"] if word.startswith("transformers")),
        settings={
            name: arguments[name]
            for name in SETTINGS
            if name in arguments and arguments["optimizer"] == ONLY_WITH.get(name, arguments["optimizer"])
        },
        time_and_machine=time_and_machine(record),
        examination=examination,
        calibration_words=calibration_words,
        trust_table=trust_table,
        is_cifar10=classes == list(CIFAR10_CLASSES),
        percent="{:.2%}".format,
    )


def _plain(name: str) -> str:
    """A class name that Markdown shows as it is, in a table too."""
    return MARKUP.sub(r"\\\1", " ".join(name.split()))


def _metadata(record: dict, classes: list[str], repo_id: str, examination: dict | None) -> ModelCardData:
    """The card's YAML. A copy of CIFAR-10 is filed under the Hub's, and named as what it is in the results."""
    name = record["dataset"]["name"]
    hub_id = CIFAR10_NAME if name in CIFAR10_COPIES else record["dataset"].get("hub_id")
    of = {
        "task_type": "image-classification",
        "dataset_type": hub_id or NO_HUB_ID.sub("-", name.split("/")[-1]).strip("-.") or "own-images",
        "dataset_name": name,
        "dataset_split": "test",
    }
    results = [EvalResult(metric_type="accuracy", metric_name="Accuracy", metric_value=record["test_accuracy"], **of)]
    if examination:
        results.append(
            EvalResult(
                metric_type="expected_calibration_error",
                metric_name=f"Expected calibration error, {BINS} bins",
                metric_value=calibration_errors(examination)[0],
                **of,
            )
        )
    return ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision-transformer", "vit_cifar", "attention-maps"],
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"],
        base_model=_base_model(record["arguments"]),
        model_name=repo_id.split("/")[-1],
        eval_results=results,
    )


def _base_model(arguments: dict) -> str | None:
    """The Hub id that the training started from; a local folder's revision is a checksum of its weights."""
    name, revision = arguments.get("model_name_or_path"), arguments.get("model_revision") or ""
    return split_revision(name)[0] if name and len(revision) == COMMIT_LENGTH else None


def project() -> dict:
    """What the checkout's pyproject.toml says of the package: an installation may be of an older one."""
    return tomllib.loads((HUB_CARD.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def card_picture(folder: str | Path, examination: Examination) -> Figure:
    """The card's picture: right answers for three classes, those least sure, and the surest mistake of all."""
    answers, names = examination.answers, examination.answers.features["label"].names
    rows = answers.remove_columns("image").add_column("row", range(len(answers))).to_list()
    rows.sort(key=lambda row: row["confidence"])
    right = [row for row in rows if row["label"] == row["prediction"]]
    least_sure = {row["label"]: row for row in reversed(right)}
    surest_mistake = [row for row in rows if row["label"] != row["prediction"]][-1:]
    chosen = [least_sure[label] for label in sorted(least_sure)[:3]] + surest_mistake
    notes = ["" if row["label"] == row["prediction"] else f"label: {names[row['label']]}" for row in chosen]
    images = [answers[row["row"]]["image"].convert("RGB") for row in chosen]
    return draw_overlays(*load_model(str(folder)), images, notes)

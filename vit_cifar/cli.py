"""`vit-cifar …` = `python -m vit_cifar …`. A user's error is one line on stderr and exit code 2."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError, one_line

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    # --dataset_name, as train.py and the records spell it, is --dataset-name.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    help="Use a ViT-CIFAR model, look inside it, measure it, publish it.",
)

MODEL_HELP = "Model folder or Hub id (user/name or user/name@revision); if omitted, the model in the checkout."
ModelOption = Annotated[str | None, typer.Option("--model", help=MODEL_HELP)]
ImageColumnOption = Annotated[
    str | None, typer.Option(help="Column with the images; if omitted, the only one of type Image.")
]
LabelColumnOption = Annotated[
    str | None, typer.Option(help="Column with the labels; if omitted, the only one of type ClassLabel.")
]
RepoOption = Annotated[str, typer.Option(help="The repository on the Hub, as in user/name.")]
PushOption = Annotated[
    bool, typer.Option("--push", help="Upload the result as one commit; without it nothing leaves this machine.")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")]
KeepOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Keep the files that were built in this new folder.")
]


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    model: ModelOption = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to print.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list for programs.")] = False,
) -> None:
    """Print the likeliest classes of each image, in percent."""
    from transformers import pipeline

    from .images import open_image
    from .models import load_model

    network, processor = load_model(model)
    classify = pipeline("image-classification", model=network, image_processor=processor)
    opened = (open_image(path) for path in images)  # one after the other: there may be thousands
    answers = list(classify(opened, top_k=min(top, network.config.num_labels)))  # all of them, or an error and none
    if as_json:
        rows = [{"image": str(path), "predictions": answer} for path, answer in zip(images, answers, strict=True)]
        print(json.dumps(rows, indent=2))
        return
    for path, answer in zip(images, answers, strict=True):
        print(f"{path}: " + ", ".join(f"{row['label']} {row['score']:.1%}" for row in answer))


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    dataset_name: Annotated[
        str | None,
        typer.Option(help="Hub id, local folder, or `sample`; if omitted, CIFAR-10, for a model of its classes."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split to measure on.")] = "test",
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")] = False,
) -> None:
    """Print a model's accuracy on a split, in all and for each class."""
    from .configuration_vit_cifar import CIFAR10_CLASSES
    from .evaluation.metrics import evaluate as measure
    from .models import class_names, default_device, load_model
    from .training.data import CIFAR10_NAME, load_split

    network, processor = load_model(model)
    if dataset_name is None and class_names(network.config) != list(CIFAR10_CLASSES):
        raise UserError("dataset_name: expected a dataset of the model's classes, which are not CIFAR-10's, got none")
    dataset = load_split(dataset_name or CIFAR10_NAME, split, network.config.image_size, image_column, label_column)
    result = measure(network.to(default_device()), processor, dataset)
    if as_json:
        numbers = {"accuracy": result.accuracy, "loss": result.loss, "per_class": result.per_class}
        print(json.dumps({"images": len(dataset)} | numbers, indent=2))
        return
    print(f"accuracy {result.accuracy:.2%} on {len(dataset):,} images, loss {result.loss:.4f} nats")
    for name, value in result.per_class.items():
        print(f"  {name:<12} {value:7.2%}")


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A new PNG file; a new folder for several images.", show_default=False),
    ],
    model: ModelOption = None,
    method: Annotated[
        str, typer.Option(help="attention, rollout, gradient rollout, occlusion or random.")
    ] = "attention",
    layer: Annotated[
        int | None, typer.Option(help="Counted from 1 (method attention only); if omitted, the last.")
    ] = None,
    head: Annotated[
        str, typer.Option(help="Counted from 1, or mean or max over all heads (method attention only).")
    ] = "mean",
    class_name: Annotated[
        str | None,
        typer.Option(
            "--class", help="The class to explain (gradient rollout and occlusion only); if omitted, the answer."
        ),
    ] = None,
) -> None:
    """Draw where the model looks, as PNG files that say in their metadata what they show."""
    from tqdm.auto import tqdm

    from .explain.pictures import explain_image, files_in, map_options, name_of
    from .hub.folder import new_folder
    from .images import open_image
    from .models import load_model

    files = files_in(images)
    network, processor = load_model(model)
    network.float()  # in bf16 the small changes that occlusion measures would be rounding
    options = map_options(network.config, method, layer, head, class_name)
    if len(images) == 1 and not images[0].is_dir():
        _check_new_file(output)
        if output.suffix.lower() != ".png":
            raise UserError(f"output: expected a name that ends in .png, got {output}")
        found = explain_image(network, processor, open_image(files[0]), name_of(model), **options)
        found.save(output)
        print(f"{files[0]}: {found}")
        return
    with new_folder(output) as folder:
        for path in tqdm(files, "reading", unit=" images", disable=None):  # all of them: a bad one would cost the maps
            open_image(path)
        for path in tqdm(files, "explaining", unit=" images", disable=None):
            found = explain_image(network, processor, open_image(path), name_of(model), **options)
            found.save(folder / f"{path.stem}.png")
            tqdm.write(f"{path}: {found}")


@app.command()
def examine(
    folder: Annotated[Path, typer.Argument(help="A model folder with its training record.", show_default=False)],
    dataset_name: Annotated[
        str | None,
        typer.Option(help="Hub id or local folder; if omitted, the one in the record."),
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="How many test images to measure the maps on.")] = 500,
) -> None:
    """Measure mistakes, calibration and how far each kind of map can be trusted; kept beside the weights."""
    from datasets import disable_progress_bars

    from .evaluation.examination import examine_folder, report, write_examination

    if not folder.is_dir():
        raise UserError(f"model: expected a model folder, got {folder}: no such folder")
    examination = examine_folder(folder, dataset_name, images)
    print(report(examination.record))
    disable_progress_bars()  # `to_parquet` would show one for some hundred rows
    write_examination(folder, examination)


@app.command()
def benchmark(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the record into this new JSON file.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a training step.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="How many times each model is timed.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a round.")] = 3,
) -> None:
    """Time training and inference beside a plain loop, transformers' ViT and timm's, in turns in one process."""
    from .evaluation.benchmark import benchmark as measure
    from .evaluation.benchmark import report
    from .evaluation.records import write_json

    if output is not None:
        _check_new_file(output)
    record = measure(batch_size, rounds, steps)
    print(report(record))
    if output is not None:
        write_json(output, record)


@app.command()
def convert_tutorial(
    checkpoint: Annotated[
        Path, typer.Argument(help="The tutorial's file, as in cifar_vit_pe_conv.pth.", show_default=False)
    ],
    output_dir: Annotated[Path, typer.Argument(help="A new folder for the model.", show_default=False)],
) -> None:
    """Turn a checkpoint of the tutorial into a model folder that from_pretrained loads."""
    from .hub.convert_tutorial import convert_tutorial as convert

    recipe, model = convert(checkpoint, output_dir)
    print(f"{recipe}, {model.num_parameters():,} parameters: {output_dir}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Model folder or Hub id.", show_default=False)],
    kind: Annotated[
        str,
        typer.Option(
            "--format", help="onnx, or vit for a folder that transformers' own ViT loads.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.", show_default=False)],
    dataset_name: Annotated[
        str | None,
        typer.Option(help="Also measure the exported model on the test split of this dataset; as in evaluate."),
    ] = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
) -> None:
    """Write a model in a form that needs none of this package's code, checked against the original."""
    from .hub.export import export_model, report

    record = export_model(model, kind, output, dataset_name, image_column, label_column)
    print(f"{output}: {report(record)}")


@app.command()
def publish(
    model_dir: Annotated[Path, typer.Argument(help="A model folder with its training record.", show_default=False)],
    repo_id: RepoOption,
    push: PushOption = False,
    private: PrivateOption = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; if omitted, main.")] = None,
    dataset_name: Annotated[
        str | None,
        typer.Option(help="To check the accuracy on; if omitted, the one in the record, if it is available."),
    ] = None,
    output: KeepOption = None,
) -> None:
    """Build a Hub repository from a model folder, check it as a stranger will load it, and with --push upload it."""
    from .hub.publish import publish as make

    make(model_dir, repo_id, push, private, revision, dataset_name, output)


@app.command()
def publish_space(
    repo_id: RepoOption,
    model_id: Annotated[str, typer.Option(help="The model on the Hub, as in user/name.")],
    model_revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit; its commit gets pinned."),
    ] = None,
    push: PushOption = False,
    private: PrivateOption = False,
    output: KeepOption = None,
) -> None:
    """Make a Space of the page for a model on the Hub, and with --push upload it."""
    from .hub.space import publish_space as make

    make(repo_id, model_id, model_revision, push, private, output)


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", envvar="MODEL_ID", help="Model folder or Hub id; if omitted, every model in the checkout."
        ),
    ] = None,
) -> None:
    """Serve the page that shows what a model answers and where it looks."""
    try:
        from .demo.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError('the page: expected gradio, got none: pip install "vit-cifar[demo]"') from error
    serve(model or None)


def _check_new_file(output: Path) -> None:
    if output.exists():
        raise UserError(f"output: expected a new file, got {output}, which exists")
    if not output.parent.is_dir():
        raise UserError(f"output: expected a new file in a folder that exists, got {output}")


def main() -> None:
    from huggingface_hub.utils.logging import set_verbosity_error
    from safetensors import SafetensorError
    from transformers.utils import logging

    # No progress bars of small files (decoding a dataset keeps its own), no warnings of retries: the last one raises.
    logging.disable_progress_bar()  # the Hub's as well
    logging.set_verbosity_error()
    set_verbosity_error()
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    warnings.filterwarnings("ignore", module="PIL|torch")  # of damaged files: the error says what the user needs
    try:
        app()
    except (UserError, OSError, SafetensorError) as error:  # the last two: a full disk, a folder not ours to write
        print(f"vit-cifar: {one_line(error)}", file=sys.stderr)
        sys.exit(2)

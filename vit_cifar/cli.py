"""`vit-cifar …` = `python -m vit_cifar …`. A user's error is one line on stderr and exit code 2."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Use a ViT-CIFAR model, look inside it, measure it, publish it.",
)

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Model folder, user/name or user/name@revision; left out, the one in the checkout."),
]
ImageColumnOption = Annotated[
    str | None, typer.Option("--image_column", "--image-column", help="Left out, the only column of type Image.")
]
LabelColumnOption = Annotated[
    str | None, typer.Option("--label_column", "--label-column", help="Left out, the only column of type ClassLabel.")
]
RepoOption = Annotated[str, typer.Option("--repo-id", "--repo_id", help="The repository on the Hub, as in user/name.")]
PushOption = Annotated[
    bool, typer.Option("--push", help="Upload, as one commit; left out, nothing leaves this machine.")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository that only you can see.")]
KeepOption = Annotated[Path | None, typer.Option("--output", "-o", help="A new folder to keep what was made.")]


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
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder, user/name or user/name@revision; left out, the one in the checkout."),
    ] = None,
    dataset_name: Annotated[
        str | None,
        typer.Option("--dataset_name", "--dataset-name", help="Hub id, local folder, or `sample`; left out, CIFAR-10."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split to measure on.")] = "test",
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")] = False,
) -> None:
    """Print a model's accuracy on a split, in all and for each class."""
    from .evaluation.metrics import evaluate as measure
    from .models import default_device, load_model
    from .training.data import CIFAR10_NAME, load_split

    network, processor = load_model(model)
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
    layer: Annotated[int | None, typer.Option(help="For attention: from 1; left out, the last.")] = None,
    head: Annotated[str, typer.Option(help="For attention: from 1, or mean or max over heads.")] = "mean",
    class_name: Annotated[
        str | None,
        typer.Option("--class", help="For gradient rollout and occlusion: the class to explain; left out, the answer."),
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
        typer.Option(
            "--dataset_name", "--dataset-name", help="Hub id or local folder; left out, what the record names."
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Test images that the maps are tried on.")] = 500,
) -> None:
    """Measure mistakes, calibration and how far each kind of map can be trusted; kept beside the weights."""
    from datasets import disable_progress_bars

    from .evaluation.examination import examine_folder, report, write_examination

    if not folder.is_dir():
        raise UserError(f"model: expected a model folder, got {folder}: no such folder")
    examination = examine_folder(folder, dataset_name, images)
    print(report(examination.record))
    disable_progress_bars()  # of writing a small file
    write_examination(folder, examination)


@app.command()
def benchmark(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the record into this new JSON file.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", "--batch-size", min=1, help="Of a training step.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="How often each takes its turn.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a turn.")] = 3,
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
        str, typer.Option("--format", help="onnx, or vit: a folder for transformers' own ViT.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.", show_default=False)],
    dataset_name: Annotated[
        str | None,
        typer.Option(
            "--dataset_name", "--dataset-name", help="Measure what was exported on its test split; as in evaluate."
        ),
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
    revision: Annotated[str | None, typer.Option(help="A branch to push to; left out, main.")] = None,
    dataset_name: Annotated[
        str | None,
        typer.Option(
            "--dataset_name",
            "--dataset-name",
            help="To evaluate on again; left out, what the record names, if it can be had.",
        ),
    ] = None,
    output: KeepOption = None,
) -> None:
    """Make a Hub repository of a model folder, check it as a stranger will use it, and with --push upload it."""
    from .hub.publish import publish as make

    make(model_dir, repo_id, push, private, revision, dataset_name, output)


@app.command()
def publish_space(
    repo_id: RepoOption,
    model_id: Annotated[str, typer.Option("--model-id", "--model_id", help="The model on the Hub, as in user/name.")],
    model_revision: Annotated[
        str | None,
        typer.Option("--model-revision", "--model_revision", help="Branch, tag or commit; its commit gets pinned."),
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
            "--model", envvar="MODEL_ID", help="Model folder or Hub id; left out, every model in the checkout."
        ),
    ] = None,
) -> None:
    """Serve the page that shows what a model answers and where it looks."""
    try:
        from .demo.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError('the page needs gradio: pip install "vit-cifar[demo]"') from error
    serve(model or None)


def _check_new_file(output: Path) -> None:
    if output.exists():
        raise UserError(f"output: expected a new file, got {output}, which exists")
    if not output.parent.is_dir():
        raise UserError(f"output: expected a new file in a folder that exists, got {output}")


def main() -> None:
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error
    from safetensors import SafetensorError
    from transformers.utils import logging

    # Of small files; decoding keeps its own. Of retries: if they come to nothing, the error says so.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    disable_progress_bars()
    set_verbosity_error()
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    warnings.filterwarnings("ignore", module="PIL|torch")  # of damaged files: the error says what the user needs
    try:
        app()
    except (UserError, OSError, SafetensorError) as error:  # the last two: a full disk, a folder not ours to write
        print(f"vit-cifar: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

"""The one door for models from outside: a folder or a Hub id becomes a trained model, or one line that says why not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig, ViTImageProcessor

from .configuration_vit_cifar import ViTCifarConfig
from .errors import UserError, first_line
from .integrity import MODEL_FILES, SUMS_NAME, DamageError, check_checksums, newest_whole_checkpoint
from .modeling_vit_cifar import ViTCifarForImageClassification

HUB_CARD = Path(__file__).parents[1] / "hub_card"  # in a checkout, not in a wheel
BUNDLED_MODELS = HUB_CARD / "models"
DEFAULT_MODEL = "vit-cifar10-nano"


class ModelError(UserError):
    """A model that cannot be loaded; the message is one line."""


@contextmanager
def _model_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ModelError of one line."""
    try:
        yield
    except ModelError:
        raise
    except HFValidationError as error:
        raise ModelError(f"model: expected a model folder or a Hub id, got {name!r}: no such folder") from error
    except Exception as error:  # a damaged file or a fault of the network can be of any type in the libraries below
        where = "" if Path(name).is_dir() else "no such folder, and from the Hub: "
        raise ModelError(
            f"model: expected a model folder or a Hub id, got {name!r}: {where}{first_line(error)}"
        ) from error


def split_revision(name: str) -> tuple[str, str | None]:
    """A Hub id with a branch, tag or commit, "user/name@revision" as huggingface_hub's paths write it, in two."""
    if Path(name).is_dir():
        return name, None
    name, _, revision = name.partition("@")
    return name, revision or None


def load_model(name: str | None = None) -> tuple[ViTCifarForImageClassification, ViTImageProcessor]:
    """(model in evaluation mode, its image processor).

    Args:
        name: a model folder or a Hub id, at a revision if it says user/name@revision; None for the model in the
            checkout.

    Raises:
        ModelError: there is no such model, it is of another type, its files are not those of its SHA256SUMS (if it
            has one), or its weights are not all there (transformers would fill what is missing with random numbers)
            or not finite.
    """
    if name is None:
        name = str(BUNDLED_MODELS / DEFAULT_MODEL)
        if not Path(name).is_dir():
            raise ModelError("model: expected a folder or a Hub id, got none, and this installation carries no model")
    folder = local_folder(name)
    with _model_errors(name):
        # Mismatched weights are let in so that they can be refused below by name.
        model, info = ViTCifarForImageClassification.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
        )
        processor = ViTImageProcessor.from_pretrained(folder)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := info.get(problem):
            raise ModelError(f"model: expected all weights of {name}, got {problem.replace('_', ' ')}: {sorted(found)}")
    if broken := [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ModelError(f"model: expected finite weights, got NaN or infinity in {', '.join(broken[:3])} of {name}")
    return model.eval(), processor


def default_device() -> torch.device:
    """The device for inference: the GPU if there is one of CUDA or ROCm, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def class_names(config: ViTCifarConfig) -> list[str]:
    """In the order of the logits."""
    return [config.id2label[index] for index in range(config.num_labels)]


def local_folder(name: str) -> Path:
    """The folder of a model's weights and of what lies beside them; a Hub id's is downloaded, and named by its commit.

    Raises:
        ModelError: there is no such model, it is of another type, or its files are not those of its SHA256SUMS.
    """
    is_folder = Path(name).is_dir()
    if is_folder:
        _check(Path(name))
    repo_id, revision = split_revision(name)
    with _model_errors(name):
        if not is_folder:
            validate_repo_id(repo_id)
        # Before the weights, which may be large; the package's own classes only: nobody is asked to run other code.
        config = AutoConfig.from_pretrained(repo_id, revision=revision, trust_remote_code=False)
        if not isinstance(config, ViTCifarConfig):
            raise ModelError(f"model: expected type {ViTCifarConfig.model_type}, got {config.model_type} in {name}")
        if is_folder:
            return Path(name)
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*MODEL_FILES, SUMS_NAME]))
    _check(folder)
    return folder


def _check(folder: Path) -> None:
    """Raises ModelError if the folder has a SHA256SUMS and its files are others."""
    if not (folder / SUMS_NAME).is_file():
        return
    try:
        check_checksums(folder)
    except DamageError as error:
        newest, _ = newest_whole_checkpoint(folder)
        offer = f"; {newest} is whole: train.py goes on from it with --resume_from_checkpoint" if newest else ""
        raise ModelError(f"model: {error} (if you changed them yourself, delete that list){offer}") from error

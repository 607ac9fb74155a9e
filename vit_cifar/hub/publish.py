"""`vit-cifar publish`: a trained model folder -> a Hub repository, checked the way a stranger will load it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the second, of the network, is of its HTTP library
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import load_file, save_file

from ..errors import UserError, one_line
from ..evaluation.examination import EXAMINATION_NAME, read_examination
from ..evaluation.metrics import evaluate
from ..evaluation.records import RECORD_NAME, accuracy_tolerance, read_record, write_json
from ..integrity import MISTAKES_NAME, WEIGHTS_NAME, write_checksums
from ..models import HUB_CARD, load_model
from ..training.data import DataError, load_recorded_split, recorded_dataset
from . import stranger
from .card import PICTURE_NAME, card_picture, model_card
from .folder import new_folder

CARD_NAME = "README.md"
COPIED = ("config.json", "preprocessor_config.json", WEIGHTS_NAME, RECORD_NAME)
EXAMINED = (EXAMINATION_NAME, MISTAKES_NAME)
REMOTE_CODE = ("configuration_vit_cifar.py", "modeling_vit_cifar.py")
AUTO_MAP = {
    "AutoConfig": "configuration_vit_cifar.ViTCifarConfig",
    "AutoModel": "modeling_vit_cifar.ViTCifarModel",
    "AutoModelForImageClassification": "modeling_vit_cifar.ViTCifarForImageClassification",
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
LINK = re.compile(r"(?<!\\)\]\((?!https?:|#)([^)]+)\)")
CLOSE = 1e-4  # of logits and attentions, in two processes on one machine
SAME_LOSS = 1e-3


class PublishError(UserError):
    """Something that must not or cannot be published; the message is one line."""


def publish(
    model_dir: str | Path,
    repo_id: str,
    push: bool = False,
    private: bool = False,
    revision: str | None = None,
    dataset_name: str | None = None,
    output: str | Path | None = None,
) -> CommitInfo | None:
    """Builds the Hub's repository of a model folder, checks it, and uploads it if `push` says so.

    Args:
        model_dir: with weights, config, preprocessor and training record, as train.py leaves it; it is only read.
        repo_id: "user/name".
        private, revision: see `upload`.
        dataset_name: see `check_accuracy`.
        output: a new folder to keep what was built.

    Returns: the commit, or None without `push`.

    Raises:
        PublishError, RecordError, ModelError, DataError, FolderError: nothing was uploaded, or the upload failed.
    """
    check_repo_id(repo_id)
    if push:
        check_login()
    with new_folder(output) as folder:
        build_model_repo(model_dir, repo_id, folder)
        print(check_card(folder))
        print(check_as_stranger(folder))
        print(check_accuracy(folder, dataset_name))
        print(describe_files(folder))
        if (folder / MISTAKES_NAME).is_file():
            print(f"{MISTAKES_NAME} and {PICTURE_NAME} hold test images, which all who see the repository get")
        if not push:
            print(f"nothing was uploaded: --push makes this one commit in {repo_id}")
            return None
        accuracy = f"{read_record(folder)['test_accuracy']:.2%}"
        commit = upload(
            folder, repo_id, "model", private, revision, f"{repo_id.split('/')[1]}, {accuracy} test accuracy"
        )
        print(f"uploaded: {commit.commit_url}\nload it with revision={commit.oid!r}")
        return commit


def build_model_repo(model_dir: str | Path, repo_id: str, folder: Path) -> None:
    """Fills an empty folder with what the Hub's repository will hold; `model_dir` is only read.

    Raises:
        PublishError: weights that are pickled, a file that is missing, not in a checkout.
        RecordError: no training record, or one of other weights.
        ModelError: the model cannot be loaded.
    """
    model_dir = Path(model_dir)
    if not (HUB_CARD / "model_card.md").is_file():
        raise PublishError("publish: expected a checkout of the project, which holds hub_card/, got an installation")
    if not model_dir.is_dir():
        raise PublishError(f"model: expected a folder, got {model_dir}, which is none")
    if pickles := sorted(path.name for pattern in PICKLES for path in model_dir.glob(pattern)):
        raise PublishError(f"{model_dir}: expected weights as safetensors alone, got {', '.join(pickles)}")
    if missing := [name for name in COPIED if name != RECORD_NAME and not (model_dir / name).is_file()]:
        raise PublishError(f"{model_dir}: expected {', '.join(COPIED)}, got no {', '.join(missing)}")
    record, (model, _) = read_record(model_dir), load_model(str(model_dir))
    _compare(record, {"parameters": model.num_parameters()}, "the model")
    examination, card = read_examination(model_dir), model_card(model_dir, repo_id)
    if examination:
        tolerance = accuracy_tolerance(record["dataset"]["images"]["test"])
        _compare(record, {"test_accuracy": examination.record["test_accuracy"]}, EXAMINATION_NAME, tolerance)

    for name in COPIED + (EXAMINED if examination else ()):
        shutil.copyfile(model_dir / name, folder / name)
    for name in REMOTE_CODE:
        shutil.copyfile(Path(__file__).parents[1] / name, folder / name)
    shutil.copyfile(HUB_CARD.parent / "LICENSE", folder / "LICENSE")  # which that code must carry
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = AUTO_MAP  # save_pretrained names only the class that was saved
    write_json(folder / "config.json", config)
    card.save(folder / CARD_NAME)
    if examination:
        card_picture(model_dir, examination).savefig(folder / PICTURE_NAME, dpi=110)
    write_checksums(folder)


def check_card(folder: Path) -> str:
    """What the Hub reads of the card is there, agrees with the record, and links to files that are there.

    Returns: what was found, in a line.

    Raises:
        PublishError: it is not so.
    """
    card, accuracy = ModelCard.load(folder / CARD_NAME), read_record(folder)["test_accuracy"]
    wanted = ("license", "library_name", "pipeline_tag", "metrics", "eval_results")
    if missing := [name for name in wanted if not card.data.get(name)]:
        raise PublishError(f"card: expected {', '.join(wanted)}, got no {', '.join(missing)}")
    stated = [result.metric_value for result in card.data.eval_results if result.metric_type == "accuracy"]
    if stated != [accuracy]:
        raise PublishError(f"card: expected the record's accuracy {accuracy}, got {stated}")
    if f"{accuracy:.2%}" not in card.text:
        raise PublishError(f"card: expected the record's accuracy, {accuracy:.2%}, in its text, got none")
    if "More Information Needed" in card.content:
        raise PublishError("card: expected every section to be filled, got 'More Information Needed'")
    links = set(LINK.findall(card.text))
    if dead := sorted(link for link in links if not (folder / link).is_file()):
        raise PublishError(f"card: expected links to files of the repository, got {', '.join(dead)}")
    return f"card: {len(card.text.split()):,} words, accuracy {accuracy:.2%}, {len(links)} links to files"


def check_as_stranger(folder: Path) -> str:
    """A process that cannot import this package loads the folder by its remote code and answers alike.

    Returns: what was found, in a line.

    Raises:
        PublishError: it cannot load it, or answers otherwise.
    """
    model, processor = load_model(str(folder))
    size = (4, model.config.num_channels, model.config.image_size, model.config.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = stranger.answer(model, processor, images)
    with tempfile.TemporaryDirectory() as elsewhere:
        given, found = Path(elsewhere, "images.safetensors"), Path(elsewhere, "answer.safetensors")
        save_file({"images": images}, given)
        process = subprocess.run(
            [sys.executable, "-P", stranger.__file__, folder.resolve(), given, found],
            cwd=elsewhere,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(elsewhere, "modules"))},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise PublishError(f"remote code: expected a model that loads without this package, got {reason}")
        theirs = load_file(found)
    apart = {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}
    said = ", ".join(f"{name} differ by at most {value:.1e}" for name, value in apart.items())
    if not all(value <= CLOSE for value in apart.values()):  # NaN is not
        raise PublishError(f"remote code: expected the answers of this package to {CLOSE:g}, got {said}")
    return f"loaded without this package, by trust_remote_code: {said}"


def check_accuracy(folder: Path, dataset_name: str | None) -> str:
    """The test split says what the record says.

    Args:
        dataset_name: a Hub id or a local folder; None for the dataset that the record names, if it can be had.

    Returns: what was found, in a line.

    Raises:
        PublishError: the accuracy is another one.
        DataError: `dataset_name` cannot be used.
    """
    record = read_record(folder)
    model, processor = load_model(str(folder))
    try:
        name = dataset_name or recorded_dataset(record)
        test_set = load_recorded_split(record, "test", name, model.config.image_size)
    except DataError as error:
        if dataset_name:
            raise
        return f"not evaluated again (--dataset_name names the record's dataset): {error}"
    found, source = evaluate(model, processor, test_set), dataset_name or "its dataset"
    smallest = int(test_set.labels.unique(return_counts=True)[1].min())
    _compare(record["dataset"]["images"], {"test": len(test_set)}, source)
    _compare(record, {"test_loss": found.loss}, source, SAME_LOSS)
    _compare(record, {"test_accuracy": found.accuracy}, source, accuracy_tolerance(len(test_set)))
    _compare(record["test_accuracy_per_class"], found.per_class, source, accuracy_tolerance(smallest, 5e-3))
    return f"evaluated again: {found.accuracy:.2%} on {len(test_set):,} test images, as the record says"


def _compare(stated: dict, found: dict[str, float], source: str, tolerance: float = 0) -> None:
    """Raises PublishError unless the record states what was found."""
    for name, value in found.items():
        expected = stated.get(name)
        if not isinstance(expected, int | float) or not abs(expected - value) <= tolerance:
            raise PublishError(f"record: expected its {name} {expected}, got {value} from {source}")


def check_repo_id(repo_id: str, name: str = "repo-id") -> None:
    """Raises PublishError, which calls it `name`, unless it is of the form user/name."""
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("no user before the name")
    except HFValidationError as error:
        raise PublishError(f"{name}: expected user/name, got {repo_id!r}") from error


def check_login() -> None:
    """Raises PublishError without a token."""
    if get_token() is None:
        raise PublishError("push: expected a token of the Hub, got none: `hf auth login` stores one")


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """What the Hub or the network answers inside becomes a PublishError of one line."""
    try:
        yield
    except UserError:
        raise
    except (HfHubHTTPError, HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # large uploads wrap what they met
        reason = one_line(cause or error)
        if isinstance(cause, HfHubHTTPError):  # its own text is many lines for developers
            answer = cause.response
            reason = f"{answer.status_code} {answer.reason_phrase}, {cause.server_message or 'no reason given'}"
        raise PublishError(f"{doing}: {reason}") from error


def upload(folder: Path, repo_id: str, repo_type: str, private: bool, revision: str | None, message: str) -> CommitInfo:
    """The folder as one commit; the repository and the branch are made if they are not there.

    Args:
        private: of a repository that is made.
        revision: a branch; None for main.

    Raises:
        PublishError: the Hub said no, or could not be reached. An earlier revision stays as it was.
    """
    api = HfApi()
    # It warns of a data file in a model's repository; the mistakes are meant to lie beside the weights.
    warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
    with hub_errors(f"push to {repo_id}"):
        space_sdk = "gradio" if repo_type == "space" else None
        # None leaves it to the user's or the organisation's own default.
        api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True, space_sdk=space_sdk)
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise PublishError(f"private: expected a new or a private repository, got {repo_id}, which is public")
        if revision:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        # Not upload_folder, which with Xet splits what the Hub refuses into several commits, deletions first.
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        deleted = []
        for name in api.list_repo_files(repo_id, repo_type=repo_type, revision=revision):
            # What an earlier version left must not be taken for this one's; other files of the owner stay.
            left = name in (*EXAMINED, PICTURE_NAME) or any(fnmatch(name, kind) and "/" not in name for kind in PICKLES)
            if name not in files and name != ".gitattributes" and (left or repo_type == "space"):
                deleted.append(name)
        operations += map(CommitOperationDelete, deleted)
        info = api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type, revision=revision)
    for name in deleted:
        print(f"deleted {name}, which {repo_id} had and this folder has not")
    return info


def describe_files(folder: Path) -> str:
    """A line a file: size and path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "\n".join(f"{path.stat().st_size:>12,} bytes  {path.relative_to(folder)}" for path in files)

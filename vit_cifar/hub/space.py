"""`vit-cifar publish-space`: the page as a Hugging Face Space, with a model pinned to one commit."""

import importlib.metadata
import platform
import shutil
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, SpaceCard, SpaceCardData

from ..models import HUB_CARD, load_model, split_revision
from .card import project
from .folder import new_folder
from .publish import CARD_NAME, PublishError, check_login, check_repo_id, describe_files, hub_errors, upload

PIN_NAME = "model_id.txt"  # app.py reads it
PACKAGED = (".py", ".yaml", ".css", ".png", ".parquet")


def publish_space(
    repo_id: str,
    model_id: str,
    model_revision: str | None = None,
    push: bool = False,
    private: bool = False,
    output: str | Path | None = None,
) -> CommitInfo | None:
    """Builds the Space's repository, and uploads it if `push` says so.

    Args:
        repo_id: of the Space, "user/name".
        model_id: of the model that it shows, on the Hub; at a revision if it says user/name@revision.
        model_revision: branch, tag or commit of the model; None for main. The commit that it is now gets pinned.
        private, output: see `publish.publish`.

    Returns: the commit, or None without `push`.

    Raises:
        PublishError, ModelError, FolderError: nothing was uploaded, or the upload failed.
    """
    check_repo_id(repo_id)
    model_id, in_name = split_revision(model_id)
    check_repo_id(model_id, "model-id")
    model_revision = model_revision or in_name
    if not (HUB_CARD / "space").is_dir():
        raise PublishError(
            "publish-space: expected a checkout of the project, which holds hub_card/ and app.py, got an installation"
        )
    if push:
        check_login()
    with hub_errors(f"model {model_id}"):
        model = HfApi().model_info(model_id, revision=model_revision)
    if model.private or model.gated:
        kind = "private" if model.private else "gated"
        raise PublishError(f"model-id: expected a public model, got {model_id}, which is {kind}: a Space has no token")
    commit = model.sha
    load_model(f"{model_id}@{commit}")  # or the Space would not start
    with new_folder(output) as folder:
        build_space_repo(repo_id, model_id, commit, folder)
        print(f"shows {model_id} at commit {commit}\n{describe_files(folder)}")
        if not push:
            print(f"nothing was uploaded: --push makes this one commit in the Space {repo_id}")
            return None
        pushed = upload(folder, repo_id, "space", private, None, f"the page for {model_id} at {commit[:7]}")
        print(f"uploaded: {pushed.commit_url}")
        return pushed


def build_space_repo(repo_id: str, model_id: str, commit: str, folder: Path) -> None:
    """Fills an empty folder with app.py, a copy of the package, the Space's card, its requirements and the pin.

    Raises:
        PublishError: gradio is not installed.
    """
    package = Path(__file__).parents[1]
    checkout = package.parent
    # The version installed here: a Space names one gradio, not a range.
    try:
        gradio = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError as error:
        raise PublishError('publish-space: expected gradio, got none: pip install "vit-cifar[demo]"') from error
    package_data = project()
    others = [name for name in package_data["optional-dependencies"]["demo"] if not name.startswith("gradio")]
    requirements = [*package_data["dependencies"], *others, f"gradio=={gradio}"]

    shutil.copyfile(checkout / "app.py", folder / "app.py")
    shutil.copyfile(checkout / "LICENSE", folder / "LICENSE")
    for path in sorted(package.rglob("*")):  # what the package is made of
        inside = path.relative_to(checkout)
        if path.suffix in PACKAGED and not any(part.startswith(".") for part in inside.parts):  # an editor's copies
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    data = SpaceCardData(
        title=f"Where {model_id.split('/')[1]} looks",
        sdk="gradio",
        sdk_version=gradio,
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file="app.py",
        license="apache-2.0",
        models=[model_id],
        emoji="🔎",
        colorFrom="green",
        colorTo="blue",
    )
    template = HUB_CARD / "space" / CARD_NAME
    SpaceCard.from_template(data, template_path=template, repo_id=repo_id, model_id=model_id, commit=commit).save(
        folder / CARD_NAME
    )
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
    (folder / PIN_NAME).write_text(f"{model_id}@{commit}\n")

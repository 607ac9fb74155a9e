"""The wheel in an empty environment, used from another folder: nothing of the checkout is at hand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, new_environment, open_when_served, run

from vit_cifar import __version__
from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # torch is downloaded anew
NANO = BUNDLED_MODELS / DEFAULT_MODEL


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the commands of an environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(
        ROOT, folder / "source", ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", "runs", "__pycache__")
    )
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, timeout=600)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"vit_cifar-{__version__}-py3-none-any.whl"
    return new_environment(folder / "environment", f"{wheel}[demo]")


def test_load(installed, tmp_path):
    script = (
        "import sys, vit_cifar; from transformers import AutoModelForImageClassification as Auto; "
        "print(vit_cifar.__version__, vit_cifar.__file__, type(Auto.from_pretrained(sys.argv[1])).__module__)"
    )
    finished = run(installed / "python", "-c", script, NANO, cwd=tmp_path, PYTHONPATH="")
    assert finished.returncode == 0, finished.stderr
    version, file, module = finished.stdout.split()
    assert version == __version__ and module == "vit_cifar.modeling_vit_cifar"
    assert Path(file).is_relative_to(installed.parent) and not Path(file).is_relative_to(ROOT)


def test_predict(installed, tmp_path):
    image = shutil.copy(ROOT / "vit_cifar" / "demo" / "assets" / "examples" / "ship.png", tmp_path)
    finished = run(installed / "vit-cifar", "predict", image, "--model", NANO, "--json", cwd=tmp_path, PYTHONPATH="")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)[0]["predictions"][0]["label"] == "ship"
    without = run(installed / "vit-cifar", "predict", image, cwd=tmp_path, PYTHONPATH="")
    assert without.returncode == 2 and without.stderr.count("\n") == 1
    assert "this installation carries no model" in without.stderr


def test_train_and_open_the_page(installed, tmp_path):
    shutil.copy(ROOT / "train.py", tmp_path)
    trained = run(
        installed / "python", "train.py", "--recipe", "smoke", "--output_dir", "runs/smoke", cwd=tmp_path, PYTHONPATH=""
    )
    assert trained.returncode == 0, trained.stderr
    record = json.loads((tmp_path / "runs" / "smoke" / "training_record.json").read_text())
    assert record["recipe"] == "smoke" and record["git_commit"] is None
    with open_when_served(tmp_path, installed / "vit-cifar", "demo", "--model", "runs/smoke") as page:
        assert page.locator("#answer h2").inner_text() in record["test_accuracy_per_class"]
        assert "Where smoke looks" in page.title()

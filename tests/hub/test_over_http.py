"""From a folder to the Hub and back, over HTTP, by a stand-in for the Hub on this machine."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, run
from loopback_hub import LoopbackHub

from vit_cifar.models import BUNDLED_MODELS, DEFAULT_MODEL
from vit_cifar.training.data import SAMPLE_FOLDER

pytestmark = pytest.mark.slow
NANO = BUNDLED_MODELS / DEFAULT_MODEL
MODEL_ID, SPACE_ID = "your-name/vit-cifar10-nano", "your-name/where-nano-looks"
SHIP = ROOT / "vit_cifar" / "demo" / "assets" / "examples" / "ship.png"


def vit_cifar(hub: LoopbackHub, cache: Path, *words: object, **environment: str):
    """A command in a process of its own, with an empty cache if `cache` is one."""
    return run(sys.executable, "-m", "vit_cifar", *words, **hub.environment(cache) | environment)


def publish(hub: LoopbackHub, cache: Path, *words: object, model_dir: Path = NANO, **environment: str):
    return vit_cifar(hub, cache, "publish", model_dir, "--repo-id", MODEL_ID, "--push", *words, **environment)


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[LoopbackHub]:
    """With nano and a dataset, for tests that only read."""
    with LoopbackHub() as hub:
        files = {path.name: path.read_bytes() for path in NANO.iterdir() if path.is_file()}
        hub.add_repo("model", MODEL_ID, files)
        hub.add_repo(
            "dataset",
            "your-name/sample",
            {
                f"data/{split}-00000-of-00001.parquet": (SAMPLE_FOLDER / f"{split}.parquet").read_bytes()
                for split in ("train", "test")
            },
        )
        yield hub


def one_line(finished, code: int = 2) -> str:
    """What a failed command said."""
    assert finished.returncode == code, finished.stdout + finished.stderr
    assert finished.stderr.count("\n") == 1, finished.stderr
    return finished.stderr

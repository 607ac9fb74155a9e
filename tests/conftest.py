"""What tests share: model folders, one finished smoke training, the real dataset where it is at hand."""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import run, skip_or_fail

from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification
from vit_cifar.training.data import image_processor

if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each; what a test starts inherits it
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two at a time; the slow tests, which load and kill processes, one after the other."""
    return 0 if config.option.markexpr == "slow" else 2


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights: for what does not depend on a trained model."""
    torch.manual_seed(0)
    config = ViTCifarConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    folder = tmp_path_factory.mktemp("tiny")
    ViTCifarForImageClassification(config).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smoke_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train.py --recipe smoke` leaves behind."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    finished = run(sys.executable, "train.py", "--recipe", "smoke", "--output_dir", folder)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="session")
def cifar10() -> str:
    """The real dataset: a local folder named by CIFAR10_DATASET."""
    folder = os.environ.get("CIFAR10_DATASET", "")
    if not Path(folder).is_dir() or not folder:
        skip_or_fail("CIFAR10_DATASET names no folder with the real dataset")
    return folder

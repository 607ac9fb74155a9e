"""Functions that tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def skip_or_fail(reason: str) -> None:
    """A machine may lack the dataset or a browser; CI may not."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """A command from the repository root, without network, with its output as text."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def run_elsewhere(script: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """A Python script as a stranger runs it: in `folder`, offline, with a cache of its own for remote code."""
    return subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
    )

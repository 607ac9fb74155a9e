"""Functions that tests share."""

import io
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from time import monotonic, sleep
from typing import IO
from unittest.mock import patch
from warnings import catch_warnings

import pytest
import torch
from playwright.sync_api import Page, sync_playwright
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 120  # seconds; a test machine may be busy


def skip_or_fail(reason: str) -> None:
    """A machine may lack the dataset or a browser; CI may not."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def copy_to_change(model_folder: Path, target: Path) -> Path:
    """A copy whose files a test may change: without the checksums that would tell."""
    return shutil.copytree(model_folder, target, ignore=shutil.ignore_patterns("SHA256SUMS"))


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """A command from the repository root, without network, with its output as text."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@contextmanager
def kept_settings() -> Iterator[None]:
    """What a command sets for its whole process is afterwards as it was."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    try:
        with catch_warnings():
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # and the Hub's


def run_here(program: str, *words: object) -> subprocess.CompletedProcess:
    """A script of the repository or `vit_cifar …` in this process: each new one spends up to 10 seconds on importing.

    What libraries log or warn of is not in its stderr: where that matters, `run` it.
    """
    command = [program, *map(str, words)]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code = 0
    with kept_settings(), patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    said = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(command, code, *said)


def start(*command: object, errors: IO | int = subprocess.DEVNULL, **environment: str) -> subprocess.Popen:
    """The same, but not waited for, and its output is not kept, but for errors in a file."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=errors,
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


def new_environment(folder: Path, *requirements: str) -> Path:
    """An empty virtual environment with these installed by pip; the folder of its commands."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=300)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *requirements], check=True, timeout=1200)
    return folder / "bin"


@contextmanager
def served(folder: Path, *command: object, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process of a command that serves the page, run in `folder`, and the address that it prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "page.log"
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder), "HF_HUB_OFFLINE": "1"} | environment
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env=os.environ | settings,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = monotonic() + 3 * PATIENCE
        while not (said := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and monotonic() < deadline, log.read_text()
            sleep(0.2)
        yield process, said[0]
    finally:
        process.kill()
        process.wait()


@contextmanager
def open_when_served(folder: Path, *command: object, **environment: str) -> Iterator[Page]:
    """The page that a command serves, in Chromium, with its first answer."""
    if not CHROMIUM.is_file():
        skip_or_fail("no chromium in /usr/bin")
    with served(folder, *command, **environment) as (_, url), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#answer h2", timeout=1000 * PATIENCE)
        yield page
        browser.close()

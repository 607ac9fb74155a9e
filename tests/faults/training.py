"""A training that is killed, runs out of disk, finds its cache half made or read-only."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import run, skip_or_fail, start
from vit_cifar.evaluation.records import weights_sha256
from vit_cifar.integrity import check_checksums, checkpoints, newest_whole_checkpoint
from vit_cifar.models import ModelError, load_model

SMOKE = ("--recipe", "smoke", "--num_train_epochs", "20")
LAST = 200  # its steps; a checkpoint every 5 of them

# train.py in a process that dies by its own hand: SECONDS after training began, or at the EVENT-th time that it opens,
# makes, renames or deletes something of a checkpoint, of which a save does some thirty.
DYING = """
import os, runpy, signal, sys, threading
from transformers import Trainer
kind, number = sys.argv[1], float(sys.argv[2])
sys.argv = ["train.py", *sys.argv[3:]]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
train, seen = Trainer.train, 0
def watch(event, arguments):
    global seen
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree") and "checkpoint-" in str(arguments[0]):
        seen += 1
        if seen == number:
            die()
def begin(*args, **kwargs):
    if kind == "seconds":
        threading.Timer(number, die).start()
    else:
        sys.addaudithook(watch)
    return train(*args, **kwargs)
Trainer.train = begin
runpy.run_path("train.py", run_name="__main__")
"""


def train(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "train.py", *SMOKE, "--output_dir", folder, *arguments, **environment)


def state(folder: Path) -> dict[str, object]:
    """What a training ends with: weights, and of its last checkpoint optimizer, schedule and random state."""
    names = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    last = folder / f"checkpoint-{LAST}"
    check_checksums(folder)
    return {"weights": load_file(folder / "model.safetensors")} | {
        name: torch.load(last / name, weights_only=False) for name in names
    }


def same(first: object, second: object) -> bool:
    """To the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool((first == second).all()) if hasattr(first, "all") else first == second


def kill(times: int = 20, seed: int = 0) -> dict:
    """One training, killed again and again, at least every second time inside a save, ends like one that was not."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        unbroken, killed = Path(scratch, "unbroken"), Path(scratch, "killed")
        assert train(unbroken).returncode == 0
        inside = 0
        for number in range(times):
            kind, moment = ("event", moments.randint(1, 60)) if number % 2 else ("seconds", moments.uniform(0, 0.6))
            resume = ["--resume_from_checkpoint"] if checkpoints(killed) else []
            process = run(sys.executable, "-c", DYING, kind, moment, *SMOKE, "--output_dir", killed, *resume)
            assert process.returncode == -signal.SIGKILL, process.stderr
            inside += bool(newest_whole_checkpoint(killed)[1])
        resumed = train(killed, "--resume_from_checkpoint")
        assert resumed.returncode == 0, resumed.stderr
        assert same(state(unbroken), state(killed))
    assert inside >= times * 7 // 20
    return {"kills": times, "left_a_half_checkpoint": inside, "identical_in_the_end": True}


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `folder`; options as `mount` takes them."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]).returncode:
        skip_or_fail("a small file system can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def full_disk(places: int = 6) -> dict:
    """The disk is full at another place of the second save each time; then there is room again."""
    said, resumed_alike = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        unbroken = Path(scratch, "unbroken")
        assert train(unbroken).returncode == 0
        size = sum(-(-path.stat().st_size // 4096) * 4096 for path in (unbroken / f"checkpoint-{LAST}").iterdir())
        for place in range(places):
            disk = Path(scratch, f"disk_{place}")
            with small_disk(disk, f"size={size + size * (2 * place + 1) // (2 * places)}"):
                folder = disk / "run"
                failed = train(folder)
                line = re.search(
                    r"checkpoint-10: cannot be written: (.*); --resume_from_checkpoint goes on from", failed.stderr
                )
                assert failed.returncode == 2 and line and "Traceback" not in failed.stderr, failed.stderr
                whole, _ = newest_whole_checkpoint(folder)
                assert whole.name == "checkpoint-5"
                load_file(whole / "model.safetensors")
                said.append(line[1])
                subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
                resumed = train(folder, "--resume_from_checkpoint")
                assert resumed.returncode == 0, resumed.stderr
                assert same(state(unbroken), state(folder))
                resumed_alike += 1
        with small_disk(Path(scratch, "last"), f"size={size // 4}") as disk:  # room for a part of the model alone
            failed = train(disk / "run", "--save_strategy", "no")
            assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr
            said.append(re.search(r"train.py: error: (.*)", failed.stderr)[1].replace(str(disk), "."))
            with pytest.raises(ModelError):  # the half model is not taken for a whole one
                load_model(str(disk / "run"))
    return {"places_of_a_save": resumed_alike, "and_of_the_model_folder": 1, "messages": sorted(set(said))}


# What the rows of a dataset are once decoded, as a checksum.
DECODE = """
import hashlib, sys
from vit_cifar.training.data import load_split
dataset = load_split(sys.argv[1], "train")
print(hashlib.sha256(dataset.images.numpy()).hexdigest())
"""


def cache(dataset_name: str, kills: int = 10, seed: int = 0) -> dict:
    """A cache that is half made when its process dies, that two trainings make at once, that cannot be written."""
    moments, command = random.Random(seed), (sys.executable, "-c", DECODE, dataset_name)
    with tempfile.TemporaryDirectory() as scratch:
        whole = run(*command, HF_HOME=f"{scratch}/unbroken")
        assert whole.returncode == 0, whole.stderr
        shutil.rmtree(f"{scratch}/unbroken/vit_cifar")
        began = monotonic()
        assert run(*command, HF_HOME=f"{scratch}/unbroken").stdout == whole.stdout
        seconds = monotonic() - began
        before_the_end = 0
        for _ in range(kills):  # all on one cache, so that each finds what the one before left
            for complete in Path(scratch, "killed", "vit_cifar").glob("*.safetensors"):
                complete.unlink()
            process = start(*command, HF_HOME=f"{scratch}/killed")
            sleep(moments.uniform(0.4, 1) * seconds)
            process.kill()
            before_the_end += process.wait() == -signal.SIGKILL
        again = run(*command, HF_HOME=f"{scratch}/killed")
        assert again.returncode == 0 and again.stdout == whole.stdout, again.stderr

        smoke = [sys.executable, "train.py", "--recipe", "smoke", "--output_dir"]
        both = [start(*smoke, f"{scratch}/{name}", HF_HOME=f"{scratch}/shared") for name in ("first", "second")]
        assert [process.wait() for process in both] == [0, 0]
        with small_disk(Path(scratch, "read_only"), "ro") as home:
            third = run(*smoke, f"{scratch}/third", HF_HOME=str(home))
            assert third.returncode == 0 and "the cache cannot be written" in third.stderr, third.stderr
        weights = {weights_sha256(Path(scratch, name)) for name in ("first", "second", "third")}
        assert len(weights) == 1
    return {"killed_while_decoding": before_the_end, "trained_at_once": 2, "trained_on_a_read_only_cache": 1}

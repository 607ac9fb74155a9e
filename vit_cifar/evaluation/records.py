"""training_record.json: how a model folder came about and what it scores. README and cards take numbers from here."""

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
from pathlib import Path

import psutil
import torch

from ..errors import UserError
from ..integrity import WEIGHTS_NAME, sha256

RECORD_NAME = "training_record.json"


class RecordError(UserError):
    """A record that is not there or belongs to other weights; the message is one line."""


def accuracy_tolerance(images: int, share: float = 1e-3) -> float:
    """How far two accuracies of the same model over so many images may be apart: processors round differently, so that
    some images on the border fall to the other side. Two always may."""
    return max(share, 2.5 / max(images, 1))


def epochs_trained(record: dict) -> float:
    """Epochs that were trained: fewer than `num_train_epochs` where `max_steps` or early stopping ended it before."""
    return record["epochs"][-1]["epoch"] if record["epoch_selected_on"] else record["kept_epoch"]


def weights_sha256(folder: str | Path) -> str:
    return sha256(Path(folder) / WEIGHTS_NAME)


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_record(folder: str | Path) -> dict:
    """The record of a model folder.

    Raises:
        RecordError: there is none, or it belongs to other weights.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise RecordError(f"{folder}: expected a {RECORD_NAME}, got none")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        stated = record["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{path}: expected a record with weights_sha256, got {type(error).__name__}: {error}"
        ) from error
    if (found := weights_sha256(folder)) != stated:
        raise RecordError(
            f"{path}: expected the record of these weights (sha256 {found[:12]}…), "
            f"got that of others ({str(stated)[:12]}…)"
        )
    return record


def versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "transformers", "datasets", "accelerate", "safetensors", "huggingface_hub")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def hardware(device: torch.device) -> dict[str, str | int | float]:
    """Processor, physical cores, processes, threads, memory in GiB and, if `device` is one, the GPU."""
    capabilities = torch.cpu.get_capabilities()
    found = {
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        # By itself: a virtual machine may hide which model its processor is.
        "bf16_units": [name for name in ("amx_bf16", "avx512_bf16", "bf16") if capabilities.get(name)],
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),  # as torchrun and accelerate launch say it
        "threads": torch.get_num_threads(),  # of each process
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if device.type != "cpu":
        found["gpu"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return found


def _processor() -> str:
    """Its name, with family and model where Linux tells: two generations of one name differ by a factor of two."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if {"model name", "cpu family", "model"} <= fields.keys():
        return "{model name}, family {cpu family}, model {model}".format_map(fields)
    return platform.processor() or platform.machine()


def git_commit(file: str | Path) -> str | None:
    """Commit of the checkout that `file` belongs to, "+changes" added if it has any; None if it belongs to none, as an
    installation that lies within another project's checkout."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(Path(file).parent), *arguments], capture_output=True, text=True)

    try:
        tracked = git("ls-files", "--error-unmatch", Path(file).name)
    except FileNotFoundError:  # no git on this machine
        return None
    commit = git("rev-parse", "HEAD")
    if tracked.returncode or commit.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if git("status", "--porcelain", "--untracked-files=no").stdout else "")


def public_name(name: str) -> str:
    """A Hub id or a path within the checkout as it is, a path of one machine by its last part."""
    path = Path(name)
    of_machine = path.is_absolute() or path == Path() or (".." in path.parts and path.exists())
    return path.resolve().name if of_machine else name


def public_command(words: list[str], names: dict[str, str]) -> str:
    """The command as a reader can use it: folders of one machine give way to names.

    Args:
        names: {argument, as in "dataset_name": what to write as its value}.
    """
    words = list(words)
    for i, word in enumerate(words):
        for argument, name in names.items():
            for option in (f"--{argument}", f"--{argument.replace('_', '-')}"):
                if words[i - 1] == option:
                    words[i] = name
                elif word.startswith(f"{option}="):
                    words[i] = f"--{argument}={name}"
    return shlex.join(words)


def epoch_log(log_history: list[dict]) -> list[dict]:
    """Trainer's log -> a row for each epoch: its end and the means of both losses and the validation accuracy."""
    names = {"loss": "training_loss", "eval_loss": "validation_loss", "eval_accuracy": "validation_accuracy"}
    values: dict[int, dict[str, list[tuple[float, int]]]] = {}  # (value, its weight)
    before = 0
    for entry in log_history:
        steps = 1
        if "loss" in entry:  # a mean over the steps since the last one
            steps, before = max(entry["step"] - before, 1), entry["step"]
        epoch = values.setdefault(math.ceil(round(entry["epoch"], 6)), {})  # 0.5 is the middle of the first one
        for key, name in names.items():
            if key in entry:
                epoch.setdefault(name, []).append((entry[key], steps))
    end = round(max((entry["epoch"] for entry in log_history), default=0), 2)  # may be within the last epoch
    return [
        {"epoch": min(epoch, end)}
        | {name: round(statistics.fmean(*zip(*found, strict=True)), 10) for name, found in values[epoch].items()}
        for epoch in sorted(values)
        if values[epoch]
    ]


def plot_losses(record: dict, path: str | Path) -> None:
    """Training and validation loss by epoch, the kept epoch marked."""
    from matplotlib.figure import Figure  # not at import: drawing needs it, loading a model does not

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    smoothing = record["arguments"]["label_smoothing_factor"]
    labels = {
        "training_loss": f"training loss, augmented, label smoothing {smoothing:g}",
        "validation_loss": "validation loss",
    }
    for name in labels:
        points = [(row["epoch"], row[name]) for row in record["epochs"] if name in row]
        axes.plot(*zip(*points, strict=True), marker=".", label=labels[name])
    kept = record["kept_epoch"]
    axes.axvline(kept, color="0.5", linestyle=":", label=f"kept: epoch {kept:g}")
    axes.set(xlabel="epoch", ylabel="cross-entropy (nats)", title=f"{record['recipe']} on {record['dataset']['name']}")
    axes.legend()
    figure.savefig(path, dpi=150)


def time_and_machine(record: dict) -> str:
    """As in "44 min on 2 CPU cores, bf16 autocast"."""
    hardware, minutes = record["hardware"], record["wall_time_seconds"] / 60
    processes = hardware.get("processes", 1)
    used, cores = hardware["threads"] * processes, hardware["cores"]
    machine = (f"{used} of {cores}" if used < cores else f"{cores}") + (" CPU cores" if cores > 1 else " CPU core")
    if "gpu" in hardware:
        machine = f"{processes} × {hardware['gpu']}" if processes > 1 else hardware["gpu"]
    return f"{minutes:.{0 if minutes > 10 else 1}f} min on {machine}, {record['number_format']}"


def fill_tables(page: str, script: str, tables: dict[str, str]) -> str:
    """A Markdown page with its tables made anew.

    Args:
        script: as in the page's comments, <!-- NAME: made by SCRIPT --> and <!-- end of NAME -->.
        tables: {name: Markdown to stand between the two comments}.

    Raises:
        ValueError: the page does not have a table's two comments.
    """
    for name, table in tables.items():
        start, end = f"<!-- {name}: made by {script} -->\n", f"<!-- end of {name} -->"
        page, found = re.subn(f"{start}.*?{end}", lambda _, text=f"{start}{table}\n{end}": text, page, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"page: expected {start.strip()} and {end} once, got them {found} times")
    return page

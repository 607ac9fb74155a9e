"""What of a folder is still as it was written: checksums, and which of a training's checkpoints are whole.

SHA256SUMS has the format of `sha256sum --check`. It finds damage, not forgery: who can change a file can change it too.
"""

import hashlib
import os
from fnmatch import fnmatch
from pathlib import Path

from .errors import UserError

SUMS_NAME = "SHA256SUMS"
LAST_LINE = "# end"  # a comment to sha256sum; without it the list itself is cut
WEIGHTS_NAME, MISTAKES_NAME = "model.safetensors", "mistakes.parquet"
# What programs read of a model folder and, beside that, of a checkpoint. Not the card, which may be edited on the Hub.
MODEL_FILES = ("*.json", "*.py", WEIGHTS_NAME, MISTAKES_NAME)
CHECKPOINT_FILES = ("*.pt", "*.pth", "*.bin")


class DamageError(UserError):
    """Files that are not what was written; the message is one line that names them."""


def write_checksums(folder: str | Path) -> None:
    """SHA256SUMS of the files in a folder that programs read, all of which are on the disk before it is."""
    folder, lines = Path(folder), []
    for path in sorted(folder.glob("[!.]*")):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in MODEL_FILES + CHECKPOINT_FILES):
            lines.append(f"{sha256(path)}  {path.name}")
            with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
    part = folder / f".{SUMS_NAME}.part"
    with part.open("w", newline="\n") as file:
        file.write("\n".join([*lines, LAST_LINE]) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / SUMS_NAME)


def check_checksums(folder: str | Path) -> None:
    """Raises DamageError unless every file in SHA256SUMS, which has to be there, can be read and is what it was."""
    folder = Path(folder)

    def differs(name: str, digest: str) -> bool:
        return not (folder / name).is_file() or sha256(folder / name) != digest

    try:
        *lines, last_line, rest = (folder / SUMS_NAME).read_text().split("\n")
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        whole = last_line == LAST_LINE and not rest
        damaged = [name for name, digest in expected.items() if differs(name, digest)]
    except FileNotFoundError as error:
        raise DamageError(f"{folder}: expected a {SUMS_NAME}, which is written last, got none") from error
    except OSError as error:
        raise DamageError(f"{folder}: expected files that can be read, got {error}") from error
    except ValueError:  # not text, or not of these lines
        whole = False
    if not whole:
        damaged = [SUMS_NAME]
    if damaged:
        raise DamageError(f"{folder}: expected the files that {SUMS_NAME} lists, got others: {', '.join(damaged)}")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(output_dir: str | Path) -> list[Path]:
    """A training's checkpoints, whole or not, newest first."""
    numbered = {path.name.removeprefix("checkpoint-"): path for path in Path(output_dir).glob("checkpoint-*")}
    return [numbered[step] for step in sorted(filter(str.isdigit, numbered), key=int, reverse=True)]


def newest_whole_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[DamageError]]:
    """(The newest checkpoint that is what it was when written, what is wrong with each newer one)."""
    problems = []
    for checkpoint in checkpoints(output_dir):
        try:
            check_checksums(checkpoint)
            return checkpoint, problems
        except DamageError as error:
            problems.append(error)
    return None, problems

"""A folder that a command makes: whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


class FolderError(UserError):
    """A folder that is taken or cannot be written; the message is one line."""


@contextmanager
def new_folder(output: str | Path | None) -> Iterator[Path]:
    """An empty folder to fill, which becomes `output` if nothing goes wrong inside; without `output`, it is gone after.

    Raises:
        FolderError: `output` holds something, or cannot be written.
    """
    if output is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FolderError(f"output: expected a new or an empty folder, got {output}, which is there already")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise FolderError(f"output: expected a folder that can be written, got {output}: {error}") from error
    with scratch:
        part = Path(scratch.name) / output.name
        part.mkdir()
        yield part
        os.replace(part, output)

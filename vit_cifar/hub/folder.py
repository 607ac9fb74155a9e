"""A folder that a command makes: whole or not at all."""

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
    place = Path(output).resolve()  # `.` has no name, and a link is not to be replaced
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise FolderError(f"output: expected a new or an empty folder, got {output}, which is there already")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, or inside a folder that is there, which may be a file system of its own: what is made is moved.
        beside = place if place.exists() else place.parent
        scratch = tempfile.TemporaryDirectory(dir=beside, prefix=f".{place.name}.")
    except OSError as error:
        raise FolderError(f"output: expected a folder that can be written, got {output}: {error}") from error
    with scratch:
        part = Path(scratch.name) / place.name
        part.mkdir()
        yield part
        if not place.exists():
            part.rename(place)
        else:  # an empty folder, in which somebody may be: it stays, and is filled
            for path in part.iterdir():
                path.rename(place / path.name)
